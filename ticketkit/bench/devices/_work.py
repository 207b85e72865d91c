"""A directory on the device for one run, the files pushed there, and a runner's events followed to the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketkit.bench.devices import Device, _events, shown
from ticketkit.errors import DeviceError

MARGIN = 8 << 20  # bytes beside the files: outputs, and what the system needs
SLACK = 30.0  # seconds: the runner gives an engine up first, and says so


@dataclass(frozen=True)
class File:
    """A file for the device: where it is here, its name there, and whether it is a program."""

    path: Path
    name: str
    executable: bool = False


@contextmanager
def workplace(device: Device, files: Sequence[File], say: Callable[[str], None], notes: list[str]) -> Iterator[str]:
    """A directory on the device with these files in it, removed afterwards; where it cannot be, the error or else a note names it.

    Raises DeviceError before anything is copied when the device says that it has too little room.
    """
    with _orderly_end():
        directory = device.reserve()
        with _removed(device, directory, notes):
            needed, free = sum(file.path.stat().st_size for file in files) + MARGIN, device.free_bytes(directory)
            if free is not None and free < needed:
                raise DeviceError(
                    f"{device.label}: expected {needed:,} bytes free in {directory.rpartition('/')[0]}, there are {free:,}; "
                    "free some there, or set TMPDIR there"
                )
            for file in files:
                say(f"copying {file.name}")
                device.push(file.path, f"{directory}/{file.name}", file.executable)
            yield directory


def follow(
    device: Device,
    words: Sequence[str],
    directory: str,
    silence: float,
    take: Callable[[_events.Event], None],
) -> None:
    """Run a program there and hand its events over until it has ended.

    Raises DeviceError when it did not end in order: an error of its own, a broken connection, a silence, an event nobody can believe.
    """
    over, code, error, fate = False, None, None, None
    with device.run(words, directory, silence) as lines:
        for line in lines:
            event = _events.parse(line)
            if event is None:
                continue
            lines.alive()
            if event["event"] == "exit":
                code = event["code"]
                break
            if event["event"] == "error":
                error = shown(event["message"])[1:-1]
            over = over or event["event"] == "end"
            take(event)
        if not over:
            fate = lines.fate()
    if error:
        raise DeviceError(f"{device.label}: {error}")
    if not over:
        killed = f"signal {code - 128}" if code is not None and code > 128 else None
        why = "; ".join(filter(None, (killed, fate))) or "it ended without a word"
        raise DeviceError(f"{device.label}: the run was cut off: {why}")


@contextmanager
def _removed(device: Device, directory: str, notes: list[str]) -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        if why := _remains(device, directory):
            raise DeviceError(f"{error}; {why}") from None
        raise
    except BaseException as error:
        if why := _remains(device, directory):
            notes.append(why)
            if isinstance(error, KeyboardInterrupt):  # where nothing was measured yet, nobody reads the notes
                raise KeyboardInterrupt(why) from None
        raise
    if why := _remains(device, directory):  # what was measured is none the worse for it
        notes.append(why)


def _remains(device: Device, directory: str) -> str | None:
    """Remove the directory; None, or that it may still be there: a run's watcher removes it too, once the connection has ended."""
    try:
        device.remove(directory)
    except DeviceError as error:
        return f"{directory} may be left on the device: {error}"
    except KeyboardInterrupt:
        return f"{directory} may be left on the device: interrupted while removing it"
    return None


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run like Ctrl-C, so that the device is cleaned up."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in ends if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # nohup ignores SIGHUP, and so do we
    before = {number: signal.signal(number, interrupt) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
