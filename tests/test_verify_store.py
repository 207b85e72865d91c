"""The trainings of `verify`: kept by content, resumed after every kind of stop, and nothing chosen by test images."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from small import little

torch = pytest.importorskip("torch")

from verifying import FAST, Count, planned, results, rewritten  # noqa: E402

from ticketkit import models, tasks  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.tasks import Split  # noqa: E402
from ticketkit.ticket import read_safetensors  # noqa: E402
from ticketkit.verifier import plan as planning  # noqa: E402
from ticketkit.verifier import verify  # noqa: E402
from ticketkit.verifier.origin import Variant  # noqa: E402
from ticketkit.verifier.trial import Selection  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "little_digits")


@pytest.fixture(scope="module")
def store(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished trainings of FAST on the last level of the small run; not to be written to."""
    out = tmp_path_factory.mktemp("verify") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "get", little)
        verify(small_run, **FAST, out=out)
    return out


# the store


def test_second_call_trains_nothing(small_run: Path, store: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    count = Count()
    again = verify(small_run, **FAST, out=own, progress=count)
    assert count.steps == 0 and count.lines == [] and len(results(own)) == 2
    ticket = planned(small_run, out=own).trials["digits", Variant("ticket", 2), 0].key
    assert again.tasks[0].rows[0].test.values == (results(store)[ticket]["test"],)


def test_other_tickets_and_levels_reuse_the_dense_runs(small_run: Path, store: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    count = Count()
    verify(small_run, **FAST, levels="all", controls=["complement"], out=own, progress=count)
    assert count.steps == 3, "level 1, and two complements"
    ticket = rewritten(small_run, tmp_path / "t.safetensors", metric_name="another provenance")
    verify(ticket, **FAST, out=own, progress=count)
    assert count.steps == 3, "the ticket of round 2 as a file is the same training"


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.06},
        {"steps": 2},
        {"batch_size": 17},
        {"schedule": "constant"},
        {"weight_decay": 0.0},
        {"mode": "linear"},
        {"select": "best"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_decides_the_result_is_in_the_key(small_run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    own, other = planned(small_run, out=tmp_path).trials, planned(small_run, **changes, out=tmp_path).trials
    assert not {trial.key for trial in own.values()} & {trial.key for trial in other.values()}
    free = planned(small_run, threads=2, checkpoint_seconds=1, seeds=2, levels="all", out=tmp_path / "elsewhere").trials
    assert {trial.key for trial in own.values()} < {trial.key for trial in free.values()}, "what does not decide it is not"


def test_data_decide_the_key(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = planned(small_run, out=tmp_path).trials["digits", Variant("dense"), 0].key
    monkeypatch.setattr(tasks, "get", lambda name: little(wrong=True))
    assert planned(small_run, out=tmp_path).trials["digits", Variant("dense"), 0].key != own


def test_trainings_in_other_hands_are_waited_for(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = planned(small_run, out=tmp_path).trials["digits", Variant("dense"), 0]
    theirs, count, waited = dense.run.claim(dense.config()), Count(), []
    theirs.__enter__()

    def release(seconds: float) -> None:
        waited.append(len(results(tmp_path)))
        theirs.__exit__(None, None, None)

    monkeypatch.setattr(planning.time, "sleep", release)
    verify(small_run, **FAST, out=tmp_path, progress=count)
    assert waited == [1], "the ticket first, then the dense one"
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '{"val": 0.5}', '{"val": 2, "test": 0, "step": 1, "seconds": 0, "weights_sha256": ""}'])
def test_damaged_result_is_one_clear_line(small_run: Path, store: Path, tmp_path: Path, content: str) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    next(own.glob("*/result.json")).write_text(content)
    with pytest.raises(TicketError, match=r"result\.json: expected the result of a training.*delete its folder") as caught:
        verify(small_run, **FAST, out=own)
    assert "\n" not in str(caught.value)


# stopping and resuming

LONG: dict[str, Any] = {**FAST, "steps": 10, "select": "best"}  # two epochs and a half
DRIVER = """
import os, signal, sys
from small import little
from ticketkit import cli, tasks
from ticketkit.search import progress

class Kill(progress.Progress):
    left = int(sys.argv[1])

    def advance(self, words):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

tasks.get, progress.choose = little, Kill
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def whole(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of LONG without a stop."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "get", little)
        verify(small_run, **LONG, out=out)
    return results(out)


def words(run: Path, store: Path, options: dict[str, Any]) -> list[str]:
    """The call as a command line that saves after every step."""
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return ["verify", str(run), *given, "--checkpoint-seconds=0", "--out", str(store)]


@pytest.mark.parametrize(("at", "done", "left"), [(7, 0, 14), (16, 1, 5)])
def test_killed_past_an_epoch_ends_with_the_same_bits(
    small_run: Path, tmp_path: Path, at: int, done: int, left: int, whole: dict[str, dict[str, Any]]
) -> None:
    """kill -9 in the second epoch of the first or second training, before that step is saved (the published transfer script crashed
    at the end of the first epoch)."""
    command = [sys.executable, "-c", DRIVER, str(at), *words(small_run, tmp_path, LONG)]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **paths}, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(results(tmp_path)) == done and len(list(tmp_path.glob("*/state.safetensors"))) == 1
    count = Count()
    verify(small_run, **LONG, out=tmp_path, progress=count)
    assert count.steps == left, "only what was missing is trained"
    assert results(tmp_path) == whole and not list(tmp_path.glob("*/state.safetensors"))


def test_interrupted_keeps_everything(
    small_run: Path,
    tmp_path: Path,
    whole: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Interrupt(Count):
        def advance(self, words: str) -> None:
            super().advance(words)
            if self.steps == 6:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ticketkit.search.progress.choose", Interrupt)
    with pytest.raises(SystemExit) as stop:
        main(words(small_run, tmp_path, LONG))
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and out == "" and err.strip() == "ticketkit: error: interrupted; what was finished is kept"
    count = Count()
    verify(small_run, **LONG, out=tmp_path, progress=count)
    assert count.steps == 14 and results(tmp_path) == whole


@pytest.mark.parametrize("damage", ["none", "module", "carried/step", "truncated"])
def test_damaged_state_is_one_clear_line(small_run: Path, tmp_path: Path, damage: str) -> None:
    class Stop(Count):
        def advance(self, words: str) -> None:
            if list(tmp_path.glob("*/state.safetensors")):
                raise KeyboardInterrupt

    options = {**FAST, "steps": 8, "select": "best", "mode": "linear", "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        verify(small_run, **options, progress=Stop())
    (path,) = tmp_path.glob("*/state.safetensors")
    tensors, metadata = read_safetensors(path)
    save_file({name: array for name, array in tensors.items() if name != damage and name.partition("/")[0] != damage}, path, metadata)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "none":
        assert len(verify(small_run, **options).tasks) == 1
        return
    with pytest.raises(TicketError, match=r"state\.safetensors: .*delete it, only the round in progress is lost"):
        verify(small_run, **options)


# what is chosen by what


def test_nothing_is_chosen_by_test_images(
    small_run: Path, tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong test labels change the test metric, and nothing else: not the epoch, not the weights, not the validation metric."""
    monkeypatch.setattr(tasks, "get", lambda name: little(wrong=True))
    verify(small_run, **LONG, out=tmp_path)
    chosen = [{key: value for key, value in result.items() if key != "test"} for result in results(tmp_path).values()]
    honest = [{key: value for key, value in result.items() if key != "test"} for result in whole.values()]
    order = lambda result: result["weights_sha256"]  # noqa: E731
    assert sorted(chosen, key=order) == sorted(honest, key=order)
    assert {result["test"] for result in results(tmp_path).values()} != {result["test"] for result in whole.values()}


def test_best_is_the_first_best_epoch_on_validation(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores by script; the test images are measured once, last, and their score (the highest) decides nothing."""
    script = iter([0.3, 0.5, 0.5, 0.2, 0.5, 0.9] * 2)
    asked: list[str] = []
    weights: list[str] = []

    def metric(self: Selection, split: Split) -> float:
        asked.append("test" if split is self.trial.subject.data.test else "val")
        weights.append(models.state_sha256(models.arrays(self.module)))
        return next(script)

    monkeypatch.setattr(Selection, "_metric", metric)
    verify(small_run, **{**LONG, "steps": 16}, out=tmp_path)
    assert asked == ["val", "val", "val", "val", "val", "test"] * 2
    assert {result["step"] for result in results(tmp_path).values()} == {8}
    assert weights[5] == weights[1] != weights[3], "the weights of epoch 2 are measured"
    assert {result["weights_sha256"] for result in results(tmp_path).values()} == {weights[1], weights[7]}


def test_last_weights_are_measured_once(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        Selection, "_metric", lambda self, split: asked.append("test" if split is self.trial.subject.data.test else "val") or 0.5
    )
    verify(small_run, **{**LONG, "select": "last", "steps": 2}, out=tmp_path)
    assert asked == ["val", "test"] * 2
