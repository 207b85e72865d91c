"""MoCo v2 (He et al. 2020; Chen et al. 2020b): one view finds the other among a queue of earlier ones, seen by a slower encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketkit import models
from ticketkit.pretrain._objective import Gather, Objective, need, same
from ticketkit.pretrain._retrieval import evaluate, unit
from ticketkit.pretrain._views import TwoViews
from ticketkit.tasks import Split, Task


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE (He et al. 2020, eq. 1), on embeddings of length 1.

    Args:
        queries, keys: [n, d]; key i is the one that query i should find.
        negatives: [k, d], what it should tell it from.
        temperature: τ, by which the cosines are divided.

    Returns:
        the mean loss, and how many queries are nearer to their key than to every negative; both 0-dimensional.
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosines = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives.T], dim=1)  # [n, 1 + k]
    loss = F.cross_entropy(cosines / temperature, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))
    return loss, (cosines[:, 0] > cosines[:, 1:].amax(1)).sum()


class Keys(nn.Module):  # type: ignore[misc]
    """The key encoder and its queue: what MoCo has beside the network, and what a rewind makes anew.

    State dict: `encoder.NAME` for every NAME of the network's; `queue`, float32 [queue, dim], unit vectors, random at first;
    `pointer`, int64 [], the row that is overwritten next.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, network: nn.Module, queue: int, dim: int, groups: int) -> None:
        """A copy of the network, its zeros included; the queue comes from torch's global generator."""
        super().__init__()
        device = next(network.parameters()).device
        self.groups = groups
        self.encoder = copy.deepcopy(network).requires_grad_(False).train()
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1).to(device))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> keys of length 1, [B, dim], without gradient.

        The images go through the encoder in up to `groups` parts of at least two, of a random permutation (torch's global
        generator): batch statistics common to a query and its key would give the key away (He et al. 2020, "Shuffling BN").
        """
        order = torch.randperm(len(images)).to(images.device)
        parts = order.tensor_split(max(1, min(self.groups, len(images) // 2)))
        keys = torch.cat([unit(self.encoder(images[part])) for part in parts])
        return keys[order.argsort()]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def enqueue(self, keys: Tensor) -> None:
        """Put keys [n, dim] in the place of the n oldest; of more than the queue holds, the last."""
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows[-len(self.queue) :]] = keys[-len(self.queue) :].to(self.queue)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def follow(self, network: nn.Module, momentum: float) -> None:
        """θ_k ← m θ_k + (1 - m) θ_q over the parameters (eq. 2); BN statistics are the encoder's own."""
        own = list(self.encoder.parameters())
        torch._foreach_mul_(own, momentum)
        torch._foreach_add_(own, list(network.parameters()), alpha=1 - momentum)


@dataclass(frozen=True)
class MoCo:
    """InfoNCE of the first view, seen by the network, against the second, seen by the key encoder, and the queue of earlier keys.

    The key encoder starts each round as a copy of the rewound and masked network and moves towards it by a moving average, so
    the mask holds in both. The queue starts each round anew, from random unit vectors.

    Attributes:
        temperature: τ; 0.2 in MoCo v2.
        key_momentum: m of the moving average.
        queue: keys it holds, at least 1; no multiple of the batch is needed (65,536 on ImageNet, 4,096 for CIFAR).
        dim: width of the embeddings.
        bn_groups: parts of the shuffled batch in which keys are computed, the GPUs of the paper.

    Raises:
        TicketError: an option out of its range.
    """

    temperature: float = 0.2
    key_momentum: float = 0.999
    queue: int = 4096
    dim: int = 128
    bn_groups: int = 8

    name: ClassVar[str] = "moco"
    metric: ClassVar[str] = "retrieval accuracy"
    queries: ClassVar[int] = 1
    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need(self.temperature > 0, "temperature", "a number above 0", self.temperature)
        need(0 <= self.key_momentum < 1, "key_momentum", "a number from 0 to below 1", self.key_momentum)
        for option in ("queue", "dim", "bn_groups"):
            need(getattr(self, option) >= 1, option, "at least 1", getattr(self, option))

    def head(self, features: int, num_classes: int) -> nn.Module:
        """[N, features] -> embeddings [N, dim]."""
        return models.projection(features, self.dim)

    def views(self, task: Task) -> TwoViews:
        """Two views of each image."""
        return TwoViews(task)

    def begin(self, network: nn.Module) -> Keys:
        """The key encoder and the queue, on the network's device."""
        return Keys(network, self.queue, self.dim, self.bn_groups)

    def twins(self, state: nn.Module) -> Sequence[nn.Module]:
        """The key encoder: the mask holds in both (P1, section 4)."""
        assert isinstance(state, Keys)
        return (state.encoder,)

    def loss(
        self, network: nn.Module, state: nn.Module, views: tuple[Tensor, ...], labels: Tensor, gather: Gather = same
    ) -> tuple[Tensor, Tensor]:
        """Mean InfoNCE over the N queries, and how many were right; then the keys of all processes join the queue.

        Labels are not looked at.
        """
        assert isinstance(state, Keys)
        first, second = views
        keys = state(second)
        negatives = state.queue.clone()  # the queue changes before the backward pass needs it
        answer = info_nce(unit(network(first)), keys, negatives, self.temperature)
        state.enqueue(gather(keys))
        return answer

    def after_step(self, network: nn.Module, state: nn.Module) -> None:
        """The key encoder follows the network."""
        assert isinstance(state, Keys)
        state.follow(network, self.key_momentum)

    def evaluate(self, network: nn.Module, task: Task, split: Split, num_classes: int) -> tuple[float, float]:
        """Top-1 retrieval accuracy (P1, A.2) and mean NT-Xent at MoCo's temperature: no queue is needed to compare networks."""
        return evaluate(network, self.views(task), split, self.temperature)


OBJECTIVE: type[Objective] = MoCo
