"""When a ticket matches: the rules of P1 (Chen et al., CVPR 2021), on one metric over seeds. No torch, no files.

    matching    trained from the ticket, the metric is at least the dense network's, same training and same seeds (P1, section 3)
                strict   the means compared
                one sd   the ticket's mean at least the dense mean less one standard deviation of the dense runs (P1, footnote 7)
    winning     matching, and the ticket's weights are the pretrained ones, θ = θ_p
    universal   matching on every task of a set

One run has no standard deviation: the one-sd rule then gives None, neither yes nor no.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Metrics are float32 quotients in [0, 1], each off by at most 2^-25, so are two means and a deviation: less is no difference.
# One image more or less shows up to 8 million images.
TIE = 2.0**-23
RULES = ("one_sd", "strict")


@dataclass(frozen=True)
class Sample:
    """A metric, higher is better, as measured for each seed; at least one value, fractions in [0, 1]."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the values, correctly rounded, so that their order does not matter."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (divided by n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """n, mean, sd and the values in order of the seeds, JSON values only."""
        return {"n": len(self.values), "mean": self.mean, "sd": self.sd, "values": list(self.values)}


@dataclass(frozen=True)
class Verdict:
    """One question answered by both rules; `one_sd` is None where there is no standard deviation."""

    one_sd: bool | None
    strict: bool

    def by(self, rule: str) -> bool | None:
        """The answer by one of `RULES`."""
        return self.strict if rule == "strict" else self.one_sd

    def to_dict(self) -> dict[str, bool | None]:
        """Answer by rule."""
        return {rule: self.by(rule) for rule in RULES}


def matching(ticket: Sample, dense: Sample) -> Verdict:
    """Whether the ticket matches the dense network."""
    short = dense.mean - ticket.mean
    return Verdict(None if dense.sd is None else short <= dense.sd + TIE, short <= TIE)


def winning(matches: Verdict, pretrained: bool) -> Verdict:
    """Whether a ticket wins that `matches` and whose weights are the `pretrained` ones, or are not."""
    return matches if pretrained else Verdict(False, False)


def universal(matches: Sequence[Verdict]) -> Verdict:
    """Whether a ticket is universal, from its verdicts on every task; one task without a standard deviation leaves one_sd open."""
    answers = [each.one_sd for each in matches]
    one_sd = False if False in answers else None if None in answers else True
    return Verdict(one_sd, all(each.strict for each in matches))


@dataclass(frozen=True)
class Rung:
    """One level of a ladder of tickets: its round, its sparsity, and whether it matches on validation and on test images."""

    level: int | None
    sparsity: float
    val: Verdict
    test: Verdict


@dataclass(frozen=True)
class Highest:
    """The sparsest matching levels by one rule, None where no level matches.

    Attributes:
        by_validation: chosen on validation images, `confirmed` by the test images or not: the honest answer.
        by_test: chosen on the test images, as the papers report it: flattered, for choosing among many levels favours luck.
        unbroken_by_validation, unbroken_by_test: the highest up to which every lower verified level matches too.
    """

    by_validation: Rung | None
    confirmed: bool | None
    by_test: Rung | None
    unbroken_by_validation: Rung | None
    unbroken_by_test: Rung | None


def highest(rungs: Sequence[Rung], rule: str) -> Highest | None:
    """Both ways to choose, by one of `RULES`; `rungs` in any order. None where the rule leaves a verdict open."""
    if any(verdict.by(rule) is None for rung in rungs for verdict in (rung.val, rung.test)):
        return None
    ladder = sorted(rungs, key=lambda rung: rung.sparsity)
    val, test = ([bool(getattr(rung, split).by(rule)) for rung in ladder] for split in ("val", "test"))
    chosen = _last(ladder, val)
    return Highest(
        by_validation=chosen,
        confirmed=chosen.test.by(rule) if chosen else None,
        by_test=_last(ladder, test),
        unbroken_by_validation=_last(ladder, _until_broken(val)),
        unbroken_by_test=_last(ladder, _until_broken(test)),
    )


def _last(ladder: Sequence[Rung], matches: Sequence[bool]) -> Rung | None:
    return next((rung for rung, match in zip(reversed(ladder), reversed(matches), strict=True) if match), None)


def _until_broken(matches: Sequence[bool]) -> list[bool]:
    return [all(matches[: i + 1]) for i in range(len(matches))]
