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
    """Says nothing. Other displays say `start`, `advance` and `say` in their own way; the rest is put in words here."""

    def __init__(self) -> None:
        self.rounds = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return

    def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
        """`rounds` rounds or trainings begin, `steps` steps of them are left; `training` is the recipe as it takes effect, in one
        line, and `remarks` say what was dropped from the weights."""
        self.rounds = rounds
        if steps:
            self.say(f"training: {training}")
        for remark in remarks:
            self.say(f"weights: {remark}")

    def advance(self, words: str) -> None:
        """One more of the steps is done; `words` say where it stands."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
        """One more step of a search is done; accuracy over this epoch's training batches so far."""
        self.advance(f"round {round}/{self.rounds}  {sparsity:.1%} sparse  loss {loss:.3f}  train {accuracy:.1%}")

    def finished(self, row: Row, dense: Row) -> None:
        """A round is done; `row` is its line in rounds.jsonl, `dense` that of round 0."""
        self.say(describe(row, dense, self.rounds))


class Lines(Progress):
    """One plain line a round."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class Live(Progress):
    """A bar over all steps with words on the latest and the time left; what is said scrolls above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.bars = Bars(*columns, console=console, transient=True)

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
        self.task = self.bars.add_task("loading", total=steps)
        super().start(rounds, steps, training, remarks)

    def advance(self, words: str) -> None:
        self.bars.update(self.task, advance=1, description=words)

    def say(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False)


def describe(row: Row, dense: Row, rounds: int) -> str:
    """One finished round in one line."""
    return (
        f"round {row['round']}/{rounds}  sparsity {row['sparsity']:.2%}  {row['metric_name']} {row['metric']:.2%} "
        f"({100 * (row['metric'] - dense['metric']):+.2f} points to dense)  {row['seconds']:.0f} s"
    )


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
