"""A layer of benchmarks/gpu.py with data on the GPU: our call, those of the dense libraries, and those of other sparse kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from shapes import Conv, Shape
from torch import Tensor

from ticketkit.formats import gaps
from ticketkit.runtime import gpu

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A layer with data on the GPU."""

    shape: Shape
    dtype: torch.dtype
    x: Tensor  # [N, C, H, W] channels_last, or [N, K]
    weight: Tensor  # dense, with zeros
    bias: Tensor
    steps: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        if isinstance(self.shape, Conv):
            s = self.shape
            return torch.nn.functional.conv2d(self.x, self.weight, self.bias, s.stride, s.pad, s.dilation)
        return torch.nn.functional.linear(self.x, self.weight, self.bias)


def make(shape: Shape, batch: int, dtype: torch.dtype, sparsity: int, side: int | None, device: str) -> Case:
    """A layer with random weights, pruned singly or in blocks of side x side (outputs x channels of a tap)."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape.weight, np.float32)
    window = shape.weight[2:] or (1, 1)
    grid = (-(-shape.weight[0] // (side or 1)), -(-shape.weight[1] // (side or 1)), *window)
    kept = np.zeros(prod(grid), bool)
    kept[generator.permutation(kept.size)[: max(1, round(kept.size * (100 - sparsity) / 100))]] = True
    mask = kept.reshape(grid).repeat(side or 1, 0).repeat(side or 1, 1)[: shape.weight[0], : shape.weight[1]]
    weight *= mask.reshape(shape.weight)
    weight[~mask.reshape(shape.weight)] = 0.0
    weight = torch.from_numpy(weight).to(dtype).float().numpy()  # in the type's own numbers
    coded = gaps.pack(weight)
    x = torch.from_numpy(generator.standard_normal((batch * shape.x[0], *shape.x[1:]), np.float32)).to(device, dtype)
    dense = torch.from_numpy(weight).to(device, dtype)
    if isinstance(shape, Conv):
        x, dense = x.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last)
    values, steps = torch.from_numpy(coded["values"]).to(device), torch.from_numpy(coded["gaps"]).to(device)
    return Case(shape, dtype, x, dense, torch.zeros(shape.weight[0], device=device, dtype=dtype), steps, values)


def sparse(case: Case, side: int | None) -> tuple[Callable[[], Tensor], gpu.Weight]:
    """Our call, and the weight that it takes. CSR gets its input in planes, as a network of CSR layers would hold it."""
    weight = gpu.Weight.of(case.steps, case.shape.weight, side)
    stored = weight.store(case.values, case.dtype)
    if isinstance(case.shape, Conv):
        s = case.shape
        window = gpu.Window((s.stride,) * 2, (s.pad,) * 4, (s.dilation,) * 2)
        x = case.x if side else case.x.contiguous()
        return lambda: gpu.conv2d(x, weight, stored, case.bias, window=window, tf32=True), weight
    rows = case.x if side else case.x.t().contiguous().t()
    return lambda: gpu.conv2d(rows[:, :, None, None], weight, stored, case.bias, tf32=True)[:, :, 0, 0], weight


def dense_ones(case: Case) -> dict[str, Callable[[], Tensor]]:
    """cuDNN or cuBLAS, and for pointwise layers both."""
    found: dict[str, Callable[[], Tensor]] = {"dense": case.dense}
    if isinstance(case.shape, Conv) and case.shape.kernel == case.shape.stride == 1:
        pixels = case.x.permute(0, 2, 3, 1).reshape(-1, case.shape.in_channels)
        matrix = case.weight.reshape(case.shape.out_channels, -1)
        found["dense, as a product"] = lambda: torch.nn.functional.linear(pixels, matrix, case.bias)
    return found


def foreign(case: Case, side: int | None) -> dict[str, Callable[[], Tensor]]:
    """torch's own sparse kernels for a matrix product; whatever does not run here is left out."""
    s = case.shape
    if isinstance(s, Conv) and not s.kernel == s.stride == 1:
        return {}
    rows = case.x if not isinstance(s, Conv) else case.x.permute(0, 2, 3, 1).reshape(-1, s.in_channels)
    matrix, columns = case.weight.reshape(len(case.weight), -1).contiguous(), rows.t()
    makers: dict[str, Callable[[], Any]] = {"torch.sparse CSR": matrix.to_sparse_csr}
    if side and not any(n % side for n in matrix.shape):
        makers["torch.sparse BSR"] = lambda: matrix.to_sparse_bsr(side)
    makers["2:4 (half of the weights, its own pattern)"] = lambda: torch.sparse.to_sparse_semi_structured(half(matrix))
    found: dict[str, Callable[[], Tensor]] = {}
    for name, make_one in makers.items():
        try:
            other = make_one()
            if "2:4" in name:
                torch.nn.functional.linear(rows, other)
                found[name] = lambda other=other: torch.nn.functional.linear(rows, other)  # type: ignore[misc]
            else:
                other @ columns
                found[name] = lambda other=other: other @ columns  # type: ignore[misc]
        except (RuntimeError, NotImplementedError, ValueError):
            torch.cuda.synchronize()
    return found


def half(matrix: Tensor) -> Tensor:
    """The matrix with the two larger of each four in a row."""
    fours = matrix.reshape(len(matrix), -1, 4)
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1.0)
    return torch.where(kept.bool(), fours, 0).reshape(matrix.shape)
