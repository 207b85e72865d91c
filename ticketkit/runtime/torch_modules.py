"""Convolutions and linear layers with sparse weights as torch modules, put in place of dense ones and back.

    report = ticketkit.sparsify_(network)      # layers with enough zeros, in place; make optimizers afterwards
    ...                                        # run, or train: the kept weights learn, zeros stay
    ticketkit.densify_(network)                # nn.Conv2d and nn.Linear again, with exact zeros

Outputs stay within rounding. What a layer becomes is chosen by what gains on its device: on processors single weights from 50 % zeros on
(measured), on GPUs blocks from 50 %, single weights from 95 % (from publications on such kernels; see benchmarks/gpu.py). Every layer
left dense is in the report with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ticketkit.errors import KernelError
from ticketkit.formats import bsr, gaps
from ticketkit.runtime import gpu, torch_gpu, torch_op

Dense: TypeAlias = nn.Conv2d | nn.Linear
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)  # that the report names
LEAST = {("cpu", "csr"): 0.5, ("cpu", "bsr"): 0.5, ("cpu", "bsr1x4"): 0.5, ("cuda", "csr"): 0.95, ("cuda", "bsr"): 0.5}
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Swap:
    """What became of a layer: format "csr", "bsr" or "bsr1x4", or "dense" and why."""

    name: str
    sparsity: float  # of its weight, in [0, 1]
    format: str
    block: int  # side of the blocks of "bsr" on GPUs, else 0
    reason: str


class Sparse(nn.Module):  # type: ignore[misc]
    """What `SparseConv2d` and `SparseLinear` share: the weight as values [n], a parameter, and gaps u16 [n] (`ticketkit.formats.gaps`)."""

    values: nn.Parameter
    gaps: Tensor
    kept: Tensor | None
    bias: Tensor

    def __init__(self, dense: Dense, kept: np.ndarray, swap: Swap) -> None:
        super().__init__()
        self.shape, self.format, self.block = list(dense.weight.shape), swap.format, swap.block
        weight = dense.weight.detach()
        steps = torch.from_numpy(gaps.pack(kept.astype(np.float32))["gaps"])
        at = steps.to(torch.int64).cumsum(0).to(weight.device)
        fillers = torch.from_numpy(kept.reshape(-1)).to(weight.device)[at]
        values = weight.reshape(-1)[at] * fillers
        self.values = nn.Parameter(values, requires_grad=dense.weight.requires_grad)
        self.register_buffer("gaps", steps.to(weight.device))
        self.register_buffer("kept", None if bool(fillers.all()) else fillers)  # fillers stay zero
        if dense.bias is None:
            self.register_buffer("bias", weight.new_zeros(len(weight)), persistent=False)
        else:
            self.bias = nn.Parameter(dense.bias.detach(), requires_grad=dense.bias.requires_grad)
        self.biased = dense.bias is not None
        _carry(dense, self)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew; for code that looks at it."""
        at = self.gaps.to(torch.int64).cumsum(0)
        return self.values.new_zeros(prod(self.shape)).index_copy(0, at, self._values()).reshape(self.shape)

    def _values(self) -> Tensor:
        return self.values if self.kept is None else self.values * self.kept

    def extra_repr(self) -> str:
        zeros = 1 - self.values.numel() / prod(self.shape)
        return f"{self.shape}, {zeros:.1%} zeros, format={self.format}" + (f", block={self.block}" if self.block else "")


class SparseConv2d(Sparse):
    """`torch.nn.Conv2d` with a sparse weight: [N, C, H, W] -> [N, M, OH, OW]."""

    def __init__(self, dense: nn.Conv2d, kept: np.ndarray, swap: Swap) -> None:
        super().__init__(dense, kept, swap)
        self.window = list(dense.stride), _padding(dense), list(dense.dilation), dense.groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self._values(), self.gaps, self.bias, None, self.shape
        return torch_op.sparse_conv2d(x, *weight, *self.window, format=self.format, block=self.block)

    def dense(self) -> nn.Conv2d:
        stride, (top, left, bottom, right), dilation, groups = self.window
        options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": self.biased, **_like(self.values)}
        channels = self.shape[1] * groups, self.shape[0]
        symmetric = (top, left) == (bottom, right)  # what else there is comes from padding "same"
        return _filled(self, nn.Conv2d(*channels, self.shape[2:], padding=(top, left) if symmetric else "same", **options))


