"""A search in a process of its own that says when it is at a moment to be killed. The tests kill it."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from small import few_digits

from ticketkit import tasks
from ticketkit.search.find import find


def search(signal: Connection, write: int, within: bool, options: dict[str, Any]) -> None:
    """Run `find` on a few digits and signal at its `write`-th file.

    Args:
        signal: sent one byte.
        write: number of the file, counted from 1.
        within: signal before the file, all written under another name, gets its own, and wait there for the end; otherwise
            signal afterwards and go on.
        options: of find.
    """
    count, rename = 0, os.replace

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == write and within:
            signal.send_bytes(b"!")
            time.sleep(600)
        rename(source, target)
        if count == write:
            signal.send_bytes(b"!")

    os.replace = counted  # type: ignore[assignment]
    torch.set_num_threads(1)
    tasks.tasks()["digits"] = few_digits()
    find("digits", **options)
