"""The rounds of a search: start, train, measure, keep; resumable after any step and in any number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ticketkit import masks as algebra
from ticketkit import models
from ticketkit.errors import ModelError
from ticketkit.masks import Masks
from ticketkit.pretrain import Objective
from ticketkit.search import rewind as points
from ticketkit.search.logs import Log
from ticketkit.search.methods import Method
from ticketkit.search.progress import Progress
from ticketkit.search.ranks import Ranks
from ticketkit.search.rundir import Arrays, RunDir
from ticketkit.search.sitting import sit
from ticketkit.search.train import Settings, Training, unchanged
from ticketkit.tasks import Batches, Data, Split, Task
from ticketkit.ticket import Ticket


@dataclass(frozen=True)
class Search:
    """One network, one task, one objective, one method and one run directory; `every` is the seconds between two checkpoints."""

    module: nn.Module
    task: Task
    data: Data
    objective: Objective
    method: Method
    levels: list[float]
    settings: Settings
    block: algebra.Block
    config: dict[str, Any]
    run: RunDir
    ranks: Ranks
    log: Log
    every: float
    progress: Progress

    def iterate(self, theta: Arrays) -> None:
        """Until every level is on disk: prune, rewind, train. Round 0, the dense reference, starts from `theta`, θ_p."""
        full = algebra.full({name: theta[name] for name in models.prunable(self.config["model"], self.module)})  # m = 1
        batches = Batches(self.data.train, self.objective.views(self.task), self.settings.batch_size, self.ranks.rank, self.ranks.count)
        done = self.ranks.from_first(lambda: len(self.run.rows()))
        for k in range(done, len(self.levels)):
            masks = self.ranks.agree(lambda k=k: self._masks(k, full))  # type: ignore[misc]
            training = self._begin(k, masks, theta)
            seconds = self._train(training, batches)  # train f(x; m ⊙ θ, γ) for t epochs
            self._finish(training, seconds)

    def _masks(self, k: int, full: Masks) -> Masks:
        """The masks that round k starts with."""
        source = self.method.source(k) if k else None
        if source is None:
            return full
        trained, ticket = self.run.round(source)
        masks = {name: ticket.masks[name] for name in full}  # in the network's order, which breaks ties; the file's is another
        return self.method.masks(trained, masks, self.config["rate"], self.levels[k], self.block)

    def _begin(self, k: int, masks: Masks, theta: Arrays) -> Training:
        """Round k at its first step: the weights rewound, everything else as new."""
        point = self.config["rewind"] if k else "pretrained"
        if k:
            start = self.ranks.from_first(self.run.rewind) if point != "lr" else self.ranks.from_first(lambda: self._trained(k))
        else:
            start = theta
        models.assign(self.module, start)
        step = points.step_of(point, self.settings.steps)
        due = self.method.due(self.levels[k], self.settings.steps) if k else unchanged
        shared = {"objective": self.objective, "ranks": self.ranks, "due": due, "block": self.block}
        training = Training(self.module, masks, self.settings, k, step, **shared)  # type: ignore[arg-type]
        if point == "early":
            training.restore(self.ranks.from_first(self.run.early))
        return training

    def _trained(self, k: int) -> Arrays:
        """What learning-rate rewinding goes on from: the trained weights of the round that decided the masks."""
        return self.run.round(self.method.source(k) or 0)[0]

    def _train(self, training: Training, batches: Batches) -> float:
        """Train to the end of the round, from where it stopped; returns the seconds it took, over all its sittings."""
        early = points.step_of("early", self.settings.steps) if training.round == 0 and self.config["rewind"] == "early" else None

        def look(now: Training) -> None:
            self.progress.step(now.round, algebra.sparsity(now.masks), now.loss, now.accuracy)
            self.log.step(now)
            if now.step == early:
                self.ranks.from_first(lambda: self.run.save_early(now.state(), models.arrays(now.module)))

        return sit(training, batches, self.run, self.every, look)

    def _evaluate(self, split: Split) -> tuple[float, float]:
        """(metric, mean loss) over a split. Every rank measures all of it, so that the number does not depend on how many there are."""
        return self.objective.evaluate(self.module, self.task, split, self.config["num_classes"])

    def _finish(self, training: Training, seconds: float) -> None:
        """Measure the trained round, and write ticket, weights and row."""
        score, loss = self._evaluate(self.data.test)
        if not math.isfinite(loss):
            raise ModelError(f"training diverged: the test loss of round {training.round} is {loss}; lower --lr")
        val_score, _ = self._evaluate(self.data.val)
        self.ranks.from_first(lambda: self._keep(training, seconds, {"metric": score, "val_metric": val_score, "loss": loss}))

    def _keep(self, training: Training, seconds: float, measured: dict[str, float]) -> None:
        k, masks, name = training.round, training.masks, self.config["model"]
        dense = self.run.rows()[0]["metric"] if k else measured["metric"]
        facts = {"round": k, "sparsity": algebra.sparsity(masks), "layer_sparsity": algebra.layer_sparsity(masks)}
        metrics = {"metric_name": self.objective.metric, "dense_metric": [dense], "ticket_metric": [measured["metric"]]}
        origin = {key: self.config[key] for key in ORIGIN}
        start = self._trained(k) if k and self.config["rewind"] == "lr" else self.run.rewind()
        ticket = Ticket(masks, start, {**origin, **models.rule(name), **facts, **metrics})
        pruned = sum(mask.size for mask in masks.values()) - algebra.kept(masks)
        row = {
            **facts,
            "sparsity_model": pruned / sum(parameter.numel() for parameter in self.module.parameters()),
            "kept": algebra.kept(masks),
            "metric_name": self.objective.metric,
            **measured,
            "seconds": round(seconds, 1),
            "mask_sha256": ticket.mask_sha256,
        }
        self.run.finish(row, ticket.apply(models.arrays(self.module)), ticket)
        self.log.round(row, (k + 1) * self.settings.steps)
        self.progress.finished(row, self.run.rows()[0])


# What a ticket records of its run, from run.json.
ORIGIN = (
    "model", "num_classes", "input_shape", "weights", "weights_sha256", "objective", "objective_options", "method", "task", "rewind",
    "rate", "granularity", "seed", "version",
)  # fmt: skip
