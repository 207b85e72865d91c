"""`find`: lottery tickets by pruning, in a run directory that is taken up where it stopped.

The default is iterative magnitude pruning, Algorithm 1 of Chen et al., "The Lottery Tickets Hypothesis for Supervised and
Self-supervised Pre-training in Computer Vision Models" (CVPR 2021).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ticketkit import masks as algebra
from ticketkit import models, tasks
from ticketkit.errors import TicketError
from ticketkit.pretrain import Objective
from ticketkit.search import logs, methods, setup
from ticketkit.search import rewind as points
from ticketkit.search.loop import Search
from ticketkit.search.methods import Method
from ticketkit.search.progress import Progress
from ticketkit.search.ranks import Machine, Ranks
from ticketkit.search.rundir import Row, RunDir
from ticketkit.search.settings import Changes, recipe, settings
from ticketkit.ticket import Ticket

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class RunResult:
    """A finished search: its directory, run.json and the lines of rounds.jsonl (row 0 is the dense reference).

    `first` tells, of several processes, the one that speaks for all.
    """

    path: Path
    config: dict[str, Any]
    rows: list[Row]
    first: bool = True

    @property
    def ticket(self) -> Ticket:
        """The ticket of the last round."""
        return RunDir(self.path).round(self.rows[-1]["round"])[1]


def find(
    task: str = "digits",
    *,
    model: str | None = None,
    weights: str | None = None,
    objective: str = "supervised",
    temperature: float | None = None,
    strength: float | None = None,
    queue: int | None = None,
    key_momentum: float | None = None,
    method: str = "imp",
    rounds: int | None = None,
    sparsity: float | Sequence[float] | None = None,
    rate: float = 0.2,
    granularity: str = "1x1",
    rewind: str = "pretrained",
    accumulate: int = 1,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    machine: Machine | None = None,
    log: str | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
    **changes: Unpack[Changes],
) -> RunResult:
    """Find lottery tickets by pruning, or take up an interrupted search where it stopped.

    Args:
        task: one of `ticketkit.tasks.names()`; a self-supervised objective takes its images alone.
        model: one of `ticketkit.models.names()`; default: the task's.
        weights: checkpoint file, torchvision weight name, or "random"; default: the model family's.
        objective: one of `ticketkit.pretrain.names()`: supervised, simclr, moco.
        temperature, strength, queue, key_momentum: options of the self-supervised objectives, see there; default: theirs.
        method: one of `ticketkit.search.methods.METHODS`: imp, oneshot, gmp, acdc.
        rounds: pruning rounds after the dense reference (round 0), default 3 for imp. Round k has sparsity 1 - (1 - rate)^k.
        sparsity: instead of rounds. imp: as many as reach this fraction of the prunable weights. The other methods: one round for each
            fraction; default 0.9.
        rate: fraction of the remaining weights pruned each round.
        granularity: "RxC" prunes whole blocks of R output channels by C weights, by their mean magnitude, such as "4x1" or
            "1x16", see `ticketkit.masks.global_magnitude`; a round's sparsity is then rounded to blocks. "1x1": single weights.
        rewind: "pretrained", "init", "early" or "lr", see `ticketkit.search.rewind`.
        accumulate: parts in which each process works off its share of a batch, to save memory; not for simclr, which compares the
            images of a batch, and in moco each part finds the keys of those before it in the queue.
        seed: of initialisation, data order and augmentation; 0 is a seed like any other.
        data: the task's data folder.
        out: run directory; default: runs/TASK-MODEL-seedN. If it holds this very run, the run goes on
            there; more rounds may be asked for.
        threads: of torch; default: those the run began with, else torch's own choice.
        machine: processes, devices and precision, see `ticketkit.search.ranks.Machine`; default: one process.
        log: "csv" or "tensorboard" writes curves to OUT/logs, too.
        checkpoint_seconds: the state is written at the end of each epoch and at least this often in between.
        progress: told of each step and round.
        changes: how a round trains, see `ticketkit.search.settings.Changes`: recipe, epochs or steps, batch_size, lr, schedule,
            milestones, warmup, momentum, weight_decay.

    Returns:
        The run directory, its configuration and one row for each round asked for, dense first.

    Raises:
        TicketkitError: anything wrong with the options, the data, the weights or the run directory, in one line.
        KeyboardInterrupt: after Ctrl-C, once the state is on disk.
    """
    chosen, how, block = tasks.get(task), methods.get(method), algebra.parse_block(granularity)
    goal = setup.objective(objective, temperature=temperature, strength=strength, queue=queue, key_momentum=key_momentum)
    levels, named = setup.levels(how, rounds, sparsity, rate), recipe(changes.get("recipe"), chosen).name
    _check(goal, how, rewind, accumulate, checkpoint_seconds)
    logs.check(log)
    model = model or chosen.model
    run = RunDir(out if out is not None else Path("runs") / f"{task}-{model}-seed{seed}")
    images = chosen.load(None if data is None else Path(data))
    training = settings(chosen, len(images.train), seed, accumulate, **changes)
    rewound_step = points.step_of(rewind, training.steps)
    ranks = Ranks(machine)
    ranks.check_batch(training.batch_size, training.accumulate)
    with ExitStack() as here:
        here.enter_context(torch.random.fork_rng(devices=[]))
        here.enter_context(setup.torch_threads(threads, run))
        here.enter_context(ranks.launched())
        shown = here.enter_context(setup.shown(progress, ranks))
        start = ranks.each(lambda: setup.network(model, weights, len(images.classes), chosen.size, seed, goal))
        how_told = setup.pruning(goal, how, levels, ranks.machine, rewind=rewind, rate=rate, granularity=granularity, recipe=named)
        config = setup.config(chosen, model, images, training, start.source, how_told)
        ranks.same(f"{config['data_sha256']} {config['weights_sha256']}", "the images or the weights")

        def begin() -> None:
            here.enter_context(run.claim(config))
            setup.keep_start(run, start, rewind)
            left = setup.steps_left(run, training.steps, rewound_step, len(levels) - 1)
            shown.start(len(levels) - 1, left, f"{named}: {training}", start.source.remarks)

        ranks.from_first(begin)
        curves = logs.Log(log if ranks.first else None, run.path)
        here.callback(curves.close)
        search = Search(
            start.module, chosen, images, goal, how, levels, training, block, config, run, ranks, curves, checkpoint_seconds, shown
        )
        search.iterate(start.pretrained)
        there, rows = ranks.from_first(lambda: (run.config(), run.rows()))
    return RunResult(run.path, there, rows[: len(levels)], ranks.first)


def _check(goal: Objective, how: Method, rewind: str, accumulate: int, checkpoint_seconds: float) -> None:
    """Refuse options that make no sense together."""
    if accumulate > 1 and goal.whole:
        raise TicketError(f"--accumulate: {goal.name} compares the images of a whole batch; expected 1, got {accumulate}")
    if rewind in points.POINTS and rewind not in how.rewinds:
        raise TicketError(f"--rewind: method {how.name} prunes while it trains; expected {' or '.join(how.rewinds)}, got {rewind}")
    if not checkpoint_seconds >= 0.0:  # "not >=": NaN too
        raise TicketError(f"--checkpoint-seconds: expected 0 or more, got {checkpoint_seconds:g}")


def load_round(path: str | os.PathLike[str], round: int | None = None) -> tuple[nn.Module, dict[str, Any], Ticket]:
    """What `find` left behind of one round: the network with its trained weights (pruned ones exactly zero) in evaluation mode,
    run.json, and the ticket.

    Args:
        path: run directory.
        round: its number; default: the last finished one.

    Raises:
        TicketError: no run directory, no such round, or damaged files.
        ModelError: the weights do not fit the model.
    """
    run = RunDir(path)
    config, (trained, ticket) = run.config(), run.round(run.finished(round))
    module = models.build_for(config["model"], trained, config["num_classes"], config["input_shape"][1])
    models.assign(module, ticket.apply(trained))
    return module.eval(), config, ticket
