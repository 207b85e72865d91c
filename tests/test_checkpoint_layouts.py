"""Checkpoints of self-supervised training, written with the official key names: the network is found, the rest is left and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torchvision.models.resnet import Bottleneck, ResNet  # noqa: E402

from ticketkit import models  # noqa: E402
from ticketkit.errors import ModelError  # noqa: E402
from ticketkit.models._layouts import take  # noqa: E402

State = dict[str, Tensor]
STEM = ("conv1",)


def resnet18(seed: int = 1, head: Callable[[], nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(seed)
    module = models.build("resnet18", 10)
    module.fc = head() if head else module.fc
    return module


def mlp() -> nn.Module:
    """The head of MoCo v2."""
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def moco(query: State, key: State, path: Path) -> str:
    """As main_moco.py saves it."""
    queue = {"module.queue": torch.ones(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    state = {**prefixed("module.encoder_q", query), **prefixed("module.encoder_k", key), **queue}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}, path / "moco.pth.tar")
    return str(path / "moco.pth.tar")


def assert_same(module: nn.Module, state: State, names: list[str]) -> None:
    assert names and all(torch.equal(module.state_dict()[name], state[name]) for name in names)


def test_moco_gives_its_query_encoder_and_head(tmp_path: Path) -> None:
    query, key = resnet18(1, mlp).state_dict(), resnet18(2, mlp).state_dict()
    file, module = moco(query, key, tmp_path), resnet18(3, mlp)
    source = models.load_weights("resnet18", module, file)
    assert_same(module, query, list(query))
    assert source.remarks == ("MoCo layout: encoder_q taken; left: encoder_k, queue, queue_ptr",)
    assert not torch.equal(module.layer1[0].conv1.weight, key["layer1.0.conv1.weight"])


def test_the_hash_is_that_of_the_network_alone(tmp_path: Path) -> None:
    state = resnet18(1, mlp).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    plain = models.load_weights("resnet18", resnet18(3, mlp), str(tmp_path / "plain.pth"))
    inside = models.load_weights("resnet18", resnet18(3, mlp), moco(state, resnet18(2, mlp).state_dict(), tmp_path))
    assert plain.sha256 == inside.sha256 and plain.remarks == ()


def test_a_projection_head_is_dropped_where_the_network_classifies(tmp_path: Path) -> None:
    state, module, untouched = resnet18(1, mlp).state_dict(), resnet18(3), resnet18(3)
    source = models.load_weights("resnet18", module, moco(state, state, tmp_path))
    dropped = "dropped from the checkpoint: fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias"
    assert source.remarks[1:] == (dropped, "newly initialised: fc.weight, fc.bias")
    assert torch.equal(module.fc.weight, untouched.fc.weight)
    assert_same(module, state, [name for name in state if not name.startswith("fc.")])


def test_a_classifier_is_dropped_where_the_network_projects(tmp_path: Path) -> None:
    state, module, untouched = resnet18(1).state_dict(), resnet18(3, mlp), resnet18(3, mlp)
    torch.save(state, tmp_path / "c.pth")
    (dropped, new) = models.load_weights("resnet18", module, str(tmp_path / "c.pth")).remarks
    assert dropped == "dropped from the checkpoint: fc.weight, fc.bias" and new.endswith("fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias")
    assert torch.equal(module.fc[0].weight, untouched.fc[0].weight)


CHILD = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def by_children(state: State) -> State:
    """The names of nn.Sequential(*list(resnet.children())[:-1])."""
    split = [(name.partition("."), tensor) for name, tensor in state.items()]
    return {f"{CHILD[first]}.{rest}": tensor for (first, _, rest), tensor in split if first in CHILD}


def byol(state: State) -> dict[str, State]:
    """Two state dicts side by side, and an optimizer's."""
    online = {**prefixed("encoder", by_children(state)), "projetion.net.0.weight": torch.ones(4)}
    return {"online_network_state_dict": online, "target_network_state_dict": online, "optimizer_state_dict": {"state": {}}}


