"""One process or many: everything that several ranks must agree on, over Lightning Fabric.

Every rank trains the same network on its rows of the same global batches. Masks are decided by rank 0 alone, sent to the others and
compared by hash: ranks that each prune for themselves end with different masks. Only rank 0 writes files and shows progress.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from ticketkit.errors import TicketError, TicketkitError
from ticketkit.masks import Masks
from ticketkit.quiet import quiet
from ticketkit.search.syncbn import synchronised
from ticketkit.ticket import Ticket

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp")
GRACE = 10.0  # seconds that the first process has for its last words
UNUSABLE = (ValueError, RuntimeError, TypeError, ModuleNotFoundError, MisconfigurationException)  # what Fabric raises on a Machine

T = TypeVar("T")


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
            except UNUSABLE as error:  # more devices than there are, an unknown accelerator, ...
                raise _unusable(error) from None
        if dist.is_torchelastic_launched() and (started := int(os.environ["WORLD_SIZE"])) != self.machine.nodes * self.machine.devices:
            got = f"{self.machine.nodes} x {self.machine.devices}"  # each would search for itself, or wait for ever
            raise TicketError(f"--nodes x --devices: expected the {started} processes that torchrun started, got {got}")

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

    def check_batch(self, images: int, parts: int) -> None:
        """TicketError unless a global batch can be divided among the processes, and each one's share into `parts`."""
        if images % (self.count * parts):
            shares = f"{self.count} processes" + (f" x {parts} parts (--accumulate)" if parts > 1 else "")
            raise TicketError(f"--batch-size: expected a multiple of {self.count * parts}, for {shares}, got {images}")

    @contextmanager
    def launched(self) -> Iterator[None]:
        """Start the other processes and connect them all; nothing where there is one.

        Raises:
            TicketError: they cannot be started, or one of them ended while the others needed it.
        """
        try:
            with quiet():
                self.fabric.launch()
        except UNUSABLE as error:
            raise _unusable(error) from None
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.* is deprecated")  # of Fabric's own calls
        try:
            yield
        except RuntimeError as error:  # gloo has no class of its own for it
            if self.count == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise TicketError("another process of this search ended; repeat the command to go on from what is saved") from None

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
        masks: dict[str, Any] = self.from_first(lambda: dict(decide()))
        if self.count == 1:
            return masks
        self.same(Ticket(masks).mask_sha256, "the masks")
        return masks

    def same(self, value: str, name: str) -> None:
        """TicketError on every rank unless `value` is the same on all."""
        if self.count > 1:
            digest = list(hashlib.sha256(value.encode()).digest())
            every = self.fabric.all_gather(torch.tensor(digest, dtype=torch.uint8, device=self.fabric.device))
            if not bool((every == every[0]).all()):
                raise TicketError(f"{name} differ between processes; check the files of every node and the network, and start again")

    def each(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank; an error of any rank is raised on all, so that none waits for one that has given up."""
        if self.count == 1:
            return make()
        found, failure = _tried(make)
        failures: list[Exception | None] = [None] * self.count
        dist.all_gather_object(failures, failure)
        for failed in failures:
            if failed is not None:
                raise failed
        return found  # type: ignore[return-value]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; an error of rank 0 is raised on all."""
        if self.count == 1:
            return make()
        value, failure = self.fabric.broadcast(_tried(make) if self.first else None)
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


@contextmanager
def first_speaks() -> Iterator[None]:
    """What ends all processes is told once: the others leave without a word, with the code that the command line gives.

    Before they are connected it is told once on each node. Fabric's launcher and torchrun kill the first process as soon as another
    has left with an error; so the others wait until it has gone, at most `GRACE` seconds.
    """
    parent = os.getppid()
    try:
        yield
    except (TicketkitError, KeyboardInterrupt) as error:
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if (rank_zero_only.rank == 0) if dist.is_initialized() else (local == "0"):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end = time.monotonic() + GRACE
        while os.getppid() == parent and time.monotonic() < end:
            time.sleep(0.05)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def _tried(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as failed:
        return None, failed


def _unusable(error: Exception) -> TicketError:
    return TicketError(f"--devices, --nodes, --strategy, --accelerator: {' '.join(str(error).split())}")
