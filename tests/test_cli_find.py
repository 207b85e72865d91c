"""`ticketkit find` as a user meets it: its table, its JSON, and one line for everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL_RUN

torch = pytest.importorskip("torch")

from ticketkit import models, tasks  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.search.rewind import POINTS  # noqa: E402

OPTIONS = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL_RUN.items()]
Capture = pytest.CaptureFixture[str]


def run(*words: str) -> int:
    """Exit code of `ticketkit WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def fails_with_one_line(capsys: Capture, *words: str) -> str:
    assert run("find", *words) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ticketkit: error: "), err
    return err


def test_table_names_every_round_and_the_path(small_run: Path, capsys: Capture) -> None:
    assert run("find", "digits", *OPTIONS, "--out", str(small_run)) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in (small_run / "rounds.jsonl").read_text().splitlines()]
    lines = out.splitlines()
    for row, line in zip(rows, lines[1:4], strict=True):
        difference = 100 * (row["metric"] - rows[0]["metric"])
        for word in (str(row["round"]), f"{row['sparsity']:.2%}", f"{row['metric']:.2%}", f"{difference:+.2f}", f"{row['kept']:,}"):
            assert word in line.split()
    assert lines[-1].endswith(str(small_run)) and err == "", "a finished run has nothing to report but its table"


def test_json_prints_the_rows(small_run: Path, capsys: Capture) -> None:
    assert run("find", "digits", *OPTIONS, "--out", str(small_run), "--json") == 0
    assert capsys.readouterr().out == (small_run / "rounds.jsonl").read_text()


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: Capture) -> None:
    words = ("digits", "--steps", "2", "--batch-size", "16", "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "run"), "--json")
    assert run("find", *words) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["round"] for line in out.splitlines()] == [0, 1]
    first, *rest = err.splitlines()
    assert first == "training: digits: 2 steps, batch 16, SGD lr 0.1 cosine, momentum 0.9, weight decay 0.0002"
    assert [line.split()[:2] for line in rest] == [["round", "0/1"], ["round", "1/1"]] and "\x1b" not in err


def test_dropped_tensors_are_said(tmp_path: Path, capsys: Capture) -> None:
    torch.save(models.build("resnet20", 100).state_dict(), tmp_path / "c100.pth")
    words = ("digits", "--steps", "1", "--batch-size", "8", "--rounds", "0", "--weights", str(tmp_path / "c100.pth"))
    assert run("find", *words, "--out", str(tmp_path / "run")) == 0
    assert "dropped from the checkpoint: linear.weight, linear.bias" in capsys.readouterr().err


def test_help_names_every_choice(capsys: Capture) -> None:
    assert run("find", "--help") == 0
    text = capsys.readouterr().out
    words = ("IMAGENET1K_V1", "4x1", "1x16", "[default: 1x1]", "kill -9", "TICKETKIT_DATA")
    for word in (*tasks.names(), *POINTS, *tasks.SCHEDULES, *tasks.RECIPES, *words):
        assert word in text, word


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., str]:
    """A checkpoint of resnet20 with some tensors replaced; its path."""

    def write(**changes: torch.Tensor) -> str:
        torch.save({**models.build("resnet20", 10).state_dict(), **changes}, tmp_path / "c.pth")
        return str(tmp_path / "c.pth")

    return write


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digit"], "unknown task 'digit'; expected one of cifar10"),
        (["digits", "--model", "resnet21"], "unknown model 'resnet21'; expected one of resnet20"),
        (["digits", "--weights", "missing.pth"], "missing.pth: no such checkpoint file"),
        (["digits", "--weights", "IMAGENET1K_V1"], "IMAGENET1K_V1: no such checkpoint file"),
        (["digits", "--weights", __file__], "not a plain state dict"),
        (["cifar10"], "needs --data DIR with cifar-10-batches-py/"),
        (["cifar10", "--data", "missing"], "missing: no such folder"),
        (["fashion-mnist", "--data", "."], "expected FashionMNIST/raw/"),
        (["digits", "--rounds", "2", "--sparsity", "0.9"], "give one of them"),
        (["digits", "--lr", "-1"], "--lr"),
        (["digits", "--granularity", "4by1"], "--granularity: expected RxC with numbers from 1 to 9999, such as 4x1 or 1x16, got '4by1'"),
    ],
)
def test_bad_words(words: list[str], expected: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TICKETKIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert expected in fails_with_one_line(capsys, *words, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "shape", "value", "expected"),
    [
        ("layer1.0.conv1.weight", (16, 16, 3, 3), float("nan"), "layer1.0.conv1.weight holds NaN"),
        ("layer1.0.conv1.weight", (16, 16, 5, 5), 0.0, "the model expects shape (16, 16, 3, 3)"),
        ("layer1.7.conv1.weight", (16, 16, 3, 3), 0.0, "not in the model"),
    ],
)
def test_bad_checkpoints(
    name: str, shape: tuple[int, ...], value: float, expected: str, weights: Callable[..., str], tmp_path: Path, capsys: Capture
) -> None:
    path = weights(**{name: torch.full(shape, value)})
    assert expected in fails_with_one_line(capsys, "digits", "--weights", path, "--out", str(tmp_path / "run"))


def test_truncated_checkpoint(weights: Callable[..., str], tmp_path: Path, capsys: Capture) -> None:
    path = Path(weights())
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated" in fails_with_one_line(capsys, "digits", "--weights", str(path), "--out", str(tmp_path / "run"))


def test_output_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    """Below a regular file, since permissions do not stop root."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        words = ("digits", "--steps", "1", "--rounds", "0", "--out", str(out))
        assert "choose another --out" in fails_with_one_line(capsys, *words)


def test_another_run_in_the_same_place(small_run: Path, capsys: Capture) -> None:
    line = fails_with_one_line(capsys, "digits", *OPTIONS, "--lr", "0.7", "--out", str(small_run))
    assert "lr is 0.05 there, 0.7 here" in line


def test_recipe_is_shown_recorded_and_every_field_of_it_can_be_changed(tmp_path: Path, capsys: Capture) -> None:
    words = ("digits", "--recipe", "paper-visda", "--steps", "4", "--rounds", "0", "--threads", "1", "--out", str(tmp_path / "run"))
    changes = ("--batch-size=8", "--lr=0.5", "--momentum=0", "--weight-decay=0", "--milestones=0.25,0.5", "--warmup=2")
    assert run("find", *words, *changes) == 0
    shown = capsys.readouterr().err.splitlines()[0]
    assert shown == (
        "training: paper-visda: 4 steps, batch 8, SGD lr 0.5 x0.1 at 25 % and 50 %, warm-up 2 steps, momentum 0, weight decay 0"
    )
    config = json.loads((tmp_path / "run" / "run.json").read_text())
    assert config["recipe"] == "paper-visda" and config["milestones"] == [0.25, 0.5] and config["warmup"] == 2
    same = ("digits", "--recipe", "paper-cifar10", *words[3:])
    assert run("find", *same, *changes) == 0, "the numbers define the run, not the recipe's name"
    capsys.readouterr()
    for change, field in (("--momentum=0.1", "momentum"), ("--milestones=0.5", "milestones"), ("--warmup=0", "warmup")):
        assert f"{field} is" in fails_with_one_line(capsys, *words, *changes, change)


def test_granularity_is_part_of_the_run(tmp_path: Path, capsys: Capture) -> None:
    words = ("digits", "--steps", "1", "--batch-size", "8", "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "run"))
    assert run("find", *words, "--granularity", "8x1", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1]["sparsity"] == pytest.approx(0.2, abs=1e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["granularity"] == "8x1"
    assert 'granularity is "8x1" there, "1x1" here' in fails_with_one_line(capsys, *words)


def test_damaged_round_is_named(small_run: Path, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    damaged = Path(shutil.copytree(small_run, tmp_path / "run")) / "round_02" / "ticket.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert run("find", "digits", *OPTIONS, "--rounds=3", "--out", str(tmp_path / "run")) == 1
    recipe, error = capsys.readouterr().err.splitlines()
    assert recipe.startswith("training: ") and error.startswith("ticketkit: error: ")
    assert "round_02/ticket.safetensors: sha256 differs" in error
    assert (tmp_path / "run" / "round_01" / "ticket.safetensors").exists() and not (tmp_path / "run" / "round_03").exists()
