"""`ticketkit verify` as a user meets it: its table, its JSON, its lines, and one line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from small import little  # noqa: E402
from test_cli_find import Capture, run  # noqa: E402

from ticketkit import tasks  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.verifier.origin import CONTROLS, STARTS  # noqa: E402
from ticketkit.verifier.trial import MODES, SELECTIONS  # noqa: E402

FAST = ("--steps=1", "--batch-size=16", "--threads=1")


@pytest.fixture(scope="module")
def store(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished trainings of FAST with two seeds; not to be written to."""
    out = tmp_path_factory.mktemp("cli") / "store"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tasks, "get", little)
        main(["verify", str(small_run), *FAST, "--seeds=2", "--out", str(out), "--json"])
    return out


@pytest.mark.usefixtures("little_digits")
def test_table_and_json_say_the_same(small_run: Path, store: Path, capsys: Capture) -> None:
    words = ("verify", str(small_run), *FAST, "--seeds=2", "--out", str(store))
    assert run(*words, "--json") == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1, "finished trainings have nothing to report"
    report = json.loads(out)
    task = report["tasks"][0]
    assert report["seeds"] == [0, 1] and task["task"] == "digits" and task["dense"]["test"]["n"] == 2
    assert run(*words) == 0
    out, _ = capsys.readouterr()
    row, test = task["rows"][0], task["rows"][0]["test"]
    line = next(line for line in out.splitlines() if line.startswith("ticket"))
    for word in (f"{row['sparsity']:.2%}", f"{100 * test['mean']:.2f} ± {100 * test['sd']:.2f}", f"{100 * row['difference']:+.2f}"):
        assert word in line
    assert line.split()[-1] == ("winning" if row["winning"]["strict"] else "no")
    assert line.split()[-2] == ("winning" if row["winning"]["one_sd"] else "no")
    assert "n = 2" in out and out.rstrip().endswith(str(store))


@pytest.mark.usefixtures("little_digits")
def test_one_seed_is_said_to_have_no_deviation(small_run: Path, store: Path, capsys: Capture) -> None:
    words = ("verify", str(small_run), *FAST, "--seeds=1", "--out", str(store))
    assert run(*words) == 0
    assert "one seed has no standard deviation" in capsys.readouterr().out
    assert run(*words, "--json") == 0
    task = json.loads(capsys.readouterr().out)["tasks"][0]
    assert task["rows"][0]["matching"]["test"]["one_sd"] is None and task["highest"]["one_sd"] is None
    assert task["dense"]["test"]["sd"] is None and task["rows"][0]["matching"]["test"]["strict"] in (True, False)


@pytest.mark.usefixtures("little_digits")
def test_progress_is_plain_lines_where_there_is_no_terminal(small_run: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("verify", str(small_run), *FAST, "--seeds=1", "--control=complement", "--out", str(tmp_path / "store"), "--json")
    assert run(*words) == 0
    recipe, *lines = capsys.readouterr().err.splitlines()
    assert recipe.startswith("training: digits 1 steps, batch 16, SGD lr 0.1 cosine")
    assert lines[0] == "weights: digits: newly initialised: linear.weight, linear.bias" and "\x1b" not in "".join(lines)
    starts = ["digits: dense, seed 0: ", "digits: ticket of level 2, seed 0: ", "digits: control complement of level 2, seed 0: "]
    assert all(line.startswith(start) for line, start in zip(lines[1:], starts, strict=True))
    assert [line[-8:] for line in lines[1:]] == ["(1 of 3)", "(2 of 3)", "(3 of 3)"]


def test_help_names_every_choice(capsys: Capture) -> None:
    assert run("verify", "--help") == 0
    text = capsys.readouterr().out
    for word in (*CONTROLS, *MODES, *SELECTIONS, *STARTS, "strict", "winning", "universal", "kill -9", "TICKETKIT_DATA", "all"):
        assert word in text, word


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--task", "digit"], "unknown task 'digit'; expected one of cifar10"),
        (["--task", "cifar10"], "needs --data DIR"),
        (["--levels", "3"], "--levels: expected all, or rounds of 1 to 2"),
        (["--levels", "0"], "--levels: expected all, or rounds of 1 to 2"),
        (["--control", "randm"], "--control: expected one of random, shuffled, complement, perturb=P, reinit, got 'randm'"),
        (["--control", "perturb"], "--control: expected one of random"),
        (["--control", "perturb=0"], "perturb=P with a fraction P above 0 and at most 1, got 'perturb=0'"),
        (["--control", "perturb=x"], "perturb=P with a fraction P above 0 and at most 1"),
        (["--control", "perturb=1"], "fraction"),
        (["--mode", "probe"], "--mode: expected one of full, linear, got 'probe'"),
        (["--select", "first"], "--select: expected one of last, best, got 'first'"),
        (["--start", "trained", "--control", "complement"], "--control complement: most of its weights are zero"),
        (["--start", "dense"], "--start: expected one of rewound, trained, got 'dense'"),
        (["--dense-weights", "missing.pth"], "missing.pth: no such checkpoint file"),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds: expected 0 or more"),
        (["--epochs", "1"], "--epochs and --steps"),
        (["--lr", "0"], "--lr"),
    ],
)
def test_bad_words(
    small_run: Path, words: list[str], expected: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TICKETKIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert expected in fails_with_one_line(capsys, str(small_run), *FAST, *words, "--out", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("path", "words", "expected"),
    [
        ("missing", [], "missing: no such file or folder"),
        (".", [], "no pruned round is finished"),
        ("round_01/weights.safetensors", [], "a safetensors file but no ticket"),
        ("round_01/ticket.safetensors", ["--levels", "all"], "a ticket file is one level"),
        ("round_01/ticket.safetensors@1", [], "a ticket file is one level"),
        ("round_01@1", ["--levels", "1"], "@1 and --levels both choose rounds"),
        ("round_01/ticket.safetensors", ["--start", "trained"], "--start trained needs the run directory"),
        ("masks.safetensors", [], "this ticket holds masks but no weights"),
        ("nameless.safetensors", [], "does not say of which network it is"),
    ],
)
def test_bad_tickets(small_run: Path, path: str, words: list[str], expected: str, tmp_path: Path, capsys: Capture) -> None:
    from ticketkit.ticket import Ticket

    whole = Ticket.load(small_run / "round_01" / "ticket.safetensors")
    Ticket(whole.masks, {}, whole.meta).save(tmp_path / "masks.safetensors")
    Ticket(whole.masks, whole.weights, {}).save(tmp_path / "nameless.safetensors")
    source = small_run / path if path.startswith("round") else tmp_path / path
    assert expected in fails_with_one_line(capsys, str(source), *words, "--out", str(tmp_path / "store"))


def fails_with_one_line(capsys: Capture, *words: str) -> str:
    assert run("verify", *words) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ticketkit: error: "), err
    return err
