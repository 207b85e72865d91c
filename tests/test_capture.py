"""nn.Module to ONNX: same outputs for any batch, same names, exact zeros, no noise, and clear refusals."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from graphs import normal, run, weights
from torch import Tensor, nn

from ticketkit.capture import OPSETS, capture
from ticketkit.errors import ModelError
from ticketkit.lower import lower, read

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, y.flatten(1).sum(1)


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def block() -> nn.Module:
    torch.manual_seed(0)
    module = Block()
    with torch.no_grad():
        for norm in (module.bn1, module.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
        module.conv2.weight[torch.rand_like(module.conv2.weight) < 0.9] = 0
    return module


@pytest.mark.parametrize("opset", OPSETS)
def test_outputs_are_torchs_for_any_batch(opset: int) -> None:
    module = block()
    model = capture(module, (3, 12, 10), opset)
    assert module.training, "capture must leave the module as it was"
    assert model.opset_import[0].version == opset
    module.eval()
    for batch in (1, 2, 5):
        x = normal(batch, 3, 12, 10, seed=batch)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run(model, {"input": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_names_and_zeros_survive() -> None:
    module = block()
    model = capture(module, (3, 12, 10))
    assert [i.name for i in model.graph.input] == ["input"] and [o.name for o in model.graph.output] == ["output"]
    zeros = module.state_dict()["conv2.weight"].numpy() == 0
    np.testing.assert_array_equal(weights(model)["conv2.weight"] == 0, zeros)
    found = {layer.name: layer for layer in lower(read(model.SerializeToString())).layers}
    assert found.keys() == {"conv1", "conv2", "fc"}
    np.testing.assert_array_equal(found["conv2"].weight == 0, zeros)


def test_several_outputs() -> None:
    model = capture(TwoOutputs(), (3, 6, 6))
    assert [o.name for o in model.graph.output] == ["output", "output_1"]
    x = normal(3, 3, 6, 6)
    first, second = run(model, {"input": x})
    assert first.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(second, first.reshape(3, -1).sum(1), rtol=1e-4, atol=1e-5)


def test_capture_is_quiet_and_keeps_nothing_of_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = capture(block(), (3, 8, 8)).SerializeToString()
    assert capfd.readouterr() == ("", "") and not caught
    assert b"test_capture" not in data and b"site-packages" not in data


def test_refusals() -> None:
    with pytest.raises(ModelError, match=r"does not take an input of shape \[1, 4, 8, 8\]"):
        capture(block(), (4, 8, 8))
    with pytest.raises(ModelError, match="opset 11: expected 18 to 20"):
        capture(block(), (3, 8, 8), 11)
    broken = block()
    with torch.no_grad():
        broken.get_parameter("conv1.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"conv1\.weight holds NaN"):
        capture(broken, (3, 8, 8))
    with pytest.raises(ModelError, match="cannot trace") as caught:
        capture(Undecided(), (3, 8, 8))
    assert "\n" not in str(caught.value)
