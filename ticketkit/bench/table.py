"""A report for people: the rows as a table, and under it what the speedup must be read with."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ticketkit.bench import timing
from ticketkit.bench.rows import Row
from ticketkit.bench.subject import Subject
from ticketkit.errors import TicketkitError
from ticketkit.planner import Plan

BARS = " ▁▂▃▄▅▆▇█"


def render(report: timing.Report) -> RenderableType:
    """The table of a report, with sparsity, FLOPs left, the distribution over layers and the meaning of the ratio beneath."""
    table = Table(title=Text(_title(report)), title_justify="left", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    table.add_column("zeros")
    for heading in ("min", "p50", "p90", "p99", "mean ± std", "n", "× dense", "max |diff|", "file MB", "load s", "RSS MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(row), style="bold" if not row.multiplies_zeros else None)
    return Group(table, *map(Text, _notes(report)))


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
        f"{left / 1e9:.3g} of {dense / 1e9:.3g} GFLOP a sample left ({left / max(dense, 1):.1%})"
    )


@contextmanager
def progress(what: str) -> Iterator[timing.Progress]:
    """A progress line on stderr for `timing.measure`, gone when done."""
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, now: bar.update(task, completed=done, total=total, description=now)


def check_writable(json_to: str | None) -> None:
    """Open the rows' file for appending, so that OSError comes before the measurement and not after it."""
    if json_to and json_to != "-":
        open(json_to, "a").close()


def conclude(report: timing.Report, json_to: str | None, unusable: dict[str, str], required: Collection[str]) -> None:
    """Print the table, and the rows as JSON lines to stdout ("-": the table moves to stderr) or to the end of a file.

    Then raise what went wrong: KeyboardInterrupt after a Ctrl-C, TicketkitError if a `required` engine failed or nothing at all
    was measured. Failures of other engines, and the `unusable` ones with their reasons, are printed only.
    """
    console = Console(stderr=json_to == "-")
    console.print(render(report))
    optional = {name: why for name, why in report.failures.items() if name not in required}
    for name, why in (unusable | optional).items():
        console.print(f"not used: {name}: {why}", highlight=False, markup=False)
    lines = "".join(row.to_json() + "\n" for row in report.rows)
    if json_to == "-":
        sys.stdout.write(lines)
    elif json_to:
        with open(json_to, "a", encoding="utf-8") as file:
            file.write(lines)
    if report.interrupted:
        raise KeyboardInterrupt
    fatal = [why for name, why in report.failures.items() if name in required]
    if fatal or not report.rows:
        raise TicketkitError("; ".join(fatal) or "no engine was timed; `ticketkit doctor` tells which work here and why")


def _title(report: timing.Report) -> str:
    row = report.rows[0] if report.rows else None
    if row is None:
        return f"{report.subject.path.name}: nothing was measured"
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    return f"{row.model}: batch {row.batch}, {threads}, milliseconds per batch, {row.cpu}"


def _cells(row: Row) -> list[str]:
    ratio = "-" if row.speedup is None or row.speedup_rounds is None else f"{row.speedup:.2f} ({row.speedup_rounds:.2f})"
    times = [f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in (row.min_ms, row.p50_ms, row.p90_ms, row.p99_ms)]
    return [
        f"{row.engine} {row.engine_version}",
        "multiplied" if row.multiplies_zeros else f"skipped ({row.isa})",
        *times,
        f"{row.mean_ms:.3g} ± {row.std_ms:.2g}",
        str(row.n),
        ratio,
        f"{row.max_abs_diff:.1e}",
        f"{row.file_bytes / 1e6:.2f}",
        f"{row.load_s:.2f}",
        f"{row.peak_rss_bytes / 1e6:.0f}",
    ]


def _notes(report: timing.Report) -> list[str]:
    notes = [weights(report.subject), f"sparsity by layer {distribution(report.subject.plan)}"]
    baseline = next((row.baseline for row in report.rows), None)
    if baseline:
        notes.append(f"× dense: median of {baseline}, the fastest dense engine here, over the median; in brackets round by round")
    if report.rows:
        notes.append(f"max |diff|: against dense onnxruntime, whose largest output is {report.rows[0].max_abs_output:.3g}")
    if report.interrupted:
        notes.append("interrupted: fewer rounds than asked for")
    return notes
