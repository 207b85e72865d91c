"""Pairs of embeddings: NT-Xent, and how often a view finds its partner, which is the metric of the self-supervised objectives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketkit import models
from ticketkit.tasks import Split, Views

GROUP = 256  # pairs among which a partner is looked for: the batch size of P1's SimCLR
VIEWS_SEED = 0  # of the views that are evaluated: the same for every network


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, eq. 1) of n pairs of embeddings [n, d], which need no normalisation.

    Each of the 2n embeddings is a query, the other one of its pair its partner, and the other 2n - 1 its candidates. The loss is
    the mean over the queries of -log softmax of the partner's cosine / temperature among the candidates' (a mean of logarithms;
    the logarithm of the mean is another loss).

    Returns:
        the loss, and how many queries were right as in `retrieved`; both 0-dimensional.
    """
    cosines = _cosines(first, second)
    return F.cross_entropy(cosines / temperature, _partners(cosines)), _right(cosines.detach())


def retrieved(first: Tensor, second: Tensor) -> Tensor:
    """How many of the 2n queries of n pairs [n, d] find their partner (P1, A.2, eq. 2); int64, 0-dimensional.

    A query finds it if its cosine is the highest among the other 2n - 1, and higher than the next: where all embeddings are one,
    nothing is found. Divided by 2n it is the top-1 retrieval accuracy.
    """
    return _right(_cosines(first, second))


def evaluate(network: nn.Module, views: Views, split: Split, temperature: float) -> tuple[float, float]:
    """Top-1 retrieval accuracy and mean NT-Xent of a split, over all its queries, in evaluation mode.

    Each image gives one pair of views, always the same. Pairs are taken in order, in as few groups as hold at most 256 pairs, of
    equal size to within one: the more pairs in a group the harder to find one's own. The network's mode is put back afterwards.
    """
    device = next(network.parameters()).device
    draw = views.draw(len(split), np.random.Generator(np.random.Philox(VIEWS_SEED)))
    right = total = 0.0
    with models.evaluating(network), torch.inference_mode():
        for rows in np.array_split(np.arange(len(split)), -(-len(split) // GROUP)):
            part = slice(rows[0], rows[-1] + 1)
            rendered = views.render(split.images[part], {name: values[part] for name, values in draw.items()})
            first, second = (network(view.to(device)) for view in rendered)
            loss, found = nt_xent(first, second, temperature)
            right += float(found)
            total += float(loss) * 2 * len(rows)
    return right / (2 * len(split)), total / (2 * len(split))


def unit(embeddings: Tensor) -> Tensor:
    """[n, d] -> each divided by its length, in float32 unless it is float64."""
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Two [n, d] -> cosines [2n, 2n] in float32 or float64, -inf on the diagonal: no embedding is its own candidate."""
    both = unit(torch.cat([first, second]))
    with torch.autocast(both.device.type, enabled=False):
        return (both @ both.T).fill_diagonal_(-torch.inf)


def _partners(cosines: Tensor) -> Tensor:
    """Index of each query's partner, int64 [2n]."""
    return torch.arange(len(cosines), device=cosines.device).roll(len(cosines) // 2)


def _right(cosines: Tensor) -> Tensor:
    partners = _partners(cosines)[:, None]
    others = cosines.scatter(1, partners, -torch.inf).amax(1)
    return (cosines.gather(1, partners)[:, 0] > others).sum()
