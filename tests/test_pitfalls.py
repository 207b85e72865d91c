"""What the published code of P1 and P2 got wrong: one test a pitfall, here or elsewhere.

A test here that is called `..._can_fail` puts the bug in and sees its check fail.

    SimCLR's loader never shuffles              test_pitfalls.py::test_simclr_shuffles_its_images
    NT-Xent is -log(mean p)                     test_simclr.py::test_nt_xent_against_the_paper
    momentum survives the rewind                test_pitfalls.py::test_everything_is_rewound
    MoCo's queue survives the rewind            test_pitfalls.py::test_everything_is_rewound
    MoCo's key encoder survives the rewind      test_pitfalls.py::test_everything_is_rewound
    norms, head and stem carried over rounds    test_pitfalls.py::test_everything_is_rewound
    the head is never rewound                   test_pitfalls.py::test_everything_is_rewound
    the schedule goes on after the rewind       test_pitfalls.py::test_everything_is_rewound
    later rounds train longer                   test_pitfalls.py::test_every_round_trains_as_long_as_the_recipe_says
    best accuracy picked on the test set        test_pitfalls.py::test_test_images_decide_nothing
    seed 0 is ignored                           test_search.py::test_seed_zero_is_a_seed
    no state of random numbers in checkpoints   test_pitfalls.py::test_random_numbers_go_on_after_a_resume
    masks stored as float32                     test_pitfalls.py::test_a_mask_takes_a_bit_a_weight
    key surgery by substring                    test_checkpoint_layouts.py::test_names_are_never_cut_in_the_middle
    key surgery by substring, masks             test_ticket.py::test_key_names_are_matched_whole
    whole pickled modules                       test_pitfalls.py::test_pickled_modules_are_refused_unrun
    negative weights frozen                     test_pitfalls.py::test_negative_weights_train
    negative weights pruned first               test_masks.py::test_negative_weights_count_by_magnitude
    transfer crashes at the end of epoch 1      test_verify_store.py::test_killed_past_an_epoch_ends_with_the_same_bits
    resuming a transfer crashes                 test_verify_store.py::test_killed_past_an_epoch_ends_with_the_same_bits
    best epoch of a transfer picked on test     test_verify_store.py::test_nothing_is_chosen_by_test_images
    other masks on every rank                   test_ranks.py::test_masks_are_those_of_one_process_but_for_ties_within_rounding
    other masks on a rank go unseen             test_ranks.py::test_an_error_of_one_is_an_error_of_all
    all ones is not dense                       test_train.py::test_all_ones_mask_trains_bit_identically_to_dense
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import DIGITS, everything, few, few_digits, settings, start

torch = pytest.importorskip("torch")

from ticketkit import masks, models, tasks  # noqa: E402
from ticketkit.errors import ModelError  # noqa: E402
from ticketkit.pretrain._views import TwoViews  # noqa: E402
from ticketkit.pretrain.moco import MoCo  # noqa: E402
from ticketkit.search import setup  # noqa: E402
from ticketkit.search.find import find  # noqa: E402
from ticketkit.search.rewind import POINTS  # noqa: E402
from ticketkit.search.rundir import RunDir  # noqa: E402
from ticketkit.search.train import Training  # noqa: E402
from ticketkit.tasks import Batches, Crops, Data  # noqa: E402
from ticketkit.ticket import Ticket, read_safetensors  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Patch = pytest.MonkeyPatch
State = dict[str, np.ndarray]
SHORT: dict[str, Any] = {"rounds": 1, "steps": 3, "batch_size": 16, "threads": 1}
ROWS = [line.split() for line in str(__doc__).splitlines() if "::" in line]


@pytest.mark.parametrize("place", sorted({row[-1] for row in ROWS}))
def test_every_pitfall_has_its_test(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


# Rewinding ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole network for moco, head and statistics too, other than that of seed 0."""
    module = setup.network("resnet20", "random", 10, 16, 7, MoCo()).module
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.add_(0.25)
    path = tmp_path_factory.mktemp("weights") / "moco.pth"
    torch.save(module.state_dict(), path)
    return path


Seen = dict[tuple[int, int], tuple[State, float]]  # (round, step) -> all state before that step, and the learning rate it will have


