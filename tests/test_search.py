"""The search: Algorithm 1, rewinding, and resuming after every kind of stop."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN
from safetensors.numpy import save
from small import DIGITS, TINY, everything, settings, start

torch = pytest.importorskip("torch")

from ticketkit import masks, models, tasks  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.pretrain.supervised import Supervised  # noqa: E402
from ticketkit.search import setup  # noqa: E402
from ticketkit.search.find import find, load_round  # noqa: E402
from ticketkit.search.progress import Progress  # noqa: E402
from ticketkit.search.rewind import step_of  # noqa: E402
from ticketkit.search.rundir import RunDir  # noqa: E402
from ticketkit.search.settings import settings as settings_of  # noqa: E402
from ticketkit.search.train import Training  # noqa: E402
from ticketkit.tasks import Batches, Crops, Data, Task  # noqa: E402
from ticketkit.ticket import read_safetensors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_run_directory_keeps_its_contract(small_run: Path, data: Data) -> None:
    config = json.loads((small_run / "run.json").read_text())
    assert config["task"] == "digits" and config["input_shape"] == [3, 16, 16] and config["seed"] == 0
    assert config["data_sha256"] == data.sha256 and config["weights"] == "random"
    rows, tickets = rows_of(small_run), []
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows:
        module, _, ticket = load_round(small_run, row["round"])
        tickets.append(ticket)
        assert row["sparsity"] == ticket.sparsity == pytest.approx(1 - 0.8 ** row["round"], abs=1e-5)
        assert row["mask_sha256"] == ticket.mask_sha256
        assert set(ticket.masks) == set(models.prunable("resnet20", module))
        assert {"conv1", "linear"} == {*ticket.meta["stem"], *ticket.meta["head"]}
        assert ticket.meta["ticket_metric"] == [row["metric"]] and ticket.meta["dense_metric"] == [rows[0]["metric"]]
        stored, _ = read_safetensors(small_run / f"round_{row['round']:02d}" / "weights.safetensors")
        assert stored.keys() == module.state_dict().keys()
        zeros = {name: int((array == 0).sum()) for name, array in stored.items() if name.endswith("weight")}
        assert all((stored[name][~mask] == 0).all() for name, mask in ticket.masks.items())
        assert zeros["conv1.weight"] == zeros["linear.weight"] == 0, "stem and head are never pruned"
        total = sum(parameter.numel() for parameter in module.parameters())
        assert row["sparsity_model"] == pytest.approx(sum((~mask).sum() for mask in ticket.masks.values()) / total)
    for inner, outer in zip(tickets[1:], tickets, strict=False):
        assert masks.is_nested(inner.masks, outer.masks) and not masks.is_nested(outer.masks, inner.masks)
        assert all(np.array_equal(inner.weights[name], outer.weights[name]) for name in outer.weights), "one rewind point"
    assert not (small_run / "state.safetensors").exists()


def test_masks_follow_trained_magnitudes_not_rewound_ones(small_run: Path) -> None:
    dense, _ = read_safetensors(small_run / "round_00" / "weights.safetensors")
    _, _, first = load_round(small_run, 1)
    names = list(first.masks)
    expected = masks.global_magnitude(dense, masks.full({name: dense[name] for name in names}), 0.2)
    assert all(np.array_equal(first.masks[name], expected[name]) for name in names)
    rewound = masks.global_magnitude(first.weights, masks.full({name: dense[name] for name in names}), 0.2)
    assert not all(np.array_equal(first.masks[name], rewound[name]) for name in names)


def test_metric_is_measured_on_the_stored_weights(small_run: Path, data: Data) -> None:
    module, config, _ = load_round(small_run)
    score, loss = Supervised().evaluate(module.to(memory_format=torch.channels_last), DIGITS, data.test, config["num_classes"])
    assert score == pytest.approx(rows_of(small_run)[-1]["metric"], abs=1 / 360 + 1e-9)
    assert loss == pytest.approx(rows_of(small_run)[-1]["loss"], rel=1e-3)


COMMAND = ["find", "digits", "--checkpoint-seconds", "0"]
OPTIONS = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL_RUN.items()]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["kill -9", "Ctrl-C"])
def test_stopped_in_mid_epoch_ends_with_the_same_masks(tmp_path: Path, small_run: Path, how: signal.Signals, code: int) -> None:
    """Stopped in round 1, step 3 of an epoch of 5; the same command again goes on from there."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ticketkit.cli", *COMMAND, *OPTIONS, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    position, deadline = [0, 0], time.monotonic() + 200
    while position < [1, 3] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        if (out / "state.safetensors").exists() and len(rows_of(out) if (out / "rounds.jsonl").exists() else []) == 1:
            state = RunDir(out).state(1)
            position = state[0]["position"].tolist() if state else position
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert len(rows_of(out)) == 1 and RunDir(out).state(1) is not None, "stopped within round 1, its state kept"
    if how == signal.SIGINT:
        assert errors.strip().splitlines()[-1].endswith("interrupted; what was finished is kept") and "Traceback" not in errors
    steps: list[int] = []

    class Count(Progress):
        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            steps.append(round)

    resumed = find("digits", out=out, progress=Count(), **SMALL_RUN)
    assert steps.count(0) == 0 and 0 < steps.count(1) <= 4 and steps.count(2) == 7, "only what was missing is trained"
    assert [row["mask_sha256"] for row in resumed.rows] == [row["mask_sha256"] for row in rows_of(small_run)]
    for name in ("weights.safetensors", "ticket.safetensors"):
        assert (out / "round_02" / name).read_bytes() == (small_run / "round_02" / name).read_bytes()


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def test_finished_run_is_returned_at_once_and_can_be_prolonged(small_run: Path, tmp_path: Path) -> None:
    run = copied(small_run, tmp_path)
    before = (run / "round_02" / "ticket.safetensors").stat().st_mtime_ns
    assert find("digits", out=run, **SMALL_RUN).rows == rows_of(small_run)
    assert len(find("digits", out=run, **{**SMALL_RUN, "rounds": 1}).rows) == 2
    longer = find("digits", out=run, **{**SMALL_RUN, "rounds": 3})
    assert longer.rows[:3] == rows_of(small_run) and longer.ticket.sparsity == pytest.approx(0.488, abs=1e-3)
    assert (run / "round_02" / "ticket.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 0.06}, "lr is 0.05 there, 0.06 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"steps": 8}, "steps is 7 there, 8 here"),
        ({"rate": 0.3}, "rate is 0.2"),
        ({"rewind": "init"}, "rewind is"),
        ({"granularity": "4x1"}, 'granularity is "1x1" there, "4x1" here'),
        ({"model": "resnet32"}, "model is"),
        ({"batch_size": 128, "schedule": "constant"}, "batch_size is 256 there, 128 here; schedule is"),
    ],
)
def test_another_configuration_in_the_same_directory_is_refused(small_run: Path, changes: dict[str, object], field: str) -> None:
    before = (small_run / "run.json").read_bytes()
    with pytest.raises(TicketError, match=field) as caught:
        find("digits", out=small_run, **{**SMALL_RUN, **changes})
    assert "\n" not in str(caught.value) and (small_run / "run.json").read_bytes() == before


