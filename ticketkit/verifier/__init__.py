"""Verdicts on tickets: `verify` trains the dense network and the ticket alike, over several seeds, and compares.

`verdicts` holds the rules, `origin` says what is trained (masks and weights of tickets and controls), `trial` is one training, kept
by content in a store, `plan` all trainings of a call, `report` is what comes out, `table` prints it.

**What is measured on what.** Whatever is chosen (an epoch, with `select="best"`, or the highest matching level) is chosen on the
validation images, a tenth of the training images, the same for every seed. The test images are measured once at the end of each
training. The highest level by test images, as the papers report it, stands beside the other and is named so. On the task of the
pre-training itself the pretrained weights may know the validation images (`ticketkit.tasks`): the choice then favours denser tickets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ticketkit import tasks as known
from ticketkit.errors import TicketError
from ticketkit.search.progress import Progress
from ticketkit.search.settings import Changes, settings
from ticketkit.verifier.origin import Origin, check_control
from ticketkit.verifier.plan import Plan
from ticketkit.verifier.report import Report
from ticketkit.verifier.trial import MODES, SELECTIONS, Subject

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Report", "verify"]


def verify(
    ticket: str | os.PathLike[str],
    tasks: Sequence[str] = (),
    *,
    seeds: int = 3,
    levels: Sequence[int] | str | None = None,
    controls: Sequence[str] = (),
    mode: str = "full",
    select: str = "last",
    start: str = "rewound",
    dense_weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "runs/verify",
    threads: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
    **changes: Unpack[Changes],
) -> Report:
    """Whether tickets match the dense network: matching, winning and universal, as defined in `ticketkit.verifier.verdicts`.

    Dense network and ticket start from their weights with a new head from the seed, and train by the same recipe with the same
    seeds, which also decide order and augmentation. Every training is kept by content: the same call again trains what is missing,
    also after kill -9, and other calls reuse what they share, such as the dense runs.

    Args:
        ticket: a ticket file with weights, or the run directory of `find`; RUN@K is its round K.
        tasks: of `ticketkit.tasks.names()`; default: the task that the ticket was found on.
        seeds: how many; they are 0, 1, 2, …
        levels: rounds of the run directory, or "all"; default: the last.
        controls: of `ticketkit.verifier.origin.CONTROLS`, trained beside each level; with start "trained" only those that keep most
            of the ticket's weights, perturb=P and reinit.
        mode: "full" fine-tunes everything, "linear" trains the head alone and freezes the rest, norm statistics too.
        select: "last" measures the last weights, "best" those of the epoch with the best validation metric.
        start: "rewound", the weights that the ticket rewinds to, or "trained", its sparse-trained weights of that round.
        dense_weights: checkpoint file of θ_p; default: what the run directory or the ticket holds of it.
        data: folder of the tasks' images.
        out: the store, a folder that several calls and processes may share.
        threads, checkpoint_seconds, progress: as in `find`.
        changes: how every training is done, see `ticketkit.search.settings.Changes`; the recipe is each task's own where none is named.

    Raises:
        TicketkitError: anything wrong with the options, the data, the ticket or the store, in one line.
        KeyboardInterrupt: after Ctrl-C, once the state is on disk.
    """
    _check(seeds, mode, select, checkpoint_seconds)
    kinds = ["ticket", *dict.fromkeys(check_control(control, start) for control in controls)]
    origin = Origin(ticket, levels, start, dense_weights)
    folder = None if data is None else Path(data)
    subjects = [Subject(task, task.load(folder), mode, select) for task in map(known.get, _task_names(tasks, origin))]
    recipes = {s.task.name: [settings(s.task, len(s.data.train), seed, **changes) for seed in range(seeds)] for s in subjects}
    plan = Plan(origin, kinds, subjects, recipes, Path(out))
    with torch.random.fork_rng(devices=[]), progress or Progress() as shown:
        results = plan.train(threads, checkpoint_seconds, shown)
    return Report(
        ticket=str(ticket),
        model=origin.model,
        seeds=plan.seeds,
        mode=mode,
        select=select,
        start=start,
        dense_sha256=origin.dense_sha256,
        store=str(out),
        tasks=plan.report(results),
    )


def _check(seeds: int, mode: str, select: str, checkpoint_seconds: float) -> None:
    if seeds < 1:
        raise TicketError(f"--seeds: expected at least 1, got {seeds}")
    for option, given, choices in (("--mode", mode, MODES), ("--select", select, SELECTIONS)):
        if given not in choices:
            raise TicketError(f"{option}: expected one of {', '.join(choices)}, got {given!r}")
    if not checkpoint_seconds >= 0.0:  # "not >=": NaN too
        raise TicketError(f"--checkpoint-seconds: expected 0 or more, got {checkpoint_seconds:g}")


def _task_names(given: Sequence[str], origin: Origin) -> list[str]:
    """The tasks, each once; without any, the one that the ticket was found on."""
    own = origin.meta.get("task")
    if given:
        return list(dict.fromkeys(given))
    if not isinstance(own, str):
        raise TicketError(f"{origin.path}: the ticket does not say on which task it was found; give --task")
    return [own]
