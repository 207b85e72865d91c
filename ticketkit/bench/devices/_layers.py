"""Every layer of a model alone on a device, one thread: ours sparse, dense, and XNNPACK's two where `ticketkit-layers` was built with it.

The runner compares every result with one in double precision before it is timed. It needs no onnxruntime, and built static no library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit import __version__
from ticketkit.bench import bundle, machine, rows, timing
from ticketkit.bench.devices import _run, _runner, _trace, open_device, shown
from ticketkit.bench.devices._events import Event
from ticketkit.bench.devices._facts import Facts, ranges
from ticketkit.bench.devices._work import SLACK, File, follow, workplace
from ticketkit.errors import DeviceError, ModelError

ENGINES = ("sparse", "dense", "xnnpack-dense", "xnnpack-sparse")  # what ticketkit-layers knows
DENSE = ("dense", "xnnpack-dense")  # those that multiply zeros


@dataclass(frozen=True)
class LayerRow(rows.Line):
    """One engine on one layer of a model; times are milliseconds for one sample on one thread. Rows of a run share `timestamp`.

    `device` is that of `_run.DeviceRow`. A row of an emulated device has no times at all but `instructions`, of one run, where counted.
    """

    engine: str
    model: str
    model_sha256: str
    layer: str
    op: str  # conv2d, depthwise or gemm
    shape: list[int]  # batch, in_channels, in_h, in_w, out_channels, kernel_h, kernel_w, stride_h, stride_w, groups
    format: str
    weights: int
    nnz: int
    multiply_adds: int  # by weights that are not zero
    multiply_adds_dense: int
    isa: str
    cpu: str
    max_abs_diff: float  # from double precision
    max_abs_output: float
    tolerance: float  # derived, see the runner
    device: dict[str, Any]
    ticketkit: str
    commit: str
    timestamp: str


@dataclass(frozen=True)
class TimedLayerRow(LayerRow):
    """A layer on a real device. `gflops` counts 2 for each multiply-add by a weight that is not zero, at the median."""

    n: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    rounds_p50_ms: list[float]
    gflops: float | None  # None where the median is 0, shorter than a tick of the clock, as are the two below
    baseline: str | None  # the faster dense engine of this layer, by median
    speedup: float | None  # baseline's median / this median


@dataclass(frozen=True)
class EmulatedLayerRow(LayerRow):
    """A layer under emulation."""

    instructions: int | None


@dataclass
class Layer:
    """What was said of one layer."""

    facts: Event
    checked: dict[str, Event] = field(default_factory=dict)
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)


@dataclass
class Heard:
    """What a device has said so far."""

    names: frozenset[str]
    isa: str = ""
    kernel: str = ""
    layers: dict[str, Layer] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    states: dict[str, Event] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Note an event. DeviceError for one that contradicts what was asked, or the events before it."""
        kind, name, engine = event["event"], event.get("layer"), event.get("engine")
        if engine is not None and engine not in ENGINES:
            raise DeviceError(f"the device sent a {kind} of the engine {shown(engine)}; expected {', '.join(ENGINES)}")
        if kind == "layer":
            if name not in self.names or name in self.layers:
                raise DeviceError(f"the device sent the layer {shown(str(name))}; expected each of the bundle once")
            self.layers[name] = Layer(event)
        elif kind == "device":
            self.isa, self.kernel = (shown(event.get(key) or "unknown")[1:-1] for key in ("isa", "kernel"))
        elif kind == "state":
            self.states[event["at"]] = event
        elif kind == "failed":
            self.failures[f"{name} in {engine}"] = f"{shown(str(name))[1:-1]} in {engine}: {shown(event['message'])[1:-1]}"
        elif kind in ("checked", "round"):
            layer = self.layers.get(str(name))
            if layer is None:
                raise DeviceError(f"the device sent a {kind} of the layer {shown(str(name))} before the layer itself")
            if kind == "checked":
                self._check(layer, event)
            else:
                done = layer.times.setdefault(str(engine), [])
                if event["round"] != len(done) or engine not in layer.checked:
                    raise DeviceError(
                        f"the device sent round {event['round']} of {shown(str(name))}; expected {len(done)}, after its check"
                    )
                done.append(event["ms"])

    def _check(self, layer: Layer, event: Event) -> None:
        engine, name = event["engine"], event["layer"]
        if event["ok"] and None not in (event["max_abs_diff"], event["max_abs_output"], event.get("tolerance")):
            layer.checked[engine] = event
        else:
            off, allowed = event["max_abs_diff"], event.get("tolerance")
            self.failures[f"{name} in {engine}"] = (
                f"{shown(name)[1:-1]} in {engine}: expected the result in double precision within {allowed}, got a difference of {off}; "
                "a wrong answer has no speed"
            )


@dataclass(frozen=True)
class Report:
    """What a run measured, layer by layer; `stopped` as in `timing.Report`."""

    model: str
    rows: list[LayerRow]
    failures: dict[str, str]
    interrupted: bool
    notes: list[str]
    stopped: str | None
    emulated: bool


