"""Networks by name. One file of this folder is one family; adding a file adds its names here, on the command line and in tests.

A family file states
    NAMES                               the networks it builds
    STEM, HEAD                          module names of its first convolution(s) and of its head(s): never pruned
    WEIGHTS                             what `--weights` means where it is not given: "random", or a published weight name
    SIDE                                height and width of the images it was published for
    build(name, num_classes, image_size)    the network, randomly initialised from torch's global generator
    published(name, weights)            optional: the state dict of published weights, by weight name

Files that begin with an underscore are no families. Every convolution but the stem is prunable, grouped ones too (the rule of the
lottery-ticket papers); heads, norms and biases are not.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ticketkit.errors import ModelError
from ticketkit.models._checkpoint import Source, fit, load_checkpoint, state_sha256
from ticketkit.models._layouts import take

__all__ = [
    "Source", "arrays", "assign", "build", "build_for", "evaluating", "family", "features", "fit", "in_head", "load_checkpoint",
    "load_weights", "names", "projection", "prunable", "read_weights", "rule", "set_head", "state_sha256",
]  # fmt: skip


@cache
def families() -> dict[str, ModuleType]:
    """Family name (file name) -> family module."""
    found = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return {name: import_module(f"{__name__}.{name}") for name in sorted(found)}


def names() -> list[str]:
    """Every network that `build` knows."""
    return [name for module in families().values() for name in module.NAMES]


def family(name: str) -> ModuleType:
    """The family that builds `name`.

    Raises:
        ModelError: no family knows it.
    """
    for module in families().values():
        if name in module.NAMES:
            return module
    raise ModelError(f"unknown model {name!r}; expected one of {', '.join(names())}")


def build(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A randomly initialised network, float32 [N, 3, H, W] -> logits [N, num_classes].

    Args:
        name: one of `names()`.
        num_classes: width of the head, at least 1.
        image_size: height and width of its images in pixels; families may build another stem for small ones. None: the
            size the family was published for.
    """
    if num_classes < 1:
        raise ModelError(f"{name}: expected at least one class, got {num_classes}")
    module: nn.Module = family(name).build(name, num_classes, image_size)
    return module


def load_weights(name: str, module: nn.Module, weights: str | None = None) -> Source:
    """Give the module, as built, its pretrained weights θ_p.

    Args:
        name: the module's model name.
        module: from `build`; changed in place.
        weights: a checkpoint file, the name of published weights (torchvision's), or "random" to leave the module as it is.
            None: what the family states as its default. Of a checkpoint of self-supervised training the network is taken, see
            `_layouts`; its projection head too where the module's head has the same names and shapes.

    Raises:
        ModelError: unreadable weights, or weights of another model.
    """
    home = family(name)
    weights = weights or home.WEIGHTS
    if weights == "random":
        return Source("random", "")
    state, remarks = read_weights(name, weights)
    return Source(weights, state_sha256(state), (*remarks, *fit(module, state, home.STEM, home.HEAD)))


def read_weights(name: str, weights: str) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The state dict of a checkpoint file, or of published weights, of the network `name`, and in words what was taken of it."""
    home = family(name)
    if hasattr(home, "published") and weights.isidentifier() and weights.isupper():
        state = {key: tensor.numpy() for key, tensor in home.published(name, weights).items()}
    else:
        state = load_checkpoint(weights)
    return take(state, home.STEM)


def rule(name: str) -> dict[str, list[str]]:
    """Module names of the stem and the head, as a ticket records them."""
    home = family(name)
    return {"stem": list(home.STEM), "head": list(home.HEAD)}


def prunable(name: str, module: nn.Module) -> list[str]:
    """Parameter names that may be pruned, in the module's order: weights of every convolution outside stem and head."""
    spared = [*family(name).STEM, *family(name).HEAD]
    convolutions = [path for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    return [f"{path}.weight" for path in convolutions if not _within(path, spared)]


def in_head(name: str, path: str) -> bool:
    """True if `path`, a module or a tensor of the network `name`, belongs to its head."""
    return _within(path, family(name).HEAD)


def features(name: str, module: nn.Module) -> int:
    """Width of what the network's head sees."""
    head = module.get_submodule(family(name).HEAD[0])
    return int(next(parameter for parameter in head.parameters() if parameter.dim() == 2).shape[1])


def set_head(name: str, module: nn.Module, head: nn.Module) -> None:
    """Put another head in the place of the network's own, under the same name."""
    path, _, leaf = family(name).HEAD[0].rpartition(".")
    setattr(module.get_submodule(path), leaf, head)


def projection(width: int, dim: int) -> nn.Sequential:
    """The head of contrastive learning: [N, width] -> [N, dim] through one hidden layer (Chen et al. 2020, section 4.2).

    Its layers are 0 and 2, as in MoCo v2's checkpoints.
    """
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


def build_for(name: str, state: Mapping[str, NDArray[Any]], num_classes: int, image_size: int | None = None) -> nn.Module:
    """`build` with the head that a state dict has: its own, or a `projection`."""
    module, head = build(name, num_classes, image_size), family(name).HEAD[0]
    if f"{head}.0.weight" in state and f"{head}.2.weight" in state:
        set_head(name, module, projection(features(name, module), len(state[f"{head}.2.weight"])))
    return module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part is in the mode it was in, frozen ones too."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def arrays(module: nn.Module) -> dict[str, NDArray[Any]]:
    """The module's state dict as numpy arrays in C order that share no memory with it."""
    state = module.state_dict().items()
    return {name: np.array(tensor.detach().cpu().numpy(), order="C", copy=True) for name, tensor in state}


def assign(module: nn.Module, state: Mapping[str, NDArray[Any]]) -> None:
    """Copy a whole numpy state dict into the module.

    Raises:
        ModelError: a name is missing or left over, or a shape differs.
    """
    own = module.state_dict()
    if own.keys() != state.keys() or any(tuple(own[name].shape) != state[name].shape for name in own):
        wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if tuple(own[name].shape) != state[name].shape]
        raise ModelError(f"{wrong[0]}: the weights do not fit the model (missing, left over or of another shape)")
    module.load_state_dict({name: torch.from_numpy(np.array(value, copy=True)) for name, value in state.items()})


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
