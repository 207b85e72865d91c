"""Accuracy against sparsity: do tickets of a search match the dense network on other tasks, and do the controls not?

    python benchmarks/lottery.py runs/simclr --task cifar100 --task digits --levels all --data DIR
    python benchmarks/lottery.py runs/supervised --task cifar100 --levels 5,8,11 --control random --control complement --data DIR
    python benchmarks/lottery.py --report        its rows as a page and a figure: results/lottery.md, results/lottery.svg

Trainings are those of `ticketkit verify`, kept in --store: started again, it does what is missing. The schedules below are short, for
two cores; the papers train for 182 epochs. One row for each run and task is appended to results/lottery.jsonl: every seed's metric on
validation and test images, of the dense network, each level and each control, with the verdicts. Needs the extra `find`; the figure
the extra `report`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import command

from ticketkit import __version__, tasks
from ticketkit.bench import machine
from ticketkit.errors import DataError
from ticketkit.search.progress import choose
from ticketkit.search.rundir import RunDir
from ticketkit.verifier import verify
from ticketkit.verifier.verdicts import RULES

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "lottery.jsonl"
SHORT: dict[str, dict[str, Any]] = {  # schedules, said with every result; of the same images 800 steps of 16 learn twice what 100 of 128 do
    name: {"steps": steps, "batch_size": 16, "lr": 0.02, "schedule": "cosine"}
    for name, steps in (("cifar10", 1000), ("cifar100", 1000), ("fashion-mnist", 400), ("digits", 800))
}
FACTS = ("model", "task", "objective", "objective_options", "method", "rewind", "rate", "epochs", "steps", "batch_size", "lr", "schedule")
FACTS += ("weights_sha256", "seed")


def rows(run: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a task of a run directory, trained or taken from the store."""
    config = {"method": "imp", **RunDir(run).config()}
    common = {
        "run": run.name,
        "found_on": {key: config[key] for key in FACTS if key in config},
        "seeds": chosen.seeds,
        "mode": chosen.mode,
        "start": chosen.start,
        "cpu": machine.cpu_name(),
        "ticketkit": __version__,
        "commit": machine.commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    options = {"seeds": chosen.seeds, "mode": chosen.mode, "start": chosen.start, "controls": chosen.control}
    options["levels"] = chosen.levels
    where = {"data": chosen.data, "out": chosen.store, "threads": chosen.threads}
    found = []
    for task in chosen.task:
        schedule = SHORT.get(task, {}) | ({"steps": chosen.steps} if chosen.steps else {})
        report = verify(run, [task], **options, **where, **schedule, progress=choose())
        found.append({**common, "schedule": schedule, **report.to_dict()["tasks"][0]})
    return found


def levels(text: str) -> list[int] | str:
    """K[,K...] or all."""
    return text if text == "all" else [int(part) for part in text.split(",")]


def read(path: Path) -> list[dict[str, Any]]:
    """One row of each run, task and way to train: of several the one of most levels and seeds, of equals the newest.

    Raises:
        DataError: no such file.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; run this script on run directories first")
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in every:
        key = row["run"], row["task"], row["mode"], row["start"], _controls(row), _schedule(row)
        if key not in best or _size(row) >= _size(best[key]):
            best[key] = row
    return list(best.values())


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return len(row["rows"]), row["seeds"]


def _controls(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(sorted({each["control"] for each in row["rows"] if each["control"]}))


def page(found: list[dict[str, Any]]) -> str:
    """The rows as a page in Markdown."""
    lines = ["# Tickets on other tasks", "", "`python benchmarks/lottery.py --report` wrote it from `lottery.jsonl`: means over the seeds"]
    lines += ["± one sample standard deviation of the accuracy on test images, in %.", ""]
    lines += ["## Highest matching sparsity, %", ""]
    lines += ["| found on | transferred to | n | dense | chosen on test, as papers do: one sd | strict | chosen on validation, one sd |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in (row for row in found if not _controls(row)):
        highest = row["highest"]
        by = [_highest(highest[rule], "by_test") for rule in RULES]
        chosen = _highest(highest["one_sd"], "by_validation")
        lines.append(f"| {_name(row)} | {row['task']} | {row['seeds']} | {_mean(row['dense']['test'])} | {by[0]} | {by[1]} | {chosen} |")
    lines += ["", "## Highest sparsity that matches on every task, %, chosen on test", ""]
    lines += ["| found on | tasks | by one sd | strict |", "|---|---|---|---|"]
    lines += [f"| {name} | {', '.join(names)} | {' | '.join(levels)} |" for name, names, levels in universal(found)]
    for row in found:
        controls = ", controls" if _controls(row) else ""
        lines += ["", f"## {_name(row)} → {row['task']}{controls}", "", f"{_schedule(row)}; dense {_mean(row['dense']['test'])}.", ""]
        lines += ["| | sparsity | weights left | test | to dense | one sd | strict |", "|---|---|---|---|---|---|---|"]
        for each in row["rows"]:
            verdicts = (each["matching"]["test"][rule] for rule in RULES)
            words = " | ".join({True: "matching", False: "no", None: "?"}[verdict] for verdict in verdicts)
            name = each["control"] or "ticket"
            size = f"{each['sparsity']:.2%} | {each['kept']:,}"
            lines.append(f"| {name} | {size} | {_mean(each['test'])} | {100 * each['difference']:+.2f} | {words} |")
    return "\n".join(lines) + "\n"


def universal(found: list[dict[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """(search, its tasks, highest universal sparsity by each rule) of every search that was transferred to two tasks or more."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if not _controls(row):
            groups[row["run"], _name(row)].append(row)
    answers = []
    for (_, name), rows in groups.items():
        if len(rows) > 1:
            verdicts = [{each["sparsity"]: each["matching"]["test"] for each in row["rows"]} for row in rows]
            common = set.intersection(*(set(levels) for levels in verdicts))
            best = [max((s for s in common if all(levels[s][rule] for levels in verdicts)), default=None) for rule in RULES]
            told = ["?" if None in (row["highest"][rule] for row in rows) else _level(s) for rule, s in zip(RULES, best, strict=True)]
            answers.append((name, [row["task"] for row in rows], told))
    return answers


def _name(row: dict[str, Any]) -> str:
    origin = row["found_on"]
    usual = {row["mode"]: "full", row["start"]: "rewound", origin["rewind"]: "pretrained", origin["method"]: "imp"}
    ways = [way for way, common in usual.items() if way != common]
    temperature = origin.get("objective_options", {}).get("temperature")
    ways += [f"temperature {temperature}"] if temperature else []
    return ", ".join([f"{origin['model']} {origin['objective']} on {origin['task']}", *ways])


def _schedule(row: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["schedule"].items()) or "the task's own recipe"


def _mean(sample: dict[str, Any]) -> str:
    return f"{100 * sample['mean']:.2f}" + ("" if sample["sd"] is None else f" ± {100 * sample['sd']:.2f}")


def _highest(found: dict[str, Any] | None, choice: str) -> str:
    """A level in percent, "?" where the rule is open: one seed has no standard deviation."""
    return "?" if found is None else _level(found[choice] and found[choice]["sparsity"])


def _level(sparsity: float | None) -> str:
    return "none" if sparsity is None else f"{100 * sparsity:.2f}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """One panel a task, one line a search, its dense network as a band of one standard deviation."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if not _controls(row) and row["mode"] == "full":
            panels[row["task"]].append(row)
    with rc_context({"svg.hashsalt": "ticketkit", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axis, (task, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], sorted(panels.items()), strict=True):
            for number, row in enumerate(lines):
                points = sorted((100 * each["sparsity"], each["test"]) for each in row["rows"] if each["control"] is None)
                means, spread = ([100 * (sample[key] or 0) for _, sample in points] for key in ("mean", "sd"))
                style = {"marker": "o", "ms": 3, "lw": 1, "capsize": 2, "color": f"C{number}", "label": _name(row)}
                axis.errorbar([x for x, _ in points], means, yerr=spread, **style)
                dense, sd = row["dense"]["test"]["mean"], row["dense"]["test"]["sd"] or 0
                axis.axhspan(100 * (dense - sd), 100 * (dense + sd), color=f"C{number}", alpha=0.15, lw=0)
            axis.set(title=task, xlabel="sparsity, %", ylabel="test accuracy, %")
            axis.legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--task", action="append", default=[], choices=tasks.names(), metavar="NAME", help="to transfer to; repeat it")
    parser.add_argument("--levels", type=levels, help="rounds of each run, K,K or all; default: the last")
    parser.add_argument("--control", action="append", default=[], metavar="C", help="as in `ticketkit verify`; repeat it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of those of SHORT")
    parser.add_argument("--mode", default="full", help="full or linear")
    parser.add_argument("--start", default="rewound", help="rewound or trained")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--store", type=Path, default=Path("runs/verify"), help="where trainings are kept")
    parser.add_argument("--results", type=Path, default=ROWS, help="rows are appended to this file")
    parser.add_argument("--report", action="store_true", help="write the page and the figure")
    chosen = parser.parse_args()
    for run in chosen.run:
        for row in rows(run, chosen):
            with chosen.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if chosen.report:
        found = read(chosen.results)
        (RESULTS / "lottery.md").write_text(page(found), encoding="utf-8")
        draw(found, RESULTS / "lottery.svg")


if __name__ == "__main__":
    command.run(main)
