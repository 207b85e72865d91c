"""The child process of one engine: `python -m ticketkit.bench.worker MODULE`, commanded by JSON lines on its standard input.

    {"do": "load", "path", "threads", "feeds", "names", "outputs"}   load the model, run it once, save what came out
    {"do": "turn", "seconds", "settle", "least"}                      time some runs

Each command is answered by one JSON line, {"error": text} where it failed. `process.Worker` is the other end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from ticketkit.bench.engines import Arrays, Engine
from ticketkit.errors import TicketkitError


def main(module: str) -> None:
    """Serve commands until the parent closes the pipe."""
    if hasattr(os, "setpgid"):
        # A process group of its own: Ctrl-C reaches the parent only, which then ends the run in order. And should the parent be
        # killed while this process is stopped, the kernel wakes the orphaned group with SIGHUP, which ends it (setpgid(2)).
        os.setpgid(0, 0)
    replies = _own_stdout()
    engine = cast(Engine, import_module(module))
    run: Callable[[], Arrays] | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command.pop("do") == "load":
                run, reply = load(engine, **command)
            elif run is None:
                raise TicketkitError("expected a model to be loaded before the first turn")
            else:
                reply = turn(run, **command)
        except TicketkitError as error:
            reply = {"error": str(error)}
        except Exception as error:  # whatever a foreign engine raises must reach the parent as one line
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(reply), file=replies, flush=True)


def load(
    engine: Engine, path: str, threads: int, feeds: str, names: list[str], outputs: str
) -> tuple[Callable[[], Arrays], dict[str, Any]]:
    """Load the model and run it once; its outputs go to the file `outputs` (npz, graph order)."""
    with np.load(feeds) as arrays:
        bound = {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}
    version = engine.version()  # imports the engine's package: that is not the model's load time
    start = time.perf_counter()
    run = engine.load(Path(path), threads, bound)
    seconds = time.perf_counter() - start
    np.savez(outputs, *run())
    return run, {"version": version, "isa": engine.isa(), "load_s": seconds}


def turn(run: Callable[[], Arrays], seconds: float, settle: int, least: int) -> dict[str, Any]:
    """`settle` untimed runs (caches and clocks come back), then timed ones for `seconds`, at least `least` of them."""
    for _ in range(settle):
        run()
    times: list[int] = []
    budget = int(seconds * 1e9)
    gc.collect()
    gc.disable()
    try:
        while len(times) < least or sum(times) < budget:
            start = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - start)
    finally:
        gc.enable()
    return {"ms": [t / 1e6 for t in times], "peak_rss_bytes": _peak_rss()}


def _own_stdout() -> TextIO:
    """The pipe to the parent, out of reach of libraries that print: their standard output becomes standard error."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def _peak_rss() -> int:
    """Peak resident bytes of this process, 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would do, but on Linux it remembers the parent this process was forked from
        return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")), 0)
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1])
