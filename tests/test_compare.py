"""`compare`: the numbers against masks made by hand, where tickets come from, the tables, the figure, and one clear line otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ticketkit
from ticketkit import masks
from ticketkit.analysis import plot
from ticketkit.analysis.compare import Comparison, compare
from ticketkit.cli import main
from ticketkit.errors import TicketError
from ticketkit.search.rundir import RunDir
from ticketkit.ticket import Ticket

SHAPES = {"layer.10.conv.weight": (8, 4, 3, 3), "layer.2.conv.weight": (4, 4, 3, 3), "layer.2.pointwise.weight": (8, 4, 1, 1)}
ORIGIN = {"model": "resnet20", "objective": "supervised", "task": "digits"}


def ticket(seed: int, round: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Ticket:
    """A ticket whose rounds nest, 1 - 0.8^round sparse."""
    now = {name: np.ones(shape, np.bool_) for name, shape in shapes.items()}
    for _ in range(round):
        now = masks.random(now, 0.2, seed)
    return Ticket(now, {}, {**ORIGIN, "round": round})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with rounds 0 to 2."""
    made = RunDir(tmp_path / "run")
    config = {"model": "resnet20", "num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.0], "std": [1.0], "classes": [], "threads": 1}
    with made.claim(config):
        for k in range(3):
            numbers = dict.fromkeys(("metric", "sparsity", "sparsity_model", "kept", "seconds"), 0.0)
            made.finish({"round": k, "metric_name": "accuracy", **numbers}, {}, ticket(0, k))
    return made.path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return ticket(1, 2).save(tmp_path / "other.safetensors")


def said(*words: object) -> int:
    """Exit code of `ticketkit compare WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, words)])
    return int(stop.value.code or 0)


def test_numbers_by_hand() -> None:
    """a keeps 3x3 kernels 0 and 1 whole, b one weight of kernel 1; of the 1x1 kernels a keeps one, b both."""
    conv_a, conv_b = np.zeros((2, 2, 3, 3), bool), np.zeros((2, 2, 3, 3), bool)
    conv_a[0], conv_b[0, 1, 0, 0] = True, True
    a = Ticket({"conv": conv_a, "pointwise": np.array([True, False]).reshape(2, 1, 1, 1)})
    b = Ticket({"conv": conv_b, "pointwise": np.array([True, True]).reshape(2, 1, 1, 1)})
    found = compare(a, b)
    first, second = found.tickets
    assert (first.kept, first.total, first.sparsity) == (19, 38, 0.5) and (second.kept, second.total) == (3, 38)
    assert first.zero_kernels(larger=True) == (2, 4) and second.zero_kernels(larger=True) == (3, 4)
    assert first.zero_kernels(larger=False) == (1, 2) and second.zero_kernels(larger=False) == (0, 2)
    assert [layer.sparsity for layer in first.layers] == [0.5, 0.5] and [layer.kernel_size for layer in first.layers] == [9, 1]
    (pair,) = found.pairs
    assert pair.similarity == 2 / 20
    assert pair.by_chance == pytest.approx((19 * 3 / 38) / (22 - 19 * 3 / 38))
    in_layers = 18 * 1 / 36 + 1 * 2 / 2
    assert pair.by_chance_in_layers == pytest.approx(in_layers / (22 - in_layers))
    assert first.name == f"ticket {a.mask_sha256[:12]}" and (first.model, first.round) == (None, None)


def test_runs_rounds_files_and_tickets(run: Path, other: Path) -> None:
    found = compare(f"{run}@1", run, other, ticket(3, 1))
    assert [each.name for each in found.tickets[:3]] == [f"{run}@1", f"{run}@2", str(other)]
    assert [each.round for each in found.tickets] == [1, 2, 2, 1]
    assert [(pair.a, pair.b) for pair in found.pairs] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for pair in found.pairs:
        read = [ticket(0, 1), ticket(0, 2), ticket(1, 2), ticket(3, 1)]
        assert pair.similarity == masks.similarity(read[pair.a].masks, read[pair.b].masks)
    first, second = (each.kept for each in found.tickets[:2])
    assert found.pairs[0].similarity == second / first, "nested"
    assert [each.name for each in compare(run, f"{run}@0", round=1).tickets] == [f"{run}@1", f"{run}@0"]


def test_a_path_may_hold_an_at_sign(run: Path, other: Path) -> None:
    named = run.rename(run.with_name("run@1"))
    assert [each.round for each in compare(named, f"{named}@0", other.rename(other.with_name("x@7"))).tickets] == [2, 0, 2]


def test_layers_are_in_natural_order() -> None:
    """As a string layer.10 is before layer.2, and so it is in the file."""
    names = [layer.name for layer in compare(ticket(0), ticket(1)).tickets[0].layers]
    assert names == ["layer.2.conv.weight", "layer.2.pointwise.weight", "layer.10.conv.weight"] != sorted(names)


def test_a_run_of_find(small_run: Path) -> None:
    found = compare(f"{small_run}@1", small_run)
    rows = [json.loads(line) for line in (small_run / "rounds.jsonl").read_text().splitlines()]
    assert [(each.kept, each.mask_sha256) for each in found.tickets] == [(row["kept"], row["mask_sha256"]) for row in rows[1:]]
    assert found.pairs[0].similarity == rows[2]["kept"] / rows[1]["kept"]
    layers = {layer.name: layer.sparsity for layer in found.tickets[1].layers}
    assert layers == rows[2]["layer_sparsity"]


def test_json_is_what_the_verb_says(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(run, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(ticketkit.compare(run, other).to_dict()))
    assert found["tickets"][0]["zero_kernels"]["kxk"]["total"] == 48 and found["tickets"][0]["zero_kernels"]["1x1"]["total"] == 32
    assert found["tickets"][0]["layers"][0]["shape"] == [4, 4, 3, 3] and found["pairs"][0]["a"] == 0
    assert "compare" in ticketkit.__all__


def test_tables(run: Path, other: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)  # long paths are shortened
    assert said(f"{run.name}@1", other.name) == 0
    out = capsys.readouterr().out
    found = compare(f"{run}@1", other)
    (pair,) = found.pairs
    values = [*(each.sparsity for each in found.tickets), pair.similarity, pair.by_chance, pair.by_chance_in_layers]
    for word in ("run@1", "resnet20", "supervised", "digits", *(f"{value:.2%}" for value in values)):
        assert word in out, word
    assert "layer.10.conv.weight" not in out
    assert said(f"{run}@1", other, "--layers") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (line for line in lines if line[:1] == ["layer.10.conv.weight"])
    layer, same = (each.layers[2] for each in found.tickets)
    zero = [f"{x.zero_kernels / x.kernels:.2%}" for x in (layer, same)]
    assert row[1:] == ["8x4x3x3", f"{layer.sparsity:.2%}", zero[0], f"{same.sparsity:.2%}", zero[1]]
    (row,) = (line for line in lines if line[:1] == ["layer.2.pointwise.weight"])
    assert row[3] == row[5] == "-"


def drawn(found: Comparison, path: Path) -> str:
    """The figure as text, drawn without a warning."""
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return plot.save(found, path).read_text()


def test_figure(tmp_path: Path) -> None:
    found = compare(ticket(0, 3), ticket(1, 3))
    text = drawn(found, tmp_path / "a.svg")
    pair = found.pairs[0]
    for word in (f"{100 * pair.similarity:.1f}", f"({100 * pair.by_chance_in_layers:.1f})", "layer.10.conv.weight", found.tickets[0].name):
        assert word in text, word
    assert "layer.2.pointwise.weight" not in text, "a 1x1 kernel is a weight"
    assert drawn(found, tmp_path / "b.svg") == text, "equal comparisons are equal files"
    plot.save(found, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_figure_of_many_tickets_and_of_no_large_kernel(tmp_path: Path) -> None:
    found = compare(*(ticket(0, k) for k in range(14)))
    text = drawn(found, tmp_path / "many.svg")
    assert f"14: {found.tickets[13].sparsity:.1%} sparse" in text and f"({100 * found.pairs[0].by_chance_in_layers:.1f})" not in text
    linear = {"fc.weight": (10, 20)}
    assert "no layer has kernels larger than 1x1" in drawn(compare(ticket(0, 1, linear), ticket(1, 1, linear)), tmp_path / "fc.svg")


def test_neither_torch_nor_matplotlib_is_needed(run: Path, other: Path, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(torch=None, torchvision=None, matplotlib=None); from ticketkit import cli; cli.main({})"

    def words(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", blocked.format(["compare", str(run), str(other), *more])]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = words("--layers")
    assert done.returncode == 0 and "resnet20" in done.stdout, done.stderr
    done = words("--plot", str(tmp_path / "a.svg"))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "a figure needs matplotlib, which is not installed; pip install 'ticketkit[report]'" in done.stderr


def test_a_run_without_a_ticket_yet(run: Path, other: Path) -> None:
    (run / "rounds.jsonl").unlink()
    with pytest.raises(TicketError, match="round 0 is not finished, 0 rounds are"):
        compare(run, other)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{run}"], "expected two tickets or more to compare, got 1"),
        (["{run}@3", "{other}"], "run: round 3 is not finished, 3 rounds are"),
        (["{run}", "{other}", "--round", "1"], "--round and @1 choose a round of a run directory, this is a ticket"),
        (["{run}", "{other}@1"], "--round and @1 choose a round of a run directory, this is a ticket"),
        (["{run}", "{run}@-1"], "run@-1: no such file or folder"),
        (["{run}", "missing"], "missing: no such file or folder; expected a ticket file or a run directory"),
        (["{run}", "{folder}"], "run.json: cannot be read; expected the run directory of `ticketkit find`"),
        (["{run}", "{run}/run.json"], "not a whole safetensors file"),
        (["{run}", "{wider}"], "layer.2.conv.weight: shapes (4, 4, 3, 3) and (4, 5, 3, 3) differ; compare tickets of the same network"),
        (["{run}", "{deeper}"], "layer.3.conv.weight: only one of the two masks has this layer; compare tickets of the same network"),
        (["{run}", "{other}", "--plot", "x.jpg"], "x.jpg: expected the name of a figure to end in .svg or .png, got '.jpg'"),
        (["{run}", "{other}", "--plot", "missing/x.svg"], "cannot write"),
    ],
)
def test_nonsense_is_one_line(words: list[str], expected: str, run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    if "cannot write" in expected:
        pytest.importorskip("matplotlib")
    places = {"run": run, "other": other, "folder": tmp_path / "folder"}
    places["folder"].mkdir()
    for name, layer in (("wider", {"layer.2.conv.weight": (4, 5, 3, 3)}), ("deeper", {"layer.3.conv.weight": (4, 4, 3, 3)})):
        places[name] = ticket(0, 1, {**SHAPES, **layer}).save(tmp_path / f"{name}.safetensors")
    assert said(*(word.format(**places) for word in words)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ticketkit: error: ") and err.count("\n") == 1 and expected in err
