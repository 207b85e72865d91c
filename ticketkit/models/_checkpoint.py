"""Checkpoints of others: read them without running their code, and fit them into a network of ours."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ticketkit.errors import ModelError, TicketError, first_line
from ticketkit.models._layouts import ROOTS
from ticketkit.ticket import KEY, read_safetensors, split_pruned

Arrays = Mapping[str, NDArray[Any]]
WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Source:
    """Where weights came from: `name` as the user wrote it, sha256 over the state dict ("" if random), remarks in words."""

    name: str
    sha256: str
    remarks: tuple[str, ...] = ()


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The state dict in a file, as numpy arrays; floating ones as float32.

    Reads safetensors, and torch files with `weights_only=True`, so that no code of the file runs. Unwraps `state_dict`,
    `model_state_dict` and `model`, takes off `module.` prefixes, and joins state dicts that lie side by side (`_layouts.ROOTS`) by a
    dot. What else there is beside the network stays, for `_layouts.take`. The keys of `torch.nn.utils.prune` stay as they are, for
    `Ticket.from_state_dict`.

    Raises:
        ModelError: missing, damaged, refused by weights_only, without tensors, or with NaN or infinity (the tensor is named).
    """
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such checkpoint file; expected .safetensors or a torch state dict (.pt, .pth, .th)")
    raw = _read_safetensors(path) if str(path).endswith(".safetensors") else _read_torch(path)
    state = {_plain(key): _to_array(value) for key, value in raw.items() if isinstance(value, Tensor | np.ndarray)}
    if not state:
        raise ModelError(f"{path}: expected a state dict of tensors, found none under {', '.join(WRAPPERS)} or at the top")
    for name, array in state.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity; this checkpoint is broken")
    return state


def fit(module: nn.Module, state: Arrays, stem: Iterable[str], head: Iterable[str]) -> tuple[str, ...]:
    """Copy a state dict into the module, and say in words what was left out.

    Pruned checkpoints (NAME_orig, NAME_mask) are merged first. A head, or a stem, of another shape keeps the module's own
    initialisation; tensors of parts the module does not have are dropped. Anything else must match exactly.

    Raises:
        ModelError: a backbone tensor is missing, left over, or of another shape.
    """
    try:
        weights, masks = split_pruned(state)
    except TicketError as error:
        raise ModelError(str(error)) from None
    given = {name: array * masks[name] if name in masks else array for name, array in weights.items()}
    own = module.state_dict()
    free, parts = (*stem, *head), {name.split(".")[0] for name in own}
    strange = [name for name in given if name not in own and name.split(".")[0] in parts and name.split(".")[0] not in free]
    if strange:
        raise ModelError(f"{strange[0]} ({len(strange)} such tensors): in the checkpoint but not in the model; wrong --model?")
    fitting, kept = {}, []
    for name, tensor in own.items():
        if name in given and given[name].shape == tuple(tensor.shape):
            fitting[name] = torch.from_numpy(np.ascontiguousarray(given[name])).reshape(tensor.shape).to(tensor.dtype)
        elif name.split(".")[0] in free:
            kept.append(name)
        elif name in given:
            raise ModelError(f"{name}: the model expects shape {tuple(tensor.shape)}, the checkpoint has {given[name].shape}")
        elif not name.endswith(".num_batches_tracked"):  # absent from checkpoints older than torch 0.4.1, and without effect
            raise ModelError(f"{name}: missing from the checkpoint; it is of another model")
    module.load_state_dict(fitting, strict=False)
    dropped = [name for name in given if name not in fitting]
    remarks = [f"dropped from the checkpoint: {', '.join(dropped)}"] if dropped else []
    return (*remarks, f"newly initialised: {', '.join(kept)}") if kept else tuple(remarks)


def state_sha256(state: Arrays) -> str:
    """Hash of a state dict by content: the same weights hash alike in every file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}\0{state[name].dtype.str}\0{state[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()


def _read_torch(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to file an issue about foreign pickles; we refuse those ourselves
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError, TypeError, IndexError) as error:
        raise ModelError(f"{path}: not a torch checkpoint ({_first_sentence(error)}); truncated, or of another format") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path}: not a plain state dict ({_first_sentence(error)}); save one with torch.save(model.state_dict(), path)"
        ) from None
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            return _joined(loaded) if any(isinstance(loaded.get(root), Mapping) for root in ROOTS) else loaded
        loaded = inner
    raise ModelError(f"{path}: expected a state dict, got a {type(loaded).__name__}")


def _joined(files: Mapping[str, Any]) -> Mapping[str, Any]:
    """{"resnet": {"fc.bias": t}, "epoch": 3} -> {"resnet.fc.bias": t}"""
    groups = [(root, group) for root, group in files.items() if isinstance(group, Mapping)]
    return {f"{root}.{_plain(name)}": value for root, group in groups for name, value in group.items()}


def _read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        tensors, metadata = read_safetensors(path)
    except TicketError as error:
        raise ModelError(str(error)) from None
    if KEY in metadata:
        raise ModelError(f"{path}: this is a ticket, not a checkpoint; pass the weights it was found on")
    return tensors


def _plain(key: object) -> str:
    key = str(key)  # a dictionary of tensors may have numbers for keys
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _to_array(value: Tensor | NDArray[Any]) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).contiguous().numpy()
    array: NDArray[Any] = value
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _first_sentence(error: Exception) -> str:
    return first_line(error).split(". ")[0]
