"""What the self-supervised objectives put in place of a network's head, and the options they share."""

from __future__ import annotations

from torch import nn

from ticketkit.errors import TicketError


def projection(features: int, dim: int) -> nn.Module:
    """[N, features] -> [N, dim], one hidden layer (Chen et al. 2020, section 4.2); 0 and 2 in the names of MoCo v2's checkpoints."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


def need(holds: bool, option: str, expected: str, got: float) -> None:
    """Raise TicketError unless the option's value is as expected."""
    if not holds:
        raise TicketError(f"{option}: expected {expected}, got {got}; choose another value")
