"""Ctrl-C between two steps, not within one: the weights are then whole and can be saved."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; another, a second or more later, interrupts at once.

    Under torchrun one Ctrl-C comes twice, from the terminal and from torchrun. Outside the main thread the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    first = math.inf

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() - first >= 1.0:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
