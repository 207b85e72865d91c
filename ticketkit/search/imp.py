"""Iterative magnitude pruning: Algorithm 1 of Chen et al., "The Lottery Tickets Hypothesis for Supervised and Self-supervised
Pre-training in Computer Vision Models" (CVPR 2021), resumable after any step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ticketkit import masks as algebra
from ticketkit import models, tasks
from ticketkit.errors import ModelError, TicketError
from ticketkit.masks import Masks
from ticketkit.pretrain import supervised
from ticketkit.search import rewind as points
from ticketkit.search import setup
from ticketkit.search.interrupt import deferred_interrupt
from ticketkit.search.progress import Progress
from ticketkit.search.rundir import Arrays, Row, RunDir
from ticketkit.search.train import Settings, Training
from ticketkit.tasks import Batches, Data, Task, evaluation_batches
from ticketkit.ticket import Ticket


@dataclass(frozen=True)
class RunResult:
    """A finished search: its directory, run.json and the lines of rounds.jsonl (row 0 is the dense reference)."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]

    @property
    def ticket(self) -> Ticket:
        """The ticket of the last round."""
        return RunDir(self.path).round(self.rows[-1]["round"])[1]


@dataclass(frozen=True)
class Search:
    """Algorithm 1 on one network, one task and one run directory; `every` is the seconds between two checkpoints."""

    module: nn.Module
    task: Task
    data: Data
    settings: Settings
    block: algebra.Block
    config: dict[str, Any]
    run: RunDir
    every: float
    progress: Progress

    def iterate(self, theta: Arrays, rounds: int) -> None:
        """Until `rounds` rounds are on disk: train, prune, rewind. The dense reference starts from `theta`, θ_p."""
        batches = Batches(self.task, self.data.train, self.settings.batch_size)
        rewound_step = points.step_of(self.config["rewind"], self.settings.steps)
        masks = algebra.full({name: theta[name] for name in models.prunable(self.config["model"], self.module)})  # m = 1
        for k in range(rounds + 1):
            if k >= len(self.run.rows()):
                start, step = (theta, 0) if k == 0 else (self.run.rewind(), rewound_step)  # rewind the weights to θ
                seconds = self.train(k, start, step, masks, batches)  # train f(x; m ⊙ θ, γ) for t epochs
                self.finish(k, masks, seconds)
            trained = self.run.round(k)[0]
            masks = algebra.global_magnitude(trained, masks, self.config["rate"], self.block)  # prune the smallest that remain

    def train(self, k: int, start: Arrays, step: int, masks: Masks, batches: Batches) -> float:
        """Train round k from `start`, or from where it stopped; returns the seconds it took, over all its sittings."""
        models.assign(self.module, start)
        training = Training(self.module, masks, self.settings, k, step)
        seconds = self._resume(training)
        began, saved, level = time.monotonic() - seconds, time.monotonic(), algebra.sparsity(masks)
        early = points.step_of("early", self.settings.steps) if k == 0 and self.config["rewind"] == "early" else None

        def after_step(now: Training) -> None:
            """Shows progress and saves what is due; KeyboardInterrupt if asked to stop."""
            nonlocal saved
            self.progress.step(k, level, now.loss, now.accuracy)
            if now.step == early:
                self.run.save_rewind(models.arrays(now.module))
            due = time.monotonic() - saved >= self.every or stop.is_set()
            if due or now.step % batches.steps_per_epoch == 0 or now.step == self.settings.steps:
                self.run.save_state(now.state(), time.monotonic() - began)
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt

        with deferred_interrupt() as stop:
            training.run(batches, after_step)
        return time.monotonic() - began

    def _resume(self, training: Training) -> float:
        saved = self.run.state(training.round)
        if saved is None:
            return 0.0
        try:
            training.load(saved[0])
        except (ModelError, KeyError, RuntimeError, TypeError) as error:  # tensors of other names, shapes or types
            raise self.run.unusable_state(error) from None
        return saved[1]

    def finish(self, k: int, masks: Masks, seconds: float) -> None:
        """Measure the trained round, and write ticket, weights and row."""
        classes, name = self.config["num_classes"], self.config["model"]
        score, loss = supervised.evaluate(self.module, evaluation_batches(self.task, self.data.test), classes)
        if not math.isfinite(loss):
            raise ModelError(f"training diverged: the test loss of round {k} is {loss}; lower --lr")
        val_score, _ = supervised.evaluate(self.module, evaluation_batches(self.task, self.data.val), classes)
        dense = self.run.rows()[0]["metric"] if k else score
        start = ("model", "num_classes", "input_shape", "weights", "weights_sha256", "objective", "task")
        origin = (*start, "rewind", "rate", "granularity", "seed", "version")
        facts = {"round": k, "sparsity": algebra.sparsity(masks), "layer_sparsity": algebra.layer_sparsity(masks)}
        measured = {"metric_name": self.task.metric, "dense_metric": [dense], "ticket_metric": [score]}
        meta = {**{key: self.config[key] for key in origin}, **models.rule(name), **facts, **measured}
        ticket = Ticket(masks, self.run.rewind(), meta)
        pruned = sum(mask.size for mask in masks.values()) - algebra.kept(masks)
        row = {
            **facts,
            "sparsity_model": pruned / sum(parameter.numel() for parameter in self.module.parameters()),
            "kept": algebra.kept(masks),
            "metric": score,
            "metric_name": self.task.metric,
            "val_metric": val_score,
            "loss": loss,
            "seconds": round(seconds, 1),
            "mask_sha256": ticket.mask_sha256,
        }
        self.run.finish(row, ticket.apply(models.arrays(self.module)), ticket)
        self.progress.finished(row, self.run.rows()[0])


