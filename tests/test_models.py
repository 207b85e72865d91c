"""Every network of every family, and everybody's checkpoints."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.numpy import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torchvision import models as zoo  # noqa: E402

from ticketkit import models  # noqa: E402
from ticketkit.errors import ModelError  # noqa: E402
from ticketkit.ticket import Ticket  # noqa: E402

AKAMASTER = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"}
# trainable parameters, as He et al. (Table 6, in millions: 0.27, 0.46, 0.66, 0.85) and torchvision's documentation state them
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "resnext50_32x4d": 25_028_904,
}


def toy() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet20", 10)


def checkpoint(path: Path, **changes: torch.Tensor) -> Path:
    torch.save({**toy().state_dict(), **changes}, path)
    return path


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("image_size", [None, 32])
def test_stem_head_norm_and_bias_are_never_prunable(name: str, image_size: int | None) -> None:
    """Without memory: built on the meta device."""
    with torch.device("meta"):
        module = models.build(name, 7, image_size)
    parameters, prunable = dict(module.named_parameters()), models.prunable(name, module)
    convolutions = [path for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    assert prunable == [f"{path}.weight" for path in convolutions[1:]], "every convolution but the first"
    assert all(parameters[path].ndim == 4 for path in prunable)
    for part in models.rule(name)["stem"] + models.rule(name)["head"]:
        assert f"{part}.weight" in parameters and f"{part}.weight" not in prunable
    head = models.rule(name)["head"][0]
    assert parameters[f"{head}.weight"].shape[0] == 7


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        module = models.build(name, 10 if name in AKAMASTER or name == "resnet44" else 1000)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


def test_resnet50_has_the_prunable_weights_of_the_paper() -> None:
    with torch.device("meta"):
        module = models.build("resnet50", 1000)
    prunable = models.prunable("resnet50", module)
    assert len(prunable) == 52
    assert sum(dict(module.named_parameters())[name].numel() for name in prunable) == 23_445_504


def test_every_torchvision_resnet_is_there() -> None:
    expected = {name for name in zoo.list_models(module=zoo) if name.startswith(("resnet", "wide_resnet", "resnext"))}
    assert expected <= set(models.names()) and len(expected) == 10


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("resnet20", 16), ("resnet18", 32), ("resnet18", 64)])
def test_forward(name: str, size: int) -> None:
    module = models.build(name, 10, size).eval()
    with torch.inference_mode():
        assert module(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_small_images_get_a_small_stem() -> None:
    stems = [models.build("resnet18", 10, size).conv1 for size in (32, 64, None)]
    assert [stem.stride[0] for stem in stems] == [1, 2, 2]


@pytest.mark.parametrize("name", ["resnet21", "", "ResNet50", "_checkpoint"])
def test_unknown_models_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="expected one of resnet20"):
        models.build(name, 10)


@pytest.mark.parametrize(("name", "file"), AKAMASTER.items())
def test_published_cifar_checkpoints_fit_whole(name: str, file: str, data_dir: Path) -> None:
    module = models.build(name, 10)
    source = models.load_weights(name, module, str(data_dir / "weights" / "akamaster" / file))
    assert source.remarks == () and len(source.sha256) == 64
    raw = torch.load(data_dir / "weights" / "akamaster" / file, map_location="cpu", weights_only=True)["state_dict"]
    for key, tensor in raw.items():
        assert torch.equal(module.state_dict()[key.removeprefix("module.")], tensor)


def wrap_plain(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path)


def wrap_parallel(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)


def wrap_deep(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"model": {"state_dict": {f"module.module.{name}": tensor for name, tensor in state.items()}}}, path)


def wrap_old_zip(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def wrap_half(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)


def wrap_old_norms(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)


def wrap_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file({f"module.{name}": tensor.numpy() for name, tensor in state.items()}, path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    "wrap", [wrap_plain, wrap_parallel, wrap_deep, wrap_old_zip, wrap_half, wrap_old_norms, wrap_safetensors], ids=lambda f: f.__name__
)
def test_checkpoints_in_every_wrapping(wrap: object, tmp_path: Path) -> None:
    torch.manual_seed(5)
    original, module = models.build("resnet20", 10), toy()
    wrap(original.state_dict(), tmp_path / "c.pth")  # type: ignore[operator]
    source = models.load_weights("resnet20", module, str(next(tmp_path.iterdir())))
    assert source.remarks == ()
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-2 if wrap is wrap_half else 0, atol=0)


def test_same_weights_hash_alike_in_every_format(tmp_path: Path) -> None:
    wrap_plain(toy().state_dict(), tmp_path / "a.pth")
    wrap_safetensors(toy().state_dict(), tmp_path / "b.pth")
    first, second = (models.load_weights("resnet20", toy(), str(path)).sha256 for path in sorted(tmp_path.iterdir()))
    assert first == second


def test_another_head_is_dropped_and_said(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.save({**models.build("resnet20", 100).state_dict(), "projector.0.weight": torch.ones(3)}, tmp_path / "c.pth")
    module = toy()
    source = models.load_weights("resnet20", module, str(tmp_path / "c.pth"))
    assert source.remarks == (
        "dropped from the checkpoint: linear.weight, linear.bias, projector.0.weight",
        "newly initialised: linear.weight, linear.bias",
    )
    assert torch.equal(module.linear.weight, toy().linear.weight)
    assert not torch.equal(module.layer1[0].conv1.weight, toy().layer1[0].conv1.weight)


def test_pruned_checkpoints_are_merged(tmp_path: Path) -> None:
    from torch.nn.utils import prune

    module = toy()
    prune.l1_unstructured(module.layer1[0].conv1, "weight", amount=0.5)
    torch.save(module.state_dict(), tmp_path / "c.pth")
    other = toy()
    models.load_weights("resnet20", other, str(tmp_path / "c.pth"))
    assert torch.equal(other.layer1[0].conv1.weight, module.layer1[0].conv1.weight)
    found = Ticket.from_state_dict(models.load_checkpoint(tmp_path / "c.pth"), models.prunable("resnet20", other))
    assert found.layer_sparsity["layer1.0.conv1.weight"] == 0.5 and len(found.masks) == 18


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer1.0.conv1.weight": torch.full((16, 16, 3, 3), torch.nan)}, "layer1.0.conv1.weight holds NaN"),
        ({"bn1.running_var": torch.full((16,), torch.inf)}, "bn1.running_var holds NaN or infinity"),
        ({"layer2.0.conv1.weight": torch.zeros(32, 16, 5, 5)}, "layer2.0.conv1.weight: the model expects shape"),
        ({"layer3.3.conv1.weight": torch.zeros(64, 64, 3, 3)}, "layer3.3.conv1.weight .* not in the model"),
        ({"conv1.weight_mask": torch.ones(16, 3, 3, 3)}, "half of"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, changes: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        models.load_weights("resnet20", toy(), str(checkpoint(tmp_path / "c.pth", **changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stored", "built"), [("resnet32", "resnet20"), ("resnet20", "resnet32"), ("resnet20", "resnet18")])
def test_weights_of_another_model_are_refused(tmp_path: Path, stored: str, built: str) -> None:
    torch.save(models.build(stored, 10).state_dict(), tmp_path / "c.pth")
    with pytest.raises(ModelError):
        models.load_weights(built, models.build(built, 10), str(tmp_path / "c.pth"))


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    trap = str(tmp_path / "sprung")
    torch.save({"state_dict": Trap(trap)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Trap(trap)))
    torch.save(toy(), tmp_path / "whole_module.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(ModelError) as caught:
            models.load_checkpoint(path)
        assert "\n" not in str(caught.value)
    assert not os.path.exists(trap)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "c.pth").read_bytes()
    wrap_safetensors(toy().state_dict(), tmp_path / "s.pth")
    safe = (tmp_path / "s.safetensors").read_bytes()
    contents = {"half.pth": whole[: len(whole) // 2], "empty.pth": b"", "text.pth": b"hello", "half.safetensors": safe[:-9]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    Ticket({"w": np.ones(3, bool)}).save(tmp_path / "ticket.safetensors")
    names = "half.pth", "empty.pth", "text.pth", "half.safetensors", "list.pth", "nothing.pth", "ticket.safetensors", "missing.pth", "."
    for name in names:
        with pytest.raises(ModelError) as caught:
            models.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_published_weights_come_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's download is replaced by a state dict with the official keys."""
    torch.manual_seed(3)
    official = zoo.resnet18().state_dict()
    monkeypatch.setattr(zoo.ResNet18_Weights, "get_state_dict", lambda self, **_: official)
    module = models.build("resnet18", 10, 32)
    source = models.load_weights("resnet18", module)
    assert source.name == "IMAGENET1K_V1"
    assert source.remarks[0] == "dropped from the checkpoint: conv1.weight, fc.weight, fc.bias"
    assert torch.equal(module.layer4[1].conv2.weight, official["layer4.1.conv2.weight"])
    with pytest.raises(ModelError, match="IMAGENET1K_V1"):
        models.load_weights("resnet18", module, "IMAGENET1K_V9")

    def offline(self: object, **_: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(zoo.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(ModelError, match="cannot download"):
        models.load_weights("resnet18", module)


def test_arrays_and_assign_are_inverse_and_strict() -> None:
    module, other = toy(), models.build("resnet20", 10).to(memory_format=torch.channels_last)
    state = models.arrays(module)
    models.assign(other, state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    state["conv1.weight"][:] = 0
    assert module.conv1.weight.abs().sum() > 0, "arrays share no memory with the module"
    for wrong in ({"conv1.weight": state["conv1.weight"]}, {**state, "more": state["conv1.weight"]}, {**state, "linear.bias": np.zeros(3)}):
        with pytest.raises(ModelError, match="do not fit"):
            models.assign(module, wrong)
