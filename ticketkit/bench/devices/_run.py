"""Whole models on a device: pushed with runner and libraries, checked, timed in alternating rounds, and cleaned up after.

The protocol is that of `timing.py`, kept by `ticketkit-network` on the device. Outputs come back once, from a run that times nothing, and
are held against dense onnxruntime's on this machine before anything is timed: a wrong answer has no speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper

from ticketkit import __version__
from ticketkit.bench import engines, machine, rows, timing
from ticketkit.bench.devices import Device, _runner, open_device, shown
from ticketkit.bench.devices._events import Event
from ticketkit.bench.devices._facts import Facts, ranges
from ticketkit.bench.devices._work import SLACK, File, follow, workplace
from ticketkit.bench.subject import Subject
from ticketkit.errors import DataError, DeviceError, ModelError, first_line
from ticketkit.exporters import export
from ticketkit.lower import operators, read

ENGINES = (timing.REFERENCE, "ticketkit")  # what ticketkit-network knows
THROTTLED = 0.9  # of the clock, or of the speed, that a run began with


@dataclass(frozen=True)
class Target:
    """Which device, and how it is used.

    Attributes:
        name: as `--device` has it.
        cpus: as `--cpus` has it; None: the fastest cluster where there are several (see `Facts.choose`), else no pinning.
        runner: folder with built runners; None: found or built.
        onnxruntime: the device's libonnxruntime; None: found or fetched.
    """

    name: str
    cpus: str | None = None
    runner: Path | None = None
    onnxruntime: Path | None = None


@dataclass(frozen=True)
class DeviceRow(rows.Row):
    """A row of a device: that of `bench`, and where it was measured.

    `device` has kind, model, abi, kernel; clusters (name, cpus, max_khz, core); cpus, the processors used ([]: not pinned);
    temperatures (degrees Celsius by zone) and khz (by processor) before and after; throttled; complete (False: the run, or this engine's
    part of it, was cut off).
    `cpu` is the device's, `commit` that of this machine's ticketkit.
    """

    device: dict[str, Any]


@dataclass
class Heard:
    """What a device has said so far."""

    names: Sequence[str]
    runtime: str = ""
    isa: str = ""
    kernel: str = ""
    loaded: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    states: dict[str, Event] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Note an event. DeviceError for one that contradicts what was asked, or the events before it."""
        kind, name = event["event"], event.get("engine")
        if name is not None and name not in self.names:
            raise DeviceError(f"the device sent a {kind} of the engine {shown(name)}; expected {' or '.join(self.names)}")
        if kind == "device":
            self.runtime, self.isa, self.kernel = (shown(event.get(key) or "unknown")[1:-1] for key in ("runtime", "isa", "kernel"))
        elif kind == "state":
            self.states[event["at"]] = event
        elif kind == "failed":
            self.failures[event["engine"]] = f"engine {name}: {shown(event['message'])[1:-1]}"
        elif kind == "loaded":
            self.loaded[event["engine"]] = event["load_s"]
        elif kind == "finished":
            self.rss[event["engine"]] = event["peak_rss_bytes"]
        elif kind == "round":
            done = self.times.setdefault(event["engine"], [])
            if event["round"] != len(done):
                raise DeviceError(f"the device sent round {event['round']} of {name}; expected {len(done)}")
            done.append(event["ms"])


@dataclass(frozen=True)
class Load:
    """Everything that one model needs on a device, made ready here.

    Attributes:
        device, facts, cpus: where it is to run.
        subject: the model.
        names: of the engines.
        files: all that is pushed; those of the engines are in `models`, by engine.
        expected: outputs of dense onnxruntime here, one behind the other.
        shape: of the one input.
    """

    device: Device
    facts: Facts
    cpus: tuple[int, ...]
    subject: Subject
    names: Sequence[str]
    files: list[File]
    models: dict[str, Path]
    expected: np.ndarray
    shape: tuple[int, ...]

    def words(self, directory: str, threads: int, names: Sequence[str], *more: str) -> list[str]:
        """The command line of `ticketkit-network` in a directory of the device."""
        chosen = [word for name in names for word in ("--engine", f"{name}={directory}/{name}.onnx")]
        bound = ["--cpus", ranges(self.cpus)] if self.cpus else []
        words = [f"{directory}/{_runner.NETWORK}", "--library", f"{directory}/libonnxruntime.so", *chosen, *bound]
        words += ["--operators", f"{directory}/{_runner.OPERATORS}", "--input", f"{directory}/input.f32"]
        return [*words, "--threads", str(threads), "--shape", ",".join(map(str, self.shape)), *more]