def watched(out: Path, point: str, pretrained: Path) -> tuple[RunDir, Seen]:
    """A search with moco, and what was there before every step."""
    seen: Seen = {}
    take = Training._one_step

    def look(self: Training, *batch: Any) -> int:
        state = {key: array.copy() for key, array in self.state().items()}
        seen[self.round, self.step] = state, self.settings.lr_at(self.step)
        return take(self, *batch)

    with Patch.context() as patch:
        patch.setattr(Training, "_one_step", look)
        options = {**SHORT, "objective": "moco", "queue": 40, "momentum": 0.9, "schedule": "cosine"}
        return RunDir(find("digits", weights=str(pretrained), rewind=point, out=out, **options).path), seen


def part(state: State, kind: str) -> State:
    return {key.removeprefix(kind): array for key, array in state.items() if key.startswith(kind)}


def check_rewound(run: RunDir, seen: Seen, point: str, pretrained: Path) -> None:
    """The first round after the dense one starts from what the rewind point says, and from nothing else."""
    first = min(step for round, step in seen if round == 1)
    state, lr = seen[1, first]
    trained, ticket = run.round(0)[0], run.round(1)[1]
    weights = {
        "pretrained": part(seen[0, 0][0], "module/"),
        "init": setup.network("resnet20", "random", 10, 16, 0, MoCo()).initial,
        "early": part(seen[0, 1][0], "module/"),
        "lr": trained,
    }[point]
    assert first == (1 if point == "early" else 0) and lr == seen[0, first][1], "schedule"
    same(part(state, "module/"), ticket.apply(weights), "network")
    early = seen[0, 1][0] if point == "early" else {}
    same(part(state, "momentum/"), part(early, "momentum/"), "momentum")
    own = part(state, "objective/")
    if point == "early":
        expected = part(early, "objective/")
        encoder = ticket.apply(part(expected, "encoder."))
        same(own, {**expected, **{f"encoder.{name}": array for name, array in encoder.items()}}, "key encoder, queue")
        return
    same(part(own, "encoder."), part(state, "module/"), "key encoder")
    assert own["pointer"] == 0, "queue"
    torch.manual_seed(int(np.random.SeedSequence((0, 1)).generate_state(1)[0]))
    np.testing.assert_array_equal(own["queue"], torch.nn.functional.normalize(torch.randn(40, 128), dim=1).numpy(), "queue")


def same(got: State, expected: State, what: str) -> None:
    assert got.keys() == expected.keys(), what
    assert [name for name in got if not np.array_equal(got[name], expected[name])] == [], what


@pytest.mark.parametrize("point", POINTS)
def test_everything_is_rewound(tmp_path: Path, pretrained: Path, point: str) -> None:
    """Weights of stem, backbone and head, norm statistics, momentum, MoCo's queue and key encoder, and the schedule."""
    run, seen = watched(tmp_path / "run", point, pretrained)
    check_rewound(run, seen, point, pretrained)
    steps = [step for round, step in seen if round == 1]
    assert steps == list(range(1 if point == "early" else 0, 3)), "as long as the dense round, less what is rewound"


def carried(kind: str) -> Callable[[Patch], None]:
    """The bug that this survives the rewind, as a patch."""
    begin, init, assign = MoCo.begin, Training.__init__, models.assign
    last: dict[str, Any] = {}

    def keep_own(self: MoCo, network: torch.nn.Module) -> Any:
        fresh, before = begin(self, network), last.get("own")
        if before is not None and kind == "queue":
            fresh.queue, fresh.pointer = before.queue, before.pointer
        elif before is not None:
            fresh.encoder = before.encoder
        last["own"] = fresh
        return fresh

    def keep_momentum(self: Training, *rest: Any, **more: Any) -> None:
        init(self, *rest, **more)
        if "optimizer" in last:
            self.optimizer.load_state_dict(last["optimizer"].state_dict())
        last["optimizer"] = self.optimizer

    def keep_step(self: Training, module: Any, mask: Any, chosen: Any, round: int, first: int = 0, **more: Any) -> None:
        init(self, module, mask, chosen, round, first + round, **more)

    def keep_weights(module: torch.nn.Module, state: Any) -> None:
        now = models.arrays(module)
        assign(module, {name: now[name] if kind in name else array for name, array in state.items()})

    def put(patch: Patch) -> None:
        if kind in ("queue", "key encoder"):
            patch.setattr(MoCo, "begin", keep_own)
        elif kind == "momentum":
            patch.setattr(Training, "__init__", keep_momentum)
        elif kind == "schedule":
            patch.setattr(Training, "__init__", keep_step)
        else:
            patch.setattr(models, "assign", keep_weights)

    return put


