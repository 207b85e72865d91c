"""One process or many: everything that several ranks must agree on, over Lightning Fabric.

Every rank trains the same network on its rows of the same global batches. Masks are decided by rank 0 alone, sent to the others and
compared by hash: ranks that each prune for themselves end with different masks. Only rank 0 writes files and shows progress.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from ticketkit.errors import TicketError
from ticketkit.masks import Masks
from ticketkit.quiet import quiet
from ticketkit.search.syncbn import synchronised

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp")


@dataclass(frozen=True)
class Machine:
    """Where a search runs: what Lightning Fabric is told, see its documentation. torchrun's and SLURM's environments are recognised.

    Attributes:
        devices: processes on each node, each with a device of its own.
        nodes: of the cluster.
        strategy: "auto" or "ddp" (distributed data parallel).
        precision: "32-true" or "bf16-mixed" (automatic mixed precision; the weights and their updates stay float32).
        accelerator: "auto", "cpu", "cuda" or another of Fabric's.
        compile: train through `torch.compile`.
    """

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accelerator: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--devices", self.devices), ("--nodes", self.nodes)):
            if value < 1:
                raise TicketError(f"{option}: expected at least 1, got {value}")
        for option, chosen, known in (("--strategy", self.strategy, STRATEGIES), ("--precision", self.precision, PRECISIONS)):
            if chosen not in known:
                raise TicketError(f"{option}: expected one of {', '.join(known)}, got {chosen!r}")


class Ranks:
    """The processes of one search. `launch` starts the others where nobody has; with one process every method is a plain call."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        words = {"devices": self.machine.devices, "num_nodes": self.machine.nodes, "strategy": self.machine.strategy}
        with quiet():
            try:
                self.fabric = Fabric(accelerator=self.machine.accelerator, precision=self.machine.precision, **words)  # type: ignore[arg-type]
            except (ValueError, RuntimeError, TypeError) as error:  # more devices than there are, an unknown accelerator, ...
                raise TicketError(f"--devices, --nodes, --strategy, --precision: {' '.join(str(error).split())}") from None

    @property
    def rank(self) -> int:
        """Number of this process over all nodes."""
        return int(self.fabric.global_rank)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return int(self.fabric.world_size)

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and shows."""
        return self.rank == 0

    def launch(self) -> None:
        """Start the other processes and connect them all; nothing where there is one."""
        with quiet():
            self.fabric.launch()
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.* is deprecated")  # of Fabric's own calls

    def setup(self, module: nn.Module, optimizer: Optimizer) -> nn.Module:
        """What is called in training in place of `module`: on its device, in its precision, gradients averaged over the ranks.

        `module` keeps its parameters and their names; its batch norms see the global batch.
        """
        if self.count > 1:
            synchronised(module, self.fabric.device.type)
        compiled = torch.compile(module) if self.machine.compile else module
        network, _ = self.fabric.setup(compiled, optimizer)
        return network  # type: ignore[no-any-return]

    def without_sync(self, network: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Gradients of a part of a batch are not yet averaged over the ranks inside, where enabled."""
        if self.count == 1 or not enabled:
            return nullcontext()
        context: AbstractContextManager[None] = self.fabric.no_backward_sync(network)  # type: ignore[arg-type]
        return context

    def agree(self, decide: Callable[[], Masks]) -> dict[str, Any]:
        """The masks that rank 0 decides on, the same on every rank, to the bit.

        Raises:
            TicketError: a rank received other masks.
        """
        if self.count == 1:
            return dict(decide())
        masks: dict[str, Any] = self.fabric.broadcast(dict(decide()) if self.first else None)
        digest = hashlib.sha256()
        for name, mask in masks.items():
            digest.update(f"{name}{mask.shape}".encode())
            digest.update(np.packbits(mask).tobytes())
        mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=self.fabric.device)
        every = self.fabric.all_gather(mine)
        if not bool((every == every[0]).all()):
            raise TicketError("the masks differ between processes; check the network between the nodes, and start again")
        return masks

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; an error of rank 0 is raised on all."""
        if self.count == 1:
            return make()
        found: Any = None
        if self.first:
            try:
                found = make(), None
            except Exception as failed:
                found = None, failed
        value, failure = self.fabric.broadcast(found)
        if failure is not None:
            raise failure
        return value

    def gather(self, embeddings: Tensor) -> Tensor:
        """Rows [B, d] of every rank in order of the ranks, [ranks * B, d]; gradients flow back to all."""
        if self.count == 1:
            return embeddings
        every: Tensor = self.fabric.all_gather(embeddings, sync_grads=embeddings.requires_grad)
        return every.flatten(0, 1)

    def total(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sum of each number over the ranks."""
        if self.count == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.fabric.device)
        summed: Tensor = self.fabric.all_reduce(values, reduce_op="sum")
        return dict(zip(numbers, summed.tolist(), strict=True))
