"""Programs that reach a device: called with lists of words (no local shell), bounded in time and in what they may send."""

from __future__ import annotations

import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from ticketkit.bench.devices import shown
from ticketkit.errors import DeviceError

ANSWER = 1 << 20  # bytes: what a short question may be answered with
LINE = 1 << 22  # bytes of one line of a run: the longest is a turn of `_events.MOST_RUNS` times, of at most 16 bytes each
NOISE = 1 << 26  # bytes of a run between two lines that make sense
PIECE = 1 << 16


@dataclass(frozen=True)
class Done:
    """How a client ended: exit code (negative: the signal), what came on standard output as text, and the last words of standard error."""

    code: int
    out: str
    words: str


def call(words: Sequence[str], seconds: float, source: Path | None = None, sink: IO[bytes] | None = None, limit: int = ANSWER) -> Done:
    """Run a client to its end.

    Args:
        words: program and arguments.
        seconds: it is killed after.
        source: a file for its standard input; none: empty.
        sink: takes its standard output; none: the answer's text does.
        limit: bytes of standard output.

    Raises DeviceError when it cannot be started, takes too long or sends more than `limit`.
    """
    took, killed, kept = 0, threading.Event(), sink or BytesIO()
    with tempfile.TemporaryFile() as errors, open(source or os.devnull, "rb") as stdin:
        child = _start(words, stdin, errors)

        def stop() -> None:
            killed.set()
            child.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert child.stdout is not None
            while piece := child.stdout.read1(PIECE):  # type: ignore[attr-defined]
                took += len(piece)
                if took > limit:
                    raise DeviceError(f"{Path(words[0]).name}: expected at most {limit:,} bytes, the device sent more; it was not believed")
                kept.write(piece)
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()  # type: ignore[union-attr]
        if killed.is_set():
            raise DeviceError(f"{Path(words[0]).name}: expected an end within {seconds:g} s, got none and stopped it; is the device alive?")
        return Done(code, kept.getvalue().decode(errors="replace") if isinstance(kept, BytesIO) else "", last_words(errors))


class Stream:
    """A client in progress and the lines it sends; a context manager, which ends it.

    Closing its standard input asks the other end to stop (see `_shell.py`); it is killed when it does not.
    """

    def __init__(self, words: Sequence[str], silence: float) -> None:
        """Start it. `silence`: seconds without a line that makes sense (`alive`) after which it counts as dead."""
        self.silence = silence
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the client)
        self._child = _start(words, subprocess.PIPE, self._errors)
        self._lines: queue.Queue[bytes | None] = queue.Queue(maxsize=16)
        self._closed = threading.Event()
        self._heard, self._noise = time.monotonic(), 0
        threading.Thread(target=self._listen, daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        """Lines without their ends. DeviceError when none came within `silence`, or too much came that made no sense."""
        while True:
            left = self._heard + self.silence - time.monotonic()
            try:
                line = self._lines.get(timeout=max(left, 0.001))
            except queue.Empty:
                raise DeviceError(f"the device was silent for {self.silence:g} s and counts as dead; allow more with --timeout") from None
            if line is None:
                return
            self._noise += len(line)
            if len(line) >= LINE or self._noise > NOISE or time.monotonic() > self._heard + self.silence:
                raise DeviceError(
                    f"the device sent {self._noise:,} bytes that are no events, such as {shown(line[:80].decode(errors='replace'))}"
                )
            yield line.decode(errors="replace").rstrip("\r\n")

    def alive(self) -> None:
        """A line that made sense has come: the silence that is allowed counts from now."""
        self._heard, self._noise = time.monotonic(), 0

    def fate(self) -> str | None:
        """Once the lines have ended: None for exit code 0, else how the client ended and its last words, in one line."""
        try:
            code = self._child.wait(10)
        except subprocess.TimeoutExpired:
            return "its output ended, but the client did not"
        if code == 0:
            return None
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        said = last_words(self._errors)
        return f"{how}; last words: {said}" if said else how

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        assert self._child.stdin is not None and self._child.stdout is not None
        with suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._errors.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        with suppress(ValueError, OSError), self._child.stdout as pipe:
            while line := pipe.readline(LINE):
                if not self._put(line):
                    break  # and the pipe is closed, which a client that still talks notices
        self._put(None)

    def _put(self, line: bytes | None) -> bool:
        """Hand a line over; False when nobody listens any more."""
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._lines.put(line, timeout=0.2)
                return True
        return False


def last_words(errors: IO[bytes]) -> str:
    """The last line that is not empty of what a client wrote to standard error, fit to be printed; "" for none."""
    end = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, end - 4096))
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return shown(lines[-1])[1:-1] if lines else ""


def _start(words: Sequence[str], stdin: IO[bytes] | int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    try:  # in a session of its own: Ctrl-C reaches us only, and we end the run in order
        return subprocess.Popen(list(words), stdin=stdin, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    except (OSError, ValueError) as error:
        raise DeviceError(f"{shown(words[0])} cannot be started: {error}") from None
