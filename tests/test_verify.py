"""`verify`: what is trained from which weights under which masks, and on several tasks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small import little

torch = pytest.importorskip("torch")

from verifying import FAST, planned, results, rewritten, trainings  # noqa: E402

from ticketkit import masks, models, tasks  # noqa: E402
from ticketkit.errors import ModelError, TicketError  # noqa: E402
from ticketkit.search.progress import Lines  # noqa: E402
from ticketkit.ticket import Ticket, read_safetensors  # noqa: E402
from ticketkit.verifier import table, verify  # noqa: E402
from ticketkit.verifier.origin import Variant  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "little_digits")


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
    assert [variant.level for variant in planned(f"{small_run}@1", out=tmp_path).variants] == [None, 1]
    assert [variant.level for variant in planned(small_run, out=tmp_path).variants] == [None, 2]


# θ and θ_p


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


def test_learning_rate_rewinding_began_with_the_pretrained_weights(small_run: Path, tmp_path: Path) -> None:
    """Its tickets hold trained weights; those of rewind.safetensors are θ_p."""
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    ticket = Ticket.load(run / "round_02" / "ticket.safetensors")
    trained, _ = read_safetensors(run / "round_01" / "weights.safetensors")
    Ticket(ticket.masks, trained, {**ticket.meta, "rewind": "lr"}).save(run / "round_02" / "ticket.safetensors")
    plan = planned(run, out=tmp_path)
    assert plan.origin.dense_sha256 == planned(small_run, out=tmp_path).origin.dense_sha256
    assert plan.identities[Variant("ticket", 2), 0].weights_sha256 != plan.origin.dense_sha256, "so it cannot be winning"


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


def test_a_diverged_training_is_a_result_and_said(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(small_run, **{**FAST, "steps": 3, "lr": 1e30}, out=tmp_path, progress=Lines(sys.stdout))
    (task,) = report.tasks
    seeds = len(report.seeds)
    assert task.diverged == task.rows[0].diverged == seeds and all(found["diverged"] for found in results(tmp_path).values())
    assert "digits: dense, seed 0: training diverged: the loss is" in capsys.readouterr().out
    assert task.to_dict()["rows"][0]["diverged"] == seeds and any("2 trainings diverged" in note for note in table._notes(report))
    again = verify(small_run, **{**FAST, "steps": 3, "lr": 1e30}, out=tmp_path)
    assert again.to_dict() == report.to_dict(), "finished: not tried again"
    assert verify(small_run, **FAST, out=tmp_path).tasks[0].diverged == 0