class SparseLinear(Sparse):
    """`torch.nn.Linear` with a sparse weight: [..., K] -> [..., M]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch_op.sparse_linear(x, self._values(), self.gaps, self.bias, self.shape, format=self.format, block=self.block)

    def dense(self) -> nn.Linear:
        rows, cols = self.shape
        return _filled(self, nn.Linear(cols, rows, bias=self.biased, **_like(self.values)))


def sparsify_(module: nn.Module, masks: Mapping[str, Any] | None = None, *, format: str = "auto", least: float | None = None) -> list[Swap]:
    """Puts sparse layers in place of the convolutions and linear layers of `module` that have enough zeros.

    Args:
        module: changed in place, on a processor or a GPU. Its parameters change: make optimizers afterwards.
        masks: {"NAME.weight" or "NAME": array of truth values of the weight's shape}: what is kept; layers without one stay dense.
            None: what is not zero.
        format: "csr", "bsr", "bsr1x4" (linear layers, processors), or "auto": blocks where the non-zeros fill them, else single weights.
        least: zeros in a weight from which on it becomes sparse, in [0, 1]; None: what gains on its device (`LEAST`).

    Returns:
        What became of each convolution and linear layer.

    Raises:
        KernelError: no such format; a mask of another shape; a GPU, or a Triton, that cannot run the kernels; `module` is itself a layer.
    """
    if format not in ("auto", "csr", "bsr", "bsr1x4"):
        raise KernelError(f"format: expected auto, csr, bsr or bsr1x4, got {format!r}")
    if least is not None and not 0 <= least <= 1:
        raise KernelError(f"least: expected a fraction in [0, 1], got {least}")
    if type(module) in (nn.Conv2d, nn.Linear):
        raise KernelError("sparsify_: expected a network that holds layers, got a layer itself; put it into torch.nn.Sequential")
    found: dict[nn.Module, tuple[Swap, nn.Module | None]] = {}
    report = []
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    for owner_name, owner in list(module.named_modules(remove_duplicate=False)):
        for leaf, layer in list(owner.named_children()):
            if not isinstance(layer, LAYERS):
                continue
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            if layer not in found:  # a layer in several places stays one
                if why := _no_layer_of_ours(owner, layer, owners):
                    found[layer] = Swap(name, 0.0, "dense", 0, why), None
                else:
                    found[layer] = _swapped(name, layer, masks, format, least)
                report.append(found[layer][0])
            if (sparse := found[layer][1]) is not None:
                setattr(owner, leaf, sparse)
    return report


def densify_(module: nn.Module) -> list[str]:
    """Puts dense layers back in place of those that `sparsify_` made; returns their names. Make optimizers afterwards."""
    found: dict[nn.Module, nn.Module] = {}
    names = []
    for owner_name, owner in list(module.named_modules(remove_duplicate=False)):
        for leaf, layer in list(owner.named_children()):
            if isinstance(layer, SparseConv2d | SparseLinear):
                if layer not in found:
                    found[layer] = layer.dense()
                    names.append(f"{owner_name}.{leaf}" if owner_name else leaf)
                setattr(owner, leaf, found[layer])
    return names


def _swapped(
    name: str, layer: Dense, masks: Mapping[str, Any] | None, format: str, least: float | None
) -> tuple[Swap, SparseConv2d | SparseLinear | None]:
    """What becomes of a layer, and the sparse one if it becomes sparse."""
    if why := _unfit(layer):
        return Swap(name, 0.0, "dense", 0, why), None
    weight = layer.weight.detach()
    if masks is None:
        kept = (weight != 0).cpu().numpy()
    else:
        mask = masks.get(f"{name}.weight", masks.get(name))
        if mask is None:
            return Swap(name, 0.0, "dense", 0, "no mask"), None
        kept = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask) != 0
        if kept.shape != tuple(weight.shape):
            raise KernelError(f"masks[{name!r}]: expected shape {list(weight.shape)}, got {list(kept.shape)}")
    sparsity = 1 - float(kept.mean())
    device = weight.device.type
    if device == "cuda":
        gpu.require(weight.device)
    chosen, block = _form(kept, device, format)
    if (device, chosen) not in LEAST:
        return Swap(name, sparsity, "dense", 0, f"no kernels of format {chosen} on {device}"), None
    if isinstance(layer, nn.Conv2d) and chosen == "bsr1x4":
        return Swap(name, sparsity, "dense", 0, "convolutions have no kernels of format bsr1x4"), None
    enough = LEAST[device, chosen] if least is None else least
    if sparsity < enough:
        return Swap(name, sparsity, "dense", 0, f"{sparsity:.1%} zeros, {enough:.0%} are where {chosen} gains on {device}"), None
    swap = Swap(name, sparsity, chosen, block, f"{sparsity:.1%} zeros")
    return swap, SparseConv2d(layer, kept, swap) if isinstance(layer, nn.Conv2d) else SparseLinear(layer, kept, swap)


def _no_layer_of_ours(owner: nn.Module, layer: nn.Module, owners: Mapping[int, int]) -> str:
    """Why a layer is none that can be put in place of; empty if it is one."""
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"no kernels for {type(layer).__name__}"
    if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return f"{type(owner).__name__} multiplies its weight itself"
    if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
        return "its weight or bias is shared with another layer"
    return ""


def _unfit(layer: Dense) -> str:
    """Why a layer cannot be sparse at all; empty if it can."""
    device, dtype = layer.weight.device.type, layer.weight.dtype
    if "weight" not in layer._parameters:
        return "its weight is made by a hook; remove that first (torch.nn.utils.prune.remove)"
    if device not in ("cpu", "cuda"):
        return f"no kernels for {device}"
    if dtype not in ((torch.float32,) if device == "cpu" else gpu.TYPES):
        return f"no kernels for {dtype} on {device}"
    if not bool(layer.weight.isfinite().all()):
        return "its weight holds NaN or infinity"
    return _unfit_window(layer) if isinstance(layer, nn.Conv2d) else ""


def _unfit_window(conv: nn.Conv2d) -> str:
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.weight.device.type == "cpu"
    return f"{conv.groups} groups" if conv.groups > 1 and not depthwise else ""


def _form(kept: np.ndarray, device: str, format: str) -> tuple[str, int]:
    """Format and side of blocks (0: none, or not a GPU's)."""
    if device == "cuda":
        steps = torch.from_numpy(gaps.pack(kept.astype(np.float32))["gaps"])
        side = torch_gpu.own_side(steps, kept.shape)
        if format == "auto":
            return ("bsr", side) if side else ("csr", 0)
        return format, (side or gpu.BLOCKS[-1]) if format == "bsr" else 0
    if format != "auto":
        return format, 0
    if kept.ndim == 4 and kept.shape[1] == 1:
        return "csr", 0  # depthwise
    found = next((name for name, block in bsr.KERNELS.items() if bsr.fill(kept.astype(np.float32), block) >= torch_gpu.FILLED), "csr")
    return "csr" if kept.ndim == 4 and found == "bsr1x4" else found, 0


def _padding(conv: nn.Conv2d) -> list[int]:
    """top, left, bottom, right."""
    if isinstance(conv.padding, str):
        reach = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [*(total // 2 for total in reach), *(total - total // 2 for total in reach)]
    return [*conv.padding, *conv.padding]


def _like(values: Tensor) -> dict[str, Any]:
    return {"device": values.device, "dtype": values.dtype}


def _filled(sparse: Sparse, dense: Dense) -> Any:
    """A new dense layer with the weights, modes and hooks of a sparse one."""
    with torch.no_grad():
        dense.weight.copy_(sparse.weight)
        dense.weight.requires_grad_(sparse.values.requires_grad)
        if sparse.biased:
            dense.bias.copy_(sparse.bias)
            dense.bias.requires_grad_(sparse.bias.requires_grad)
    _carry(sparse, dense)
    return dense


def _carry(old: nn.Module, new: nn.Module) -> None:
    """Mode and hooks go from one layer to the one that takes its place."""
    new.train(old.training)
    for name in HOOKS:
        setattr(new, name, getattr(old, name).copy())
