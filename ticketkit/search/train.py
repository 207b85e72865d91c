"""The one training loop: SGD under masks, stoppable and resumable after any step.

Masks need no hooks and no extra parameters: the weights are multiplied by their masks at the optimizer step. Multiplying by a
mask of ones changes no bit, so the dense reference runs through the same loop. A pruned weight's momentum lives on, unseen.

Where only some parameters are `trainable` (a linear probe trains the head alone), the others are frozen: the optimizer does not
know them, and modules without a trainable parameter stay in evaluation mode, so that norm statistics do not move either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ticketkit import masks as algebra
from ticketkit import models
from ticketkit.errors import ModelError
from ticketkit.masks import Masks
from ticketkit.pretrain import Objective
from ticketkit.pretrain.supervised import Supervised
from ticketkit.search.ranks import Ranks
from ticketkit.tasks import Batches, describe

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """The training algorithm A_t: everything that decides a round but its weights, masks, objective and data.

    Attributes:
        steps: optimizer steps of a round.
        batch_size: images of a global batch, that of all processes together.
        lr, schedule, milestones, weight_decay, momentum, warmup: as in `ticketkit.tasks.Recipe`.
        seed: of data order, augmentation and torch's random numbers.
        accumulate: parts in which each process works off its share of a batch.
    """

    steps: int
    batch_size: int
    lr: float
    schedule: str
    milestones: tuple[float, ...]
    weight_decay: float
    momentum: float
    seed: int
    warmup: int = 0
    accumulate: int = 1

    def __str__(self) -> str:
        """One line, as that of a `Recipe`."""
        return describe(f"{self.steps} steps", self)

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0; a pure function, so a resumed run needs no scheduler state.

        Over the first `warmup` steps the schedule's is multiplied by 1/warmup, 2/warmup, … 1 (Goyal et al. 2017, section 2.2).
        """
        done = step / self.steps
        lr = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.schedule == "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.schedule == "multistep":
            return float(lr * 0.1 ** sum(done >= milestone for milestone in self.milestones))
        return lr


@dataclass(frozen=True)
class Change:
    """New masks within a round: so many of the prunable weights pruned, by magnitude over all layers.

    Attributes:
        sparsity: to be reached, 0 <= sparsity < 1.
        nested: prune what is left; otherwise choose anew among all weights, pruned ones (which are zero) too.
        forget: set the momentum to zero.
    """

    sparsity: float
    nested: bool
    forget: bool = False


Due = Callable[[int], "Change | None"]


def unchanged(step: int) -> Change | None:
    """Masks stay as they are throughout the round."""
    return None


class DivergedError(ModelError):
    """The loss is no longer finite; `seconds` is how long the training took until then."""

    seconds = 0.0


