"""The same answers on real photographs: a pretrained network pruned by global magnitude, exported with float32 and float16 values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import UNPACK
from graphs import Array, run
from onnx import ModelProto, numpy_helper

from ticketkit import masks
from ticketkit.exporters import onnx as target
from ticketkit.inputs import ImageRule, read_input
from ticketkit.lower import half_weights, lower, read
from ticketkit.lower.operators import Execution
from ticketkit.planner import plan

torch = pytest.importorskip("torch")
zoo = pytest.importorskip("torchvision").models

from ticketkit.capture import capture  # noqa: E402

# name -> files below weights/, how photographs become inputs, module of the head; the first that is there is taken, largest first
NETWORKS = {
    "resnet50": ("resnet50/*.pt*", ImageRule(), "fc"),
    "mobilenet_v2": ("mobilenet_v2/*.pt", ImageRule((0.5,) * 3, (0.5,) * 3), "classifier"),
    "squeezenet1_1": ("squeezenet1_1/*.pt", ImageRule(), "classifier"),
}
LEVELS = (0.2, 0.9)  # without fine-tuning 0.9 leaves hardly a class to tell apart, 0.2 nearly all
IMAGES = 25


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[Path]:
    homes = [data_dir / "photos" / "imagenet", UNPACK.parent / "packed" / "photos" / "imagenet"]
    found = next((sorted(home.glob("*.jpg")) for home in homes if home.is_dir()), [])
    if len(found) < 16:
        pytest.skip("no photographs: expected 16 or more in $TICKETKIT_DATA/photos/imagenet")
    return found[:: max(1, len(found) // IMAGES)]


@pytest.fixture(scope="module")
def pretrained(data_dir: Path, photographs: Sequence[Path]) -> tuple[ModelProto, dict[str, Array], Array]:
    """The largest pretrained network there is, as ONNX, its prunable weights by name, and the photographs as its input."""
    there = ((name, file) for name in NETWORKS for file in sorted((data_dir / "weights").glob(NETWORKS[name][0])))
    name, file = next(there, ("", Path()))
    if not name:
        pytest.skip(f"no pretrained weights: expected those of {', '.join(NETWORKS)} in $TICKETKIT_DATA/weights")
    _, rule, head = NETWORKS[name]
    module = zoo.get_model(name, weights=None)
    module.load_state_dict(torch.load(file, weights_only=True))
    convolutions = [path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    weights = {f"{path}.weight": module.get_parameter(f"{path}.weight").detach().numpy().copy() for path in convolutions[1:]}
    images = np.concatenate([read_input(photograph, ["N", 3, 224, 224], rule) for photograph in photographs])
    return capture(module, (3, 224, 224)), {key: w for key, w in weights.items() if not key.startswith(head)}, images


def pruned(model: ModelProto, weights: dict[str, Array], level: float) -> ModelProto:
    """With zeros where global magnitude puts them; folded BatchNorm scales weights, and moves no zero."""
    kept, made = masks.global_magnitude(weights, masks.full(weights), level), ModelProto()
    made.CopyFrom(model)
    tensors = {t.name: t for t in made.graph.initializer}
    for name, mask in kept.items():
        tensors[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensors[name]) * mask, name))
    return made


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("level", LEVELS)
def test_top_1_on_photographs(level: float, values: str, pretrained: tuple[ModelProto, dict[str, Array], Array]) -> None:
    """The export answers as the network it holds in both runtimes, always; rounding itself may turn a near tie."""
    dense, weights, images = pretrained
    model = pruned(dense, weights, level)
    network, feeds = lower(read(model.SerializeToString())), {"input": images}
    exact = run(model, feeds)[0]
    if values == "fp16":
        half_weights.round_weights(rounded := ModelProto.FromString(network.model.SerializeToString()), network.weights)
        network = lower(rounded)
    reference = run(network.model, feeds)[0]
    keep = {layer.name: Execution() for layer in network.layers if not layer.obstacle and layer.op == "Conv" and layer.sparsity > 0}
    data = target.encode(network, replace(plan(network, keep), values=values))
    assert plan(network).prunable_sparsity == pytest.approx(level, abs=0.02) and len(keep) > 20
    for library in (False, True):
        found = run(data, feeds, library)[0]
        np.testing.assert_allclose(found, reference, atol=1e-4 * np.abs(reference).max())
        np.testing.assert_array_equal(found.argmax(1), reference.argmax(1))
        assert (found.argmax(1) == exact.argmax(1)).mean() >= (1.0 if values == "fp32" else 0.95)
    assert level > 0.5 or len(np.unique(exact.argmax(1))) > 0.8 * len(images), "these answers mean something"