def test_runs_from_before_recipes_and_warm_up_go_on(small_run: Path, tmp_path: Path) -> None:
    run = copied(small_run, tmp_path)
    config = json.loads((run / "run.json").read_text())
    assert config.pop("recipe") == "digits" and config.pop("warmup") == 0
    (run / "run.json").write_text(json.dumps(config))
    assert find("digits", out=run, **SMALL_RUN).rows == rows_of(small_run)
    with pytest.raises(TicketError, match="warmup is 0 there, 1 here"):
        find("digits", out=run, warmup=1, **SMALL_RUN)


def test_two_searches_do_not_share_a_directory(small_run: Path) -> None:
    run = RunDir(small_run)
    with run.claim(run.config()), pytest.raises(TicketError, match="another process"):
        find("digits", out=small_run, **SMALL_RUN)
    assert len(find("digits", out=small_run, **SMALL_RUN).rows) == 3, "the claim ends with its block"


def test_leftovers_of_a_crash_are_cleared(small_run: Path, tmp_path: Path) -> None:
    run = copied(small_run, tmp_path)
    leftover = run / "round_01" / ".ticket.safetensors.abc.tmp"
    leftover.write_bytes(b"half")
    find("digits", out=run, **SMALL_RUN)
    assert not leftover.exists()


