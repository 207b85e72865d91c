"""One sitting of a training: taken up where the last one stopped, saved while it runs, and stopped between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from ticketkit.errors import ModelError
from ticketkit.search.interrupt import deferred_interrupt
from ticketkit.search.rundir import Arrays, RunDir
from ticketkit.search.train import DivergedError, Training
from ticketkit.tasks import Batches

CARRIED = "carried/"  # of tensors that are not the training's own


class Carried(Protocol):
    """What is saved and resumed beside a training."""

    def state(self) -> Arrays:
        """As arrays."""

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave; ModelError, KeyError, ValueError, RuntimeError or TypeError where it cannot."""


def sit(
    training: Training,
    batches: Batches,
    run: RunDir,
    every: float,
    look: Callable[[Training], None],
    carried: Carried | None = None,
) -> float:
    """Train to the end of the round, from the state in `run` if there is one.

    Args:
        training: at its first step.
        batches: what it trains on.
        run: where its state is kept.
        every: seconds between two saves; the end of an epoch is saved, too.
        look: called after each step, before anything is saved.
        carried: saved and resumed with it.

    Returns:
        seconds, over all sittings.

    Raises:
        TicketError: the state in `run` is damaged.
        DivergedError: the loss is no longer finite.
        KeyboardInterrupt: after Ctrl-C, once the state is on disk.
    """
    seconds, ranks = _resume(training, run, carried), training.ranks
    began = saved = time.monotonic()

    def after_step(now: Training) -> None:
        """Shows the step, saves what is due; KeyboardInterrupt if asked to stop."""
        nonlocal saved
        look(now)
        late = ranks.first and time.monotonic() - saved >= every
        asked = ranks.total({"stop": stop.is_set(), "save": late})  # the same answer on all ranks
        if asked["stop"] or asked["save"] or ends_epoch(now, batches):
            ranks.from_first(lambda: run.save_state(_state(now, carried), seconds + time.monotonic() - began))
            saved = time.monotonic()
        if asked["stop"]:
            raise KeyboardInterrupt

    with deferred_interrupt() as stop:
        try:
            training.run(batches, after_step)
        except DivergedError as error:
            error.seconds = seconds + time.monotonic() - began
            raise
    return seconds + time.monotonic() - began


def ends_epoch(now: Training, batches: Batches) -> bool:
    """Whether the step just done was the last of an epoch, or of the round."""
    return now.step % batches.steps_per_epoch == 0 or now.step == now.settings.steps


def _state(training: Training, carried: Carried | None) -> Arrays:
    more = {} if carried is None else {f"{CARRIED}{name}": array for name, array in carried.state().items()}
    return {**training.state(), **more}


def _resume(training: Training, run: RunDir, carried: Carried | None) -> float:
    saved = training.ranks.from_first(lambda: run.state(training.round))
    if saved is None:
        return 0.0
    state, seconds = saved
    try:
        training.load({name: array for name, array in state.items() if not name.startswith(CARRIED)})
        if carried is not None:
            carried.load({name.removeprefix(CARRIED): array for name, array in state.items() if name.startswith(CARRIED)})
    except (ModelError, KeyError, ValueError, RuntimeError, TypeError) as error:  # tensors of other names, shapes or types
        raise run.unusable_state(error) from None
    return float(seconds)
