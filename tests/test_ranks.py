"""Two processes train as one: batch norms, gradients, queues, masks and errors against a single process on the whole batch.

Sums in another order differ by rounding. How much that is here is measured, not guessed: by how much the single process in float32
differs from float64. Two processes may differ from float64 by `ROUNDINGS` times that; what is wrong differs by far more.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

import peers  # noqa: E402
from small import DIGITS, settings  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ticketkit import masks, models  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.search.ranks import Machine, Ranks  # noqa: E402
from ticketkit.tasks import Batches, Crops  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDINGS = 8
Both = tuple[dict[str, Any], dict[str, Any]]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """That of torchrun, which Fabric recognises."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    words = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": paths}
    return {**os.environ, **words, **{key: str(value) for key, value in ours.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what each case gave them."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    command = [sys.executable, str(Path(peers.__file__)), str(folder)]
    both = [subprocess.Popen(command, env=environment(rank, 2, port), stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate(timeout=280)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return folder


def case(out: Path, name: str) -> Both:
    first, second = (dict(np.load(out / f"{name}-{rank}.npz")) for rank in (0, 1))
    return first, second


def off(found: Any, exact: Any) -> float:
    return float(np.abs(np.asarray(found, np.float64) - exact).max())


def rounding(one: Any, exact: Any) -> float:
    """What may be between another order of summation and the exact value."""
    return ROUNDINGS * max(off(one, exact), float(np.finfo(np.float32).eps * np.abs(exact).max()))


def test_batch_norm_is_that_of_the_whole_batch(out: Path) -> None:
    one, exact = peers.batch_norm(Ranks()), peers.batch_norm(Ranks(), torch.float64)
    wrong = []
    for name in ("batch_norm", "batch_norm alone"):
        two = case(out, name)
        joined = {key: np.concatenate([part[key] for part in two]) for key in ("y", "x")}
        joined |= {key: two[0][key] + two[1][key] for key in exact if key.startswith("gradient")}
        joined |= {key: two[1][key] for key in exact if key.startswith("0.")}
        assert joined.keys() == exact.keys()
        wrong.append({key for key in exact if off(joined[key], exact[key]) > rounding(one[key], exact[key])})
    assert wrong[0] == set()
    alone = {"y", "x", "gradient 0.weight", "0.running_mean", "0.running_var"}
    assert wrong[1] == alone, "each by itself, everything but the gradient of the bias is another"


def test_simclr_has_the_loss_and_the_gradients_of_the_whole_batch(out: Path) -> None:
    one, exact, two = peers.simclr(Ranks()), peers.simclr(Ranks(), torch.float64), case(out, "simclr")
    assert two[0]["right"] == two[1]["right"] and two[0]["right"] + two[1]["right"] == one["right"] > 0, "each tells its share"
    for name in exact.keys() - {"right"}:
        assert np.array_equal(two[0][name], two[1][name])
        assert off(two[0][name], exact[name]) <= rounding(one[name], exact[name]), name
        if "weight" in name:
            assert off(two[0][name] / 2, exact[name]) > 100 * rounding(one[name], exact[name]), "negative control: half the gradient"


def exactly_trained() -> dict[str, Any]:
    """Three steps in float64, as a textbook writes them."""
    module, chosen = peers.smooth_start().double().train(), settings(steps=3)
    optimizer = torch.optim.SGD(module.parameters(), lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay)
    for _, ((images,), labels) in zip(range(3), Batches(DIGITS.load(None).train, Crops(DIGITS), peers.ROWS).epoch(0, 0, 0), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(module(images.double()), labels).backward()
        optimizer.step()
    return models.arrays(module)


def test_masks_are_those_of_one_process_but_for_ties_within_rounding(out: Path) -> None:
    """Order statistics move by no more than the largest change δ of any magnitude; so masks may differ only where the magnitude
    is within 2 δ of the threshold.
    """
    one, exact, two, alone = peers.search(Ranks()), exactly_trained(), case(out, "search"), case(out, "search alone")
    names = [name.removeprefix("mask/") for name in one if name.startswith("mask/")]
    assert all(np.array_equal(two[0][key], two[1][key]) for key in two[0]), "weights, statistics and masks, to the bit"
    allowed = max(rounding(one[name], exact[name]) for name in names)
    assert max(off(two[0][name], exact[name]) for name in names) <= allowed
    assert max(off(alone[0][name], exact[name]) for name in names) > 100 * allowed, "negative control: batch norms of each rank"
    flat, kept, other, far = (
        np.concatenate([arrays[prefix + name].reshape(-1) for name in names])
        for arrays, prefix in ((one, ""), (one, "mask/"), (two[0], "mask/"), (alone[0], "mask/"))
    )
    size, delta = np.abs(flat.astype(np.float64)), max(off(two[0][name], one[name].astype(np.float64)) for name in names)
    near = np.abs(size - size[kept].min()) <= 2 * delta
    assert not ((kept != other) & ~near).any() and near.mean() < 1e-3
    assert (kept != far).sum() > 20 * max(1, near.sum()), "negative control"
    assert masks.sparsity({"all": kept}) == masks.sparsity({"all": other}) == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize(("name", "objective"), [("search", None), ("search simclr", peers.CONTRAST), ("search moco", peers.QUEUED)])
def test_what_is_shown_is_that_of_the_global_batch(out: Path, name: str, objective: Any) -> None:
    one, two = peers.search(Ranks(), objective), case(out, name)
    assert two[0]["loss"] == two[1]["loss"] and two[0]["accuracy"] == two[1]["accuracy"]
    assert 0 < two[0]["accuracy"] <= 1
    if objective is not peers.QUEUED:  # MoCo's key groups hold other images where there are more processes
        assert two[0]["loss"] == pytest.approx(float(one["loss"]), rel=1e-3)
        assert two[0]["accuracy"] == pytest.approx(float(one["accuracy"]), abs=2 / (3 * peers.ROWS))


def test_queues_and_key_encoders_are_the_same_on_all_ranks(out: Path) -> None:
    first, second = case(out, "search moco")
    assert {"own/queue", "own/pointer", "own/encoder.conv1.weight"} <= first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert first["own/pointer"] == 3 * peers.ROWS % peers.QUEUED.queue, "the keys of both joined"


def test_an_error_of_one_is_an_error_of_all(out: Path) -> None:
    first, second = case(out, "errors")
    assert first["heard"].tolist() == second["heard"].tolist()
    agree, from_first, each, fine, same = first["heard"]
    assert agree.startswith("TicketError: the masks differ between processes; ")
    assert (from_first, each, fine) == ("DataError: from 0", "DataError: from 1", "fine")
    assert same.startswith("TicketError: the words differ between processes; ")
    assert first["a"].all() and second["a"].all(), "and after it masks that are the same pass"


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"devices": 0}, "--devices: expected at least 1, got 0"),
        ({"nodes": -1}, "--nodes: expected at least 1"),
        ({"strategy": "fsdp"}, "--strategy: expected one of auto, ddp, got 'fsdp'"),
        ({"precision": "16"}, "--precision: expected one of 32-true, bf16-mixed, got '16'"),
        ({"accelerator": "abacus"}, "--accelerator: .*abacus"),
        ({"accelerator": "tpu", "devices": 3}, "--accelerator: .*(torch_xla|available)"),
        ({"accelerator": "cuda", "devices": 99}, "--devices.*"),
    ],
)
def test_an_impossible_machine_is_one_clear_line(machine: dict[str, Any], words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        Ranks(Machine(**machine))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("devices", "started"), [(1, 2), (3, 2), (2, 1)])
def test_torchrun_and_devices_must_agree(monkeypatch: pytest.MonkeyPatch, devices: int, started: int) -> None:
    """Otherwise every process would search for itself, or all wait for one that never comes."""
    for key, value in environment(0, started, 29500).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(TicketError, match=f"expected the {started} processes that torchrun started, got 1 x {devices}"):
        Ranks(Machine(devices=devices, strategy="ddp", accelerator="cpu"))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    ranks = Ranks(Machine(devices=2, strategy="ddp", accelerator="cpu"))
    ranks.check_batch(24, 3)
    with pytest.raises(TicketError, match="--batch-size: expected a multiple of 2, for 2 processes, got 31"):
        ranks.check_batch(31, 1)
    with pytest.raises(TicketError, match=r"expected a multiple of 6, for 2 processes x 3 parts \(--accumulate\), got 32"):
        ranks.check_batch(32, 3)