LAYOUTS: dict[str, tuple[Callable[[State], object], str]] = {
    "lightly": (
        lambda state: {"state_dict": {**prefixed("backbone", state), "projection_head.layers.0.weight": torch.ones(2)}},
        "lightly layout: backbone taken; left: projection_head",
    ),
    "lightly's tutorials": (lambda state: prefixed("backbone", by_children(state)), "lightly layout: backbone taken"),
    "momentum": (
        lambda state: {**prefixed("backbone", state), **prefixed("momentum_backbone", by_children(state))},
        "lightly layout: backbone taken; left: momentum_backbone",
    ),
    "encoder": (
        lambda state: {**prefixed("module.encoder", state), "module.projector.0.weight": torch.ones(2)},
        "SimCLR layout: encoder taken; left: projector",
    ),
    "convnet": (lambda state: {"state_dict": prefixed("convnet", state)}, "SimCLR layout: convnet taken"),
    "side by side": (
        byol,
        "BYOL layout: online_network_state_dict.encoder taken; left: online_network_state_dict.projetion, target_network_state_dict",
    ),
    "learner": (
        lambda state: {**prefixed("online_encoder.net", state), **prefixed("target_encoder.net", state), "online_encoder.n": torch.ones(1)},
        "BYOL layout: online_encoder.net taken; left: target_encoder, online_encoder.n",
    ),
    "online_backbone": (lambda state: {"online_backbone": prefixed("module", state)}, "BYOL layout: online_backbone taken"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_networks_below_a_known_prefix(name: str, tmp_path: Path) -> None:
    write, remark = LAYOUTS[name]
    state, module = resnet18(1).state_dict(), resnet18(3)
    torch.save(write(state), tmp_path / "c.pth")
    source = models.load_weights("resnet18", module, str(tmp_path / "c.pth"))
    assert source.remarks[0] == remark
    assert_same(module, state, [name for name in state if not name.startswith("fc.")])


def small_bottleneck() -> nn.Module:
    torch.manual_seed(1)
    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=3)


def simclr2(state: State) -> State:
    """torchvision's tensors under the names of SimCLRv2-Pytorch, spelled out."""
    names = {"conv1": "net.0.0", "bn1": "net.0.1.0", "fc": "fc"}
    for stage, block in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0)):
        ours, theirs = f"layer{stage}.{block}", f"net.{stage}.blocks.{block}"
        names |= {f"{ours}.conv1": f"{theirs}.net.0", f"{ours}.bn1": f"{theirs}.net.1.0"}
        names |= {f"{ours}.conv2": f"{theirs}.net.2", f"{ours}.bn2": f"{theirs}.net.3.0"}
        names |= {f"{ours}.conv3": f"{theirs}.net.4", f"{ours}.bn3": f"{theirs}.net.5.0"}
        names |= {f"{ours}.downsample.0": f"{theirs}.projection.shortcut", f"{ours}.downsample.1": f"{theirs}.projection.bn.0"}
    return {f"{names[module]}.{leaf}": tensor for name, tensor in state.items() for module, _, leaf in [name.rpartition(".")]}


@pytest.mark.parametrize("wrap", [True, False])
def test_simclr_v2_becomes_a_plain_resnet(wrap: bool, tmp_path: Path) -> None:
    state = small_bottleneck().state_dict()
    theirs, head = simclr2(state), {"layers.0.weight": torch.ones(2, 2), "layers.1.running_mean": torch.ones(2)}
    torch.save({"resnet": theirs, "head": head} if wrap else theirs, tmp_path / "r50_1x_sk0.pth")
    taken, remarks = take(models.load_checkpoint(tmp_path / "r50_1x_sk0.pth"), STEM)
    assert taken.keys() == state.keys() and all(torch.equal(torch.from_numpy(taken[name]), state[name]) for name in state)
    assert remarks == (("SimCLR v2 layout: resnet taken; left: head",) if wrap else ("SimCLR v2 layout: the top taken",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"net.2.blocks.0.net.2.main_conv.0.weight": torch.ones(2)}, r"net\.2\.blocks\.0\.net\.2\.main_conv\.0\.weight is of no plain"),
        ({"net.0.4.weight": torch.ones(2)}, r"net\.0\.4\.weight is of no plain ResNet \(selective kernels\?\); expected an sk0"),
        ({"net.1.blocks.0.projection.shortcut.2.weight": torch.ones(2)}, "selective"),
        ({"net.0.0.weight": torch.ones(128, 3, 7, 7)}, r"expected 64 channels after conv1, got shape \(128, 3, 7, 7\); .* 1x"),
        ({"net.0.0.weight": torch.ones(())}, r"expected 64 channels after conv1, got shape \(\)"),
    ],
)
def test_simclr_v2_with_selective_kernels_or_wider_is_refused(changes: State, words: str, tmp_path: Path) -> None:
    torch.save({"resnet": {**simclr2(small_bottleneck().state_dict()), **changes}}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match=words) as caught:
        models.load_weights("resnet50", nn.Module(), str(tmp_path / "c.pth"))
    assert "\n" not in str(caught.value)


