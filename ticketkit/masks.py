"""Mask algebra: which weights of a network are kept. Numpy only.

A *mask* is a boolean array of the shape of its weight, True where the weight is kept. `Masks` maps parameter names to masks.
*Sparsity* is the fraction in [0, 1] of weights *not* kept, always over the masked (prunable) weights. Every function is pure:
it returns new masks and leaves its arguments alone. Layers are visited in the mapping's own order, positions in C order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ticketkit.errors import TicketError

Mask = NDArray[np.bool_]
Masks = Mapping[str, Mask]
Weights = Mapping[str, NDArray[np.float32]]


def full(weights: Weights) -> dict[str, Mask]:
    """The mask of the dense network: True everywhere."""
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


def global_magnitude(weights: Weights, masks: Masks, rate: float) -> dict[str, Mask]:
    """Prune `rate` of the remaining weights, those of smallest magnitude over all layers together (P1, Algorithm 1).

    The threshold is one partition over the remaining magnitudes. Weights equal to it are pruned in layer order, then C order,
    until exactly round(rate * remaining) are gone, so equal inputs give equal masks on any machine.

    Args:
        weights: float arrays, one for each mask and of its shape; names beyond the masks are ignored.
        masks: what is kept so far. The result is nested in it.
        rate: fraction of the remaining weights to prune, 0 <= rate < 1.

    Raises:
        TicketError: a weight is missing, has another shape or is NaN, or the rate is out of range.
    """
    _check_rate(rate)
    magnitudes = {name: _magnitudes(name, weights, mask) for name, mask in masks.items()}
    pool = np.concatenate(list(magnitudes.values())) if magnitudes else np.empty(0, np.float32)
    drop = round(rate * pool.size)
    if not drop:
        return {name: mask.copy() for name, mask in masks.items()}
    threshold = np.partition(pool, drop - 1)[drop - 1]
    ties = drop - int(np.count_nonzero(pool < threshold))
    pruned = {}
    for name, mask in masks.items():
        stays = magnitudes[name] > threshold
        equal = np.flatnonzero(magnitudes[name] == threshold)
        stays[equal[ties:]] = True
        ties -= min(ties, equal.size)
        pruned[name] = mask.copy()
        pruned[name][mask] = stays
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


def _magnitudes(name: str, weights: Weights, mask: Mask) -> NDArray[np.float32]:
    if name not in weights:
        raise TicketError(f"{name}: the mask names it but the weights do not; use the weights of the masked model")
    if weights[name].shape != mask.shape:
        raise TicketError(f"{name}: expected weights of the mask's shape {mask.shape}, got {weights[name].shape}")
    magnitudes = np.abs(weights[name][mask])
    if np.isnan(magnitudes).any():
        raise TicketError(f"{name}: weights are NaN; training diverged, try a smaller learning rate")
    return magnitudes


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise TicketError(f"pruning rate: expected 0 <= rate < 1, got {rate:g}")
