"""The network inside a checkpoint of self-supervised training, which holds more than it: momentum encoders, queues, heads.

Names are compared by whole dotted components, never by substrings. Known are

    encoder_q.*                      MoCo v1 and v2 (`moco_v2_800ep_pretrain.pth.tar`; queue and encoder_k are left)
    backbone.*                       lightly, solo-learn
    encoder.*, convnet.*             SimCLR in torch, by several authors
    online_network.encoder.*, online_network_state_dict.encoder.*, online_encoder.net.*, online_backbone.*       BYOL
    resnet.net.*                     SimCLR v2, converted by Separius/SimCLRv2-Pytorch (`r50_1x_sk0.pth`: resnet and head)

with the network's own names behind them; those of `nn.Sequential(*resnet.children())`, where 0 is conv1 and 4 is layer1; or SimCLR
v2's. SimCLR v1 converted by tonylins/simclr-converter (`resnet50-1x.pth`) has torchvision's names at the top and needs nothing.
SimCLR's networks saw pixels in [0, 1] that were not normalised further.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ticketkit.errors import ModelError

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a network lies in a checkpoint: below `prefix`, if something lies below prefix + a mark; `rename` gives its own names.

    `rename` takes the components behind the prefix and returns None for a tensor that is not of the network.
    """

    name: str
    prefix: Parts
    marks: tuple[Parts, ...]
    rename: Callable[[Parts], Parts | None]

    def __str__(self) -> str:
        return ".".join(self.prefix) or "the top"

    def is_in(self, names: Collection[Parts]) -> bool:
        """True if the checkpoint of these names holds such a network."""
        return any(name[: len(whole)] == whole for whole in ((*self.prefix, *mark) for mark in self.marks) for name in names)


PREFIXES = {
    "MoCo": (("encoder_q",),),
    "lightly": (("backbone",),),
    "SimCLR": (("encoder",), ("convnet",)),
    "BYOL": (("online_network", "encoder"), ("online_network_state_dict", "encoder"), ("online_encoder", "net"), ("online_backbone",)),
}
SIMCLR2 = "SimCLR v2"
# Files of several state dicts side by side under these names; a file may be wrapped otherwise too, see `_checkpoint.WRAPPERS`.
ROOTS = ("resnet", "online_network_state_dict", "online_backbone")
CHILDREN = {"0": "conv1", "1": "bn1", **{str(3 + i): f"layer{i}" for i in range(1, 5)}}
BLOCK = r"net\.([1-4])\.blocks\.(\d+)\."
RULES = (
    (r"net\.0\.0\.(\w+)", r"conv1.\1"),
    (r"net\.0\.1\.0\.(\w+)", r"bn1.\1"),
    (BLOCK + r"projection\.shortcut\.(\w+)", r"layer\1.\2.downsample.0.\3"),
    (BLOCK + r"projection\.bn\.0\.(\w+)", r"layer\1.\2.downsample.1.\3"),
    *((BLOCK + rf"net\.{2 * i}\.(\w+)", rf"layer\1.\2.conv{i + 1}.\3") for i in range(3)),
    *((BLOCK + rf"net\.{2 * i + 1}\.0\.(\w+)", rf"layer\1.\2.bn{i + 1}.\3") for i in range(3)),
    (r"fc\.(\w+)", r"fc.\1"),
)
WIDTH = 64  # channels of the first convolution of every ResNet of width 1


def take(state: Mapping[str, NDArray[Any]], stem: Iterable[str]) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The network's own tensors under its own names, and in words what was taken and left.

    A checkpoint that holds the network at the top, or in no layout known here, comes back as it is, without remarks.

    Args:
        state: from `load_checkpoint`.
        stem: module names of the network's first convolution(s), by which it is recognised.

    Raises:
        ModelError: several networks that could be meant, or a SimCLR v2 network with selective kernels or of another width.
    """
    names = {name: tuple(name.split(".")) for name in state}
    marks = tuple(tuple(path.split(".")) for path in stem)
    found = [layout for layout in _layouts(marks) if layout.is_in(names.values())]
    if len(found) > 1:
        places = ", ".join(str(layout) for layout in found)
        raise ModelError(f"the checkpoint holds several networks ({places}); expected one, save the state dict of the one meant")
    if not found or not found[0].name:
        return dict(state), ()
    (layout,), taken, left = found, {}, []
    for name, parts in names.items():
        depth = len(layout.prefix)
        own = layout.rename(parts[depth:]) if parts[:depth] == layout.prefix and len(parts) > depth else None
        if own is None:
            left.append(".".join(parts[: _shared(parts, layout.prefix) + 1]))
        else:
            taken[".".join(own)] = state[name]
    wide = [array.shape for name, array in taken.items() if name.startswith("conv1.") and array.shape[:1] != (WIDTH,)]
    if layout.name == SIMCLR2 and wide:
        raise ModelError(f"SimCLR v2 layout: expected {WIDTH} channels after conv1, got shape {wide[0]}; take a network of width 1x")
    rest = f"; left: {', '.join(dict.fromkeys(left))}" if left else ""
    return taken, (f"{layout.name} layout: {layout} taken{rest}",)


def _layouts(stem: tuple[Parts, ...]) -> list[Layout]:
    """Every layout, the nameless one of a network at the top among them."""
    known = [Layout("", (), stem, _unchanged)]
    for name, prefix in ((name, prefix) for name, prefixes in PREFIXES.items() for prefix in prefixes):
        known += [Layout(name, prefix, stem, _unchanged), Layout(name, prefix, (("4", "0", "conv1"),), _from_children)]
    return known + [Layout(SIMCLR2, prefix, (("net", "0", "0"),), _from_simclr2) for prefix in ((), ("resnet",))]


def _unchanged(parts: Parts) -> Parts | None:
    return parts


def _from_children(parts: Parts) -> Parts | None:
    return (CHILDREN[parts[0]], *parts[1:]) if parts[0] in CHILDREN else None


def _from_simclr2(parts: Parts) -> Parts | None:
    name = ".".join(parts)
    for pattern, own in RULES:
        if found := re.fullmatch(pattern, name):
            return tuple(found.expand(own).split("."))
    if parts[0] == "net":
        raise ModelError(f"SimCLR v2 layout: {name} is of no plain ResNet (selective kernels?); expected an sk0 network, as r50_1x_sk0")
    return None


def _shared(parts: Parts, prefix: Parts) -> int:
    """How many leading components are those of the prefix."""
    return next((i for i, (a, b) in enumerate(zip(parts, prefix, strict=False)) if a != b), min(len(parts), len(prefix)))
