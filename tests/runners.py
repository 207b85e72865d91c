"""The programs of kernels/device, as built beside the library under test, and what they say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import ticketkit

RUNTIME = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
Events = list[dict[str, Any]]


def runner(name: str) -> Path:
    """That program of $TICKETKIT_RUNNER, else of the installed package or of the build that $TICKETKIT_LIBRARY is of; a skip where
    there is none: not on this system, or left out of the build."""
    beside = Path(ticketkit.get_library_path()).parent
    for folder in (os.environ.get("TICKETKIT_RUNNER"), beside, beside / "device"):
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.skip(f"no {name} was built beside {beside}")


def say(*words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=60, **settings)


def events(text: str, kind: str | None = None) -> Events:
    """The lines of a program's standard output, of one kind if given."""
    found: Events = [json.loads(line) for line in text.splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a program that must have ended with one clear error."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done
    last = events(done.stdout)[-1]
    assert last["event"] == "error" and done.stderr == f"error: {last['message']}\n"
    return str(last["message"])
