"""The protocol: engines take turns within one run, each in a process of its own that is suspended while the others work.

1. Every engine loads the model in a fresh process and runs it once; that output must agree with dense onnxruntime's.
2. Every engine is warmed up.
3. Rounds alternate: 1, 2, 3 then 3, 2, 1 and so on, so that a drift of the machine (clock, neighbours) meets all of them alike.
   In its turn an engine runs a few times untimed (its caches are cold), then for a fixed time with every single run on record.
4. Ratios are taken against the *fastest* dense engine of the same run, from the medians and, beside that, round by round.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit import __version__
from ticketkit.bench import engines, machine, rows
from ticketkit.bench.engines import Engine
from ticketkit.bench.process import Worker
from ticketkit.bench.subject import Subject
from ticketkit.errors import DataError, TicketkitError

# float32 engines add in different orders, so they differ; half of the digits of a float32 is more than that can explain
AGREE = math.sqrt(np.finfo(np.float32).eps)
REFERENCE = "onnxruntime"
MOST, LONGEST = 100_000, 1_000_000  # rounds or runs; seconds

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what happens now)


@dataclass(frozen=True)
class Protocol:
    """How long and how often. Seconds are per engine; `timeout` is for one answer (loading, or one turn)."""

    rounds: int = 10
    seconds: float = 0.5  # timed, per round
    warmup: float = 1.0
    settle: int = 2  # untimed runs at the start of each turn
    least: int = 3  # timed runs per turn, however slow the engine
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if not (1 <= self.rounds <= MOST and 1 <= self.least <= MOST and 0 <= self.settle <= MOST):
            raise DataError(f"bench: expected 1 to {MOST:,} rounds and runs, got {self}")
        if not all(0 <= seconds <= LONGEST for seconds in (self.seconds, self.warmup, self.timeout)):  # NaN too
            raise DataError(f"bench: expected no negative times and at most {LONGEST:,} s, got {self}")


@dataclass(frozen=True)
class Report:
    """What a run measured: rows of the engines that finished, and why the others did not."""

    subject: Subject
    rows: list[rows.Row]
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False  # Ctrl-C: fewer rounds than asked for
    notes: list[str] = field(default_factory=list)  # more to be read with the table, such as what a device says of itself
    stopped: str | None = None  # why the run broke off after some rounds


def measure(
    path: Path,
    chosen: Sequence[Engine],
    threads: int = 1,
    batch: int = 1,
    protocol: Protocol | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Time `chosen` engines on the ONNX file at `path`, float32, random normal input of `batch` samples.

    An engine that cannot load the model, answers differently, crashes or hangs ends up in `Report.failures`, and the others go
    on. Ctrl-C during the rounds ends them; what was measured is reported. Raises ModelError or DataError when the file itself
    cannot be benched.
    """
    with tempfile.TemporaryDirectory(prefix="ticketkit-bench-") as scratch, ExitStack() as stack:
        subject = Subject.open(path, batch, Path(scratch))
        run = _Run(subject, threads, protocol or Protocol(), progress, stack)
        run.load(chosen)
        run.take_turns()
        return run.report()


@dataclass
class _Contender:
    """An engine in the run: its worker, what it said when it loaded, and its times, round by round."""

    engine: Engine
    worker: Worker
    loaded: dict[str, Any]
    max_abs_diff: float
    peak_rss_bytes: int = 0
    times: list[list[float]] = field(default_factory=list)


