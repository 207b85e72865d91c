"""The same answers on real photographs: a pretrained network pruned by global magnitude, exported with float32 and float16 values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import UNPACK
from graphs import Array, run
from onnx import ModelProto

from ticketkit import masks
from ticketkit.exporters import export
from ticketkit.inputs import ImageRule, read_input
from ticketkit.lower import half, lower, read

torch = pytest.importorskip("torch")
zoo = pytest.importorskip("torchvision").models

from ticketkit.capture import capture  # noqa: E402

# name -> files below weights/, how photographs become inputs, module of the head; the first that is there is taken, largest first
NETWORKS = {
    "resnet50": ("resnet50/*.pt*", ImageRule(), "fc"),
    "mobilenet_v2": ("mobilenet_v2/*.pt", ImageRule((0.5,) * 3, (0.5,) * 3), "classifier"),
    "squeezenet1_1": ("squeezenet1_1/*.pt", ImageRule(), "classifier"),
}
LEVELS = (0.3, 0.9)  # without training 0.3 still tells classes apart, 0.9 hardly
IMAGES = 25


@pytest.fixture(scope="module")
def photographs(data_dir: Path) -> list[Path]:
    homes = [data_dir / "photos" / "imagenet", UNPACK.parent / "packed" / "photos" / "imagenet"]
    found = next((sorted(home.glob("*.jpg")) for home in homes if home.is_dir()), [])
    if len(found) < 16:
        pytest.skip("no photographs: expected 16 or more in $TICKETKIT_DATA/photos/imagenet")
    return found[:: max(1, len(found) // IMAGES)]


def network(data_dir: Path) -> tuple[str, torch.nn.Module]:
    """The largest pretrained network there is, and its name."""
    for name, (pattern, _, _) in NETWORKS.items():
        for file in sorted((data_dir / "weights").glob(pattern)):
            module = zoo.get_model(name, weights=None)
            module.load_state_dict(torch.load(file, weights_only=True))
            return name, module
    pytest.skip(f"no pretrained weights: expected those of {', '.join(NETWORKS)} in $TICKETKIT_DATA/weights")


@pytest.fixture(scope="module")
def pretrained(data_dir: Path, photographs: Sequence[Path]) -> tuple[dict[float, ModelProto], Array]:
    """The network at every level, stem and head dense, and the photographs as its input."""
    name, module = network(data_dir)
    _, rule, head = NETWORKS[name]
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d) and not path.startswith(head)}
    weights = {path: layer.weight.detach().numpy().copy() for path, layer in list(layers.items())[1:]}
    found = {}
    for level in LEVELS:
        kept = masks.global_magnitude(weights, masks.full(weights), level)
        with torch.no_grad():
            for path, mask in kept.items():
                layers[path].weight.copy_(torch.from_numpy(weights[path] * mask))
        found[level] = capture(module, (3, 224, 224))
    return found, np.concatenate([read_input(file, ["N", 3, 224, 224], rule) for file in photographs])


def rounded(model: ModelProto) -> ModelProto:
    network, made = lower(read(model.SerializeToString())), ModelProto()
    made.CopyFrom(network.model)
    half.round_weights(made, network.weights)
    return made


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("level", LEVELS)
def test_top_1_on_photographs(level: float, values: str, pretrained: tuple[dict[float, ModelProto], Array], tmp_path: Path) -> None:
    """Of the network as it came, of the one with rounded weights, and of the export in both runtimes."""
    models, images = pretrained
    report = export(models[level], tmp_path / "net.onnx", values=values, check=False)
    assert report.plan.prunable_sparsity == pytest.approx(level, abs=0.02) and report.plan.sparse
    feeds = {"input": images}
    exact = run(models[level], feeds)[0]
    reference = run(rounded(models[level]), feeds)[0] if values == "fp16" else exact
    for library in (False, True):
        found = run((tmp_path / "net.onnx").read_bytes(), feeds, library)[0]
        np.testing.assert_allclose(found, reference, atol=1e-4 * np.abs(reference).max())
        np.testing.assert_array_equal(found.argmax(1), reference.argmax(1))
        np.testing.assert_array_equal(found.argmax(1), exact.argmax(1))
    assert len(np.unique(exact.argmax(1))) > (10 if level < 0.5 else 0)
