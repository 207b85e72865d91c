"""`bench --device`: one call that measures on a device and prints, whatever kind of device and measurement it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import nan
from pathlib import Path

from rich.console import Group, RenderableType

from ticketkit.bench import table, timing
from ticketkit.bench.devices import _emulate, _layers, _run, open_device
from ticketkit.errors import DeviceError, TicketkitError

Target = _run.Target
SIMULATED = "emulated: no times; instructions are not speed"


def bench(
    target: Target,
    path: Path,
    names: Sequence[str] = (),
    threads: int = 1,
    batch: int = 1,
    protocol: timing.Protocol | None = None,
    json_to: str | None = None,
    layers: bool = False,
    instructions: bool = False,
) -> None:
    """Measure the ONNX file at `path` on a device and print the table; rows go where `json_to` says (see `table.conclude`).

    Args:
        target: the device.
        names: engines; none: all that run there.
        threads, batch: of whole models; layers run on one thread, one sample each.
        protocol: how long and often.
        layers: measure each layer alone.
        instructions: count them, on an emulated device.

    Raises DeviceError, ModelError or DataError where nothing could be measured, and, once the rows so far are printed, TicketkitError where
    the run broke off or an engine failed; KeyboardInterrupt after a Ctrl-C.
    """
    emulated, asked = open_device(target.name).emulated, protocol or timing.Protocol()
    chosen = tuple(dict.fromkeys(names))
    if layers and (threads, batch) != (1, 1):
        raise DeviceError(f"--layers: expected one thread and one sample, got {threads} and {batch}")
    if instructions and not emulated:
        raise DeviceError(f"--instructions: expected --device qemu, {target.name} is no emulator")
    with table.progress(f"bench on {target.name}") as progress:
        if layers:
            by_layer = _layers.measure(target, path, chosen, asked, instructions, progress)
        elif emulated:
            emulation = _emulate.measure(target, path, chosen or _run.ENGINES, threads, batch, asked.timeout, instructions, progress)
        else:
            report = _run.measure(target, path, chosen or _run.ENGINES, threads, batch, asked, progress)
    if layers:
        table.publish(lambda: _layers_table(by_layer), by_layer.rows, json_to, {})
        _raise(by_layer.failures, by_layer.stopped, by_layer.interrupted, bool(by_layer.rows))
    elif emulated:
        table.publish(lambda: _emulated_table(emulation), emulation.rows, json_to, {})
        _raise(emulation.failures, emulation.stopped, emulation.interrupted, bool(emulation.rows))
    else:
        table.conclude(report, json_to, {}, required=chosen or _run.ENGINES)


def _raise(failures: dict[str, str], stopped: str | None, interrupted: bool, any_rows: bool) -> None:
    """What is left to be said once the rows are printed."""
    if interrupted:
        raise KeyboardInterrupt
    wrong = ([stopped] if stopped else []) + list(failures.values())
    if len(wrong) > 3:
        wrong = [*wrong[:3], f"and {len(wrong) - 3} more"]
    if wrong or not any_rows:
        raise TicketkitError("; ".join(wrong) or "nothing was measured")


def _emulated_table(report: _emulate.Report) -> RenderableType:
    grid = table.grid("engine", "version", "zeros", "max |diff|", "file MB", "instructions", "× fewer")
    dense = next((row.instructions for row in report.rows if row.multiplies_zeros), None)
    for row in report.rows:
        fewer = f"{dense / row.instructions:.2f}" if dense and row.instructions else "-"
        count = f"{row.instructions:,}" if row.instructions else "-"
        zeros = "multiplied" if row.multiplies_zeros else "skipped"
        costs = (f"{row.max_abs_diff:.1e}", f"{row.file_bytes / 1e6:.3g}", count, fewer)
        grid.add_row(table.plain(row.engine), table.plain(row.engine_version), zeros, *costs)
    notes = [SIMULATED]
    if report.rows:
        row = report.rows[0]
        isas = ", ".join(f"{row.engine} on {row.isa}" for row in report.rows if not row.multiplies_zeros)
        notes += [f"max |diff|: against dense onnxruntime on this machine, whose largest output is {row.max_abs_output:.3g}", isas]
        if dense is None:
            notes.append("--instructions counts them, which takes minutes")
    if report.interrupted or report.stopped:
        notes.append("interrupted: not all counts" if report.interrupted else "broken off: not all counts")
    notes += report.notes
    return Group(table.plain(f"{report.model}: 64-bit ARM under emulation", "bold"), grid, "", *map(table.plain, filter(None, notes)))


def _layers_table(report: _layers.Report) -> RenderableType:
    found: dict[str, dict[str, _layers.LayerRow]] = defaultdict(dict)
    for row in report.rows:
        found[row.layer][row.engine] = row
    engines = [name for name in _layers.ENGINES if any(name in by_engine for by_engine in found.values())]
    grid = table.grid("layer", "shape", "zeros", "format", *(name.replace("-", "\n") for name in engines), "× dense")
    grid.columns[0].justify = grid.columns[1].justify = grid.columns[3].justify = "left"
    grid.columns[0].no_wrap = grid.columns[1].no_wrap = False  # on a narrow terminal these give way, not the times
    totals = dict.fromkeys(engines, 0.0)
    for name, by_engine in found.items():
        any_row = next(iter(by_engine.values()))
        cells, values = [], {}
        for engine in engines:
            value = values[engine] = _value(by_engine.get(engine))
            cells.append(_cell(value, report.emulated))
            if "sparse" in by_engine:  # without one of them, NaN: there is no sum
                totals[engine] += value if value > 0 else nan
        dense = min((values[engine] for engine in _layers.DENSE if values.get(engine, nan) > 0), default=nan)
        ours = values.get("sparse", nan)
        sparse = by_engine.get("sparse")
        zeros = f"{1 - any_row.nnz / max(any_row.weights, 1):.0%}"
        ratio = f"{dense / ours:.2f}" if dense > 0 and ours > 0 else "-"
        grid.add_row(table.plain(name[-40:]), _shape(any_row), zeros, table.plain(sparse.format[:20] if sparse else "dense"), *cells, ratio)
    if totals.get("sparse", nan) > 0:
        best = min((totals[engine] for engine in _layers.DENSE if totals.get(engine, nan) > 0), default=nan)
        ratio = f"{best / totals['sparse']:.2f}" if best > 0 else "-"
        grid.add_row("all sparse layers", "", "", "", *(_cell(totals[engine], report.emulated) for engine in engines), ratio)
    timed = "medians in ms; × dense: the faster dense engine of that layer over sparse"
    notes = [f"instructions of one run; {SIMULATED}" if report.emulated else timed]
    if not any(name.startswith("xnnpack") for name in engines):
        notes.append("dense is a plain product of the runner's own, built to run anywhere: no baseline to quote")
    notes.append("shape: channels x height x width -> channels, kernel / stride; every result agreed with double precision")
    if report.interrupted or report.stopped:
        notes.append("interrupted: not all layers" if report.interrupted else "broken off: not all layers")
    return Group(table.plain(f"{report.model}: layer by layer, one thread", "bold"), grid, "", *map(table.plain, notes + report.notes))


def _value(row: _layers.LayerRow | None) -> float:
    if isinstance(row, _layers.TimedLayerRow):
        return row.p50_ms
    return float(row.instructions) if isinstance(row, _layers.EmulatedLayerRow) and row.instructions is not None else nan


def _cell(value: float, emulated: bool) -> str:
    if not value > 0:
        return "-"
    return f"{value / 1e6:.4g} M" if emulated else table.milliseconds(value)


def _shape(row: _layers.LayerRow) -> str:
    batch, channels, height, width, out, kernel_h, kernel_w, stride_h, _, groups = row.shape
    if row.op == "gemm":
        return f"{batch} x {channels} -> {out}"
    grouped = " depthwise" if groups > 1 else ""
    return f"{channels}x{height}x{width} -> {out}, {kernel_h}x{kernel_w}/{stride_h}{grouped}"