@pytest.mark.parametrize("kind", ["queue", "key encoder", "momentum", "schedule", "running_mean", "linear", "conv1.weight"])
def test_everything_is_rewound_can_fail(tmp_path: Path, pretrained: Path, monkeypatch: Patch, kind: str) -> None:
    word = kind if kind in ("queue", "key encoder", "momentum", "schedule") else "network"
    carried(kind)(monkeypatch)
    run, seen = watched(tmp_path / "run", "pretrained", pretrained)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=word):
        check_rewound(run, seen, "pretrained", pretrained)


def test_every_round_trains_as_long_as_the_recipe_says(tmp_path: Path, monkeypatch: Patch) -> None:
    """A recipe in epochs: 2 of 2 batches each, in every round, under one schedule."""
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
    take = Training._one_step

    def look(self: Training, *batch: Any) -> int:
        rates[self.round].append(self.settings.lr_at(self.step))
        return take(self, *batch)

    monkeypatch.setattr(Training, "_one_step", look)
    recipe = replace(DIGITS.recipe, epochs=2, batch_size=16)
    monkeypatch.setitem(tasks.tasks(), "digits", replace(few_digits(), recipe=recipe))
    find("digits", rounds=2, threads=1, out=tmp_path / "run")
    assert len(rates[0]) == 4 and rates[0] == rates[1] == rates[2] and len(set(rates[0])) == 4


# Data and measurement -----------------------------------------------------------------------------------------------------------


def in_disorder(seen: list[np.ndarray], stored: np.ndarray) -> bool:
    """Whether the images came each at most once and not in their stored order."""
    where = {image.tobytes(): index for index, image in enumerate(stored)}
    order = [where[image.tobytes()] for batch in seen for image in batch]
    return len(set(order)) == len(order) and sum(b == a + 1 for a, b in pairwise(order)) < len(order) // 4


def test_simclr_shuffles_its_images(tmp_path: Path, data: Data, monkeypatch: Patch) -> None:
    seen: list[np.ndarray] = []
    render = TwoViews.render

    def look(self: TwoViews, images: np.ndarray, params: Any) -> Any:
        seen.append(images)
        return render(self, images, params)

    monkeypatch.setattr(TwoViews, "render", look)
    find("digits", objective="simclr", out=tmp_path / "run", **{**SHORT, "rounds": 0})
    (first, *_), stored = seen, data.train.images
    unique = np.unique(stored.reshape(len(stored), -1), axis=0, return_index=True)[1]
    assert len(unique) == len(stored), "equal images would have no order"
    assert in_disorder(seen[:3], stored) and len(first) == 16
    assert not in_disorder([stored[:16], stored[16:32], stored[32:48]], stored), "negative control: a loader that never shuffles"


def test_test_images_decide_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    """Other test labels change the metric and nothing else; other held-out labels, val_metric; other training labels, everything."""
    load = DIGITS.load

    def run(name: str) -> RunDir:
        def other(folder: Path | None) -> Data:
            data = few(load(folder))
            if name == "same":
                return data
            split = getattr(data, name)
            return replace(data, **{name: replace(split, labels=(split.labels + 1) % 10)})

        monkeypatch.setitem(tasks.tasks(), "digits", replace(DIGITS, load=other))
        return RunDir(find("digits", out=tmp_path / name, **SHORT).path)

    def bits(run: RunDir) -> list[Any]:
        return [(row["mask_sha256"], (run.folder(k) / "weights.safetensors").read_bytes()) for k, row in enumerate(run.rows())]

    plain, test, val, train = map(run, ("same", "test", "val", "train"))
    assert bits(plain) == bits(test) == bits(val) and bits(plain)[1] != bits(train)[1]
    assert [row["loss"] for row in test.rows()] != [row["loss"] for row in plain.rows()]


