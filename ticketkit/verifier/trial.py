"""One training of `verify`: from a ticket's weights, or the dense ones, to a metric, kept in a store by what decides it.

The store is a folder of trainings, STORE/KEY, where KEY is the sha256 over the canonical JSON of everything that decides the result:
task and data, network, masks, starting weights, recipe, seed, mode, selection. Equal trainings are so done once, whichever ticket,
level or call asks for them, and several processes may share a store.

    run.json             what KEY is the hash of, and what only describes it
    state.safetensors    while it is in progress
    result.json          once it is finished
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ticketkit import models
from ticketkit.errors import ModelError, TicketError
from ticketkit.masks import Masks
from ticketkit.models import Source
from ticketkit.pretrain.supervised import Supervised
from ticketkit.search import setup
from ticketkit.search.progress import Progress
from ticketkit.search.rundir import FREE, Arrays, RunDir
from ticketkit.search.sitting import ends_epoch, sit
from ticketkit.search.train import DivergedError, Settings, Training
from ticketkit.tasks import Batches, Data, Split, Task
from ticketkit.ticket import Ticket, canonical, write_atomic
from ticketkit.verifier.origin import Origin, Variant

FORMAT = 1
GOAL = Supervised()  # tickets of every objective are verified on labelled tasks
MODES = ("full", "linear")
SELECTIONS = ("last", "best")


@dataclass(frozen=True)
class Subject:
    """A task with its data, and how all its trainings are done."""

    task: Task
    data: Data
    mode: str
    select: str


@dataclass(frozen=True)
class Result:
    """Metrics of one finished training, fractions in [0, 1], of the weights of one `step`, which have that sha256.

    One that diverged is finished, too, with the metrics of what it left.
    """

    val: float
    test: float
    step: int
    weights_sha256: str
    seconds: float
    diverged: bool = False


@dataclass(frozen=True)
class Trial:
    """One training: a variant of a ticket on a task with a seed (that of `settings`). The hashes stand for masks and weights."""

    subject: Subject
    origin: Origin
    variant: Variant
    settings: Settings
    mask_sha256: str
    weights_sha256: str
    store: Path

    def __str__(self) -> str:
        return f"{self.subject.task.name}: {self.variant}, seed {self.settings.seed}"

    def config(self) -> dict[str, Any]:
        """The content of run.json."""
        source = Source(str(self.origin.path), self.weights_sha256)
        task, data = self.subject.task, self.subject.data
        how = {"format": FORMAT, "objective": GOAL.name, "mask_sha256": self.mask_sha256, "augmentation": asdict(task.augmentation)}
        how |= {"mode": self.subject.mode, "select": self.subject.select}
        return setup.config(task, self.origin.model, data, self.settings, source, how)

    @cached_property
    def key(self) -> str:
        """Name of the training in the store. What is as it was before there was an option for it is left out: old results stay good."""
        usual = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
        decides = {key: value for key, value in self.config().items() if key not in FREE and (key not in usual or value != usual[key])}
        return hashlib.sha256(canonical(decides).encode()).hexdigest()

    @property
    def run(self) -> RunDir:
        """The training's own directory."""
        return RunDir(self.store / self.key)

    def result(self) -> Result | None:
        """The result, if the training is finished.

        Raises:
            TicketError: the file is damaged.
        """
        path = self.run.path / "result.json"
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            found = Result(
                val=float(values["val"]),
                test=float(values["test"]),
                step=int(values["step"]),
                weights_sha256=str(values["weights_sha256"]),
                seconds=float(values["seconds"]),
                diverged=bool(values.get("diverged", False)),
            )
            if not (0.0 <= found.val <= 1.0 and 0.0 <= found.test <= 1.0):
                raise ValueError(f"val {found.val}, test {found.test}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TicketError(f"{path}: expected the result of a training, got a damaged file ({error}); delete its folder") from None
        return found

    def steps_left(self) -> int:
        """Optimizer steps that are not yet on disk."""
        return 0 if self.result() else setup.steps_left(self.run, self.settings.steps, 0, 0)

    def begin(self) -> tuple[nn.Module, Masks, tuple[str, ...]]:
        """The network as it starts, its masks, and what of it is new. The head, always new, is drawn from the seed.

        Raises:
            TicketError, ModelError: the ticket does not fit the network, or a linear probe would freeze a new, random stem.
        """
        task, model, seed = self.subject.task, self.origin.model, self.settings.seed
        module = setup.network(model, "random", len(self.subject.data.classes), task.size, seed, GOAL).module
        weights, family = self.origin.weights(self.variant), models.family(model)
        remarks: tuple[str, ...] = ()
        if weights is not None:
            remarks = models.fit(module, weights, family.STEM, family.HEAD)
            stem = [name for name, array in models.arrays(module).items() if name in weights and weights[name].shape != array.shape]
            if stem and self.subject.mode == "linear":
                raise ModelError(f"{task.name}: {stem[0]} has another shape for its images and would stay random; use --mode full")
        masks = self.origin.masks(self.variant, seed)
        models.assign(module, Ticket(masks).apply(models.arrays(module)))
        return module, masks, remarks

    def train(self, every: float, threads: int | None, progress: Progress) -> Result:
        """Train to the end, from where it stopped if it did, measure, and keep the result.

        Args:
            every: seconds between two checkpoints.
            threads: of torch; None: those it began with.
            progress: told of each step.

        Raises:
            BusyError: another process is at work on it.
            KeyboardInterrupt: after Ctrl-C, once the state is on disk.

        torch's random numbers are seeded; the caller puts them back.
        """
        run = self.run
        with setup.torch_threads(threads, run), run.claim(self.config()):
            if finished := self.result():
                (run.path / "state.safetensors").unlink(missing_ok=True)  # left by a kill at the very end
                return finished  # by another process, meanwhile
            module, masks, _ = self.begin()
            selection = Selection(self, module)
            try:
                seconds, diverged = self._sit(module, masks, selection, every, progress), False
            except DivergedError as error:  # a result like others: what a control deserves, and what one seed in many may do
                progress.say(f"{self}: {error}")
                seconds, diverged = error.seconds, True
            result = selection.measure(seconds, diverged)
            write_atomic(run.path / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
            (run.path / "state.safetensors").unlink(missing_ok=True)
        return result

    def _sit(self, module: nn.Module, masks: Masks, selection: Selection, every: float, progress: Progress) -> float:
        """Train what is left; seconds, over all sittings. The one place that makes a Training and runs it."""
        batches = Batches(self.subject.data.train, GOAL.views(self.subject.task), self.settings.batch_size)
        head = [name for name, _ in module.named_parameters() if models.in_head(self.origin.model, name)]
        training = Training(module, masks, self.settings, round=0, trainable=head if self.subject.mode == "linear" else None)

        def look(now: Training) -> None:
            progress.advance(f"{self}  loss {now.loss:.3f}  train {now.accuracy:.1%}")
            if ends_epoch(now, batches):
                selection.look(now.step)

        return sit(training, batches, self.run, every, look, selection)


class Selection:
    """Which weights of a training are measured: the last, or those of the epoch with the best validation metric, the first of equals.

    The test images are looked at once, by `measure`, when the choice is made.
    """

    def __init__(self, trial: Trial, module: nn.Module) -> None:
        self.trial, self.module = trial, module
        self.step, self.score = trial.settings.steps, -math.inf
        self._best: Arrays = {}

    def look(self, step: int) -> None:
        """At the end of an epoch: keep the weights of `step` if they are the best so far."""
        if self.trial.subject.select == "best" and (score := self._metric(self.trial.subject.data.val)) > self.score:
            self.step, self.score, self._best = step, score, models.arrays(self.module)

    def measure(self, seconds: float, diverged: bool) -> Result:
        """Of the chosen weights, at the end of a training that took `seconds`."""
        if self._best:
            models.assign(self.module, self._best)
        val, test = (self._metric(split) for split in (self.trial.subject.data.val, self.trial.subject.data.test))
        return Result(val, test, self.step, models.state_sha256(models.arrays(self.module)), round(seconds, 1), diverged)

    def state(self) -> Arrays:
        """What a resumed training must know of the choice so far."""
        if not self._best:
            return {}
        best = {f"best/{name}": array for name, array in self._best.items()}
        return {"step": np.array([self.step], np.int64), "score": np.array([self.score]), **best}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up the choice where `state` left it."""
        self._best = {name.removeprefix("best/"): array for name, array in state.items() if name.startswith("best/")}
        if self._best:
            self.step, self.score = int(state["step"][0]), float(state["score"][0])

    def _metric(self, split: Split) -> float:
        subject = self.trial.subject
        return GOAL.evaluate(self.module, subject.task, split, len(subject.data.classes))[0]
