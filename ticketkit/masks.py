"""Mask algebra: which weights of a network are kept. Numpy only.

A *mask* is a boolean array of the shape of its weight, True where the weight is kept. `Masks` maps parameter names to masks.
*Sparsity* is the fraction in [0, 1] of weights *not* kept, always over the masked (prunable) weights. Every function is pure:
it returns new masks and leaves its arguments alone. Layers are visited in the mapping's own order, positions in C order; what is
drawn from a seed takes layers in the order of their names, so that a ticket and its file, whose masks are sorted, draw alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ticketkit.errors import TicketError

Mask = NDArray[np.bool_]
Masks = Mapping[str, Mask]
Weights = Mapping[str, NDArray[np.float32]]
Block = tuple[int, int]
Magnitudes = NDArray[np.floating[Any]]


def full(weights: Mapping[str, NDArray[Any]]) -> dict[str, Mask]:
    """The mask of the dense network: True everywhere; of the shapes of these weights, or masks."""
    return {name: np.ones(weight.shape, np.bool_) for name, weight in weights.items()}


def pack(mask: Mask) -> NDArray[np.uint8]:
    """Eight weights to a byte, [ceil(n / 8)]: position i (C order) is bit i % 8, counted from the least significant, of byte i // 8."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(bits: NDArray[np.uint8], shape: tuple[int, ...]) -> Mask:
    """The mask of that shape that `pack` packed; bits past its end are not looked at."""
    return np.unpackbits(bits, bitorder="little", count=prod(shape)).astype(np.bool_).reshape(shape)


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

    Of the remaining weights in ascending order, each with the magnitude of its block, round(rate * remaining) are pruned: exactly for
    single weights, for blocks to half a block. Equal magnitudes go in layer order, then C order. Equal inputs give equal masks on
    any machine.

    No array here is longer than a layer: see `_threshold`. Magnitudes are compared in the widest dtype of the weights, float32 or
    float64.

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
    ranked = np.result_type(np.float32, *(weights[name].dtype for name in masks if name in weights))

    def layers() -> Iterator[tuple[Mask, Magnitudes, NDArray[np.int32]]]:
        for name, mask in masks.items():
            left, means, sizes = _remaining(name, weights, mask, block)
            yield left, means.astype(ranked, copy=False), sizes

    threshold, ties = _threshold(layers, round(rate * kept(masks)), ranked)
    pruned = {}
    for (name, mask), (left, means, sizes) in zip(masks.items(), layers(), strict=True):
        stays = means > threshold
        equal = np.flatnonzero(means == threshold)
        stays[equal[np.cumsum(sizes[equal]) - sizes[equal] // 2 > ties]] = True  # the others are at least half among the ties
        ties -= int(sizes[equal].sum())
        left[left] = stays
        pruned[name] = mask & _weights_of(left, mask.shape, block)
    return pruned


def random(masks: Masks, rate: float, seed: int) -> dict[str, Mask]:
    """Prune `rate` of the remaining weights, chosen uniformly over all layers: the control for magnitude pruning."""
    _check_rate(rate)
    return _draw(masks, kept(masks) - round(rate * kept(masks)), _generator(seed))


def random_like(masks: Masks, seed: int) -> dict[str, Mask]:
    """As many weights as `masks` keeps, chosen uniformly over all layers: the random mask m_r of P1, Fig. 8."""
    return _draw(full(masks), kept(masks), _generator(seed))


def shuffled(masks: Masks, seed: int) -> dict[str, Mask]:
    """Each layer keeps as many weights as in `masks`, chosen uniformly within it.

    The control for what layer-wise sparsity alone explains: the shuffling of Frankle et al. 2021 (Pruning Neural Networks at
    Initialization: Why Are We Missing the Mark?) and the rearranging of Su et al. 2020 (Sanity-Checking Pruning Methods).
    """
    generator = _generator(seed)
    drawn = {name: _subset(np.ones(mask.shape, np.bool_), kept({name: mask}), generator) for name, mask in sorted(masks.items())}
    return {name: drawn[name] for name in masks}


def complement(masks: Masks) -> dict[str, Mask]:
    """What `masks` prunes is kept, and the other way round: m^c of P1, Fig. 8. Its sparsity is 1 minus that of `masks`."""
    return {name: ~mask for name, mask in masks.items()}


def perturb(masks: Masks, fraction: float, seed: int) -> dict[str, Mask]:
    """`fraction` of the weights kept are pruned and as many pruned ones kept, chosen uniformly over all layers: m + Δp of P1, Fig. 8.

    Sparsity stays the same, exactly: round(fraction * kept) weights change places.

    Raises:
        TicketError: `fraction` is outside 0 <= f <= 1, or fewer weights are pruned than would change places.
    """
    if not 0.0 <= fraction <= 1.0:
        raise TicketError(f"fraction to perturb: expected 0 <= f <= 1, got {fraction:g}")
    zeros, ones = complement(masks), kept(masks)
    count = round(fraction * ones)
    if count > kept(zeros):
        raise TicketError(
            f"cannot perturb {fraction:g} of {ones} weights kept: that many ({count}) must be pruned, {kept(zeros)} are;"
            " choose a smaller fraction or a sparser ticket"
        )
    generator = _generator(seed)
    out, back = _draw(masks, count, generator), _draw(zeros, count, generator)
    return {name: mask & ~out[name] | back[name] for name, mask in masks.items()}


def similarity(a: Masks, b: Masks) -> float:
    """Relative similarity |a ∩ b| / |a ∪ b| of P1 (Jaccard's index); 1.0 for two masks that keep nothing.

    Masks of unlike sparsity reach at most the smaller number kept over the larger one, which nested masks do.

    Raises:
        TicketError: they are of different networks.
    """
    _check_alike(a, b)
    both = sum(int(np.count_nonzero(a[name] & b[name])) for name in a)
    return _jaccard(both, kept(a) + kept(b))


def expected_similarity(a: Masks, b: Masks, by_layer: bool = False) -> float:
    """The similarity that chance alone gives two independent masks as sparse as `a` and `b`: what `similarity` is to be read against.

    Two uniform choices of k_a and k_b out of n weights share k_a k_b / n in the mean (hypergeometric distribution), hence
    (k_a k_b / n) / (k_a + k_b - k_a k_b / n); for equal densities d that is d / (2 - d): 0.11 at 80 % sparsity, 0.053 at 90 %. As
    the ratio of two means it differs from the mean of the ratio by less than 4 / (k_a + k_b) of itself, to the second order in the
    deviation of |a ∩ b|, whose variance is below its mean.

    Args:
        by_layer: masks that keep as many in each layer as `a` and `b` do (`shuffled`), not in the whole (`random_like`). Then
            Σ k_a k_b / n over the layers is shared: more, for layers that are dense in both share much.

    Raises:
        TicketError: they are of different networks.
    """
    _check_alike(a, b)
    pairs = [({name: a[name]}, {name: b[name]}) for name in a] if by_layer else [(a, b)]
    sizes = [sum(mask.size for mask in ours.values()) for ours, _ in pairs]
    both = sum(kept(ours) * kept(theirs) / size for (ours, theirs), size in zip(pairs, sizes, strict=True) if size)
    return _jaccard(both, kept(a) + kept(b))


def zero_kernels(masks: Masks) -> dict[str, tuple[int, int]]:
    """Of each layer, (kernels without a weight left, all its kernels), P1, Fig. 7.

    A kernel is what one output channel takes from one input channel: [kh, kw] of a convolution's mask [O, I, kh, kw]. That of a
    1x1 convolution or a fully connected layer is a single weight, so there the share of zero kernels is the sparsity and says
    nothing of its own; `kernel_size` tells them apart.
    """
    kernels = {name: mask.reshape(-1, kernel_size(mask)) for name, mask in masks.items()}
    return {name: (int(np.count_nonzero(~each.any(axis=1))), len(each)) for name, each in kernels.items()}


def kernel_size(mask: Mask) -> int:
    """Number of weights in a kernel, that is in one output and one input channel: 9 for [O, I, 3, 3], 1 for [O, I]."""
    return prod(mask.shape[2:])


def is_nested(inner: Masks, outer: Masks) -> bool:
    """True if both name the same layers and every weight that `inner` keeps is kept by `outer` too."""
    return inner.keys() == outer.keys() and all(
        inner[name].shape == outer[name].shape and not np.any(inner[name] & ~outer[name]) for name in inner
    )


def _threshold(
    layers: Callable[[], Iterable[tuple[Mask, Magnitudes, NDArray[np.int32]]]], drop: int, ranked: np.dtype[Any]
) -> tuple[np.floating[Any], int]:
    """(the `drop`-th smallest magnitude, how many of the `drop` smallest equal it), each magnitude counted as often as its size says.

    Radix selection, exact. Floats that are not negative are in the order of their bit patterns, read as unsigned integers. One pass
    over the layers counts the upper 16 bits, which gives those of the threshold, the next pass the 16 bits below for the magnitudes
    that begin so: two passes for float32, four for float64. A histogram has 2^16 bins whatever the network's size.
    """
    unsigned = np.dtype(f"u{ranked.itemsize}")
    found = below = 0
    for shift in range(8 * ranked.itemsize - 16, -1, -16):
        histogram = np.zeros(1 << 16)  # of counts, exact in float64 up to 2^53
        for _, means, sizes in layers():
            upper = means.view(unsigned) >> unsigned.type(shift)
            inside = upper >> unsigned.type(16) == found
            histogram += np.bincount((upper[inside] & unsigned.type(0xFFFF)).astype(np.uint16), sizes[inside], len(histogram))
        digit = int(np.searchsorted(np.cumsum(histogram), drop - below))
        below += int(histogram[:digit].sum())
        found = found << 16 | digit
    return unsigned.type(found).view(ranked), drop - below


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise TicketError(f"seed: expected 0 or more, got {seed}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def _draw(masks: Masks, count: int, generator: np.random.Generator) -> dict[str, Mask]:
    """`count` of the weights that `masks` keeps, all choices equally likely."""
    names = sorted(masks)
    ones = [kept({name: masks[name]}) for name in names]
    counts = generator.multivariate_hypergeometric(ones, count).tolist() if names else []
    drawn = {name: _subset(masks[name], n, generator) for name, n in zip(names, counts, strict=True)}
    return {name: drawn[name] for name in masks}


def _subset(mask: Mask, count: int, generator: np.random.Generator) -> Mask:
    """`count` of the weights that one layer keeps, all choices equally likely."""
    chosen = np.zeros_like(mask)
    chosen[mask] = generator.permuted(np.arange(np.count_nonzero(mask)) < count)
    return chosen


def _jaccard(both: float, sizes: int) -> float:
    """|a ∩ b| / |a ∪ b| from |a ∩ b| and |a| + |b|."""
    return both / (sizes - both) if sizes else 1.0


def _check_alike(a: Masks, b: Masks) -> None:
    if missing := sorted(a.keys() ^ b.keys()):
        raise TicketError(f"{missing[0]}: only one of the two masks has this layer; compare tickets of the same network")
    for name in a:
        if a[name].shape != b[name].shape:
            raise TicketError(f"{name}: shapes {a[name].shape} and {b[name].shape} differ; compare tickets of the same network")


def _remaining(name: str, weights: Weights, mask: Mask, block: Block) -> tuple[Mask, Magnitudes, NDArray[np.int32]]:
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