# Checkpoints and files ----------------------------------------------------------------------------------------------------------


def test_random_numbers_go_on_after_a_resume(data: Data) -> None:
    """MoCo shuffles by torch's generator in every step."""
    objective = MoCo(queue=40)
    module = setup.network("resnet20", "random", 10, 16, 0, objective).module
    began, chosen = models.arrays(module), settings(steps=3, batch_size=16)
    batches = Batches(data.train, TwoViews(DIGITS), 16)

    def training() -> Training:
        models.assign(module, began)
        return Training(module, masks.full(everything(module)), chosen, 0, objective=objective)

    states: list[State] = []
    training().run(batches, lambda now: states.append({key: array.copy() for key, array in now.state().items()}))

    def resumed(state: State) -> State:
        again = training()
        torch.manual_seed(1234)
        again.load(state)
        again.run(batches, lambda now: None)
        return again.state()

    same(resumed(states[0]), states[2], "resumed")
    torch.manual_seed(5)
    with pytest.raises(AssertionError, match="resumed"):  # the bug: any other state of the generator
        same(resumed({**states[0], "rng": torch.get_rng_state().numpy()}), states[2], "resumed")


def test_a_mask_takes_a_bit_a_weight(small_run: Path, tmp_path: Path) -> None:
    """94 MB as float32 where 2.9 MB do, for ResNet-50."""
    ticket = Ticket.load(small_run / "round_02" / "ticket.safetensors")
    count = sum(mask.size for mask in ticket.masks.values())

    def file(masks_alone: Ticket) -> int:
        return masks_alone.save(tmp_path / "masks.safetensors").stat().st_size

    empty = {name: np.zeros((0, *mask.shape[1:]), np.bool_) for name, mask in ticket.masks.items()}
    overhead = file(Ticket(empty, {}, ticket.meta))
    assert count / 8 <= file(Ticket(ticket.masks, {}, ticket.meta)) - overhead <= count / 8 + 32 * len(ticket.masks) < count
    tensors, _ = read_safetensors(tmp_path / "masks.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.uint8)}


class Trap(torch.nn.Module):
    """A module that makes a folder when it is unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["path"]).mkdir()


def test_pickled_modules_are_refused_unrun(tmp_path: Path) -> None:
    trap, sprung = Trap(), tmp_path / "sprung"
    trap.path = str(sprung)
    torch.save(trap, tmp_path / "module.pth")
    (tmp_path / "module.pkl").write_bytes(pickle.dumps(trap))
    for file in ("module.pth", "module.pkl"):
        with pytest.raises(ModelError, match=file) as caught:
            find("digits", weights=str(tmp_path / file), out=tmp_path / "run", **SHORT)
        assert "\n" not in str(caught.value) and not sprung.exists() and not (tmp_path / "run").exists()
    torch.load(tmp_path / "module.pth", weights_only=False)
    assert sprung.is_dir(), "negative control: the trap is one"


def test_negative_weights_train(data: Data, monkeypatch: Patch) -> None:
    """`tensor < eps` without abs, as a popular re-implementation had it, froze every negative weight."""

    def moved() -> tuple[float, float]:
        module = start()
        before = np.concatenate([array.ravel() for array in everything(module).values()])
        training = Training(module, masks.full(everything(module)), settings(batch_size=8, weight_decay=0.0), 0)
        training.run(Batches(data.train, Crops(DIGITS), 8), lambda now: None)
        after = np.concatenate([array.ravel() for array in everything(module).values()])
        return float((after != before)[before < 0].mean()), float((after != before)[before > 0].mean())

    assert min(moved()) > 0.99
    take = Training._one_step

    def frozen(self: Training, *batch: Any) -> int:
        before = [weight.clone() for weight in self._weights]
        right = take(self, *batch)
        for weight, old in zip(self._weights, before, strict=True):
            weight.copy_(torch.where(old < 1e-6, old, weight))
        return right

    monkeypatch.setattr(Training, "_one_step", frozen)
    assert moved()[0] == 0.0
