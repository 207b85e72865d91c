"""A report for people: the rows as a table, and under it what the speedup must be read with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ticketkit.bench import timing
from ticketkit.bench.rows import Line, Row
from ticketkit.bench.subject import Subject
from ticketkit.errors import TicketkitError, printable
from ticketkit.planner import Plan

BARS = " ▁▂▃▄▅▆▇█"


def render(report: timing.Report) -> RenderableType:
    """Times and costs of every engine, and beneath them sparsity, FLOPs left, distribution over layers, meaning of the ratio."""
    times = grid("engine", *("min", "p50", "p90", "p99", "mean", "std", "n", "× dense", "by round"))
    costs = grid("engine", "version", "zeros", "max |diff|", "file MB", "load s", "RSS MB")
    for row in report.rows:
        style = None if row.multiplies_zeros else "bold"
        times.add_row(plain(row.engine), *_times(row), style=style)
        costs.add_row(plain(row.engine), plain(row.engine_version), *_costs(row), style=style)
    return Group(plain(_title(report), style="bold"), times, "", costs, "", *map(plain, _notes(report)))


def plain(text: str, style: str = "") -> Text:
    """Text that may be a stranger's: no markup, and no control character reaches the terminal."""
    return Text(printable(text), style=style)


def distribution(plan: Plan) -> str:
    """Sparsity of every layer in execution order, one bar each, and its range."""
    if not plan.choices:
        return "no convolution or fully connected layer"
    shares = [choice.sparsity for choice in plan.choices]
    bars = "".join(BARS[round(share * (len(BARS) - 1))] for share in shares)
    return f"|{bars}| {min(shares):.0%} to {max(shares):.0%}, median {median(shares):.0%} of {len(shares)} layers"


def weights(subject: Subject) -> str:
    """Sparsity and FLOPs left of a network in words."""
    prunable = "" if subject.sparsity_prunable is None else f"{subject.sparsity_prunable:.2%} of the prunable weights and "
    dense, left = subject.plan.flops
    return (
        f"{prunable}{subject.plan.model_sparsity:.2%} of all parameters are zero; "
        f"{_flops(left)} of {_flops(dense)} a sample left ({left / max(dense, 1):.1%})"
    )


@contextmanager
def progress(what: str) -> Iterator[timing.Progress]:
    """A progress line on stderr for `timing.measure`, gone when done."""
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, now: bar.update(task, completed=done, total=total, description=now)


def check_writable(json_to: str | None) -> None:
    """Open the rows' file for appending, so that OSError comes before the measurement and not after it."""
    if json_to and json_to != "-":
        open(json_to, "a").close()


def conclude(report: timing.Report, json_to: str | None, unusable: dict[str, str], required: Collection[str]) -> None:
    """Write the rows as JSON lines to stdout ("-": the table moves to stderr) or to the end of a file, and print the table.

    Then raise what went wrong: KeyboardInterrupt after a Ctrl-C, TicketkitError if a `required` engine failed or nothing at all
    was measured. Failures of other engines, and the `unusable` ones with their reasons, are printed only.
    """
    optional = {name: why for name, why in report.failures.items() if name not in required}
    publish(lambda: render(report), report.rows, json_to, unusable | optional)
    if report.interrupted:
        raise KeyboardInterrupt
    fatal = ([report.stopped] if report.stopped else []) + [why for name, why in report.failures.items() if name in required]
    if fatal or not report.rows:
        raise TicketkitError("; ".join(fatal) or "no engine was timed; `ticketkit doctor` tells which work here and why")


def publish(what: Callable[[], RenderableType], rows: Sequence[Line], json_to: str | None, not_used: dict[str, str]) -> None:
    """Write the rows as `conclude` says, then print the table that `what` makes, and what was not used and why."""
    lines = "".join(row.to_json() + "\n" for row in rows)
    if json_to == "-":
        sys.stdout.write(lines)
        sys.stdout.flush()
    elif json_to:
        with open(json_to, "a", encoding="utf-8") as file:
            file.write(lines)
    console = Console(stderr=json_to == "-")
    console.print(what())
    for name, why in not_used.items():
        console.print(printable(f"not used: {name}: {why}"), highlight=False, markup=False)


def _title(report: timing.Report) -> str:
    row = report.rows[0] if report.rows else None
    if row is None:
        return f"{report.subject.path.name}: nothing was measured"
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    isas = ", ".join(f"{r.engine} on {r.isa}" for r in report.rows if not r.multiplies_zeros)
    return f"{row.model}: batch {row.batch}, {threads}, milliseconds per batch, {row.cpu}{isas and f' ({isas})'}"


def grid(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        words = heading in {"engine", "zeros", "version"}
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    return table


def _times(row: Row) -> list[str]:
    known = row.speedup is not None and row.speedup_rounds is not None
    ratios = [f"{row.speedup:.2f}", f"{row.speedup_rounds:.2f}"] if known else ["-", "-"]
    times = [milliseconds(ms) for ms in (row.min_ms, row.p50_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.std_ms)]
    return [*times, str(row.n), *ratios]


def _costs(row: Row) -> list[str]:
    sizes = [f"{row.file_bytes / 1e6:.3g}", f"{row.load_s:.2f}", f"{row.peak_rss_bytes / 1e6:.0f}"]
    return ["multiplied" if row.multiplies_zeros else "skipped", f"{row.max_abs_diff:.1e}", *sizes]


def _shares(found: Sequence[Row]) -> Iterator[str]:
    """What the sparse engines need of the file, memory and load time of dense onnxruntime, or of the baseline where that was not timed."""
    dense = {row.engine: row for row in found if row.multiplies_zeros}
    reference = dense.get(timing.REFERENCE) or next((dense[row.baseline] for row in found if row.baseline), None)
    if reference is None:
        return
    for row in found:
        if not row.multiplies_zeros:
            file, load = row.file_bytes / reference.file_bytes, row.load_s / max(reference.load_s, 1e-9)
            memory = f"{row.peak_rss_bytes / reference.peak_rss_bytes:.2f} of the memory, " if reference.peak_rss_bytes else ""
            yield f"{row.engine} against {reference.engine}: {file:.2f} of the file, {memory}{load:.2f} of the load time"


def milliseconds(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _flops(count: int) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M")) if count >= size), (1e3, "k"))
    return f"{count / size:.3g} {unit}FLOP"


def _notes(report: timing.Report) -> list[str]:
    notes = [weights(report.subject), f"sparsity by layer {distribution(report.subject.plan)}"]
    baseline = next((row.baseline for row in report.rows), None)
    for row in report.rows:
        if not row.multiplies_zeros:
            notes.append(f"{row.engine} runs {row.sparse_layers} of {row.layers} layers sparse, the others dense")
    notes += _shares(report.rows)
    if baseline:
        notes.append(f"× dense: p50 of {baseline}, the fastest dense engine here, over this p50; by round: their median")
    if report.rows:
        notes.append(f"max |diff|: against dense onnxruntime, whose largest output is {report.rows[0].max_abs_output:.3g}")
    notes += report.notes
    if report.interrupted or report.stopped:
        notes.append("interrupted: fewer rounds than asked for" if report.interrupted else "broken off: fewer rounds than asked for")
    return notes
