"""Instructions that an emulated program executes, exactly, between any two lines that it prints.

qemu's log (`-d in_asm,exec,nochain,strace`) has every block of instructions when it is first translated, a line whenever a block is
executed, and every system call. A runner prints each event by one write(2) to standard output; so a count stands at each. What printing
itself takes, some thousand instructions, is in it. Logging is slow: two to four seconds for each million blocks.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ticketkit.bench.devices import _work, qemu
from ticketkit.bench.devices._events import Event
from ticketkit.errors import DeviceError

LOG = "instructions.log"
PATIENCE = 3600.0  # seconds for one answer of a program whose every block is logged
SYSTEM_CALL = re.compile(rb"^(\d+) (\w+)\((\d+)?")


class Tally:
    """Reads the emulator's log: `marks` are the instructions executed before each write to standard output of the first process."""

    def __init__(self) -> None:
        self.marks: list[int] = []
        self._sizes: dict[bytes, int] = {}  # first address of a block -> its instructions
        self._total, self._first, self._process = 0, b"", b""
        self._pending: Counter[bytes] = Counter()

    def read(self, lines: Iterable[bytes]) -> None:
        """Take the log to its end."""
        sizes, starting = self._sizes, False
        current = b""
        for line in lines:
            if line.startswith(b"Trace "):
                at = line.find(b"/") + 1
                self._total += sizes.get(line[at : line.find(b"/", at)].lstrip(b"0"), 0)
            elif line.startswith(b"0x"):
                address = line[2 : line.find(b":")].lstrip(b"0")
                if starting:
                    current, starting = address, False
                    sizes[current] = 0
                sizes[current] += 1
            elif line.startswith(b"IN:"):
                starting = True
            elif (call := SYSTEM_CALL.match(line)) is not None:
                self._process = self._process or call[1]
                if call[1] == self._process and call[2] == b"write" and call[3] == b"1":
                    self.marks.append(self._total)


def follow(words: Sequence[str], directory: str, silence: float, take: Callable[[Event, int], None]) -> None:
    """Run a program under the tracing emulator, in a directory that `reserve` of qemu made there; give each event with the instructions
    executed since the one before.

    Raises DeviceError as `_work.follow`, and where log and events do not fit.
    """
    log = Path(directory) / LOG
    os.mkfifo(log, 0o600)
    device = qemu.Qemu("qemu")
    device.options = ("-d", "in_asm,exec,nochain,strace", "-D", LOG)
    tally, events = Tally(), list[Event]()
    # opened for both, so that neither open waits should the emulator never start; the end is then the last writer's, ours
    ours = os.open(log, os.O_RDWR)
    reader = threading.Thread(target=_read, args=(log, tally), daemon=True)
    reader.start()
    try:
        _work.follow(device, words, directory, silence, events.append)
    finally:
        os.close(ours)
        reader.join(30)
        with suppress(OSError):
            log.unlink()
    if len(tally.marks) != len(events):
        raise DeviceError(f"the emulator's log has {len(tally.marks)} lines printed, {len(events)} came; instructions cannot be told")
    for event, before, until in zip(events, [0, *tally.marks], tally.marks, strict=False):
        take(event, until - before)


def _read(log: Path, tally: Tally) -> None:
    with suppress(OSError), log.open("rb", buffering=1 << 20) as lines:
        tally.read(lines)
