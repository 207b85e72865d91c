"""Which trainings a verification needs, doing them, and its report from their results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ticketkit import masks as algebra
from ticketkit.search.progress import Progress
from ticketkit.search.rundir import BusyError
from ticketkit.search.train import Settings
from ticketkit.ticket import Ticket
from ticketkit.verifier.origin import Origin, Variant, weights_sha256
from ticketkit.verifier.report import Row, TaskReport
from ticketkit.verifier.trial import Result, Subject, Trial
from ticketkit.verifier.verdicts import Sample, matching

POLL = 1.0  # seconds between two looks at trainings that other processes have in hand
Results = dict[str, Result]  # by key of the training


@dataclass(frozen=True)
class Identity:
    """What a variant with a seed is by content: sparsity, weights left and hash of its masks, hash of its weights."""

    sparsity: float
    kept: int
    mask_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Plan:
    """The trainings of one verification: every variant on every subject with every seed.

    `kinds` are "ticket" and the controls, at each level; `settings` hold, by task, the recipe for each seed; `store` is the folder
    of the trainings.
    """

    origin: Origin
    kinds: Sequence[str]
    subjects: Sequence[Subject]
    settings: Mapping[str, Sequence[Settings]]
    store: Path

    @cached_property
    def variants(self) -> list[Variant]:
        """The dense network, then, level by level, the ticket and its controls."""
        return [Variant("dense"), *(Variant(kind, level) for level in self.origin.levels for kind in self.kinds)]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """The same for every task."""
        return tuple(each.seed for each in next(iter(self.settings.values())))

    @cached_property
    def identities(self) -> dict[tuple[Variant, int], Identity]:
        """By variant and seed. Masks and weights are read, hashed and let go: for many levels they would not fit into memory."""
        return {(variant, seed): self._identity(variant, seed) for variant in self.variants for seed in self.seeds}

    def _identity(self, variant: Variant, seed: int) -> Identity:
        masks = self.origin.masks(variant, seed)
        weights = weights_sha256(self.origin.weights(variant))
        return Identity(algebra.sparsity(masks), algebra.kept(masks), Ticket(masks).mask_sha256, weights)

    @cached_property
    def trials(self) -> dict[tuple[str, Variant, int], Trial]:
        """By task, variant and seed, in the order in which they are done; equal ones have equal keys."""
        return {
            (subject.task.name, variant, settings.seed): self._trial(subject, variant, settings)
            for subject in self.subjects
            for variant in self.variants
            for settings in self.settings[subject.task.name]
        }

    def _trial(self, subject: Subject, variant: Variant, settings: Settings) -> Trial:
        identity = self.identities[variant, settings.seed]
        return Trial(subject, self.origin, variant, settings, identity.mask_sha256, identity.weights_sha256, self.store)

    def train(self, threads: int | None, every: float, progress: Progress) -> Results:
        """All results. What is finished is not done again, and what other processes have in hand is waited for at the end."""
        results = {trial.key: found for trial in self.trials.values() if (found := trial.result())}
        pending = list({trial.key: trial for trial in self.trials.values() if trial.key not in results}.values())
        count = len(results) + len(pending)
        progress.start(count, sum(trial.steps_left() for trial in pending), self._schedules(), self._remarks() if pending else ())

        while pending:
            busy = []
            for trial in pending:
                try:
                    result = trial.train(every, threads, progress)
                except BusyError:
                    busy.append(trial)
                    continue
                results[trial.key] = result
                metrics = f"validation {result.val:.2%}, test {result.test:.2%}{', diverged' if result.diverged else ''}"
                progress.say(f"{trial}: {metrics}, {result.seconds:.0f} s ({len(results)} of {count})")
            if len(busy) == len(pending):
                time.sleep(POLL)
            pending = busy
        return results

    def _schedules(self) -> str:
        """How each task is trained, in one line."""
        return "; ".join(f"{task} {settings[0]}" for task, settings in self.settings.items())

    def _remarks(self) -> tuple[str, ...]:
        """What of the network is new on each task; an error, before any training, where the dense weights do not fit it."""
        first = [self.trials[subject.task.name, self.variants[0], self.seeds[0]] for subject in self.subjects]
        return tuple(f"{trial.subject.task.name}: {remark}" for trial in first for remark in trial.begin()[2])

    def report(self, results: Results) -> tuple[TaskReport, ...]:
        """One report for each task."""
        return tuple(self._task_report(subject, results) for subject in self.subjects)

    def _task_report(self, subject: Subject, results: Results) -> TaskReport:
        task = subject.task
        recipe = {key: value for key, value in asdict(self.settings[task.name][0]).items() if key != "seed"}

        def diverged(variant: Variant) -> int:
            return sum(results[self.trials[task.name, variant, seed].key].diverged for seed in self.seeds)

        def sample(variant: Variant, split: str) -> Sample:
            return Sample(tuple(getattr(results[self.trials[task.name, variant, seed].key], split) for seed in self.seeds))

        val, test = (sample(self.variants[0], split) for split in ("val", "test"))
        rows = []
        for variant in self.variants[1:]:
            own_val, own_test = (sample(variant, split) for split in ("val", "test"))
            identity = self.identities[variant, self.seeds[0]]
            control = None if variant.kind == "ticket" else variant.kind
            pretrained = identity.weights_sha256 == self.origin.dense_sha256
            verdicts = matching(own_val, val), matching(own_test, test)
            of = control, variant.level, identity.sparsity, identity.kept, pretrained, diverged(variant)
            rows.append(Row(*of, own_val, own_test, *verdicts))
        return TaskReport(task.name, task.metric, recipe, val, test, diverged(self.variants[0]), tuple(rows))
