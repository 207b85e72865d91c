"""One engine in a process of its own, awake only while it is asked something.

Idle thread pools spin, and a spinning pool slows whoever is being timed. So a worker is suspended (SIGSTOP) whenever it has
answered, and resumed (SIGCONT) for its next turn: nothing of it can run in between, whatever its engine does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from ticketkit.bench.engines import Engine, label
from ticketkit.errors import TicketkitError


class Worker:
    """A child process serving one engine. Use as a context manager: leaving it kills the child, whatever state it is in."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self.name = label(engine)
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (lives as long as the child)
        paths = os.pathsep.join(p for p in sys.path if p)  # the child imports what the parent would
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ticketkit.bench.worker", engine.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
        )
        self._process = psutil.Process(self._child.pid)
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Wake the worker, have it do one command, suspend it again.

        Raises TicketkitError, naming the engine, when the command fails there, the worker has died, or no answer comes within
        `timeout` seconds (the worker is killed then).
        """
        try:
            self._process.resume()
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._child.stdin.flush()
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._child.kill()
            raise TicketkitError(
                f"engine {self.name}: expected an answer to {do!r} within {timeout:g} s, got none and killed it; "
                "allow more with --timeout"
            ) from None
        except (OSError, psutil.NoSuchProcess):
            answer = ""
        if not answer:
            raise TicketkitError(f"engine {self.name}: its process died during {do!r} ({self._epitaph()}); the others go on")
        with suppress(psutil.NoSuchProcess):  # died right after answering: its next turn will say so
            self._suspend()
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            raise TicketkitError(f"engine {self.name}: {reply['error']}")
        return reply

    def _suspend(self) -> None:
        """Suspend the child, and see it suspended: the signal takes effect a moment after it is sent."""
        self._process.suspend()
        deadline = time.monotonic() + 1
        while self._process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._answers.put(line)
        self._answers.put("")  # the pipe is closed: the worker is gone

    def _epitaph(self) -> str:
        """How the child ended: signal or exit code, and the last line it wrote to stderr."""
        code = self._child.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return f"{how}; last words: {lines[-1]}" if lines else how

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._stderr):
            with suppress(BrokenPipeError):  # a command the worker never read
                stream.close()  # type: ignore[union-attr]
