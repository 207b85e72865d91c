"""Where `bench --device` measures. The registry is the list of files in this folder: `--device x:REST` is `devices/x.py` opened with REST.

A device file is a module with the names of `Kind`; `open` gives a `Device`. Files with a leading underscore are what all kinds share:

    _client.py    one call of a client (ssh, adb, sh), bounded in time and size, and the stream of a run's lines
    _shell.py     a device behind a client that runs a line of POSIX shell there
    _facts.py     processors of a device, its clusters, and which of them `--cpus` means
    _events.py    what the runners say, one JSON object a line, believed only after it was checked
    _runner.py    the runners for a device's ABI, found or built, and the onnxruntime library for it
    _work.py      a fresh directory there with all files in it, a program that runs in it, and its removal
    _run.py       whole models: check, then time in alternating rounds
    _layers.py    the same, layer by layer
    _emulate.py   whole models under emulation, which has no times
    _trace.py     instructions of an emulated run
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol, cast

from ticketkit.errors import DeviceError, printable

if TYPE_CHECKING:
    from ticketkit.bench.devices._facts import Facts


class Lines(Protocol):
    """A program that runs on the device: its lines as they come, until it ends or is no longer believed to be alive."""

    def __iter__(self) -> Iterator[str]:
        """Lines of its standard output, without their ends. DeviceError when none came for long, or too many did."""

    def alive(self) -> None:
        """A line that made sense has come: the silence that is allowed counts from now."""

    def fate(self) -> str | None:
        """Once the lines have ended: None for exit code 0, else how it ended and its last words on standard error, in one line."""


class Device(Protocol):
    """One machine to measure on. Everything of a run lies in one directory of ours there. All methods raise DeviceError."""

    label: str  # as the user wrote it, such as ssh:pi@board
    emulated: bool  # True: its times mean nothing

    def describe(self) -> Facts:
        """Architecture, system and processors."""

    def reserve(self) -> str:
        """Make a fresh directory that only this user may read; its absolute path there."""

    def free_bytes(self, directory: str) -> int | None:
        """Bytes free where the directory lies, None where the device does not tell."""

    def push(self, file: Path, to: str, executable: bool = False) -> None:
        """Copy a file to the absolute path `to` on the device."""

    def run(self, words: Sequence[str], directory: str, silence: float) -> AbstractContextManager[Lines]:
        """Start a program in `directory`; leaving the context ends it and whatever it started. `silence` in seconds."""

    def pull(self, path: str, to: Path, limit: int) -> None:
        """Copy a file of at most `limit` bytes from the device."""

    def remove(self, directory: str) -> None:
        """Remove what `reserve` made, with all that is in it. A directory that is gone already is no error."""


class Kind(Protocol):
    """What a file of this folder offers."""

    USAGE: str  # how --device spells it
    CLIENT: str  # the program it is driven by, "" for none

    def available(self) -> tuple[bool, str]:
        """(usable here?, why not). Looks for the client, not for devices."""

    def open(self, rest: str) -> Device:
        """The device that the text after the colon names ("" without one). DeviceError for text that names none; talks to nobody."""


def names() -> list[str]:
    """Kinds of devices, sorted."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Kind:
    """The kind of that name; DeviceError for an unknown one."""
    if name not in names():
        raise DeviceError(f"--device: expected {' or '.join(get(known).USAGE for known in names())}, got {shown(name)}")
    return cast(Kind, import_module(f"{__name__}.{name}"))


def open_device(text: str) -> Device:
    """The device that `--device` names; DeviceError for a name that is none, or a client that is missing here."""
    name, _, rest = text.partition(":")
    kind = get(name)
    device = kind.open(rest)
    works, why = kind.available()
    if not works:
        raise DeviceError(f"--device {name}: {why}")
    return device


def shown(text: str, limit: int = 200) -> str:
    """Foreign text, fit to be printed: on one line, shortened, without control characters."""
    clean = printable(" ".join(text.split()))
    return repr(clean if len(clean) <= limit else clean[:limit] + "…")
