"""A report for people: the levels of each task with their verdicts, then the highest matching ones."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from ticketkit.verifier.report import Report, Row, TaskReport
from ticketkit.verifier.verdicts import RULES, Highest, Rung, Sample

WORDS = {"one_sd": "one sd", "strict": "strict"}
MODES = {"full": "everything trains", "linear": "linear probe: the head alone trains"}


def show(report: Report) -> None:
    """Print it to stdout."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for task in report.tasks:
        _line(console, _title(report, task))
        console.print(_levels(task))
        console.print()
    console.print(_summary(report))
    for note in _notes(report):
        _line(console, note)


def _line(console: Console, line: str) -> None:
    """As it is: no markup, no colours, not broken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _percent(sample: Sample) -> str:
    """Mean ± standard deviation, in percent."""
    return f"{100 * sample.mean:.2f}" if sample.sd is None else f"{100 * sample.mean:.2f} ± {100 * sample.sd:.2f}"


def _title(report: Report, task: TaskReport) -> str:
    return (
        f"{task.task}: dense {report.model} {_percent(task.test)} % {task.metric} on test images, "
        f"{_percent(task.val)} % on validation images; n = {len(report.seeds)}; {MODES[report.mode]}"
    )


def _levels(task: TaskReport) -> Table:
    grid = _grid("", "level", "sparsity", "validation", "test", "to dense", *(f"by {WORDS[rule]}" for rule in RULES))
    for row in task.rows:
        verdicts = (_verdict(row, rule) for rule in RULES)
        difference = f"{100 * (row.test.mean - task.test.mean):+.2f}"
        grid.add_row(row.control or "ticket", *_level(row.rung), _percent(row.val), _percent(row.test), difference, *verdicts)
    return grid


def _verdict(row: Row, rule: str) -> str:
    return "winning" if row.winning and row.winning.by(rule) else _answer(row.matching_test.by(rule), "matching", "no")


def _answer(answer: bool | None, yes: str, no: str) -> str:
    return "unknown" if answer is None else yes if answer else no


def _summary(report: Report) -> Table:
    grid = _grid("highest matching", "rule", "chosen on validation", "test images", "chosen on test, as papers do")
    for task in report.tasks:
        for rule in RULES:
            _add(grid, task.task, rule, task.highest(rule))
    if len(report.tasks) > 1:
        for rule in RULES:
            _add(grid, f"universal, {len(report.tasks)} tasks", rule, report.highest_universal(rule))
    return grid


def _add(grid: Table, name: str, rule: str, found: Highest | None) -> None:
    if found is None:
        grid.add_row(name, WORDS[rule], "unknown", "–", "unknown")
        return
    confirmed = _answer(found.confirmed, "confirm it", "do not confirm it") if found.by_validation else "–"
    grid.add_row(name, WORDS[rule], _rung(found.by_validation), confirmed, _rung(found.by_test))


def _rung(rung: Rung | None) -> str:
    return "none" if rung is None else f"{rung.sparsity:.2%}" + ("" if rung.level is None else f" (level {rung.level})")


def _level(rung: Rung) -> tuple[str, str]:
    return "–" if rung.level is None else str(rung.level), f"{rung.sparsity:.2%}"


def _notes(report: Report) -> list[str]:
    rows = [row for task in report.tasks for row in task.tickets]
    notes = []
    if len(report.seeds) == 1:
        notes.append("one seed has no standard deviation: the one-sd rule is unknown; give --seeds 3")
    if lost := sum(task.diverged + sum(row.diverged for row in task.rows) for task in report.tasks):
        notes.append(f"{lost} trainings diverged; they count with what they left")
    if not any(row.pretrained for row in rows):
        notes.append("no ticket here starts from the dense network's weights, so none can be winning")
    return [*notes, f"trainings: {report.store}"]


def _grid(*names: str) -> Table:
    grid = Table(*names, box=None, pad_edge=False)
    for column in grid.columns[1:]:
        column.justify = "right"
    return grid