def measure(
    target: _run.Target,
    path: Path,
    names: Sequence[str] = (),
    protocol: timing.Protocol | None = None,
    instructions: bool = False,
    progress: timing.Progress = lambda done, total, what: None,
) -> Report:
    """Time the layers of the ONNX file at `path` on a device, or, emulated, compare them only and count their `instructions` if asked to.

    A run that breaks off gives the rows of the layers that came through. Raises DeviceError where the device or its runner cannot be used,
    ModelError where the model has no layer to time.
    """
    wrong = [name for name in names if name not in ENGINES]
    if wrong:
        raise DeviceError(f"--engine: expected {', '.join(ENGINES)} with --layers, got {shown(wrong[0])}")
    asked, started = protocol or timing.Protocol(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = open_device(target.name)
    if instructions and not device.emulated:
        raise DeviceError(f"--instructions: expected --device qemu, {device.label} is no emulator")
    facts = device.describe()
    cpus = facts.choose(target.cpus)[-1:]  # the one that the thread runs on
    program = _runner.programs(facts.abi, [_runner.LAYERS], target.runner, lambda what: progress(0, 1, what))[_runner.LAYERS]
    with tempfile.TemporaryDirectory(prefix="ticketkit-device-") as scratch:
        file = Path(scratch) / "layers.bundle"
        try:
            known = bundle.write(path, file)
        except ModelError as error:
            raise ModelError(str(error) if str(error).startswith(str(path)) else f"{path.name}: {error}") from None
        heard, stopped, interrupted, left = Heard(frozenset(known)), None, False, list[str]()

        def take(event: Event) -> None:
            heard.take(event)
            if event["event"] == "layer":
                progress(len(heard.layers), len(known), shown(event["layer"], 60)[1:-1])

        try:
            files = [File(program, _runner.LAYERS, True), File(file, file.name)]
            with workplace(device, files, lambda what: progress(0, len(known), what), left) as directory:
                words = [f"{directory}/{_runner.LAYERS}", f"{directory}/{file.name}", *_options(names, cpus)]
                if device.emulated:
                    follow(device, [*words, "--check-only"], directory, asked.timeout + SLACK, take)
                    if instructions:
                        _count(words, directory, heard, progress)
                else:
                    more = ["--rounds", str(asked.rounds), "--seconds", f"{asked.seconds / 10:g}"]
                    follow(device, [*words, *more], directory, asked.timeout + SLACK, take)
        except DeviceError as error:
            if not heard.layers:
                raise
            stopped = f"{error}; the rows are of the layers before that"
        except KeyboardInterrupt:
            if not heard.layers:
                raise
            interrupted = True
    complete = stopped is None and not interrupted
    about = _run.about(facts, device.label, cpus, heard.kernel, heard.states, [], complete)
    digest = sha256(path.read_bytes()).hexdigest()
    found = [
        row for layer in heard.layers.values() for row in _rows(layer, path.name, digest, heard, facts, about, started, device.emulated)
    ]
    notes = _run.notes(facts, device.label, cpus, heard.kernel, heard.states, [])
    return Report(path.name, found, heard.failures, interrupted, notes + left, stopped, device.emulated)


def _count(words: Sequence[str], directory: str, heard: Heard, progress: timing.Progress) -> None:
    """Instructions of one run of every engine that was right, into `heard`: those between two events of the second round."""
    done = 0

    def take(event: Event, since: int) -> None:
        nonlocal done
        if event["event"] == "round" and event["round"] == 1 and (layer := heard.layers.get(event.get("layer", ""))):
            layer.instructions[event["engine"]] = since
            done += 1
            progress(done, len(heard.layers) * 2, f"counted {shown(event['layer'], 60)[1:-1]}")

    once = ["--rounds", "2", "--seconds", "0", "--warmup", "0", "--settle", "0", "--least", "1", "--unchecked"]
    _trace.follow([*words, *once], directory, _trace.PATIENCE, take)


def _options(names: Sequence[str], cpus: Sequence[int]) -> list[str]:
    chosen = ["--engines", ",".join(dict.fromkeys(names))] if names else []
    return [*chosen, *(["--cpu", ranges(cpus)] if cpus else [])]


def _rows(
    layer: Layer, model: str, digest: str, heard: Heard, facts: Facts, about: dict[str, Any], started: str, emulated: bool
) -> list[LayerRow]:
    said, found = layer.facts, list[LayerRow]()
    medians = {name: float(np.median([t for each in times for t in each])) for name, times in layer.times.items()}
    baseline = min((name for name in DENSE if medians.get(name, 0) > 0), key=medians.__getitem__, default=None)
    for engine, check in layer.checked.items():
        shared = {
            "engine": engine,
            "model": model,
            "model_sha256": digest,
            **{key: said[key] for key in ("layer", "op", "shape", "weights", "nnz", "multiply_adds", "multiply_adds_dense")},
            "format": check.get("format") or "",
            "isa": heard.isa if engine in ("sparse", "dense") else "own choice",
            "cpu": facts.model or facts.machine,
            **{key: check[key] for key in ("max_abs_diff", "max_abs_output", "tolerance")},
            "device": {**about, "complete": about["complete"] and f"{said['layer']} in {engine}" not in heard.failures},
            "ticketkit": __version__,
            "commit": machine.commit(),
            "timestamp": started,
        }
        if emulated:
            found.append(EmulatedLayerRow(**shared, instructions=layer.instructions.get(engine)))
        elif engine in layer.times:
            times = layer.times[engine]
            own: dict[str, Any] = {
                "n": sum(map(len, times)),
                **rows.statistics([t for each in times for t in each]),
                "rounds_p50_ms": [round(float(np.median(each)), 6) for each in times],
                "gflops": 2 * said["multiply_adds"] / medians[engine] / 1e6 if medians[engine] > 0 else None,
                "baseline": baseline,
                "speedup": medians[baseline] / medians[engine] if baseline is not None and medians[engine] > 0 else None,
            }
            found.append(TimedLayerRow(**shared, **own))
    return found
