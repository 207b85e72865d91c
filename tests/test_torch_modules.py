"""Any torch in: modules as they come, pruned by whatever means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, normal, run, weights

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402

import ticketkit  # noqa: E402
from ticketkit import capture  # noqa: E402
from ticketkit.capture import bake, trace  # noqa: E402
from ticketkit.errors import ExportError, ModelError  # noqa: E402
from ticketkit.lower import read  # noqa: E402

torch.set_num_threads(1)


class Net(nn.Module):
    """Convolutions wide enough to run sparse, BatchNorm and a head: images [N, 3, 24, 24] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    module = Net()
    with torch.no_grad():
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module


IMAGE = torch.zeros(1, 3, 24, 24)


def by_magnitude(module: Net) -> None:
    for layer in (module.conv1, module.conv2):
        prune.l1_unstructured(layer, "weight", amount=0.9)


def globally(module: Net) -> None:
    prune.global_unstructured([(module.conv1, "weight"), (module.conv2, "weight")], prune.L1Unstructured, amount=0.9)


def twice(module: Net) -> None:
    """A PruningContainer, and a bias."""
    globally(module)
    prune.random_unstructured(module.conv1, "weight", amount=0.5)
    prune.random_unstructured(module.conv2, "bias", amount=0.5)


def by_parametrization(module: Net) -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    for layer in (module.conv1, module.conv2):
        parametrize.register_parametrization(layer, "weight", Masked((torch.rand_like(layer.weight) > 0.9).float()))


def in_place(module: Net) -> None:
    with torch.no_grad():
        for layer in (module.conv1, module.conv2):
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0


PRUNED = [by_magnitude, globally, twice, by_parametrization, in_place]


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that an export must not change."""
    tensors = {name: (id(t), t._version, t.requires_grad) for name, t in (*module.named_parameters(), *module.named_buffers())}
    hooks = {name: [id(hook) for hook in part._forward_pre_hooks.values()] for name, part in module.named_modules()}
    return {"tensors": tensors, "hooks": hooks, "training": {name: part.training for name, part in module.named_modules()}}


# Modules ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", [twice, by_parametrization], ids=lambda f: f.__name__)
def test_a_pruned_module_exports_as_it_computes(pruner: Callable[[Net], None], tmp_path: Path) -> None:
    module = net()
    pruner(module)
    module.train()
    module.norm.eval()  # a mixture that must stay
    module(torch.rand(2, 3, 24, 24)).sum().backward()  # its weights are now what autograd computed
    before, state = snapshot(module), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    report = ticketkit.export(module, tmp_path / "net.onnx", example_inputs=IMAGE)
    assert snapshot(module) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert [c.engine for c in report.comparisons] == ["onnxruntime", "ticketkit", "the torch module"]
    assert len(report.plan.sparse) == 2
    assert report.plan.prunable_sparsity == pytest.approx(0.9, abs=0.06 if pruner is twice else 0.01)
    session = ticketkit.InferenceSession(tmp_path / "net.onnx", threads=1)
    module.eval()
    for batch in (1, 5):
        x = normal(batch, 3, 24, 24, seed=batch)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(session.run(None, {"input": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", PRUNED, ids=lambda f: f.__name__)
def test_baked_is_plain(pruner: Callable[[Net], None]) -> None:
    module = net()
    pruner(module)
    module.eval()
    before, x = snapshot(module), torch.rand(2, 3, 24, 24)
    baked = bake(module)
    assert snapshot(module) == before and torch.equal(baked(x), module(x))
    assert baked.state_dict().keys() == net().state_dict().keys()
    assert not baked.training and not any(part._forward_pre_hooks for part in baked.modules())
    assert not any(parametrize.is_parametrized(part) for part in baked.modules())
    for name in ("conv1", "conv2"):
        torch.testing.assert_close(baked.get_submodule(name).weight, module.get_submodule(name).weight, rtol=0, atol=0)
    copy.deepcopy(baked)
    net().load_state_dict(baked.state_dict())


def test_images_need_no_example(tmp_path: Path) -> None:
    module = net()
    by_magnitude(module)
    report = ticketkit.export(module, tmp_path / "net.onnx", input_shape=(3, 24, 24), check=False)
    assert report.plan.inputs == {"input": (1, 3, 24, 24)}
    assert {"conv1.values", "conv1.gaps", "conv1.bias", "stem.weight"} <= weights(read(tmp_path / "net.onnx")).keys()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: nn.DataParallel(nn.DataParallel(m))]
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = net()
    by_magnitude(module)
    baked = bake(wrap(module))
    assert type(baked) is Net and baked.state_dict().keys() == net().state_dict().keys()


class Tied(nn.Module):
    """One weight for two layers, of which one may be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("pruned", [[], ["first"], ["second"], ["first", "second"]], ids=str)
@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_tied_weights_stay_what_each_layer_uses(pruned: list[str], how: str) -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    for name in pruned:
        layer = module.get_submodule(name)
        if how == "hook":
            prune.random_unstructured(layer, "weight", amount=0.5)
        else:
            parametrize.register_parametrization(layer, "weight", nn.Threshold(0.05, 0))
    x, baked = torch.rand(3, 16), bake(module)
    assert torch.equal(baked(x), module(x)) and (baked.first.weight is baked.second.weight) == (not pruned)


