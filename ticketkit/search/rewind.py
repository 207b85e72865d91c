"""Where a round starts from. Rewinding resets *all* state: weights, norm statistics, heads, momentum, MoCo's queue, random numbers.

    pretrained   θ_p    the given weights (P1, Algorithm 1)
    init         θ_0    the random initialisation of the same seed; the dense reference still starts from the given weights
    early        θ_5%   all state after 5 % of the dense reference's steps; later rounds train the other 95 %
    lr                  learning-rate rewinding (Renda et al. 2020, section 3): the weights stay as trained, the schedule starts again
"""

from __future__ import annotations

from ticketkit.errors import TicketError

POINTS = ("pretrained", "init", "early", "lr")
EARLY = 0.05


def step_of(point: str, steps: int) -> int:
    """The step of a round at which it stands after rewinding to `point`.

    Raises:
        TicketError: no such point, or too few steps for an early one.
    """
    if point not in POINTS:
        raise TicketError(f"unknown rewind point {point!r}; expected one of {', '.join(POINTS)}")
    if point != "early":
        return 0
    if steps < 2:
        raise TicketError(f"--rewind early needs at least 2 steps a round, got {steps}")
    return max(1, round(EARLY * steps))
