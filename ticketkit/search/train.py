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
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from ticketkit import models
from ticketkit.errors import ModelError
from ticketkit.masks import Masks
from ticketkit.pretrain import supervised
from ticketkit.tasks import Batches

SCHEDULES = ("multistep", "cosine", "constant")


@dataclass(frozen=True)
class Settings:
    """The training algorithm A_t: everything that decides a round but its weights, masks and data."""

    steps: int
    batch_size: int
    lr: float
    schedule: str
    milestones: tuple[float, ...]
    weight_decay: float
    momentum: float
    seed: int

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0; a pure function, so a resumed run needs no scheduler state."""
        done = step / self.steps
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.schedule == "multistep":
            return float(self.lr * 0.1 ** sum(done >= milestone for milestone in self.milestones))
        return self.lr


class Training:
    """One round in progress: module, optimizer and position. `step` counts finished steps; `state` and `load` save and resume.

    `trainable` are the names of the parameters that train, None for all of them; ModelError for a name the module does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        settings: Settings,
        round: int,
        first_step: int = 0,
        trainable: Sequence[str] | None = None,
    ) -> None:
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, round)).generate_state(1)[0]))
        self.fabric = Fabric(accelerator="auto", devices=1)
        self.module = module.to(self.fabric.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.settings, self.round, self.step = settings, round, first_step
        self.loss, self.accuracy = math.nan, math.nan
        parameters = dict(self.module.named_parameters())
        self._frozen = _freeze(self.module, trainable)
        training = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(training, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        self._weights = [parameters[name].detach() for name in masks]  # shares memory with the parameters
        self._masks = [
            torch.from_numpy(mask).to(weight).to(memory_format=torch.channels_last)
            for mask, weight in zip(masks.values(), self._weights, strict=True)
        ]
        self._apply_masks()

    def run(self, batches: Batches, after_step: Callable[[Training], None]) -> None:
        """Train to the end of the round; `after_step` is called after each step and may save, show or raise.

        Raises:
            ModelError: the loss is no longer finite.
        """
        while self.step < self.settings.steps:
            epoch, first = divmod(self.step, batches.steps_per_epoch)
            correct = seen = 0
            for images, labels in batches.epoch(self.settings.seed, self.round, epoch, first):
                correct += self._one_step(images, labels)
                seen += len(labels)
                self.accuracy = correct / seen
                after_step(self)
                if self.step == self.settings.steps:
                    break

    def _one_step(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        images, labels = self.fabric.to_device((images, labels))
        for layer in self._frozen:  # at each step: whoever measures in between may put the whole module back into training mode
            layer.training = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.step)
        self.optimizer.zero_grad()
        loss, logits = supervised.loss(self.module, images, labels)
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise ModelError(f"training diverged: the loss is {self.loss} in round {self.round}, step {self.step}; lower --lr")
        self.fabric.backward(loss)
        self.optimizer.step()
        self._apply_masks()
        self.step += 1
        return int((logits.detach().argmax(1) == labels).sum())

    def _apply_masks(self) -> None:
        torch._foreach_mul_(self._weights, self._masks)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything the rest of the round depends on, as arrays: module, momentum, random numbers, position."""
        momentum = {
            f"momentum/{name}": self.optimizer.state[parameter]["momentum_buffer"].cpu().contiguous().numpy()
            for name, parameter in self.module.named_parameters()
            if self.optimizer.state[parameter].get("momentum_buffer") is not None
        }
        module = {f"module/{name}": array for name, array in models.arrays(self.module).items()}
        position = np.array([self.round, self.step], np.int64)
        return {**module, **momentum, "rng": torch.get_rng_state().numpy(), "position": position}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from `state`, bit for bit as if never stopped (on one kind of machine, with as many threads)."""
        part = {"module": {}, "momentum": {}, "rng": {}, "position": {}}  # type: dict[str, dict[str, NDArray[Any]]]
        for key, array in state.items():
            kind, _, name = key.partition("/")
            part[kind][name] = array
        models.assign(self.module, part["module"])
        for name, parameter in self.module.named_parameters():
            if name in part["momentum"]:
                buffer = torch.zeros_like(parameter)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(torch.from_numpy(part["momentum"][name]))
        torch.set_rng_state(torch.from_numpy(part["rng"][""].copy()))
        self.step = int(part["position"][""][1])


def _freeze(module: nn.Module, trainable: Sequence[str] | None) -> list[nn.Module]:
    """Let only the parameters named `trainable` (None: all) have gradients; the submodules that have none of these in them."""
    parameters = dict(module.named_parameters())
    chosen = set(parameters if trainable is None else trainable)
    if trainable is not None and (not chosen or not chosen <= parameters.keys()):
        strange = ", ".join(sorted(chosen - parameters.keys())) or "none"
        raise ModelError(f"trainable: expected parameters of the model, got {strange}; wrong head rule?")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    if trainable is None:
        return []
    return [layer for layer in module.modules() if not any(parameter.requires_grad for parameter in layer.parameters())]