def test_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(TicketError, match="not empty"):
        find("digits", out=tmp_path, **TINY)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("file", ["run.json", "rounds.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_damaged_run_directory_is_one_clear_line(small_run: Path, tmp_path: Path, file: str, content: bytes) -> None:
    run = copied(small_run, tmp_path)
    (run / file).write_bytes(content)
    with pytest.raises(TicketError, match=file) as caught:
        load_round(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "model", "num_classes", "input_shape", "mean", "std", "classes", "threads"])
@pytest.mark.parametrize("value", [None, {}])
def test_incomplete_run_json_is_one_clear_line(small_run: Path, tmp_path: Path, key: str | None, value: object) -> None:
    run = copied(small_run, tmp_path)
    config = json.loads((run / "run.json").read_text())
    damaged = {} if key is None else {**config, key: value} if value is not None else {k: v for k, v in config.items() if k != key}
    (run / "run.json").write_text(json.dumps(damaged))
    for use in (lambda: load_round(run), lambda: find("digits", out=run, **SMALL_RUN)):
        with pytest.raises(TicketError, match=f"run.json: expected '{key or 'model'}'") as caught:
            use()
        assert "\n" not in str(caught.value) and "choose another --out" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("round", None), ("round", 2), ("metric", None), ("metric", "x"), ("kept", None)])
def test_incomplete_row_is_one_clear_line(small_run: Path, tmp_path: Path, key: str, value: object) -> None:
    run = copied(small_run, tmp_path)
    rows = rows_of(run)
    rows[1] = {**rows[1], key: value}
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "round 1 in line 2" if value == 2 else f"'{key}'"
    for use in (lambda: load_round(run), lambda: find("digits", out=run, **SMALL_RUN)):
        with pytest.raises(TicketError, match=rf"rounds\.jsonl: expected {words}") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["none", "position", "rng", "module", "seconds", "shape", "unknown", "short rng", "truncated"])
def test_damaged_state_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    options = {**TINY, "rounds": 0, "steps": 2}
    run = RunDir(tmp_path / "run")

    class Stop(Progress):
        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            if (run.path / "state.safetensors").exists():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("digits", out=run.path, checkpoint_seconds=0, progress=Stop(), **options)
    path = run.path / "state.safetensors"
    tensors, metadata = read_safetensors(path)
    if damage in ("position", "rng", "module"):
        tensors = {name: array for name, array in tensors.items() if name.partition("/")[0] != damage}
    changed = {"shape": {"position": np.zeros(1, np.int64)}, "unknown": {"else": np.zeros(1)}, "short rng": {"rng": np.zeros(3, np.uint8)}}
    whole = save({**tensors, **changed.get(damage, {})}, {} if damage == "seconds" else metadata)
    path.write_bytes(whole[:-9] if damage == "truncated" else whole)
    if damage == "none":
        assert len(find("digits", out=run.path, **options).rows) == 1
        return
    with pytest.raises(TicketError, match=r"state\.safetensors: .*delete it, only the round in progress is lost") as caught:
        find("digits", out=run.path, **options)
    assert "\n" not in str(caught.value)


def test_round_that_is_not_there(small_run: Path, tmp_path: Path) -> None:
    for run, round in ((small_run, 3), (small_run, -1), (tmp_path, None), (tmp_path / "missing", None)):
        with pytest.raises(TicketError):
            load_round(run, round)
    broken = copied(small_run, tmp_path)
    path = broken / "round_02" / "ticket.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TicketError, match=r"ticket\.safetensors"):
        load_round(broken)
    assert load_round(broken, 1)[2].meta["round"] == 1, "other rounds stay readable"