def measure(
    target: Target,
    path: Path,
    names: Sequence[str] = ENGINES,
    threads: int = 1,
    batch: int = 1,
    protocol: timing.Protocol | None = None,
    progress: timing.Progress = lambda done, total, what: None,
) -> timing.Report:
    """Time the ONNX file at `path` on a device, dense and sparse, float32, random normal input of `batch` samples.

    A run that breaks off (dead device, killed runner, Ctrl-C) gives rows of the rounds that came through, and `Report.stopped` says why.
    Raises DeviceError where the device, its runner or its libraries cannot be used, ModelError or DataError where the model cannot.
    """
    asked = protocol or timing.Protocol()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    steps = 0

    def say(what: str) -> None:
        nonlocal steps
        progress(steps, 12 + len(names) * asked.rounds, what)
        steps += 1

    with tempfile.TemporaryDirectory(prefix="ticketkit-device-") as scratch:
        load = prepare(target, path, names, threads, batch, Path(scratch), say)
        if load.device.emulated:
            raise DeviceError(f"{load.device.label}: an emulator has no times; `_emulate.measure` is for that")
        heard, stopped, interrupted = Heard(names), None, False
        differences, left = dict[str, float](), list[str]()
        try:
            with workplace(load.device, load.files, say, left) as directory:
                differences, checked = check(load, directory, threads, asked, Path(scratch), say)
                heard = Heard([name for name in names if name in differences], failures=checked.failures)
                if heard.names:
                    words = load.words(directory, threads, heard.names, *_times(asked))

                    def take(event: Event) -> None:
                        heard.take(event)
                        if event["event"] in ("round", "loaded"):
                            say(f"{event['engine']}: {'loaded' if event['event'] == 'loaded' else 'round ' + str(event['round'] + 1)}")

                    follow(load.device, words, directory, asked.timeout + SLACK + asked.seconds + asked.warmup, take)
        except DeviceError as error:
            if not heard.times:
                raise
            stopped = f"{error}; the rows are of the rounds before that"
        except KeyboardInterrupt:
            if not heard.times:
                raise
            interrupted = True
        complete = stopped is None and not interrupted
        whole = {name: complete and name not in heard.failures for name in heard.times}
        found = [_row(load, heard, name, differences[name], threads, started, whole[name]) for name in heard.times]
        said = notes(load.facts, load.device.label, load.cpus, heard.kernel, heard.states, slowing(heard.times))
        return timing.Report(load.subject, _with_ratios(found, heard), heard.failures, interrupted, said + left, stopped)


def prepare(target: Target, path: Path, names: Sequence[str], threads: int, batch: int, scratch: Path, say: Any) -> Load:
    """Look at the device, find or build what it needs, and make the model's files ready in the folder `scratch`."""
    wrong = [name for name in names if name not in ENGINES]
    if wrong:
        raise DeviceError(f"--engine: expected {' or '.join(ENGINES)} on a device, got {shown(wrong[0])}")
    device = open_device(target.name)
    say("looking at the device")
    facts = device.describe()
    cpus = facts.choose(target.cpus, threads)
    programs = _runner.programs(facts.abi, (_runner.NETWORK, _runner.OPERATORS), target.runner, say)
    library = _runner.onnxruntime(facts.abi, target.onnxruntime, say)
    say("reading the model")
    subject = Subject.open(path, batch, scratch)
    feeds = _feeds(subject)
    (x,) = feeds.values()
    dense = engines.get(timing.REFERENCE).load(subject.plain, 1, feeds)()
    if any(y.dtype != np.float32 for y in dense):
        raise ModelError(f"{path.name}: expected float32 outputs on a device, got {', '.join(sorted({str(y.dtype) for y in dense}))}")
    expected = np.concatenate([y.reshape(-1) for y in dense])
    if not np.isfinite(expected).all():
        raise DataError(f"{path.name}: expected finite outputs, got NaN or infinity from dense onnxruntime")
    (scratch / "input.f32").write_bytes(np.ascontiguousarray(x).tobytes())
    models = {name: _model(subject, name, scratch, say) for name in names}
    files = [
        *(File(program, name, name == _runner.NETWORK) for name, program in programs.items()),
        File(library, "libonnxruntime.so"),
        File(scratch / "input.f32", "input.f32"),
        *(File(model, f"{name}.onnx") for name, model in models.items()),
    ]
    return Load(device, facts, cpus, subject, names, files, models, expected, x.shape)


