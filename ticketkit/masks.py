"""Mask algebra: which weights of a network are kept. Numpy only.

A *mask* is a boolean array of the shape of its weight, True where the weight is kept. `Masks` maps parameter names to masks.
*Sparsity* is the fraction in [0, 1] of weights *not* kept, always over the masked (prunable) weights. Every function is pure:
it returns new masks and leaves its arguments alone. Layers are visited in the mapping's own order, positions in C order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ticketkit.errors import TicketError

Mask = NDArray[np.bool_]
Masks = Mapping[str, Mask]
Weights = Mapping[str, NDArray[np.float32]]
Block = tuple[int, int]


def full(weights: Mapping[str, NDArray[Any]]) -> dict[str, Mask]:
    """The mask of the dense network: True everywhere; of the shapes of these weights, or masks."""
    return {name: np.ones(weight.shape, np.bool_) for name, weight in weights.items()}


def sparsity(masks: Masks) -> float:
    """Fraction of the masked weights that are pruned; 0.0 for no weights at all."""
    total = sum(mask.size for mask in masks.values())
    return 1.0 - kept(masks) / total if total else 0.0


def kept(masks: Masks) -> int:
    """Number of weights that remain."""
    return sum(int(np.count_nonzero(mask)) for mask in masks.values())


def layer_sparsity(masks: Masks) -> dict[str, float]:
    """Sparsity of each layer by name."""
    return {name: sparsity({name: mask}) for name, mask in masks.items()}


def rounds_to(target: float, rate: float) -> int:
    """Fewest rounds k whose sparsity 1 - (1 - rate)^k reaches `target`, 0 <= target < 1 (Algorithm 1: "until sparsity s")."""
    if not 0.0 <= target < 1.0:
        raise TicketError(f"target sparsity: expected 0 <= s < 1, got {target:g}")
    _check_rate(rate)
    return 0 if target == 0.0 else int(np.ceil(np.log1p(-target) / np.log1p(-rate) - 1e-9))


def parse_block(granularity: str) -> Block:
    """Rows and columns of the blocks that "RxC" names: R output channels by C of their weights in C order.

    Raises:
        TicketError: another word, or a number below 1 or above 9999.
    """
    if not (sides := re.fullmatch("([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", granularity)):
        raise TicketError(f"--granularity: expected RxC with numbers from 1 to 9999, such as 4x1 or 1x16, got {granularity!r}")
    return int(sides[1]), int(sides[2])


def global_magnitude(weights: Weights, masks: Masks, rate: float, block: Block = (1, 1)) -> dict[str, Mask]:
    """Prune `rate` of the remaining weights, those of smallest magnitude over all layers together (P1, Algorithm 1).

    With a `block` (r, c) whole blocks of the matrix [M, ...] in C order are pruned, those of smallest mean magnitude. For equal
    blocks that is the order of their L1 norms, by which Li et al. 2017 (Pruning Filters for Efficient ConvNets) and Mao et al.
    2017 (Exploring the Regularity of Sparse Structure) rank groups of weights; Narang et al. 2017 (Block-Sparse Recurrent Neural
    Networks) take the largest magnitude. The mean, so that a block cut short by the edge is not pruned for being short.

    The threshold is one partition over the remaining weights, each as large as its block. Blocks equal to it are pruned in layer
    order, then C order, until round(rate * remaining) weights are gone, exactly for single weights, for blocks to half a block.
    Equal inputs give equal masks on any machine.

    Args:
        weights: float arrays, one for each mask and of its shape; names beyond the masks are ignored.
        masks: what is kept so far. The result is nested in it.
        rate: fraction of the remaining weights to prune, 0 <= rate < 1.
        block: rows (output channels) and columns of a block, 1 or more; of a block partly pruned before, the rest counts.

    Raises:
        TicketError: a weight is missing, has another shape or is NaN, or the rate or the block is out of range.
    """
    _check_rate(rate)
    if min(block) < 1:
        raise TicketError(f"pruning block: expected 1x1 or more, got {block[0]}x{block[1]}")
    layers = {name: _remaining(name, weights, mask, block) for name, mask in masks.items()}
    pool = np.concatenate([np.repeat(means, sizes) for _, means, sizes in layers.values()]) if layers else np.empty(0, np.float32)
    drop = round(rate * pool.size)
    if not drop:
        return {name: mask.copy() for name, mask in masks.items()}
    threshold = np.partition(pool, drop - 1)[drop - 1]
    ties = drop - int(np.count_nonzero(pool < threshold))
    pruned = {}
    for name, (left, means, sizes) in layers.items():
        stays = means > threshold
        equal = np.flatnonzero(means == threshold)
        stays[equal[np.cumsum(sizes[equal]) - sizes[equal] // 2 > ties]] = True  # the others are at least half among the ties
        ties -= int(sizes[equal].sum())
        left[left] = stays
        pruned[name] = masks[name] & _weights_of(left, masks[name].shape, block)
    return pruned


def random(masks: Masks, rate: float, seed: int) -> dict[str, Mask]:
    """Prune `rate` of the remaining weights, chosen uniformly over all layers: the control for magnitude pruning."""
    generator = np.random.Generator(np.random.Philox(seed))
    noise = {name: generator.random(mask.shape, np.float32) for name, mask in masks.items()}
    return global_magnitude(noise, masks, rate)


def is_nested(inner: Masks, outer: Masks) -> bool:
    """True if both name the same layers and every weight that `inner` keeps is kept by `outer` too."""
    return inner.keys() == outer.keys() and all(
        inner[name].shape == outer[name].shape and not np.any(inner[name] & ~outer[name]) for name in inner
    )


def _remaining(name: str, weights: Weights, mask: Mask, block: Block) -> tuple[Mask, NDArray[np.float32], NDArray[np.int32]]:
    """Which blocks have weights left, [ceil(M / r), ceil(K / c)], and, of those, mean magnitude and number of the weights left."""
    if name not in weights:
        raise TicketError(f"{name}: the mask names it but the weights do not; use the weights of the masked model")
    if weights[name].shape != mask.shape:
        raise TicketError(f"{name}: expected weights of the mask's shape {mask.shape}, got {weights[name].shape}")
    sums = _tiles(np.where(mask, np.abs(weights[name]), np.float32(0)), block).sum(axis=(1, 3))
    if np.isnan(sums).any():
        raise TicketError(f"{name}: weights are NaN; training diverged, try a smaller learning rate")
    sizes = _tiles(mask, block).sum(axis=(1, 3), dtype=np.int32)
    left = sizes > 0
    return left, sums[left] / sizes[left].astype(sums.dtype), sizes[left]


def _tiles(array: NDArray[Any], block: Block) -> NDArray[Any]:
    """The matrix [M, K] of the array as [ceil(M / r), r, ceil(K / c), c], zeros beyond its edges."""
    rows, cols = _matrix(array.shape)
    r, c = min(block[0], rows), min(block[1], cols)
    padded = np.pad(array.reshape(rows, cols), ((0, -rows % r), (0, -cols % c)))
    return padded.reshape(len(padded) // r, r, -1, c)


def _weights_of(blocks: Mask, shape: tuple[int, ...], block: Block) -> Mask:
    """The mask of that shape whose blocks are given."""
    rows, cols = _matrix(shape)
    return blocks[np.arange(rows) // block[0]][:, np.arange(cols) // block[1]].reshape(shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise TicketError(f"pruning rate: expected 0 <= rate < 1, got {rate:g}")