class Training:
    """One round in progress: network, optimizer, masks, the objective's own state, and position.

    `step` counts finished steps; `state` and `load` save and resume everything.

    Args:
        module: the network, its weights those the round starts from; trained in place.
        masks: of its prunable weights.
        settings: the training algorithm.
        round: number of the round; with the settings' seed it decides all random numbers.
        first_step: where in the schedule the round starts.
        objective: what is learnt; default: the classes of the task.
        ranks: the processes that train together; default: this one alone.
        due: the change of masks to be made before a step, if any.
        block: granularity of such changes, see `ticketkit.masks.global_magnitude`.
        trainable: parameter names; all others are frozen, and modules without any of them stay in evaluation mode. None: all.

    Raises:
        ModelError: `trainable` names a parameter the module does not have, or none.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        settings: Settings,
        round: int,
        first_step: int = 0,
        *,
        objective: Objective | None = None,
        ranks: Ranks | None = None,
        due: Due = unchanged,
        block: algebra.Block = (1, 1),
        trainable: Sequence[str] | None = None,
    ) -> None:
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, round)).generate_state(1)[0]))
        self.ranks, self.objective = ranks or Ranks(), objective or Supervised()
        self.device = self.ranks.fabric.device
        self.module = module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings, self.round, self.step, self.due, self.block = settings, round, first_step, due, block
        self.loss, self.accuracy = math.nan, math.nan
        self._trained = _freeze(self.module, trainable)
        self.optimizer = torch.optim.SGD(
            self._trained.values(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.network = self.ranks.setup(self.module, self.optimizer)
        self._set_masks(masks)
        self.own = self.objective.begin(self.module).to(self.device)

    def run(self, batches: Batches, after_step: Callable[[Training], None]) -> None:
        """Train to the end of the round; `after_step` is called after each step and may save, show or raise.

        Raises:
            DivergedError: the loss is no longer finite.
        """
        while self.step < self.settings.steps:
            epoch, first = divmod(self.step, batches.steps_per_epoch)
            right, seen = 0.0, 0
            for views, labels in batches.epoch(self.settings.seed, self.round, epoch, first):
                right += self._one_step(views, labels)
                seen += len(labels) * self.ranks.count
                self.accuracy = right / (seen * self.objective.queries)
                after_step(self)
                if self.step == self.settings.steps:
                    break

    def _one_step(self, views: tuple[Tensor, ...], labels: Tensor) -> float:
        """How many queries of the global batch were right; `loss` is then its loss."""
        if (change := self.due(self.step)) is not None:
            self._change(change)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.step)
        self.optimizer.zero_grad()
        parts = self.settings.accumulate
        loss_here = right_here = 0.0
        for part, (labels_part, *views_part) in enumerate(zip(*(whole.chunk(parts) for whole in (labels, *views)), strict=True)):
            with self.ranks.without_sync(self.network, part < parts - 1):
                here = tuple(view.to(self.device) for view in views_part)
                with self.ranks.fabric.autocast():  # of what the objective calls beside the network, too
                    loss, hits = self.objective.loss(self.network, self.own, here, labels_part.to(self.device), self.ranks.gather)
                self.ranks.fabric.backward(loss / parts)
            loss_here += loss.item() / parts
            right_here += float(hits)
        sums = self.ranks.total({"loss": loss_here, "right": right_here})  # of all ranks, so that all stop where one diverges
        self.loss = sums["loss"] / self.ranks.count
        if not math.isfinite(self.loss):
            raise DivergedError(f"training diverged: the loss is {self.loss} in round {self.round}, step {self.step}; lower --lr")
        self.optimizer.step()
        self._apply_masks()
        self.objective.after_step(self.module, self.own)
        self.step += 1
        return sums["right"]

    def _change(self, change: Change) -> None:
        def decide() -> Masks:
            if change.sparsity == 0.0:
                return algebra.full(self.masks)
            before = self.masks if change.nested else algebra.full(self.masks)
            left = (1.0 - change.sparsity) / (1.0 - algebra.sparsity(before))
            weights = {name: weight.cpu().contiguous().numpy() for name, weight in zip(self.masks, self._weights, strict=True)}
            return algebra.global_magnitude(weights, before, max(0.0, 1.0 - left), self.block)

        self._set_masks(self.ranks.agree(decide))
        self._mask_twins()
        if change.forget:
            for buffer in self._momenta().values():
                buffer.zero_()

    def _set_masks(self, masks: Masks) -> None:
        """Take the masks, and zero what they prune."""
        parameters = dict(self.module.named_parameters())
        self.masks = dict(masks)
        self._weights = [parameters[name].detach() for name in masks]  # shares memory with the parameters
        self._factors = [
            torch.from_numpy(mask).to(weight).to(memory_format=torch.channels_last)
            for mask, weight in zip(masks.values(), self._weights, strict=True)
        ]
        self._apply_masks()

    def _mask_twins(self) -> None:
        """Zero the same in the objective's twins of the network."""
        for twin in self.objective.twins(self.own):
            copies = dict(twin.named_parameters())
            torch._foreach_mul_([copies[name].detach() for name in self.masks], self._factors)

    def _apply_masks(self) -> None:
        torch._foreach_mul_(self._weights, self._factors)

    def _momenta(self) -> dict[str, Tensor]:
        """By parameter, where there is one: none before the first step, and none of SGD without momentum."""
        found = {name: self.optimizer.state.get(parameter, {}).get("momentum_buffer") for name, parameter in self._trained.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything the rest of the round depends on, as arrays: network, momentum, masks, objective, random numbers, position."""
        momentum = {f"momentum/{name}": buffer.cpu().contiguous().numpy() for name, buffer in self._momenta().items()}
        module = {f"module/{name}": array for name, array in models.arrays(self.module).items()}
        own = {f"objective/{name}": array for name, array in models.arrays(self.own).items()}
        masks = {f"mask/{name}": algebra.pack(mask) for name, mask in self.masks.items()}
        position = np.array([self.round, self.step], np.int64)
        return {**module, **momentum, **own, **masks, "rng": torch.get_rng_state().numpy(), "position": position}

    def load(self, state: State) -> None:
        """Go on from `state`, bit for bit as if never stopped (on one kind of processor, with as many threads; on
        accelerators as far as their kernels give the same bits twice)."""
        part = _parts(state)
        if part["mask"].keys() != self.masks.keys():
            raise ModelError(f"expected masks of {len(self.masks)} layers, got {len(part['mask'])}")
        self._set_masks({name: algebra.unpack(part["mask"][name], mask.shape) for name, mask in self.masks.items()})
        self.restore(state)
        torch.set_rng_state(torch.from_numpy(part["rng"][""].copy()))
        self.step = int(part["position"][""][1])

    def restore(self, state: State) -> None:
        """Take over network, momentum and the objective's own state, but neither masks, random numbers nor position: the rewind to
        what an earlier training had reached. The present masks are applied to all of it.
        """
        part = _parts(state)
        models.assign(self.module, part["module"])
        models.assign(self.own, part["objective"])
        for name, parameter in self._trained.items():
            if name in part["momentum"]:
                buffer = torch.zeros_like(parameter)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(torch.from_numpy(part["momentum"][name]))
        self._apply_masks()
        self._mask_twins()


def _freeze(module: nn.Module, trainable: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to be trained, by name; modules that hold none are put in evaluation mode."""
    parameters = dict(module.named_parameters())
    if trainable is not None and (not trainable or not set(trainable) <= parameters.keys()):
        strange = ", ".join(sorted(set(trainable) - parameters.keys())) or "none"
        raise ModelError(f"trainable: expected parameters of the model, got {strange}; wrong head rule?")
    chosen = parameters if trainable is None else {name: parameters[name] for name in trainable}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    module.train()
    for path, part in module.named_modules():
        if trainable is not None and not any(name.startswith(f"{path}." if path else "") for name in chosen):
            part.eval()
    return chosen


def _parts(state: State) -> dict[str, dict[str, NDArray[Any]]]:
    part = {"module": {}, "momentum": {}, "objective": {}, "mask": {}, "rng": {}, "position": {}}  # type: dict[str, dict[str, NDArray[Any]]]
    for key, array in state.items():
        kind, _, name = key.partition("/")
        part[kind][name] = array
    return part
