"""`verify`: what is trained from what, the store, and that nothing is chosen by test images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small import little

torch = pytest.importorskip("torch")

from ticketkit import masks, models, tasks  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.errors import ModelError, TicketError  # noqa: E402
from ticketkit.search.progress import Progress  # noqa: E402
from ticketkit.search.train import Training  # noqa: E402
from ticketkit.tasks import Split  # noqa: E402
from ticketkit.ticket import Ticket, read_safetensors  # noqa: E402
from ticketkit.verifier import plan as planning  # noqa: E402
from ticketkit.verifier import verify  # noqa: E402
from ticketkit.verifier.origin import Variant  # noqa: E402
from ticketkit.verifier.plan import Plan  # noqa: E402
from ticketkit.verifier.trial import Selection  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "little_digits")
FAST: dict[str, Any] = {"seeds": 1, "steps": 1, "batch_size": 16, "lr": 0.05, "threads": 1}


class Count(Progress):
    """Counts the steps that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.lines = 0, list[str]()

    def advance(self, words: str) -> None:
        self.steps += 1

    def say(self, line: str) -> None:
        self.lines.append(line)


def planned(run: Path, *names: str, **options: Any) -> Plan:
    """The plan of a call, nothing trained."""

    class Planned(Exception):
        pass

    def stop(self: Plan, *rest: object) -> None:
        raise Planned(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Planned) as caught:
        patch.setattr(Plan, "train", stop)
        verify(run, names, **{**FAST, **options})
    found: Plan = caught.value.args[0]
    return found


