"""What a measurement leaves behind: one `Row` per engine, complete enough to be read alone and never a lone speedup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """What rows of every kind of run have in common: each is a dataclass that makes one line of a results file."""

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Row(Line):
    """One engine on one model in one run. All rows of a run share `timestamp`; times are milliseconds per batch."""

    engine: str
    engine_version: str
    multiplies_zeros: bool
    model: str  # file name, for people; the hash is what identifies it
    model_sha256: str
    sparsity_prunable: float | None  # zeros / weights of every convolution but the first, None where there is no such
    sparsity: float  # zeros / all parameters
    flops_dense: int  # per sample, 2 for each multiply-add, convolutions and fully connected layers
    flops_left: int  # the same, multiplications by a stored zero not counted
    layers: int  # convolutions and fully connected layers
    sparse_layers: int  # those of them that this engine runs without their zeros
    batch: int
    threads: int
    isa: str
    cpu: str
    n: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    rounds_p50_ms: list[float]  # median of each alternating round
    baseline: str | None  # the fastest dense engine of the run, by median; None when no dense engine ran
    speedup: float | None  # baseline's median / this median
    speedup_rounds: float | None  # median over the rounds of the same ratio within a round
    peak_rss_bytes: int  # of the whole worker process, Python and the engine's libraries included
    file_bytes: int  # of the file this engine loaded
    load_s: float  # until there is a session; what an engine puts off, such as packing weights, comes with its first run
    max_abs_diff: float  # against dense onnxruntime, on the same input
    max_abs_output: float  # the scale to read max_abs_diff on
    ticketkit: str
    commit: str
    timestamp: str  # UTC, ISO 8601, start of the run


def statistics(times: Sequence[float]) -> dict[str, Any]:
    """n, min, p50, p90, p99, mean and std (sample) of run times in ms, under the names of `Row`."""
    values = np.asarray(times, np.float64)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    found = {"min_ms": values.min(), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": values.mean(), "std_ms": spread}
    return {name: round(float(value), 6) for name, value in found.items()}


def ratios(times: dict[str, list[list[float]]], dense: Sequence[str]) -> tuple[str | None, dict[str, tuple[float, float]]]:
    """(fastest dense engine, {engine: (ratio of medians, median of the rounds' ratios)}), above 1 = faster than that engine.

    `times[engine][round]` are run times; `dense` names the engines that multiply zeros. (None, {}) when none of those was timed. An engine
    whose median is 0, shorter than a tick of the clock, has no ratio and is no baseline.
    """
    medians = {name: float(np.median(np.concatenate(rounds))) for name, rounds in times.items()}
    timed = [name for name in dense if medians.get(name, 0) > 0]
    if not timed:
        return None, {}
    baseline = min(timed, key=medians.__getitem__)
    found = {}
    for name, rounds in times.items():
        together = zip(times[baseline], rounds, strict=False)  # an interrupted run has a round that not all engines finished
        per_round = [np.median(b) / np.median(t) for b, t in together if np.median(t) > 0]
        if medians[name] > 0 and per_round:
            found[name] = (medians[baseline] / medians[name], float(np.median(per_round)))
    return baseline, found
