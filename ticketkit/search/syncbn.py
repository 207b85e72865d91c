"""Batch norms that see the global batch of all ranks, so that several processes train as one.

torch's SyncBatchNorm exists for accelerators only; on processors the same is written with two differentiable sums over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    """Sum over the ranks, forwards and backwards: each rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):  # type: ignore[misc]
    """BatchNorm2d whose training statistics are those of all ranks together; parameters, buffers and names are unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] of this rank -> the same shape and dtype, normalised by mean and variance over N, H, W of all ranks' batches.

        Statistics are float32, float64 for float64; in evaluation mode the running ones are used (Ioffe and Szegedy 2015, algorithm 1).
        """
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        wide = x if x.dtype == torch.float64 else x.float()
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), rate)
        scale = torch.rsqrt(variance + self.eps) * (self.weight if self.affine else 1.0)
        y = centred * scale[:, None, None]
        return (y + self.bias[:, None, None] if self.affine else y).to(x.dtype)


def synchronised(module: nn.Module, device: str) -> None:
    """Make every batch norm of the module see the batches of all ranks, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _global(child) if device == "cpu" else nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _global(norm: nn.BatchNorm2d) -> GlobalBatchNorm2d:
    twin = GlobalBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    twin.weight, twin.bias = norm.weight, norm.bias
    twin.running_mean, twin.running_var, twin.num_batches_tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    twin.training = norm.training
    return twin
