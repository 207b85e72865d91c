"""The rules of matching, winning and universal, against tables computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("torch")  # the package of the rules trains, too

from ticketkit.verifier.report import Report, Row, TaskReport
from ticketkit.verifier.verdicts import RULES, Rung, Sample, Verdict, highest, matching, universal, winning

YES, ONE_SD_ONLY, NO = Verdict(True, True), Verdict(True, False), Verdict(False, False)


def images(*right: int, of: int = 1000) -> Sample:
    """Accuracies as float32 quotients, as they are measured."""
    return Sample(tuple(float(np.float32(count / of)) for count in right))


@pytest.mark.parametrize(
    ("ticket", "dense", "expected"),
    [
        (images(900, 910, 920), images(900, 910, 920), YES),  # equal
        (images(920, 900, 910), images(900, 910, 920), YES),  # in another order
        (images(911, 910, 910), images(900, 910, 920), YES),  # one image more than 3 x 910
        (images(909, 910, 910), images(900, 910, 920), ONE_SD_ONLY),  # one image less
        (images(900, 900, 900), images(900, 910, 920), ONE_SD_ONLY),  # exactly one sd (10) below
        (images(900, 900, 899), images(900, 910, 920), NO),  # and one image less
        (images(910, 910, 910), images(910, 910, 910), YES),  # sd 0
        (images(910, 910, 909), images(910, 910, 910), NO),  # sd 0, one image less
        (images(911, 911, 911), images(910, 910, 910), YES),
        (images(902, 902), images(900, 910), ONE_SD_ONLY),  # mean 905, sd 5 sqrt 2 = 7.07
        (images(897, 898), images(900, 910), NO),  # 7.5 below it
        (images(898, 898), images(900, 910), ONE_SD_ONLY),  # 7.0 below it: with n in place of n - 1, sd 5, it would not match
        (images(500, 999, 999), images(900, 910, 920), NO),  # the ticket's own spread plays no part
        (images(910), images(910), Verdict(None, True)),  # one run has no sd
        (images(909), images(910), Verdict(None, False)),
    ],
)
def test_matching(ticket: Sample, dense: Sample, expected: Verdict) -> None:
    assert matching(ticket, dense) == expected


def test_a_small_difference_on_many_images_is_a_difference() -> None:
    """One image of a million counts, the rounding of float32 does not."""
    assert matching(images(910_000, of=10**6), images(910_001, of=10**6)) == Verdict(None, False)
    assert matching(Sample((float(np.float32(1 / 3)),) * 3), Sample((1 / 3,) * 3)) == YES


def test_samples() -> None:
    sample = Sample((0.5, 0.25, 1.0))
    assert sample.mean == pytest.approx(7 / 12) and sample.sd == pytest.approx(math.sqrt((1 + 16 + 25) / 144 / 2))
    assert sample.to_dict() == {"n": 3, "mean": sample.mean, "sd": sample.sd, "values": [0.5, 0.25, 1.0]}
    assert Sample((0.5,)).sd is None and Sample((0.5, 0.5)).sd == 0.0
    assert len({Sample(order).mean for order in itertools.permutations((0.1, 0.2, 0.3))}) == 1


@pytest.mark.parametrize("matches", [YES, ONE_SD_ONLY, NO, Verdict(None, True)])
def test_winning_needs_the_pretrained_weights(matches: Verdict) -> None:
    assert winning(matches, True) == matches and winning(matches, False) == NO


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ([YES], YES),
        ([YES, YES], YES),
        ([YES, ONE_SD_ONLY], ONE_SD_ONLY),
        ([ONE_SD_ONLY, NO, YES], NO),
        ([Verdict(None, True), YES], Verdict(None, True)),
        ([Verdict(None, True), NO], NO),
    ],
)
def test_universal(each: list[Verdict], expected: Verdict) -> None:
    assert universal(each) == expected


def ladder(val: str, test: str) -> list[Rung]:
    """Levels 1, 2, … where "y" matches strictly, "s" by one sd only, "n" not."""
    words = {"y": YES, "s": ONE_SD_ONLY, "n": NO}
    return [Rung(k, 1 - 0.8**k, words[v], words[t]) for k, (v, t) in enumerate(zip(val, test, strict=True), 1)]


def levels(found: object) -> list[object]:
    names = ("by_validation", "confirmed", "by_test", "unbroken_by_validation", "unbroken_by_test")
    values = [getattr(found, name) for name in names]
    return [value.level if isinstance(value, Rung) else value for value in values]


@pytest.mark.parametrize(
    ("val", "test", "one_sd", "strict"),
    [
        ("yyyy", "yyyy", [4, True, 4, 4, 4], [4, True, 4, 4, 4]),
        ("yysn", "ysny", [3, False, 4, 3, 2], [2, False, 4, 2, 1]),
        ("ynys", "nyyn", [4, False, 3, 1, None], [3, True, 3, 1, None]),
        ("nnnn", "yyyy", [None, None, 4, None, 4], [None, None, 4, None, 4]),
    ],
)
def test_highest(val: str, test: str, one_sd: list[object], strict: list[object]) -> None:
    rungs = ladder(val, test)
    assert [levels(highest(rungs, rule)) for rule in RULES] == [one_sd, strict]
    assert [levels(highest(rungs[::-1], rule)) for rule in RULES] == [one_sd, strict], "in any order"


def test_validation_chooses_whatever_the_test_images_say() -> None:
    """Of the two ways to choose, only the one that is named so may depend on the test images."""
    honest = [highest(ladder("ysyn", test), "one_sd") for test in ("nnnn", "yyyy", "nyny")]
    assert {each.by_validation and each.by_validation.level for each in honest if each} == {3}
    assert {each.by_test and each.by_test.level for each in honest if each} == {None, 4}


def report(val: Sample, test: Sample, name: str = "a") -> TaskReport:
    """Levels 1 and 2 of a ticket and a control, against a dense network of 90, 91 and 92 %."""
    dense = images(900, 910, 920)
    verdicts = matching(val, dense), matching(test, dense)
    kinds = (None, 1), ("random", 1), (None, 2)
    rows = [Row(control, level, 1 - 0.8**level, 80, True, 0, val, test, *verdicts) for control, level in kinds]
    return TaskReport(name, "accuracy", {"steps": 1}, dense, dense, 0, tuple(rows))


def whole(*tasks: TaskReport) -> Report:
    return Report("run", "resnet20", (0, 1, 2), "full", "last", "rewound", "0" * 64, "store", tasks)


def test_report_in_numbers() -> None:
    found = whole(report(images(905, 905, 905), images(898, 898, 898))).to_dict()
    task = found["tasks"][0]
    assert [row["control"] for row in task["rows"]] == [None, "random", None]
    assert task["rows"][0]["difference"] == pytest.approx(-0.012)
    assert task["rows"][0]["matching"] == {"val": {"one_sd": True, "strict": False}, "test": {"one_sd": False, "strict": False}}
    assert task["rows"][0]["winning"] == {"one_sd": False, "strict": False} and task["rows"][1]["winning"] is None
    one_sd = task["highest"]["one_sd"]
    assert one_sd["by_validation"]["level"] == 2 and one_sd["by_validation"]["confirmed_by_test"] is False
    assert one_sd["by_validation"]["test"]["mean"] == pytest.approx(0.898) and one_sd["by_test"] is None
    assert task["highest"]["strict"]["by_validation"] is None


def test_universal_is_over_tasks_and_tickets_alone() -> None:
    good, bad = report(images(920, 920, 920), images(920, 920, 920)), report(images(1, 1, 1), images(1, 1, 1), "b")
    assert [rung.test for rung in whole(good, bad).universal] == [NO, NO] and [r.test for r in whole(good, good).universal] == [YES, YES]
    found = whole(good, good).to_dict()["universal"]
    assert [level["level"] for level in found["levels"]] == [1, 2] and found["highest"]["strict"]["by_validation"]["level"] == 2


def test_one_seed_leaves_the_one_sd_rule_open() -> None:
    open_verdict = matching(images(910), images(900))
    assert highest([Rung(1, 0.2, open_verdict, open_verdict)], "one_sd") is None
    assert levels(highest([Rung(1, 0.2, open_verdict, open_verdict)], "strict"))[0] == 1
