"""benchmarks/lottery.py and benchmarks/training.py: rows of a tiny run, the page, the figure, and what a step costs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import lottery  # noqa: E402
import training  # noqa: E402

from ticketkit.errors import DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(mean: float, sd: float | None) -> dict[str, Any]:
    return {"n": 3, "mean": mean, "sd": sd, "values": [mean] * 3}


def row(sparsity: float, mean: float, control: str | None = None, matching: bool = False) -> dict[str, Any]:
    answers = {"one_sd": matching, "strict": False}
    verdicts = {"val": answers, "test": answers}
    facts = {"control": control, "sparsity": sparsity, "kept": round(1000 * (1 - sparsity)), "matching": verdicts}
    return {**facts, "test": sample(mean, 0.001), "difference": mean - 0.9}


def found(**changes: Any) -> dict[str, Any]:
    """A row of lottery.jsonl."""
    origin = {"model": "resnet20", "task": "cifar10", "objective": "moco", "method": "imp", "rewind": "pretrained"}
    by_test = {"level": 1, "sparsity": 0.2, "test": sample(0.9, 0.001)}
    highest = {"one_sd": {"by_test": by_test, "by_validation": None}, "strict": {"by_test": None, "by_validation": None}}
    rows = [row(0.2, 0.8995, matching=True), row(0.36, 0.85)]
    facts = {"run": "moco", "task": "digits", "mode": "full", "start": "rewound", "seeds": 3, "found_on": origin, "schedule": {"steps": 7}}
    return {**facts, "dense": {"test": sample(0.9, 0.002)}, "highest": highest, "rows": rows, **changes}


def test_page_names_levels_verdicts_and_controls() -> None:
    text = lottery.page([found(), found(run="c", rows=[row(0.36, 0.5, "random")])])
    assert "| resnet20 moco on cifar10 | digits | 3 | 90.00 ± 0.20 | 20.00 | none | none |" in text
    assert "| ticket | 20.00% | 800 | 89.95 ± 0.10 | -0.05 | matching | no |" in text
    assert "| random | 36.00% | 640 | 50.00 ± 0.10 | -40.00 | no | no |" in text
    assert "steps 7; dense 90.00 ± 0.20." in text and text.count("| resnet20 moco on cifar10 |") == 1, "controls have no highest level"


def test_temperatures_are_told_apart() -> None:
    hot = found(run="hot", found_on={**found()["found_on"], "objective_options": {"temperature": 0.5}})
    assert "| resnet20 moco on cifar10, temperature 0.5 | digits | 3 |" in lottery.page([found(), hot])


def test_universal_level_matches_on_every_task() -> None:
    other = found(task="cifar100", rows=[row(0.2, 0.9, matching=True), row(0.36, 0.9, matching=True)])
    assert lottery.universal([other]) == [], "one task is no set"
    (name, names, levels), = lottery.universal([found(), other])
    assert (name, names, levels) == ("resnet20 moco on cifar10", ["digits", "cifar100"], ["20.00", "none"])
    assert "| resnet20 moco on cifar10 | digits, cifar100 | 20.00 | none |" in lottery.page([found(), other])


def test_searches_are_told_apart_and_one_seed_leaves_one_sd_open() -> None:
    highest = {**found()["highest"], "one_sd": None}
    other = found(run="gmp", task="cifar100", found_on={**found()["found_on"], "method": "gmp"}, highest=highest)
    assert lottery.universal([found(), other]) == [], "two searches with a task each are no set"
    text = lottery.page([found(), other])
    assert "| resnet20 moco on cifar10, gmp | cifar100 | 3 | 90.00 ± 0.20 | ? | none | ? |" in text
    assert "| resnet20 moco on cifar10 | digits | 3 | 90.00 ± 0.20 | 20.00 | none | none |" in text
    one = [found(highest=highest), found(task="cifar100", highest=highest)]
    assert [levels for _, _, levels in lottery.universal(one)] == [["?", "none"]]


def test_newest_row_counts_and_missing_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lottery.jsonl"
    with pytest.raises(DataError, match="run this script"):
        lottery.read(path)
    rows = [found(seeds=1), found(task="cifar100"), found(seeds=3)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [(each["task"], each["seeds"]) for each in lottery.read(path)] == [("digits", 3), ("cifar100", 3)]


def test_figure_is_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        lottery.draw([found(), found(task="cifar100")], tmp_path / name)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes() and b"<svg" in content


@pytest.mark.usefixtures("little_digits")
def test_rows_of_a_run_hold_every_seed(small_run: Path, tmp_path: Path) -> None:
    words = {"task": ["digits"], "levels": [1, 2], "control": [], "seeds": 2, "steps": 2, "mode": "full", "start": "rewound", "threads": 1}
    (made,) = lottery.rows(small_run, argparse.Namespace(**words, data=None, store=tmp_path / "store"))
    assert made["found_on"]["task"] == "digits" and made["schedule"]["steps"] == 2 and [each["level"] for each in made["rows"]] == [1, 2]
    assert all(len(each["test"]["values"]) == 2 for each in made["rows"]) and json.dumps(made)
    assert "digits" in lottery.page([made])


def test_training_is_measured(tmp_path: Path) -> None:
    words = {"model": "resnet20", "batch_size": 4, "threads": 1, "precision": "32-true", "rounds": 2, "steps": 2}
    made = training.measure(argparse.Namespace(**words))
    rates = [made[f"{name}_images_per_s"] for name in ("bare", "search", "batches")]
    assert all(rate > 0 for rate in rates) and len(made["images_per_s"]["search"]) == 2
    ratios = [ours / theirs for ours, theirs in zip(made["images_per_s"]["search"], made["images_per_s"]["bare"], strict=True)]
    assert min(ratios) <= made["ratio"] <= max(ratios)
