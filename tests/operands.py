"""Operands of the torch operators, for tests that may import torch."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Array, normal, pruned
from torch import Tensor

from ticketkit.formats import gaps

# weight, strides, pads, dilations, group; images are [2, weight[1] * group, 13, 11]
WINDOWS = [
    ((6, 5, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((7, 5, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((4, 3, 3, 2), (2, 1), (1, 0, 2, 1), (1, 1), 1),
    ((8, 4, 3, 3), (2, 2), (2, 1, 2, 1), (2, 1), 1),
    ((9, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 9),
    ((9, 1, 5, 5), (2, 2), (2, 2, 2, 2), (1, 1), 9),
]


def coded(weight: Array) -> tuple[Tensor, Tensor]:
    """values and gaps of a weight, as tensors."""
    parts = gaps.pack(weight)
    return torch.from_numpy(parts["values"]), torch.from_numpy(parts["gaps"])


def layer(shape: tuple[int, ...] = (64, 32, 3, 3), sparsity: float = 0.9) -> tuple[Array, list[Any], dict[str, Any]]:
    """weight, and the operands and options of a 3x3 convolution with it."""
    weight = pruned(shape, sparsity)
    operands = [*coded(weight), torch.from_numpy(normal(shape[0], seed=3)), None, list(shape)]
    return weight, operands, {"padding": [1, 1, 1, 1]}
