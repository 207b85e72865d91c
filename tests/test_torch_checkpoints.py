"""Any torch in: checkpoints of named networks, in whatever wrapping."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import normal, run

torch = pytest.importorskip("torch")
import torchvision  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import ticketkit  # noqa: E402
from ticketkit import capture, models  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.errors import ModelError, TicketError  # noqa: E402

torch.set_num_threads(1)


def resnet20(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    module = models.build("resnet20", classes)
    with torch.no_grad():
        for name in models.prunable("resnet20", module):
            module.get_parameter(name)[torch.rand_like(module.get_parameter(name)) < 0.95] = 0
    return module


def plain(module: nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path / "c.pth")
    return path / "c.pth"


def parallel(module: nn.Module, path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in module.state_dict().items()}}, path / "c.th")
    return path / "c.th"


def masked(module: nn.Module, path: Path) -> Path:
    for layer in [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)][1:]:
        mask = layer.weight != 0
        with torch.no_grad():
            layer.weight[~mask] = 7
        prune.custom_from_mask(layer, "weight", mask)
    torch.save({"model": module.state_dict()}, path / "c.pt")
    return path / "c.pt"


def safe(module: nn.Module, path: Path) -> Path:
    save_file({name: tensor.numpy() for name, tensor in module.state_dict().items()}, path / "c.safetensors")
    return path / "c.safetensors"


def test_a_checkpoint_of_a_named_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = resnet20(7).eval()
    file = masked(resnet20(7), tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["export", str(file), "-o", str(tmp_path / "net.onnx"), "--model", "resnet20", "--no-tune", "--json"])
    out, err = capfd.readouterr()
    assert not caught.value.code and not err, err
    report = json.loads(out)
    assert {c["engine"] for c in report["comparisons"]} == {"onnxruntime", "ticketkit", "the torch module"}
    assert report["plan"]["inputs"] == {"input": [1, 3, 32, 32]}
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        y = expected(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run((tmp_path / "net.onnx").read_bytes(), {"input": x})[0], y, atol=1e-4)


@pytest.mark.parametrize("write", [plain, parallel, masked, safe], ids=lambda f: f.__name__)
def test_checkpoints_in_every_wrapping(write: Callable[[nn.Module, Path], Path], tmp_path: Path) -> None:
    expected, restored = resnet20(7).state_dict(), capture.restore(write(resnet20(7), tmp_path), "resnet20").state_dict()
    assert expected.keys() == restored.keys() and all(torch.equal(restored[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("name", "classes"), [("mobilenet_v3_small", 5), ("squeezenet1_1", 12), ("shufflenet_v2_x0_5", 3)])
def test_any_classifier_of_torchvision(name: str, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None, num_classes=classes).eval()
    torch.save(module.state_dict(), tmp_path / "c.pth")
    restored = capture.restore(tmp_path / "c.pth", name)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(restored(x), module(x))
    assert capture.image_shape(name) == (3, 224, 224) and capture.image_shape("resnet20") == (3, 32, 32)


def test_the_pretrained_mobile_networks(data_dir: Path) -> None:
    for name in ("mobilenet_v2", "squeezenet1_1"):
        (file,) = (data_dir / "weights" / name).glob("*.pt")
        state, restored = models.load_checkpoint(file), capture.restore(file, name).state_dict()
        assert all(np.array_equal(state[key], restored[key].numpy()) for key in state)


def test_restoring_does_not_touch_the_random_generator(tmp_path: Path) -> None:
    file = plain(resnet20(), tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    capture.restore(file, "resnet20")
    assert torch.equal(torch.get_rng_state(), before)


class Trap:
    """Code that unpickling would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("sprung",)


def change(name: str, tensor: Tensor | None) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        state = dict(resnet20().state_dict())
        state[name] = tensor
        torch.save({key: value for key, value in state.items() if value is not None}, path / "c.pth")
        return path / "c.pth"

    return write


def other(data: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / "c.pth").write_bytes(data) if isinstance(data, bytes) else torch.save(data, path / "c.pth")
        return path / "c.pth"

    return write


BAD = [
    (change("layer1.0.conv1.weight", None), {}, "layer1.0.conv1.weight: missing"),
    (change("layer1.0.conv1.weight", torch.zeros(16, 16, 5, 5)), {}, "layer1.0.conv1.weight: the model expects shape"),
    (change("layer9.weight", torch.zeros(2)), {}, "layer9.weight; not of resnet20"),
    (change("layer1.0.extra", torch.zeros(2)), {}, "layer1.0.extra .* in the checkpoint but not in the model"),
    (change("conv1.weight", torch.full((16, 3, 3, 3), torch.nan)), {}, "conv1.weight holds NaN"),
    (change("linear.weight", None), {}, "linear.weight: missing"),
    (change("linear.bias", None), {"classes": 10}, "linear.bias: missing"),
    (change("conv1.weight_mask", torch.ones(16, 3, 3, 3)), {}, "half of a torch.nn.utils.prune pair"),
    (change("linear.bias", torch.zeros(10)), {"classes": 9}, "linear.weight: the model expects shape"),
    (other({"state_dict": Trap()}), {}, "not a plain state dict|not a torch checkpoint"),
    (other(pickle.dumps(Trap())), {}, "not a plain state dict|not a torch checkpoint"),
    (other(b"text"), {}, "not a torch checkpoint|not a plain state dict"),
    (other([1, 2]), {}, "expected a state dict"),
    (change("linear.bias", torch.zeros(10)), {"model": "resnet21"}, "unknown model 'resnet21'; expected one of resnet20"),
    (change("linear.bias", torch.zeros(10)), {"model": "resnet18"}, "missing|not in the model"),
    (change("linear.bias", torch.zeros(10)), {"model": None}, "does not say what network it is of; name it"),
]


@pytest.mark.parametrize(("write", "given", "message"), BAD, ids=[f"{i}-{message[:24]}" for i, (_, _, message) in enumerate(BAD)])
def test_a_bad_checkpoint_is_one_clear_line(
    write: Callable[[Path], Path], given: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        ticketkit.export(file, tmp_path / "net.onnx", **{"model": "resnet20", **given})
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert "sprung" not in capfd.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_plain_safetensors_ask_for_their_network(tmp_path: Path) -> None:
    file = safe(resnet20(), tmp_path)
    with pytest.raises(TicketError, match=r"name their network \(--model\)"):
        ticketkit.export(file, tmp_path / "net.onnx")