def test_a_tied_weight_is_stored_once() -> None:
    model = trace(Tied(), torch.zeros(1, 16)).model
    assert sum(array.ndim == 2 for array in weights(model).values()) == 1


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.scale = nn.Embedding(7, 4), nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(4))

    def forward(self, image: Tensor, label: Tensor, *more: Tensor, shift: Tensor | None = None) -> dict[str, Any]:
        y = self.conv(image).mean((2, 3)) * self.scale + self.embedding(label)
        y = y + sum(more) if more else y
        return {"sum": y if shift is None else y + shift, "rest": [y.mean(1), (y.amax(1),)]}


def feeds_of(module: nn.Module, examples: Any, batch: int) -> dict[str, Array]:
    """Inputs by name for another batch."""
    captured = trace(module, examples)
    feeds = {}
    for info in captured.model.graph.input:
        dims = [d.dim_value or batch for d in info.type.tensor_type.shape.dim]
        assert dims and (info.name == "shift" or info.type.tensor_type.shape.dim[0].dim_param == "batch")
        integer = info.type.tensor_type.elem_type == 7
        feeds[info.name] = np.arange(batch, dtype=np.int64) % 7 if integer else normal(*dims, seed=len(feeds))
    for name, array in captured.run(feeds).items():
        np.testing.assert_allclose(run(captured.model, feeds)[["output", "output_1", "output_2"].index(name)], array, rtol=1e-4, atol=1e-5)
    return feeds


def test_several_inputs_by_position_and_by_name() -> None:
    torch.manual_seed(0)
    module, image, label = Several(), torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    names = {"input", "input_1", "input_2", "input_3"}
    assert feeds_of(module, [image, label, torch.ones(1, 4), torch.ones(1, 1)], 5).keys() == names
    batch = {"label": label.repeat(3), "image": image.repeat(3, 1, 1, 1), "shift": torch.ones(4)}
    assert feeds_of(module, batch, 5).keys() == {"image", "label", "shift"}


class OneByOne(nn.Module):
    """Made for a single image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 16).sum(1)


def test_a_batch_that_is_not_free_is_fixed() -> None:
    model = trace(OneByOne(), torch.zeros(1, 3, 4, 4)).model
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 4, 4]
    x = normal(1, 3, 4, 4)
    np.testing.assert_allclose(run(model, {"input": x})[0], x.reshape(3, -1).sum(1), rtol=1e-5)


def test_examples_and_buffers_stay_as_they_are() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mul_(2))

    x = torch.ones(2, 4)
    trace(InPlace(), x)
    assert torch.equal(x, torch.ones(2, 4))


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("cannot pickle 'generator' object")


@pytest.mark.parametrize(
    ("module", "examples", "message"),
    [
        (lambda: net().to("meta"), IMAGE, "on the meta device"),
        (Uncopyable, IMAGE, "cannot be copied: cannot pickle"),
        (net, torch.zeros(1, 4, 24, 24), r"does not take an input of shape \[1, 4, 24, 24\]"),
        (net, (IMAGE, IMAGE), r"does not take an input of shape \[1, 3, 24, 24\], \[1, 3, 24, 24\]"),
        (net, {"y": IMAGE}, "does not take an input"),
        (net, (), "expected at least one tensor"),
        (net, {}, "expected at least one tensor"),
        (net, [[IMAGE]], "got a list"),
        (net, (np.zeros((1, 3, 24, 24)),), "got a ndarray"),
    ],
    ids=str,
)
def test_modules_and_examples_that_do_not_fit(module: Callable[[], nn.Module], examples: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ticketkit.export(module(), tmp_path / "net.onnx", example_inputs=examples)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_arguments_of_another_source(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    for source, given, error, message in (
        (net(), {}, ModelError, "example_inputs=..., or input_shape"),
        (net(), {"input_shape": (24,)}, ModelError, "input shape: expected 3 or 4"),
        (net(), {"example_inputs": IMAGE, "round": 1}, ExportError, "no run directory"),
        (net(), {"example_inputs": IMAGE, "model": "resnet50"}, ExportError, "--model names the network of a checkpoint"),
        (tmp_path / "net.onnx", {"example_inputs": IMAGE}, ExportError, "those of a torch module"),
        (tmp_path / "net.onnx", {"classes": 3}, ExportError, "--classes goes with"),
        (net, {}, ModelError, "expected a path, .* got a function"),
        (7, {}, ModelError, "expected a path, .* got a int"),
    ):
        with pytest.raises(error, match=message):
            ticketkit.export(source, out, **given)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_not_the_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison with torch: a wrong graph agrees with itself, and with everything made of it."""
    honest = capture._tidy

    def wrong(model: Any) -> Any:
        model = honest(model)
        bias = next(t for t in model.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(capture.onnx.numpy_helper.from_array(capture.onnx.numpy_helper.to_array(bias) * np.float32(1.1), bias.name))
        return model

    monkeypatch.setattr(capture, "_tidy", wrong)
    module = net()
    by_magnitude(module)
    with pytest.raises(ExportError, match=r"differs from the original by .* in the torch module"):
        ticketkit.export(module, tmp_path / "net.onnx", example_inputs=IMAGE)
