"""What a search tells while it runs: nothing, plain lines for logs, or a live display on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

Row = dict[str, Any]


class Progress:
    """Says nothing. `steps` counts over all rounds that this call trains."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return

    def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
        """A search of `rounds` rounds begins, `steps` steps of it are left; `training` is the recipe as it takes effect, in one
        line, and `remarks` say what was dropped from the weights."""

    def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
        """One more step is done; accuracy over this epoch's training batches so far."""

    def finished(self, row: Row, dense: Row) -> None:
        """A round is done; `row` is its line in rounds.jsonl, `dense` that of round 0."""


class Lines(Progress):
    """One plain line a round."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.rounds = stream, 0

    def _say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
        self.rounds = rounds
        for line in _opening(steps, training, remarks):
            self._say(line)

    def finished(self, row: Row, dense: Row) -> None:
        self._say(describe(row, dense, self.rounds))


class Live(Progress):
    """A bar over all steps with sparsity, loss, training accuracy and the time left; finished rounds scroll above it."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.bars = Bars(*columns, console=console, transient=True)
        self.rounds = 0

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
        self.rounds = rounds
        self.task = self.bars.add_task("loading", total=steps)
        for line in _opening(steps, training, remarks):
            self.bars.console.print(line, markup=False, highlight=False)

    def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
        words = f"round {round}/{self.rounds}  {sparsity:.1%} sparse  loss {loss:.3f}  train {accuracy:.1%}"
        self.bars.update(self.task, advance=1, description=words)

    def finished(self, row: Row, dense: Row) -> None:
        self.bars.console.print(describe(row, dense, self.rounds), markup=False, highlight=False)


def describe(row: Row, dense: Row, rounds: int) -> str:
    """One finished round in one line."""
    return (
        f"round {row['round']}/{rounds}  sparsity {row['sparsity']:.2%}  {row['metric_name']} {row['metric']:.2%} "
        f"({100 * (row['metric'] - dense['metric']):+.2f} points to dense)  {row['seconds']:.0f} s"
    )


def _opening(steps: int, training: str, remarks: tuple[str, ...]) -> list[str]:
    """What is said before the first step; how it is trained only where something is left to train."""
    return [*([f"training: {training}"] if steps else []), *(f"weights: {remark}" for remark in remarks)]


def choose() -> Progress:
    """The live display where stderr is a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    return Live(console) if console.is_terminal else Lines(sys.stderr)


def table(rows: list[Row], path: Path) -> None:
    """Print the rounds and where they are, to stdout."""
    dense = rows[0]
    grid = Table("round", "sparsity", "whole model", dense["metric_name"], "to dense", "kept weights", box=None, pad_edge=False)
    for column in grid.columns:
        column.justify = "right"
    for row in rows:
        shares = (f"{row[key]:.2%}" for key in ("sparsity", "sparsity_model", "metric"))
        grid.add_row(str(row["round"]), *shares, f"{100 * (row['metric'] - dense['metric']):+.2f}", f"{row['kept']:,}")
    console = Console()
    console.print(grid)
    console.print(f"tickets and trained weights: {path}", markup=False, highlight=False, soft_wrap=True)