class _Run:
    """One call of `measure` in progress."""

    def __init__(self, subject: Subject, threads: int, protocol: Protocol, progress: Progress, stack: ExitStack) -> None:
        self.subject, self.threads, self.protocol, self.progress, self.stack = subject, threads, protocol, progress, stack
        self.contenders: dict[str, _Contender] = {}
        self.failures: dict[str, str] = {}
        self.interrupted = False
        self.done, self.total = 0, 0
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def load(self, chosen: Sequence[Engine]) -> None:
        """Start a worker per engine, the reference first: everybody's output is held against its."""
        asked = REFERENCE in map(engines.label, chosen)
        self.total = len(chosen) * (2 + self.protocol.rounds) + (not asked)
        with ExitStack() as passing:  # a reference nobody asked to time leaves again
            reference = engines.get(REFERENCE)
            self._step(f"{REFERENCE}: reference output")
            worker = (self.stack if asked else passing).enter_context(Worker(reference, self.threads))
            loaded, self.expected = self._start(worker, reference)
            self.scale = max((float(np.abs(y).max(initial=0)) for y in self.expected), default=0.0)
            if not np.isfinite(self.scale):
                raise DataError(f"{self.subject.path.name}: expected finite outputs, got NaN or infinity from dense onnxruntime")
            if asked:
                self.contenders[REFERENCE] = _Contender(reference, worker, loaded, 0.0)
        for engine in chosen:
            name = engines.label(engine)
            if name != REFERENCE:
                self._step(f"{name}: load")
                self._try(name, lambda engine=engine: self._join(engine))  # type: ignore[misc]

    def take_turns(self) -> None:
        """Warm up, then the alternating rounds. Ctrl-C ends them early."""
        try:
            for name in list(self.contenders):
                self._step(f"{name}: warm-up")
                self._try(name, lambda name=name: self._turn(name, self.protocol.warmup))  # type: ignore[misc]
            for i in range(self.protocol.rounds):
                for name in list(self.contenders) if i % 2 == 0 else list(self.contenders)[::-1]:
                    self._step(f"round {i + 1}/{self.protocol.rounds}: {name}")
                    self._try(name, lambda name=name: self._record(name))  # type: ignore[misc]
        except KeyboardInterrupt:
            self.interrupted = True

    def report(self) -> Report:
        """The rows of every engine that was timed at least once."""
        timed = {name: c for name, c in self.contenders.items() if c.times}
        dense = [name for name, c in timed.items() if c.engine.MULTIPLIES_ZEROS]
        baseline, ratios = rows.ratios({name: c.times for name, c in timed.items()}, dense)
        found = [self._row(c, baseline, *ratios.get(name, (None, None))) for name, c in timed.items()]
        return Report(self.subject, found, self.failures, self.interrupted)

    def _join(self, engine: Engine) -> None:
        worker = self.stack.enter_context(Worker(engine, self.threads))
        loaded, outputs = self._start(worker, engine)
        if [y.shape for y in outputs] != [y.shape for y in self.expected]:
            shapes = [[list(y.shape) for y in outputs], [list(y.shape) for y in self.expected]]
            raise TicketkitError(f"engine {worker.name}: expected outputs of shape {shapes[1]} as onnxruntime's, got {shapes[0]}")
        pairs = [(y.astype(np.float64), e.astype(np.float64)) for y, e in zip(outputs, self.expected, strict=True)]  # also of booleans
        difference = max((float(np.abs(y - e).max(initial=0)) for y, e in pairs), default=0.0)
        if not difference <= AGREE * self.scale:  # "not <=": NaN must fail too
            raise TicketkitError(
                f"engine {worker.name}: expected onnxruntime's output within {AGREE * self.scale:.3g}, "
                f"got max |difference| {difference:.3g}; a wrong answer has no speed"
            )
        self.contenders[worker.name] = _Contender(engine, worker, loaded, difference)

    def _start(self, worker: Worker, engine: Engine) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Have the worker load the model; (what it says of itself, its outputs)."""
        outputs = self.subject.scratch / f"{worker.name}.npz"
        loaded = worker.ask(
            "load",
            self.protocol.timeout,
            path=str(self.subject.file_for(engine)),
            threads=self.threads,
            feeds=str(self.subject.feeds_file),
            names=self.subject.inputs,
            outputs=str(outputs),
        )
        with np.load(outputs) as arrays:
            return loaded, [arrays[f"arr_{i}"] for i in range(len(arrays.files))]

    def _record(self, name: str) -> None:
        self.contenders[name].times.append(self._turn(name, self.protocol.seconds))

    def _turn(self, name: str, seconds: float) -> list[float]:
        contender, p = self.contenders[name], self.protocol
        reply = contender.worker.ask("turn", p.timeout + seconds, seconds=seconds, settle=p.settle, least=p.least)
        contender.peak_rss_bytes = reply["peak_rss_bytes"]
        return list(reply["ms"])

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        """An engine's failure is its own: note it, drop the engine, let the others go on."""
        try:
            action()
        except TicketkitError as error:
            self.failures[name] = str(error)
            self.contenders.pop(name, None)

    def _step(self, what: str) -> None:
        self.progress(self.done, self.total, what)
        self.done += 1

    def _row(self, c: _Contender, baseline: str | None, speedup: float | None, speedup_rounds: float | None) -> rows.Row:
        return rows.Row(
            engine=c.worker.name,
            engine_version=c.loaded["version"],
            **self.subject.facts(c.engine.MULTIPLIES_ZEROS),
            threads=self.threads,
            isa=c.loaded["isa"],
            cpu=machine.cpu_name(),
            n=sum(map(len, c.times)),
            **rows.statistics([t for times in c.times for t in times]),
            rounds_p50_ms=[round(float(np.median(times)), 6) for times in c.times],
            baseline=baseline,
            speedup=speedup,
            speedup_rounds=speedup_rounds,
            peak_rss_bytes=c.peak_rss_bytes,
            file_bytes=self.subject.file_for(c.engine).stat().st_size,
            load_s=c.loaded["load_s"],
            max_abs_diff=c.max_abs_diff,
            max_abs_output=self.scale,
            ticketkit=__version__,
            commit=machine.commit(),
            timestamp=self.started,
        )
