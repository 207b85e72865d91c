"""sparsify_ and densify_: networks give the same outputs, train on, compile and export, and say what they left dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import normal, pruned

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import ticketkit  # noqa: E402
from ticketkit.errors import KernelError  # noqa: E402
from ticketkit.runtime import torch_modules  # noqa: E402
from ticketkit.runtime.torch_modules import SparseConv2d, SparseLinear, Swap, densify_, sparsify_  # noqa: E402


class Net(nn.Module):
    """Every kind of layer that is swapped, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.same = nn.Conv2d(16, 24, (2, 3), padding="same", bias=False)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(24, 20, 3, stride=2, padding=(1, 2), dilation=(1, 2))
        self.twice = nn.Conv2d(20, 20, 1)
        self.head = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
        for i, layer in enumerate([self.same, self.depthwise, self.grouped, self.strided, self.twice, self.head[0]]):
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(pruned(tuple(layer.weight.shape), 0.8, seed=i)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.strided(self.grouped(self.depthwise(self.same(torch.relu(self.stem(x)))))))
        return self.head(self.twice(self.twice(x)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.from_numpy(normal(3, 3, 13, 11))


def test_outputs_stay(net: Net) -> None:
    before, state = net(X), copy.deepcopy(net.state_dict())
    report = {swap.name: swap for swap in sparsify_(net)}
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    sparse = {name for name, swap in report.items() if swap.format != "dense"}
    assert sparse == {"same", "depthwise", "strided", "twice", "head.0"}
    assert "2 groups" in report["grouped"].reason and "50% are where bsr gains on cpu" in report["stem"].reason
    assert report["same"].sparsity == pytest.approx(0.8, abs=0.01) and "80" in repr(net.same)
    assert isinstance(net.same, SparseConv2d) and isinstance(net.head[0], SparseLinear) and type(net.head[2]) is nn.Linear
    assert torch.equal(net.strided.weight, state["strided.weight"])
    assert sorted(densify_(net)) == sorted(sparse)
    assert torch.equal(net(X), before)
    after = net.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert densify_(net) == []


def test_the_public_verbs_are_these() -> None:
    assert ticketkit.sparsify_ is sparsify_ and ticketkit.densify_ is densify_


def test_kept_weights_learn_and_zeros_stay(net: Net) -> None:
    dense = copy.deepcopy(net).train()
    sparse = {f"{swap.name}.weight" for swap in sparsify_(net.train()) if swap.format != "dense"}
    zeros = {name: p == 0 for name, p in dense.named_parameters() if name in sparse}
    wanted = torch.from_numpy(normal(3, 5, seed=8))

    def train(network: nn.Module) -> list[float]:
        sgd, losses = torch.optim.SGD(network.parameters(), lr=0.1), []
        for _ in range(4):
            loss = (network(X) - wanted).square().mean()
            sgd.zero_grad()
            loss.backward()
            if network is dense:  # what masks do in dense training
                for name, p in network.named_parameters():
                    if name in zeros:
                        p.grad.masked_fill_(zeros[name], 0)
            sgd.step()
            losses.append(loss.item())
        return losses

    assert train(net) == pytest.approx(train(dense), rel=1e-4)
    densify_(net)
    for (name, p), q in zip(net.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        if name in zeros:
            assert not p[zeros[name]].any()


def test_fillers_do_not_learn() -> None:
    """Weights further apart than a gap reaches have stored zeros between them."""
    layer = nn.Linear(70000, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0] = layer.weight[1, 69999] = 1.0
    net = nn.Sequential(layer)
    sparsify_(net)
    sparse = net[0]
    assert isinstance(sparse, SparseLinear) and sparse.kept is not None and sparse.values.numel() > 2
    net(torch.ones(1, 70000)).sum().backward()
    assert int((sparse.values.grad != 0).sum()) == 2


def test_masks_decide(net: Net) -> None:
    """A kept weight of zero learns; a layer without a mask stays dense; arrays and tensors, by either name."""
    kept = np.zeros((20, 20, 1, 1), bool)
    kept[:3, :3] = True
    with torch.no_grad():
        net.twice.weight[0, 0] = 0.0
    report = {swap.name: swap for swap in sparsify_(net, {"twice.weight": kept, "head.0": torch.ones(32, 20)})}
    assert report["twice"].format == "csr" and report["same"].reason == "no mask"
    assert report["head.0"].reason.startswith("0.0% zeros")
    assert net.twice.values.numel() == 9
    with pytest.raises(KernelError, match=r"masks\['twice'\]: expected shape \[20, 20, 1, 1\], got \[2, 2\]"):
        sparsify_(Net(), {"twice": np.ones((2, 2))})


def test_blocks_are_seen() -> None:
    blocks = np.repeat(np.random.default_rng(0).random((8, 32)) < 0.2, 4, axis=0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        for layer, mask in zip(net, (blocks, blocks.T, pruned((32, 32), 0.8) != 0), strict=True):
            layer.weight.mul_(torch.from_numpy(np.ascontiguousarray(mask)))
    x = torch.from_numpy(normal(5, 32))
    before = net(x)
    assert [swap.format for swap in sparsify_(net)] == ["bsr", "bsr1x4", "csr"]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    densify_(net)
    assert [swap.format for swap in sparsify_(net, format="csr")] == ["csr"] * 3


def test_hooks_modes_and_frozen_weights_go_along(net: Net) -> None:
    seen: list[str] = []
    net.same.register_forward_hook(lambda *_: seen.append("same"))
    net.same.weight.requires_grad_(False)
    net.same.train()
    for swap in (sparsify_, densify_):
        swap(net)
        net(X)
        assert seen.pop() == "same" and not seen and net.same.training
        assert not next(iter(net.same.parameters())).requires_grad


def test_copies_and_state_dicts(net: Net) -> None:
    sparsify_(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.same.values.zero_()
    assert not torch.equal(other(X), net(X))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), net(X))


def test_compile_and_export(net: Net, tmp_path: Path) -> None:
    sparsify_(net)
    expected = net(X)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(X), expected)
    program = torch.export.export(net, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "net.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(X[:2]), expected[:2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: nn.utils.prune.random_unstructured(net.same, "weight", 0.5), "made by a hook"),
        (lambda net: net.same.half(), "no kernels for torch.float16 on cpu"),
        (lambda net: setattr(net.same, "padding_mode", "reflect"), "padding mode reflect"),
        (lambda net: net.same.weight.data.fill_(torch.nan), "NaN"),
        (lambda net: net.same.to("meta"), "no kernels for meta"),
    ],
    ids=["prune", "half", "reflect", "nan", "meta"],
)
def test_what_cannot_be_sparse_stays_dense_and_says_why(net: Net, change: Any, reason: str) -> None:
    import torch.nn.utils.prune  # noqa: F401

    change(net)
    swap = next(swap for swap in sparsify_(net) if swap.name == "same")
    assert swap == Swap("same", 0.0, "dense", 0, swap.reason) and reason in swap.reason
    assert type(net.same) is nn.Conv2d


def test_every_other_layer_is_named() -> None:
    class Mine(nn.Linear):
        pass

    shared = nn.Linear(8, 8)
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), Mine(8, 8), nn.MultiheadAttention(8, 2), shared, nn.Linear(8, 8),
                        nn.TransformerEncoderLayer(8, 2, 16))  # fmt: skip
    net[5].weight = shared.weight
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    report = {swap.name: swap for swap in sparsify_(net)}
    assert {swap.format for swap in report.values()} == {"dense"} and len(report) == 11
    assert report["0"].reason == "no kernels for Conv1d" and report["2"].reason == "no kernels for Mine"
    assert "shared" in report["4"].reason and "shared" in report["5"].reason
    assert report["6.linear1"].reason == "TransformerEncoderLayer multiplies its weight itself"


def test_forms_of_a_gpu() -> None:
    """What would be chosen there needs none."""
    assert torch_modules._form(pruned((64, 64), 0.9) != 0, "cuda", "auto") == ("csr", 0)
    blocks = np.kron(np.eye(2, dtype=bool), np.ones((32, 32), bool))
    assert torch_modules._form(blocks, "cuda", "auto") == ("bsr", 32)
    assert torch_modules._form(blocks, "cuda", "csr") == ("csr", 0)


def test_wrong_arguments_are_named(net: Net) -> None:
    for arguments, message in (
        ({"format": "ell"}, "format: expected auto, csr, bsr or bsr1x4, got 'ell'"),
        ({"least": 90}, "least: expected a fraction"),
    ):
        with pytest.raises(KernelError, match=message):
            sparsify_(net, **arguments)
    with pytest.raises(KernelError, match="got a layer itself"):
        sparsify_(nn.Linear(3, 3))
    assert {swap.format for swap in sparsify_(net, format="bsr1x4") if swap.name != "head.0"} == {"dense"}