def find(
    task: str = "digits",
    *,
    recipe: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    rounds: int | None = None,
    sparsity: float | None = None,
    rate: float = 0.2,
    granularity: str = "1x1",
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    momentum: float | None = None,
    milestones: Sequence[float] | None = None,
    warmup: int | None = None,
    seed: int = 0,
    rewind: str = "pretrained",
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> RunResult:
    """Find lottery tickets by iterative magnitude pruning, or take up an interrupted search where it stopped.

    Args:
        task: one of `ticketkit.tasks.names()`.
        recipe: one of `ticketkit.tasks.RECIPES`, the settings of P1, Table 1; default: the task's. The options below change it.
        model: one of `ticketkit.models.names()`; default: the task's.
        weights: checkpoint file, torchvision weight name, or "random"; default: the model family's.
        rounds: pruning rounds after the dense reference (round 0), default 3. Round k has sparsity 1 - (1 - rate)^k.
        sparsity: instead of rounds: as many as reach this fraction of the prunable weights.
        rate: fraction of the remaining weights pruned each round.
        granularity: "RxC" prunes whole blocks of R output channels by C weights, by their mean magnitude, such as "4x1" or
            "1x16", see `ticketkit.masks.global_magnitude`; a round's sparsity is then rounded to blocks. "1x1": single weights.
        epochs, steps: length of a round, one of the two; default: the recipe's epochs.
        batch_size, lr, schedule, weight_decay, momentum: of SGD; default: the recipe's. Schedules: multistep, cosine, constant.
        milestones: fractions of a round at which schedule multistep multiplies the learning rate by 0.1; default: the recipe's.
        warmup: steps over which the learning rate first rises linearly; default: the recipe's.
        seed: of initialisation, data order and augmentation; 0 is a seed like any other.
        rewind: "pretrained", "init" or "early", see `ticketkit.search.rewind`.
        data: the task's data folder.
        out: run directory; default: runs/TASK-MODEL-seedN. If it holds this very run, the run goes on
            there; more rounds may be asked for.
        threads: of torch; default: those the run began with, else torch's own choice.
        checkpoint_seconds: the state is written at the end of each epoch and at least this often in between.
        progress: told of each step and round.

    Returns:
        The run directory, its configuration and one row for each round asked for, dense first.

    Raises:
        TicketkitError: anything wrong with the options, the data, the weights or the run directory, in one line.
        KeyboardInterrupt: after Ctrl-C, once the state is on disk.
    """
    chosen, count, block = tasks.get(task), setup.rounds(rounds, sparsity, rate), algebra.parse_block(granularity)
    named = setup.recipe(recipe, chosen)
    if not checkpoint_seconds >= 0.0:  # "not >=": NaN too
        raise TicketError(f"--checkpoint-seconds: expected 0 or more, got {checkpoint_seconds:g}")
    model = model or chosen.model
    run = RunDir(out if out is not None else Path("runs") / f"{task}-{model}-seed{seed}")
    images = chosen.load(None if data is None else Path(data))
    training = (epochs, steps, batch_size, lr, schedule, weight_decay, momentum, milestones, warmup)
    settings = setup.settings(named, len(images.train), seed, *training)
    rewound_step = points.step_of(rewind, settings.steps)
    with torch.random.fork_rng(devices=[]), setup.torch_threads(threads, run), progress or Progress() as shown:
        start = setup.network(model, weights, len(images.classes), chosen.size, seed)
        pruning = {"rewind": rewind, "rate": rate, "granularity": granularity, "rounds": count, "recipe": named.name}
        config = setup.config(chosen, model, images, settings, start.source, pruning)
        with run.claim(config):
            if rewind != "early" and not run.has_rewind():
                run.save_rewind(start.pretrained if rewind == "pretrained" else start.initial)
            left = setup.steps_left(run, settings.steps, rewound_step, count)
            shown.start(count, left, f"{named.name}: {settings}", start.source.remarks)
            search = Search(start.module, chosen, images, settings, block, config, run, checkpoint_seconds, shown)
            search.iterate(start.pretrained, count)
    return RunResult(run.path, run.config(), run.rows()[: count + 1])


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
    config, rows = run.config(), run.rows()
    if not rows or (round is not None and not 0 <= round < len(rows)):
        raise TicketError(f"{path}: round {round or 0} is not finished, {len(rows)} rounds are; run find again")
    trained, ticket = run.round(len(rows) - 1 if round is None else round)
    module = models.build(config["model"], config["num_classes"], config["input_shape"][1])
    models.assign(module, ticket.apply(trained))
    return module.eval(), config, ticket