def test_simclr_v1_conversions_have_the_names_of_torchvision(tmp_path: Path) -> None:
    state, module = resnet18(1).state_dict(), resnet18(3)
    torch.save({"state_dict": state}, tmp_path / "resnet18-1x.pth")
    assert models.load_weights("resnet18", module, str(tmp_path / "resnet18-1x.pth")).remarks == ()
    assert_same(module, state, list(state))
    state["conv1.weight"], state["layer1.0.conv1.weight"] = torch.ones(128, 3, 7, 7), torch.ones(128, 128, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "resnet18-2x.pth")
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1\.weight: the model expects shape \(64, 64, 3, 3\), the checkpoint has \(128,"):
        models.load_weights("resnet18", module, str(tmp_path / "resnet18-2x.pth"))


TOY = {name: tensor.numpy() for name, tensor in small_bottleneck().state_dict().items()}


@pytest.mark.parametrize(
    "place", ["my_encoder_q.{}", "encoder_q2.{}", "net.encoder_q.{}", "{}.encoder_q", "xbackbone.{}", "encoder_qconv1.{}", "encoder.net.{}"]
)
def test_names_are_never_cut_in_the_middle(place: str) -> None:
    """Key surgery by substring, as published code does it, would change these."""
    state = {place.format(name): array for name, array in TOY.items()}
    taken, remarks = take(state, STEM)
    assert list(taken) == list(state) and remarks == ()


def test_a_prefix_is_taken_off_once_and_only_in_front() -> None:
    inner = ("encoder_q.weight", "layer1.0.encoder_q.conv1.weight", "backbone.weight", "module_encoder_q.weight")
    state = {**TOY, **dict.fromkeys(inner, TOY["conv1.weight"])}
    taken, _ = take({f"encoder_q.{name}": array for name, array in state.items()}, STEM)
    assert list(taken) == list(state), "negative control: replace('encoder_q.', '') takes it off everywhere"
    assert [f"encoder_q.{name}".replace("encoder_q.", "") for name in state] != list(state)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (("{}", "encoder_q.{}"), "the top, encoder_q"),
        (("encoder_q.{}", "backbone.{}"), "encoder_q, backbone"),
        (("backbone.{}", "encoder.{}", "encoder_k.{}"), "backbone, encoder"),
    ],
)
def test_several_networks_are_refused(places: tuple[str, ...], words: str) -> None:
    state = {place.format(name): array for place in places for name, array in TOY.items()}
    with pytest.raises(ModelError, match=rf"several networks \({words}\); expected one") as caught:
        take(state, STEM)
    assert "\n" not in str(caught.value)


def test_a_bare_tensor_of_the_name_of_a_prefix_is_left() -> None:
    taken, remarks = take({**{f"encoder_q.{name}": array for name, array in TOY.items()}, "encoder_q": TOY["fc.bias"]}, STEM)
    assert taken.keys() == TOY.keys() and remarks == ("MoCo layout: encoder_q taken; left: encoder_q",)


@pytest.mark.parametrize("missing", ["encoder_q.layer1.0.conv1.weight", "encoder_q.conv1.weight"])
def test_a_query_encoder_with_a_hole_is_refused(missing: str, tmp_path: Path) -> None:
    state = prefixed("encoder_q", resnet18(1).state_dict())
    del state[missing]
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match="missing from the checkpoint") as caught:
        models.load_weights("resnet18", resnet18(3), str(tmp_path / "c.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_one_clear_line(keep: float, tmp_path: Path) -> None:
    tiny = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in resnet18(1, mlp).state_dict().items()}
    path = Path(moco(tiny, tiny, tmp_path))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelError, match=r"moco\.pth\.tar: not a") as caught:
        models.load_weights("resnet18", resnet18(3), str(path))
    assert "\n" not in str(caught.value)


def test_numbers_for_names_are_no_crash(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), "encoder_q.conv1.weight": torch.ones(2)}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match="missing from the checkpoint"):
        models.load_weights("resnet18", resnet18(3), str(tmp_path / "c.pth"))
