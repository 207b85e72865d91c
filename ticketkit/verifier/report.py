"""What `verify` found, as plain values: metrics of the dense network and of every ticket and control, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ticketkit.verifier.verdicts import RULES, Highest, Rung, Sample, Verdict, highest, universal, winning


@dataclass(frozen=True)
class Row:
    """A ticket, or a control of one (`control` names it), on one task.

    Attributes:
        level: its round, None for a ticket file.
        sparsity: fraction of the prunable weights that are pruned.
        kept: prunable weights that are left.
        pretrained: True if it starts from the weights of the dense network, θ = θ_p, by their hash.
        diverged: how many of its trainings did; they count with the metric of what they left.
        val, test: its metric on validation and on test images, over the seeds.
        matching_val, matching_test: whether it matches the dense network on them.
    """

    control: str | None
    level: int | None
    sparsity: float
    kept: int
    pretrained: bool
    diverged: int
    val: Sample
    test: Sample
    matching_val: Verdict
    matching_test: Verdict

    @property
    def winning(self) -> Verdict | None:
        """Whether it is a winning ticket, by the test images; None for a control."""
        return None if self.control else winning(self.matching_test, self.pretrained)

    @property
    def rung(self) -> Rung:
        """Its place among the levels."""
        return Rung(self.level, self.sparsity, self.matching_val, self.matching_test)


@dataclass(frozen=True)
class TaskReport:
    """All trainings on one task; `recipe` is how they were done, `val`, `test` and `diverged` are the dense network's."""

    task: str
    metric: str
    recipe: dict[str, Any]
    val: Sample
    test: Sample
    diverged: int
    rows: tuple[Row, ...]

    @property
    def tickets(self) -> list[Row]:
        """The rows that are no controls."""
        return [row for row in self.rows if row.control is None]

    def highest(self, rule: str) -> Highest | None:
        """The sparsest matching tickets, by one of `verdicts.RULES`; None for one seed and the one-sd rule."""
        return highest([row.rung for row in self.tickets], rule)

    def test_of(self, rung: Rung) -> Sample:
        """Test metric of the ticket at one level."""
        return next(row.test for row in self.tickets if row.rung == rung)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "task": self.task,
            "metric": self.metric,
            "recipe": self.recipe,
            "dense": {"val": self.val.to_dict(), "test": self.test.to_dict(), "diverged": self.diverged},
            "rows": [self._row_dict(row) for row in self.rows],
            "highest": {rule: _highest_dict(self.highest(rule), self) for rule in RULES},
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        return {
            "control": row.control,
            "level": row.level,
            "sparsity": row.sparsity,
            "kept": row.kept,
            "pretrained_weights": row.pretrained,
            "diverged": row.diverged,
            "val": row.val.to_dict(),
            "test": row.test.to_dict(),
            "difference": row.test.mean - self.test.mean,
            "matching": {"val": row.matching_val.to_dict(), "test": row.matching_test.to_dict()},
            "winning": row.winning and row.winning.to_dict(),
        }


@dataclass(frozen=True)
class Report:
    """The answer of `verify`; `seeds`, `mode`, `select` and `start` are its options, `store` the folder of the trainings."""

    ticket: str
    model: str
    seeds: tuple[int, ...]
    mode: str
    select: str
    start: str
    dense_sha256: str
    store: str
    tasks: tuple[TaskReport, ...]

    @property
    def universal(self) -> list[Rung]:
        """Each level's verdicts over all tasks together: universal for this set of tasks where they are True."""
        levels = zip(*(report.tickets for report in self.tasks), strict=True)
        return [_together([row.rung for row in rows]) for rows in levels]

    def highest_universal(self, rule: str) -> Highest | None:
        """The sparsest universal tickets, by one of `verdicts.RULES`; None for one seed and the one-sd rule."""
        return highest(self.universal, rule)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; `highest` is chosen by validation and, as the papers do, by test images, each named so."""
        levels = [
            {"level": rung.level, "sparsity": rung.sparsity, "val": rung.val.to_dict(), "test": rung.test.to_dict()}
            for rung in self.universal
        ]
        options = {key: value for key, value in asdict(self).items() if key != "tasks"}
        return {
            **options,
            "seeds": list(self.seeds),
            "tasks": [report.to_dict() for report in self.tasks],
            "universal": {"levels": levels, "highest": {rule: _highest_dict(self.highest_universal(rule)) for rule in RULES}},
        }


def _together(rungs: Sequence[Rung]) -> Rung:
    """One level on all tasks."""
    return Rung(rungs[0].level, rungs[0].sparsity, universal([r.val for r in rungs]), universal([r.test for r in rungs]))


def _highest_dict(found: Highest | None, report: TaskReport | None = None) -> dict[str, Any] | None:
    if found is None:
        return None

    def named(rung: Rung | None) -> dict[str, Any] | None:
        if rung is None:
            return None
        metric = {} if report is None else {"test": report.test_of(rung).to_dict()}
        return {"level": rung.level, "sparsity": rung.sparsity, **metric}

    chosen = named(found.by_validation)
    return {
        "by_validation": chosen and {**chosen, "confirmed_by_test": found.confirmed},
        "by_test": named(found.by_test),
        "unbroken_by_validation": named(found.unbroken_by_validation),
        "unbroken_by_test": named(found.unbroken_by_test),
    }
