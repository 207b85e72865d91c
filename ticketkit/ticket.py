"""The Ticket: which weights of a model are kept, the weights they rewind to, and where both came from. Numpy only.

The file, version 1 (golden bytes in tests/test_ticket.py)
----------------------------------------------------------
A ticket is one safetensors file, so any safetensors reader opens it. No pickle anywhere.

Tensors
    ``NAME.mask``   uint8 [ceil(n / 8)]: the mask of the parameter NAME, n = its number of weights. Position i (C order of NAME)
                    is bit ``i % 8``, counted from the least significant, of byte ``i // 8``; 1 = kept. Bits past n are 0.
    ``NAME``        optional: the rewind weights, a whole state dict (norms, biases, heads, BN statistics too) under the model's
                    own names. *Not* multiplied by the masks, so that dense comparisons can start from the same file.

Metadata
    One key, ``ticketkit.ticket``, because safetensors writes several keys in random order and equal tickets must be equal bytes.
    Its value is canonical JSON (keys sorted, no spaces, ASCII):
    ``format``  1
    ``shapes``  {NAME: shape}, exactly the masked parameters
    ``meta``    provenance, free-form: model, stem and head rule, weights source and sha256, objective, task, round, rate,
                granularity, sparsity, per-layer sparsity, seed, dense and ticket metric (lists over seeds), ticketkit version
    ``sha256``  over the canonical JSON of the object without this field, then, for each tensor in order of its name: name, NUL,
                numpy dtype (``<f4``), NUL, shape as JSON, NUL, the bytes in C order, little-endian

A reader must refuse a file whose sha256 differs, whose masks and shapes disagree, or whose weights are not finite.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from ticketkit.errors import TicketError
from ticketkit.masks import Mask, Masks, layer_sparsity, pack, sparsity, unpack

KEY = "ticketkit.ticket"
FORMAT = 1
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Ticket:
    """A frozen ticket; equal to another if and only if their files would be.

    Attributes:
        masks: parameter name -> bool array of the parameter's shape, True where kept.
        weights: rewind weights by state-dict name, unmasked; empty if the ticket holds masks alone.
        meta: provenance, JSON values only.

    Raises:
        TicketError: a mask is not boolean, a weight has another shape than its mask, or weights are not finite.
    """

    masks: Masks
    weights: Mapping[str, Array] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.masks:
            raise TicketError("a ticket needs at least one mask, got none")
        for name, mask in self.masks.items():
            if mask.dtype != np.bool_:
                raise TicketError(f"{name}: expected a mask of dtype bool, got {mask.dtype}")
            if name in self.weights and self.weights[name].shape != mask.shape:
                raise TicketError(f"{name}: expected weights of the mask's shape {mask.shape}, got {self.weights[name].shape}")
            if f"{name}.mask" in self.weights:
                raise TicketError(f"{name}.mask: a weight may not carry the name of a mask")
        for name, weight in self.weights.items():
            if weight.dtype.kind == "f" and not np.isfinite(weight).all():
                raise TicketError(f"{name}: weights hold NaN or infinity; this checkpoint is broken")

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable (masked) weights that are pruned."""
        return sparsity(self.masks)

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Sparsity of each masked parameter."""
        return layer_sparsity(self.masks)

    @cached_property
    def mask_sha256(self) -> str:
        """Hash of the masks alone: equal across ranks, machines and resumed runs that found the same ticket."""
        return _digest({name: list(mask.shape) for name, mask in self.masks.items()}, _packed(self.masks))

    @cached_property
    def sha256(self) -> str:
        """Hash of everything, as written in the file."""
        return _digest(self._header(), self._tensors())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ticket) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __str__(self) -> str:
        origin = [f"{key} {self.meta[key]}" for key in ("model", "task", "round") if key in self.meta] or ["no provenance"]
        return f"Ticket({', '.join(origin)}; {len(self.masks)} layers, {self.sparsity:.2%} sparse, {self.mask_sha256[:12]})"

    def apply(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """A copy of `state` with every pruned weight exactly 0.0; names without a mask pass through untouched.

        Raises:
            TicketError: a masked parameter is missing from `state` or has another shape.
        """
        masked = dict(state)
        for name, mask in self.masks.items():
            if name not in state:
                raise TicketError(f"{name}: in the ticket but not in the state dict; the ticket belongs to another model")
            if state[name].shape != mask.shape:
                raise TicketError(f"{name}: the ticket expects shape {mask.shape}, the state dict has {state[name].shape}")
            masked[name] = np.where(mask, state[name], state[name].dtype.type(0))
        return masked

    def merge(self) -> dict[str, Array]:
        """The rewind weights under the masks, as one plain state dict (dense arrays with exact zeros)."""
        if not self.weights:
            raise TicketError("this ticket holds masks but no weights; give it a state dict: ticket.apply(state)")
        return self.apply(self.weights)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ticket atomically: the old file, or the whole new one, whatever happens in between.

        Raises:
            TicketError: the place is not writable or full, or `meta` is not JSON.
        """
        header = {**self._header(), "sha256": self.sha256}
        return write_atomic(path, to_safetensors(self._tensors(), {KEY: canonical(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Read and check a ticket file.

        Raises:
            TicketError: missing, truncated, altered, of a newer format, or no ticket at all.
        """
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata:
            raise TicketError(
                f"{path}: a safetensors file but no ticket: it has no {KEY!r} metadata;"
                " if these are plain weights, name their network (--model)"
            )
        try:
            header = json.loads(metadata[KEY])
            claimed, version, shapes = header.pop("sha256"), header["format"], header["shapes"]
            meta = header["meta"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TicketError(f"{path}: the ticket's metadata is damaged ({error}); copy the file again") from None
        if version != FORMAT:
            raise TicketError(f"{path}: expected ticket format {FORMAT}, got {version}; upgrade ticketkit")
        if _digest(header, tensors) != claimed:
            raise TicketError(f"{path}: sha256 differs from the one in its header: the file is damaged, copy it again")
        masks = {name: _unpack(path, name, shape, tensors.pop(f"{name}.mask", None)) for name, shape in shapes.items()}
        return cls(masks, tensors, meta)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Array], names: Iterable[str] | None = None, meta: Mapping[str, Any] | None = None
    ) -> Ticket:
        """A ticket from anybody's pruned weights: `torch.nn.utils.prune` keys, or dense arrays with exact zeros.

        Args:
            state: numpy state dict. If any NAME_orig / NAME_mask pair is there, those pairs are the masks; else each zero is a
                pruned weight.
            names: the prunable parameters (`ticketkit.models.prunable`). Without them, for a dense state dict, every floating
                array of two or more dimensions with at least one zero counts, so a layer without zeros is missing from sparsity.

        Raises:
            TicketError: no pruned weight at all, an unknown name, or a mask that is not made of zeros and ones.
        """
        weights, masks = split_pruned(state)
        if not masks:
            masks = _zeros_as_masks(weights, names)
        elif names is not None:
            masks = {name: masks[name] if name in masks else np.ones(_get(weights, name).shape, np.bool_) for name in names}
        return cls(masks, weights, dict(meta or {}))

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "meta": dict(self.meta),
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
        }

    def _tensors(self) -> dict[str, Array]:
        return {**self.weights, **_packed(self.masks)}


def split_pruned(state: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Mask]]:
    """Undo the key names of `torch.nn.utils.prune`: (state dict under plain names, unmasked; masks by plain name).

    Only exact NAME_orig / NAME_mask pairs count. A state dict without them comes back as it is, with no masks.

    Raises:
        TicketError: half of a pair is missing, or a mask holds something else than 0 and 1.
    """
    pairs = {key.removesuffix("_orig") for key in state if key.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in state}
    weights, masks = {}, {}
    for key, value in state.items():
        if key.endswith("_orig") and key.removesuffix("_orig") in pairs:
            weights[key.removesuffix("_orig")] = value
        elif key.endswith("_mask") and key.removesuffix("_mask") in pairs:
            if not np.isin(value, (0, 1)).all():
                raise TicketError(f"{key}: expected a mask of zeros and ones, got other values")
            masks[key.removesuffix("_mask")] = value.astype(np.bool_)
        elif key.endswith((".weight_orig", ".weight_mask")):
            raise TicketError(f"{key}: half of a torch.nn.utils.prune pair; its _orig or _mask is missing from the state dict")
        else:
            weights[key] = value
    return weights, masks


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` so that `path` holds either its old content or all of the new, also after a crash or a power cut.

    Raises:
        TicketError: the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise TicketError(f"{path}: cannot write ({error.strerror}); choose a writable place with enough room") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        TicketError: missing, unreadable, or not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise TicketError(f"{path}: no such file; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise TicketError(f"{path}: not a whole safetensors file ({error}); truncated or damaged, copy it again") from None


def canonical(value: Any) -> str:
    """Canonical JSON, for hashing: keys sorted, no spaces, ASCII; TicketError for what is not plain JSON."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TicketError(f"ticket metadata must be plain JSON: {error}") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _packed(masks: Masks) -> dict[str, Array]:
    return {f"{name}.mask": pack(mask) for name, mask in masks.items()}


def _unpack(path: object, name: str, shape: list[int], bits: Array | None) -> Mask:
    size = int(np.prod(shape))
    if bits is None or bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
        raise TicketError(f"{path}: {name}.mask: expected {(size + 7) // 8} bytes of mask for shape {shape}, got {bits}")
    if np.unpackbits(bits, bitorder="little")[size:].any():
        raise TicketError(f"{path}: {name}.mask: bits are set past the end of the mask")
    return unpack(bits, tuple(shape))


def _zeros_as_masks(weights: Mapping[str, Array], names: Iterable[str] | None) -> dict[str, Mask]:
    if names is None:
        names = [name for name, w in weights.items() if w.dtype.kind == "f" and w.ndim >= 2 and not w.all()]
    masks = {name: _get(weights, name) != 0 for name in names}
    if not masks or sparsity(masks) == 0.0:
        raise TicketError("no pruned weight: the state dict has neither _mask keys nor exact zeros in its weights")
    return masks


def _get(weights: Mapping[str, Array], name: str) -> Array:
    if name not in weights:
        raise TicketError(f"{name}: expected in the state dict, but it is not there")
    return weights[name]


def _digest(header: Any, tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(canonical(header).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}\0{array.dtype.str}\0{json.dumps(list(tensors[name].shape))}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