def test_seed_zero_is_a_seed(tmp_path: Path) -> None:
    """`if args.seed` in published code ignored it."""
    runs = [find("digits", out=tmp_path / str(i), **{**TINY, "rounds": 0, "seed": seed}) for i, seed in enumerate((0, 0, 1))]
    weights = [(run.path / "round_00" / "weights.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] != weights[2]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pretrained.pth"
    torch.save(start().state_dict(), path)
    return path


def starts_of(tmp_path: Path, point: str, pretrained: Path, steps: int) -> tuple[list[dict[str, np.ndarray]], list[int], Path]:
    """What each round starts from, and how many steps it takes."""
    seen: list[dict[str, np.ndarray]] = []
    counts = [0, 0]
    original = Training.__init__

    class Count(Progress):
        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            counts[round] += 1

    def remember(self: Training, module: torch.nn.Module, *rest: object, **more: object) -> None:
        seen.append(models.arrays(module))
        original(self, module, *rest, **more)  # type: ignore[arg-type]
        assert not self.optimizer.state, "momentum starts empty"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", remember)
        run = find("digits", out=tmp_path, weights=str(pretrained), rewind=point, progress=Count(), **{**TINY, "steps": steps})
    return seen, counts, run.path


def test_rewind_to_pretrained_weights(tmp_path: Path, pretrained: Path) -> None:
    (first, second), counts, _ = starts_of(tmp_path / "run", "pretrained", pretrained, 2)
    expected = models.arrays(start())
    assert all(np.array_equal(first[name], expected[name]) and np.array_equal(second[name], expected[name]) for name in expected)
    assert counts == [2, 2]


def test_rewind_to_initialisation(tmp_path: Path, pretrained: Path) -> None:
    (first, second), counts, _ = starts_of(tmp_path / "run", "init", pretrained, 2)
    expected, initial = models.arrays(start()), setup.network("resnet20", "random", 10, 16, 0, Supervised()).initial
    assert all(np.array_equal(first[name], expected[name]) and np.array_equal(second[name], initial[name]) for name in expected)
    assert not np.array_equal(first["conv1.weight"], second["conv1.weight"]) and counts == [2, 2]


def test_rewind_to_early_weights(tmp_path: Path, pretrained: Path, data: Data) -> None:
    """After 5 % of 20 steps, that is 1: weights and norm statistics are those of a one-step training, and 19 steps follow."""
    (first, second), counts, run = starts_of(tmp_path / "run", "early", pretrained, 20)
    chosen = settings(steps=20, lr=DIGITS.recipe.lr, weight_decay=DIGITS.recipe.weight_decay)
    one_step = Training(start(), masks.full(everything(start())), chosen, round=0)

    class Enough(Exception):
        pass

    def stop(now: Training) -> None:
        raise Enough

    with pytest.raises(Enough):
        one_step.run(Batches(data.train, Crops(DIGITS), 32), stop)
    expected = models.arrays(one_step.module)
    assert all(np.array_equal(second[name], expected[name]) for name in expected)
    assert not np.array_equal(first["bn1.running_mean"], second["bn1.running_mean"]) and counts == [20, 19]
    _, _, ticket = load_round(run, 1)
    assert np.array_equal(ticket.weights["conv1.weight"], expected["conv1.weight"])


@pytest.mark.parametrize(("point", "steps", "expected"), [("pretrained", 100, 0), ("init", 1, 0), ("early", 100, 5), ("early", 2, 1)])
def test_rewind_steps(point: str, steps: int, expected: int) -> None:
    assert step_of(point, steps) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 1, "sparsity": 0.5}, "say the same"),
        ({"epochs": 1, "steps": 5}, "say the same"),
        ({"rounds": -1}, "--rounds"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": 1.0}, "--rate"),
        *[({"granularity": word}, "--granularity") for word in ("", "4", "4x", "0x1", "4x1x1", "-4x1", "4X1", "4x1\n", "12345x1")],
        ({"epochs": 0}, "--epochs"),
        ({"steps": 0}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"schedule": "step"}, "--schedule"),
        ({"recipe": "paper"}, "--recipe: expected one of paper-imagenet"),
        *[({"momentum": value}, "--momentum") for value in (-0.1, 1.0, float("nan"))],
        *[({"warmup": value, "steps": 5}, "--warmup: .* fewer than the 5") for value in (-1, 5)],
        *[({"milestones": at, "schedule": "multistep"}, "--milestones") for at in ([], [0.0], [1.0], [0.7, 0.5], [0.5, 0.5], [math.nan])],
        ({"milestones": [0.5]}, "--milestones: only --schedule multistep has them, got cosine"),
        ({"recipe": "paper-moco", "schedule": "multistep"}, "--milestones: expected .* got none"),
        ({"seed": -1}, "--seed"),
        ({"threads": 0}, "--threads"),
        ({"checkpoint_seconds": float("nan")}, "--checkpoint-seconds"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds"),
        ({"rewind": "late"}, "rewind point"),
        ({"rewind": "early", "steps": 1}, "at least 2 steps"),
    ],
)
def test_senseless_options_are_refused_before_anything_is_written(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(TicketError, match=words):
        find("digits", out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_recipe_of_the_paper_is_the_default() -> None:
    """P1, Table 1: 182 epochs, batch 256, lr 0.1 falling at epochs 91 and 136, weight decay 2e-4."""
    task: Task = tasks.get("cifar10")
    chosen = settings_of(task, 45_000, 0)
    assert (chosen.batch_size, chosen.lr, chosen.weight_decay, chosen.momentum) == (256, 0.1, 2e-4, 0.9)
    per_epoch = 45_000 // 256
    assert chosen.steps == 182 * per_epoch
    rates = [chosen.lr_at(epoch * per_epoch) for epoch in (0, 90, 91, 135, 136, 181)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_random_numbers_and_threads_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    find("digits", out=tmp_path / "run", **{**TINY, "rounds": 0})
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
