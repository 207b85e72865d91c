"""What two processes do together in test_ranks.py: each case on each rank, `python tests/peers.py OUT` in torchrun's environment.

A case takes the ranks and returns arrays; with one process it is the reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pairs
import torch
from small import DIGITS, everything, settings, start
from torch.nn import functional as F

from ticketkit import masks, models
from ticketkit.errors import DataError, TicketError
from ticketkit.pretrain.moco import MoCo
from ticketkit.pretrain.simclr import SimCLR
from ticketkit.pretrain.supervised import Supervised
from ticketkit.search import ranks as module_of_ranks
from ticketkit.search.ranks import Machine, Ranks
from ticketkit.search.syncbn import synchronised
from ticketkit.search.train import Training
from ticketkit.tasks import Batches

Arrays = dict[str, Any]
CONTRAST = SimCLR(dim=8)
QUEUED = MoCo(queue=40, dim=8, bn_groups=2)
ROWS = 32  # of a global batch


def rows(ranks: Ranks, count: int) -> slice:
    """This rank's of `count`."""
    share = count // ranks.count
    return slice(ranks.rank * share, (ranks.rank + 1) * share)


def batch_norm(ranks: Ranks, dtype: torch.dtype = torch.float32, together: bool = True) -> Arrays:
    """One training step's worth of a batch norm on 6 images of 4 channels, 5 x 3; each output has a weight of its own in the loss."""
    random = np.random.default_rng(0)
    x, upstream = (torch.from_numpy(random.normal(3.0, 2.0, (6, 4, 5, 3))).to(dtype)[rows(ranks, 6)] for _ in range(2))
    norm = torch.nn.BatchNorm2d(4, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(random.normal(1.0, 0.5, 4)))
        norm.bias.copy_(torch.from_numpy(random.normal(0.0, 0.5, 4)))
    holder = torch.nn.Sequential(norm).train()
    if ranks.count > 1 and together:
        synchronised(holder, "cpu")
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = holder(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (y * upstream).sum().backward()
    found = {"y": y, "x": x.grad, **{f"gradient {name}": p.grad for name, p in holder.named_parameters()}, **holder.state_dict()}
    return {name: value.detach().numpy() for name, value in found.items()}


def simclr(ranks: Ranks, dtype: torch.dtype | None = None) -> Arrays:
    """Loss, share of hits and gradients of SimCLR on 16 images; a dtype: in that one, without Fabric."""
    module, _ = pairs.network(CONTRAST)
    views = tuple(view[rows(ranks, 16)] for view in pairs.rendered(CONTRAST, pairs.some(16).images, 0))
    if dtype is None:
        network = ranks.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    else:
        network, views = module.to(dtype), tuple(view.to(dtype) for view in views)
    loss, right = CONTRAST.loss(network, torch.nn.Module(), views, torch.zeros(16), ranks.gather)
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    return {"loss": loss.detach().numpy(), "right": np.asarray(float(right)), **gradients}


def smooth_start() -> torch.nn.Module:
    """ResNet-20 with softplus for relu: where rounding decides a sign, the gradient of relu jumps by far more than rounding."""

    class Smooth(type(start())):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with mock.patch.object(F, "relu", lambda x, inplace: F.softplus(x)):
                return super().forward(x)  # type: ignore[no-any-return]

    module = start()
    module.__class__ = Smooth
    return module


def search(ranks: Ranks, objective: Any = None, together: bool = True, accumulate: int = 1) -> Arrays:
    """Three steps on the digits from one start: weights, what the objective keeps, loss, accuracy, and the masks agreed on."""
    objective, module = objective or Supervised(), smooth_start()
    if (head := objective.head(models.features("resnet20", module), 10)) is not None:
        models.set_head("resnet20", module, head)
    ones = masks.full(everything(module))
    with mock.patch.object(module_of_ranks, "synchronised", synchronised if together else lambda module, device: None):
        training = Training(module, ones, settings(steps=3, accumulate=accumulate), 0, objective=objective, ranks=ranks)
    data = DIGITS.load(None).train
    training.run(Batches(data, objective.views(DIGITS), ROWS, ranks.rank, ranks.count), lambda now: None)
    weights = models.arrays(module)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4)
    agreed = ranks.agree(lambda: masks.global_magnitude(weights, ones, 0.2))
    measured = {"loss": np.asarray(training.loss), "accuracy": np.asarray(training.accuracy), "rng": torch.get_rng_state().numpy()}
    kept = {f"own/{name}": array for name, array in models.arrays(training.own).items()}
    return {**weights, **measured, **kept, **{f"mask/{name}": mask for name, mask in agreed.items()}}


def errors(ranks: Ranks) -> Arrays:
    """What each rank is told where one of them fails or has other masks."""
    mine = {"a": np.ones((3, 3), np.bool_)}
    broadcast = ranks.fabric.broadcast

    def flipped(value: Any) -> Any:
        received, failure = broadcast(value)
        return ({"a": received["a"] ^ (ranks.rank == 1)} if received else received), failure

    def fail_on(rank: int) -> str:
        if ranks.rank == rank:
            raise DataError(f"from {rank}")
        return "fine"

    with mock.patch.object(ranks.fabric, "broadcast", flipped):
        heard = [_said(lambda: ranks.agree(lambda: mine))]
    heard += [_said(lambda: ranks.from_first(lambda: fail_on(0))), _said(lambda: ranks.each(lambda: fail_on(1)))]
    heard += [_said(lambda: ranks.each(lambda: fail_on(2))), _said(lambda: ranks.same(f"{ranks.rank}", "the words"))]
    return {"heard": np.array(heard), **ranks.agree(lambda: mine)}


def _said(call: Any) -> str:
    try:
        return str(call())
    except (TicketError, DataError) as error:
        return f"{type(error).__name__}: {error}"


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(Machine(devices=2, strategy="ddp", accelerator="cpu"))
    with ranks.launched():
        cases = {
            "batch_norm": lambda: batch_norm(ranks),
            "batch_norm alone": lambda: batch_norm(ranks, together=False),
            "simclr": lambda: simclr(ranks),
            "search": lambda: search(ranks),
            "search alone": lambda: search(ranks, together=False),
            "search moco": lambda: search(ranks, QUEUED),
            "search simclr": lambda: search(ranks, CONTRAST),
            "errors": lambda: errors(ranks),
        }
        for name, case in cases.items():
            np.savez(out / f"{name}-{ranks.rank}.npz", **case())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
