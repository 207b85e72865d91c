"""The programs of kernels/device for the scripts here: found in a build, run, their events read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ticketkit.errors import DataError, KernelError

Event = dict[str, Any]


def find(folder: Path, name: str, preset: str) -> Path:
    """The file of that name in a build's folder; DataError saying how to build it."""
    for path in (folder / name, folder / "device" / name):
        if path.is_file():
            return path
    raise DataError(f"{folder}: no {name} in it; cmake -S kernels --preset {preset} && cmake --build build/{preset}")


def run(words: Sequence[object], seconds: float | None = None) -> list[Event]:
    """What a program says. KernelError where it could not do its work; what single engines or layers failed at is among the events."""
    command = [*map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except OSError as error:
        raise KernelError(f"{command[0]}: cannot be run here: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]}: expected an end within {seconds:g} s, and ended it") from None
    events: list[Event] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for event in events:
        if event["event"] == "error":
            raise KernelError(f"{Path(command[0]).name}: {event['message']}")
    if not events or events[-1]["event"] != "end":
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise KernelError(f"{' '.join(command[:4])} …: cut off: {last[0]}")
    return events


def of(events: Sequence[Event], kind: str, **fields: object) -> list[Event]:
    """The events of a kind with these fields."""
    return [e for e in events if e["event"] == kind and all(e.get(key) == value for key, value in fields.items())]