@contextmanager
def trainings() -> Iterator[list[tuple[Training, dict[str, np.ndarray]]]]:
    """Every training that begins, with what it starts from."""
    seen: list[tuple[Training, dict[str, np.ndarray]]] = []
    original = Training.__init__

    def remember(self: Training, module: torch.nn.Module, *rest: object, **more: object) -> None:
        seen.append((self, models.arrays(module)))
        original(self, module, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", remember)
        yield seen


def results(store: Path) -> dict[str, dict[str, Any]]:
    """By key, without the seconds."""
    found = {path.parent.name: json.loads(path.read_text()) for path in store.glob("*/result.json")}
    return {key: {name: value for name, value in result.items() if name != "seconds"} for key, result in found.items()}


@pytest.fixture(scope="module")
def store(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished trainings of FAST on the last level of the small run; not to be written to."""
    out = tmp_path_factory.mktemp("verify") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "get", little)
        verify(small_run, **FAST, out=out)
    return out


# what is trained


def test_dense_and_ticket_start_alike_but_for_the_mask(small_run: Path, tmp_path: Path) -> None:
    ticket = Ticket.load(small_run / "round_02" / "ticket.safetensors")
    with trainings() as seen:
        verify(small_run, **{**FAST, "seeds": 2}, out=tmp_path / "store")
    (dense, dense_1, sparse, sparse_1) = [start for _, start in seen]
    assert all(np.array_equal(dense[name], ticket.weights[name]) for name in dense if not name.startswith("linear"))
    assert all(np.array_equal(sparse[name], ticket.apply(dense)[name]) for name in sparse), "the head too is the dense one's"
    assert not np.array_equal(dense["linear.weight"], dense_1["linear.weight"]), "each seed has its own head"
    assert not np.array_equal(dense_1["linear.weight"], ticket.weights["linear.weight"]), "a new one"
    assert np.array_equal(dense_1["linear.weight"], sparse_1["linear.weight"])
    values = list(results(tmp_path / "store").values())
    assert len({value["weights_sha256"] for value in values}) == 4


def test_start_from_the_sparse_trained_weights(small_run: Path, tmp_path: Path) -> None:
    trained, _ = read_safetensors(small_run / "round_01" / "weights.safetensors")
    with trainings() as seen:
        report = verify(small_run, **FAST, levels=[1], start="trained", out=tmp_path / "store")
    assert all(np.array_equal(seen[1][1][name], trained[name]) for name in trained if not name.startswith("linear"))
    assert not report.tasks[0].rows[0].pretrained, "trained weights are not the pretrained ones"


def test_linear_probe_leaves_the_backbone_alone(small_run: Path, tmp_path: Path) -> None:
    with trainings() as seen:
        verify(small_run, **{**FAST, "steps": 2}, mode="linear", select="best", out=tmp_path / "store")
    for training, start in seen:
        end = models.arrays(training.module)
        assert {name for name in end if not np.array_equal(end[name], start[name])} == {"linear.weight", "linear.bias"}


def test_controls_change_one_thing(small_run: Path, tmp_path: Path) -> None:
    kinds = ["random", "shuffled", "complement", "perturb=0.1", "reinit"]
    plan = planned(small_run, controls=[*kinds, "random"], levels=[2], seeds=2, out=tmp_path)
    ticket = Variant("ticket", 2)
    assert plan.variants == [Variant("dense"), ticket, *(Variant(kind, 2) for kind in kinds)]
    hashes = {kind: [plan.identities[Variant(kind, 2), seed].mask_sha256 for seed in (0, 1)] for kind in ["ticket", *kinds]}
    assert hashes["ticket"] == hashes["reinit"] and hashes["ticket"][0] == hashes["ticket"][1]
    assert all(hashes[kind][0] != hashes[kind][1] for kind in ("random", "shuffled", "perturb=0.1")), "drawn anew for each seed"
    assert len({each[0] for each in hashes.values()}) == 5, "all differ but reinit's"
    own = plan.origin.masks(ticket, 0)
    for kind in ("random", "shuffled", "perturb=0.1"):
        other = plan.origin.masks(Variant(kind, 2), 0)
        assert masks.kept(other) == masks.kept(own) and (masks.layer_sparsity(other) == masks.layer_sparsity(own)) == (kind == "shuffled")
    assert all(np.array_equal(other, ~own[name]) for name, other in plan.origin.masks(Variant("complement", 2), 0).items())
    weights = {kind: plan.identities[Variant(kind, 2), 0].weights_sha256 for kind in kinds}
    assert {kind for kind, sha256 in weights.items() if sha256 != plan.origin.dense_sha256} == {"reinit"}


def test_reinit_starts_from_the_random_weights_of_the_seed(small_run: Path, tmp_path: Path) -> None:
    plan = planned(small_run, controls=["reinit"], seeds=2, out=tmp_path)
    starts = [models.arrays(plan.trials["digits", Variant("reinit", 2), seed].begin()[0]) for seed in (0, 1)]
    mask = plan.origin.masks(Variant("reinit", 2), 0)
    for seed, start in enumerate(starts):
        torch.manual_seed(seed)
        expected = Ticket(mask).apply(models.arrays(models.build("resnet20", 10, 16)))
        assert all(np.array_equal(start[name], expected[name]) for name in expected)
    assert not np.array_equal(starts[0]["conv1.weight"], starts[1]["conv1.weight"])


def test_all_levels_are_the_pruned_rounds(small_run: Path, tmp_path: Path) -> None:
    assert [variant.level for variant in planned(small_run, levels="all", out=tmp_path).variants] == [None, 1, 2]
    assert [variant.level for variant in planned(small_run, levels=[2, 1, 2], out=tmp_path).variants] == [None, 1, 2]
    assert [variant.level for variant in planned(small_run, out=tmp_path).variants] == [None, 2]


# θ and θ_p


def rewritten(run: Path, to: Path, **meta: Any) -> Path:
    """The ticket of round 2 with another provenance."""
    ticket = Ticket.load(run / "round_02" / "ticket.safetensors")
    kept = {key: value for key, value in {**ticket.meta, **meta}.items() if value is not None}
    return Ticket(ticket.masks, ticket.weights, kept).save(to)


def test_dense_weights_must_be_known(small_run: Path, tmp_path: Path) -> None:
    for rewind in ("init", None):
        with pytest.raises(TicketError, match="give them with --dense-weights"):
            planned(rewritten(small_run, tmp_path / "t.safetensors", rewind=rewind), out=tmp_path)
    assert planned(rewritten(small_run, tmp_path / "t.safetensors", rewind="pretrained"), out=tmp_path)


def test_weights_decide_what_can_win_whatever_the_ticket_says(small_run: Path, tmp_path: Path) -> None:
    path = rewritten(small_run, tmp_path / "t.safetensors", rewind="init")
    same, other = dict(Ticket.load(path).weights), dict(Ticket.load(path).weights)
    other["bn1.bias"] = other["bn1.bias"] + 1
    same["linear.bias"] = same["linear.bias"] + 1  # the head, new in each training, is no part of θ
    for name, weights, wins in (("same", same, True), ("other", other, False)):
        save_file(weights, tmp_path / f"{name}.safetensors")
        plan = planned(path, dense_weights=tmp_path / f"{name}.safetensors", out=tmp_path)
        assert (plan.identities[Variant("ticket"), 0].weights_sha256 == plan.origin.dense_sha256) == wins


def test_run_directory_may_hold_the_pretrained_weights(small_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    own = planned(run, out=tmp_path).origin.dense_sha256
    weights = Ticket.load(run / "round_02" / "ticket.safetensors").weights
    save_file({**weights, "bn1.bias": weights["bn1.bias"] + 1}, run / "pretrained.safetensors")
    assert planned(run, out=tmp_path).origin.dense_sha256 != own


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


@pytest.mark.parametrize("damage", ["none", "module", "kept/step", "truncated"])
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


# several tasks


def test_several_tasks(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second task of another number of classes: a new head, dense runs of its own, universal over both."""

    monkeypatch.setattr(tasks, "get", lambda name: little(name, 10 if name == "digits" else 2))
    with trainings() as seen:
        report = verify(small_run, ["digits", "halves", "digits"], **FAST, out=tmp_path)
    assert [task.task for task in report.tasks] == ["digits", "halves"]
    assert [start["linear.weight"].shape for _, start in seen] == [(10, 64), (10, 64), (2, 64), (2, 64)]
    verdicts = [task.rows[0].matching_test.strict for task in report.tasks]
    assert report.universal[0].test.strict == all(verdicts)


def test_linear_probe_of_a_new_stem_is_refused(tmp_path: Path) -> None:
    """A stem for large images would be random for small ones, and frozen."""
    torch.manual_seed(0)
    module = models.build("resnet18", 10, 224)
    weights = models.arrays(module)
    names = models.prunable("resnet18", module)
    mask = masks.random(masks.full({name: weights[name] for name in names}), 0.5, 0)
    path = Ticket(mask, weights, {"model": "resnet18", "rewind": "pretrained"}).save(tmp_path / "t.safetensors")
    with pytest.raises(ModelError, match=r"digits: conv1\.weight has another shape .* use --mode full"):
        verify(path, ["digits"], **FAST, mode="linear", out=tmp_path / "store")
    trial = planned(path, "digits", out=tmp_path).trials["digits", Variant("ticket"), 0]
    assert trial.begin()[2] == ("dropped from the checkpoint: conv1.weight", "newly initialised: conv1.weight, fc.weight, fc.bias")


def test_divergence_names_the_training(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^digits: dense, seed 0: training diverged"):
        verify(small_run, **{**FAST, "steps": 3, "lr": 1e30}, out=tmp_path)
    assert os.listdir(tmp_path) and results(tmp_path) == {}