def check(load: Load, directory: str, threads: int, protocol: timing.Protocol, scratch: Path, say: Any) -> tuple[dict[str, float], Heard]:
    """Run every engine once, fetch its outputs, compare; ({engine: largest difference}, what was heard, failures included)."""
    say("checking the outputs")
    heard = Heard(load.names)
    words = load.words(
        directory, threads, load.names, "--check-only", "--outputs", f"{directory}/out", "--timeout", f"{protocol.timeout:g}"
    )
    try:
        follow(load.device, words, directory, protocol.timeout + SLACK, heard.take)
    except DeviceError:
        if not heard.failures:  # an engine's own failure says more
            raise
    scale, differences = float(np.abs(load.expected).max(initial=0)), {}
    for name in load.names:
        if name in heard.failures:
            continue
        here = scratch / f"{name}.f32"
        load.device.pull(f"{directory}/out/{name}.f32", here, load.expected.nbytes)
        got = np.frombuffer(here.read_bytes()[: here.stat().st_size // 4 * 4], "<f4")
        off = float(np.abs(got.astype(np.float64) - load.expected).max(initial=0)) if got.shape == load.expected.shape else np.inf
        if off <= timing.AGREE * scale:
            differences[name] = off
        else:  # NaN too
            heard.failures[name] = (
                f"engine {name}: expected {load.expected.size} outputs within {timing.AGREE * scale:.3g} of onnxruntime's here, "
                f"got {got.size} with max |difference| {off:.3g}; a wrong answer has no speed"
            )
    return differences, heard


def about(
    facts: Facts, label: str, cpus: Sequence[int], kernel: str, states: Mapping[str, Event], slower: Sequence[str], complete: bool
) -> dict[str, Any]:
    """The field `device` of a row; `slower` says which engines slowed down."""
    return {
        "kind": label.partition(":")[0],
        "model": facts.model,
        "abi": facts.abi,
        "kernel": kernel or facts.release,
        "clusters": [{"name": c.name, "cpus": list(c.cpus), "max_khz": c.max_khz, "core": c.core} for c in facts.clusters],
        "cpus": list(cpus),
        "temperatures": {at: celsius(state) for at, state in states.items()},
        "khz": {at: state["khz"] for at, state in states.items()},
        "throttled": bool([*slower, *falling_clocks(cpus, states)]),
        "complete": complete,
    }


def celsius(state: Event) -> dict[str, float]:
    """Temperatures of a state by zone, zones that no sensor fills left out."""
    found = {shown(zone, 60)[1:-1]: value / 1000 for zone, value in state["temperatures"].items()}
    return {zone: value for zone, value in found.items() if -50 < value < 200}


def falling_clocks(cpus: Sequence[int], states: Mapping[str, Event]) -> list[str]:
    """The used processors whose clock fell by more than a tenth in the run."""
    if not {"before", "after"} <= set(states):
        return []
    before, after = (_clocks(cpus, states[at]) for at in ("before", "after"))
    fell = [cpu for cpu in sorted(set(before) & set(after)) if after[cpu] < THROTTLED * before[cpu]]
    return [f"cpu {cpu} fell from {before[cpu] / 1e6:.2f} to {after[cpu] / 1e6:.2f} GHz" for cpu in fell]


def slowing(times: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """The engines whose last third of rounds took longer than the first, by more than a tenth."""
    found = []
    for name, rounds in times.items():
        medians = [float(np.median(each)) for each in rounds]
        third = len(medians) // 3
        if third and np.median(medians[:third]) < THROTTLED * np.median(medians[-third:]):
            found.append(f"{name} slowed down from {np.median(medians[:third]):.3g} to {np.median(medians[-third:]):.3g} ms")
    return found


def notes(facts: Facts, label: str, cpus: Sequence[int], kernel: str, states: Mapping[str, Event], slower: Sequence[str]) -> list[str]:
    """The device in words, for under the table."""
    found = [f"device {label}: {facts.model or facts.machine}, {facts.abi}, {kernel or facts.release}"]
    found += [f"cluster {cluster}" for cluster in facts.clusters if len(facts.clusters) > 1]
    if facts.cpus:
        found.append(f"pinned to cpu {ranges(cpus)}" if cpus else "not pinned to processors")
    for at in ("before", "after"):
        if at in states:
            warm, used = celsius(states[at]), _clocks(cpus, states[at]).values()
            parts = [f"hottest zone {max(warm.values()):.0f} °C ({max(warm, key=warm.__getitem__)})"] if warm else []
            parts += [f"clock {min(used) / 1e6:.2f} to {max(used) / 1e6:.2f} GHz"] if used else []
            found.append(f"{at}: {', '.join(parts) or 'no temperatures or clocks told'}")
    return found + [f"warning: throttled? {what}" for what in (*falling_clocks(cpus, states), *slower)]


def _clocks(cpus: Sequence[int], state: Event) -> dict[int, float]:
    """kHz by processor, of those used."""
    known = {int(cpu): khz for cpu, khz in state["khz"].items() if cpu.isascii() and cpu.isdigit() and len(cpu) < 5}
    return {cpu: khz for cpu, khz in known.items() if cpu in cpus or not cpus}


def _times(protocol: timing.Protocol) -> list[str]:
    times = {"rounds": protocol.rounds, "seconds": protocol.seconds, "warmup": protocol.warmup, "timeout": protocol.timeout}
    counts = {"settle": protocol.settle, "least": protocol.least}
    return [word for name, value in (times | counts).items() for word in (f"--{name}", f"{value:g}")]


def _feeds(subject: Subject) -> dict[str, np.ndarray]:
    with np.load(subject.feeds_file) as arrays:
        feeds = {name: arrays[f"arr_{i}"] for i, name in enumerate(subject.inputs)}
    if len(feeds) != 1 or next(iter(feeds.values())).dtype != np.float32:
        kinds = ", ".join(f"{name} ({x.dtype})" for name, x in feeds.items())
        raise ModelError(f"{subject.path.name}: expected one float32 input on a device, got {kinds}")
    return feeds


def _model(subject: Subject, name: str, scratch: Path, say: Any) -> Path:
    """The file an engine loads there: as it is here, or exported where it is a plain one and sparse layers gain; one file in any case."""
    if name == timing.REFERENCE or not subject.sparse_layers:
        source = subject.plain
    elif list(operators.nodes(read(subject.path))):
        source = subject.path
    else:
        say("exporting the model")
        source = scratch / "exported.onnx"
        export(subject.path, source, check=False)
    model = onnx.load(str(source), load_external_data=False)
    if not any(external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
        return source
    to = scratch / f"{name}.onnx"
    try:
        onnx.save(read(source), str(to))
    except ValueError as error:  # protobuf's limit
        raise ModelError(f"{subject.path.name}: expected a model below 2 GB for a device: {first_line(error)}") from None
    return to


def _row(load: Load, heard: Heard, name: str, difference: float, threads: int, started: str, complete: bool) -> DeviceRow:
    times, dense = heard.times[name], name == timing.REFERENCE
    return DeviceRow(
        engine=name,
        engine_version=heard.runtime if dense else __version__,
        **load.subject.facts(dense),
        threads=threads,
        isa="own choice" if dense else heard.isa,
        cpu=load.facts.model or load.facts.machine,
        n=sum(map(len, times)),
        **rows.statistics([t for each in times for t in each]),
        rounds_p50_ms=[round(float(np.median(each)), 6) for each in times],
        baseline=None,
        speedup=None,
        speedup_rounds=None,
        peak_rss_bytes=heard.rss.get(name, 0),
        file_bytes=load.models[name].stat().st_size,
        load_s=heard.loaded.get(name, 0.0),
        max_abs_diff=difference,
        max_abs_output=float(np.abs(load.expected).max(initial=0)),
        ticketkit=__version__,
        commit=machine.commit(),
        timestamp=started,
        device=about(load.facts, load.device.label, load.cpus, heard.kernel, heard.states, slowing(heard.times), complete),
    )


def _with_ratios(found: Sequence[DeviceRow], heard: Heard) -> list[rows.Row]:
    baseline, ratios = rows.ratios(heard.times, [row.engine for row in found if row.multiplies_zeros])
    told = {row.engine: ratios.get(row.engine, (None, None)) for row in found}
    return [replace(row, baseline=baseline, speedup=told[row.engine][0], speedup_rounds=told[row.engine][1]) for row in found]
