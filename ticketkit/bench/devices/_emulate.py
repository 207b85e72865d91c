"""Whole models under emulation: are the answers right on 64-bit ARM, and, if asked, with how many instructions. No times."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from ticketkit import __version__
from ticketkit.bench import machine, rows, timing
from ticketkit.bench.devices import _run, _trace
from ticketkit.bench.devices._events import Event
from ticketkit.bench.devices._work import SLACK, workplace
from ticketkit.errors import DeviceError


@dataclass(frozen=True)
class EmulatedRow(rows.Line):
    """One engine on one model under emulation; the fields are those of `rows.Row`, but for times, of which there are none."""

    engine: str
    engine_version: str
    multiplies_zeros: bool
    model: str
    model_sha256: str
    sparsity_prunable: float | None
    sparsity: float
    flops_dense: int
    flops_left: int
    layers: int
    sparse_layers: int
    batch: int
    threads: int
    isa: str
    emulator: str
    instructions: int | None  # of one run, exact but for some thousand of the runner; None where they were not counted
    file_bytes: int
    max_abs_diff: float  # against dense onnxruntime of this machine
    max_abs_output: float
    ticketkit: str
    commit: str
    timestamp: str


@dataclass(frozen=True)
class Report:
    """Rows of the engines that were right, and why the others were not; `interrupted`, `notes`, `stopped` as in `timing.Report`."""

    model: str
    rows: list[EmulatedRow]
    failures: dict[str, str]
    interrupted: bool
    notes: list[str]
    stopped: str | None


def measure(
    target: _run.Target,
    path: Path,
    names: Sequence[str] = _run.ENGINES,
    threads: int = 1,
    batch: int = 1,
    timeout: float = 300.0,
    instructions: bool = False,
    progress: timing.Progress = lambda done, total, what: None,
) -> Report:
    """Run the ONNX file at `path` in every engine under emulation and compare with this machine; count `instructions` if asked to: minutes.

    A count that breaks off leaves the rows of what was compared, with the counts so far. Raises DeviceError where emulator, runner or
    libraries cannot be used, ModelError or DataError where the model cannot.
    """
    started, steps = datetime.now(timezone.utc).isoformat(timespec="seconds"), 0

    def say(what: str) -> None:
        nonlocal steps
        progress(steps, 12 + len(names) * instructions, what)
        steps += 1

    with tempfile.TemporaryDirectory(prefix="ticketkit-device-") as scratch:
        load = _run.prepare(target, path, names, threads, batch, Path(scratch), say)
        differences, counts, notes = dict[str, float](), dict[str, int](), list[str]()
        heard, stopped, interrupted = _run.Heard(names), None, False
        try:
            with workplace(load.device, load.files, say, notes) as directory:
                differences, heard = _run.check(load, directory, threads, timing.Protocol(timeout=timeout), Path(scratch), say)
                for name in differences if instructions else ():
                    say(f"counting the instructions of {name}")
                    counts[name] = _count(load, directory, threads, name)
        except DeviceError as error:
            if not differences:
                raise
            stopped = f"{error}; the rows have the counts before that"
        except KeyboardInterrupt:
            if not differences:
                raise
            interrupted = True
        found = [
            EmulatedRow(
                engine=name,
                engine_version=heard.runtime if name == timing.REFERENCE else __version__,
                **load.subject.facts(name == timing.REFERENCE),
                threads=threads,
                isa="own choice" if name == timing.REFERENCE else heard.isa,
                emulator=load.facts.model,
                instructions=counts.get(name),
                file_bytes=load.models[name].stat().st_size,
                max_abs_diff=difference,
                max_abs_output=float(np.abs(load.expected).max(initial=0)),
                ticketkit=__version__,
                commit=machine.commit(),
                timestamp=started,
            )
            for name, difference in differences.items()
        ]
        return Report(load.subject.path.name, found, heard.failures, interrupted, notes, stopped)


def _count(load: _run.Load, directory: str, threads: int, name: str) -> int:
    """Instructions between the events of the last two rounds: one run."""
    found: list[int] = []

    def take(event: Event, since: int) -> None:
        if event["event"] == "round" and event["round"] == 1:
            found.append(since)

    once = ["--rounds", "2", "--seconds", "0", "--warmup", "0", "--settle", "0", "--least", "1", "--timeout", f"{_trace.PATIENCE:g}"]
    _trace.follow(load.words(directory, threads, [name], *once), directory, _trace.PATIENCE + SLACK, take)
    if len(found) != 1:
        raise DeviceError(f"{name} under emulation: expected two rounds, its instructions cannot be told")
    return found[0]
