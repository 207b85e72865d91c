"""`estimate`: what a network would gain from sparsity, before anybody trains it.

A distribution says which weights of each prunable layer would be zero; the planner then predicts the network with these zeros as it does
any other. Nothing is trained, exported or run, and values do not matter: a pruned layer stands here as its mask. For a device, a core of
`ticketkit.cores`, the times of what the planner chose are simulated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ticketkit import cores, cost, masks
from ticketkit.cores import Core, predict
from ticketkit.errors import ModelError, TicketError
from ticketkit.exporters._source import Source, load
from ticketkit.lower import Layer, Network, lower
from ticketkit.lower.operators import PACKED
from ticketkit.masks import Block, Mask
from ticketkit.planner import Plan, plan

if TYPE_CHECKING:
    from rich.console import Group

Shapes: TypeAlias = Sequence[tuple[int, ...]]
Densities: TypeAlias = NDArray[np.float64]
IMAGE = (3, 224, 224)  # what a torchvision network is given where nothing is said
SLACK = 1e-3  # a model "90 % sparse" has a few zeros more or less, each layer having been rounded
COUNTED = (
    "An estimate: times of convolutions and matrix products on one core, by a cost model fitted on {machine}."
    " Other operators, and changes of layout between dense and sparse layers, are not counted;"
    " ratios carry over to other processors better than times do."
)
SIMULATED = (
    "Simulated, nothing was run: times of convolutions and matrix products on one core, {core}, by a model of its pipes and caches"
    " (ticketkit/cores; {processor}). Dense is an engine that keeps its loops {share:.0%} busy; formats are those that"
    " `ticketkit export` chooses. Other operators, changes of layout, other cores and heat are not counted; ratios carry over better"
    " than times do."
)
RANDOM = "The weights are random initialisation: global magnitude spreads the zeros of trained weights over the layers in another way."
FOLDED = "Magnitudes are those of the weights with BatchNorm folded in."


@dataclass(frozen=True)
class Level:
    """The prediction for one sparsity.

    Attributes:
        sparsity: what was asked for, a fraction of the prunable weights; what came out is `plan.totals()["prunable_sparsity"]` for
            networks with prunable convolutions.
        plan: how each layer would run, with its own sparsity and predicted time.
    """

    sparsity: float
    plan: Plan

    @property
    def ms(self) -> tuple[float, float]:
        """Predicted (all dense, as planned), on one core."""
        dense, chosen = self.plan.predicted_us
        return dense / 1e3, chosen / 1e3

    @property
    def speedup(self) -> float:
        """Predicted dense time over the planned one; 1 where no size is known."""
        dense, chosen = self.ms
        return dense / chosen if chosen else 1.0

    def count(self, format: str) -> int:
        """Number of layers that would run in a format: "dense", or one of `ticketkit.lower.operators.PACKED`."""
        return sum(c.format == format for c in self.plan.choices)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only: the totals of `inspect`, the speedup, and every layer."""
        formats = {f"{format}_layers": self.count(format) for format in PACKED}
        return {"sparsity": self.sparsity, "speedup": self.speedup, **self.plan.totals(), **formats, **self.plan.to_dict()}


@dataclass(frozen=True)
class Estimate:
    """What `estimate` says.

    Attributes:
        model: what was estimated, for people.
        prunable: names of the layers that would be pruned, by the rule in words.
        share: their part of the weights of all layers.
        distribution, granularity: as given.
        machine: where the cost model was fitted.
        levels: one per sparsity, in the order asked for.
        notes: how to read it.
        device: the core that the times were simulated for; None: predicted by the cost model.
    """

    model: str
    prunable: tuple[str, ...]
    rule: str
    share: float
    distribution: str
    granularity: str
    machine: str
    levels: tuple[Level, ...]
    notes: tuple[str, ...]
    device: Core | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; for a device also its name and clock, and that the times are simulated."""
        fields = {name: value for name, value in vars(self).items() if name not in ("levels", "device")}
        how = {"simulated": True, "device": self.device.name, "ghz": self.device.ghz} if self.device else {}
        return {**how, **fields, "levels": [level.to_dict() for level in self.levels]}


def estimate(
    source: Source,
    sparsity: float | Sequence[float],
    *,
    distribution: str = "global",
    granularity: str = "1x1",
    round: int | None = None,
    input_shape: Sequence[int] | None = None,
    batch: int | None = None,
    device: str | None = None,
) -> Estimate:
    """Predict the latency of a network at some sparsities, without training or pruning it.

    Prunable is every convolution but the first, depthwise ones too; in a network with no other convolution (a transformer), every
    convolution and product with a constant weight but the first and the last.

    Args:
        source: what `ticketkit.export` takes, or the name of a network of `torchvision.models`, randomly initialised.
        sparsity: one or more fractions of the prunable weights, 0 <= s < 1. They come out exactly, in blocks to half a block a layer.
        distribution: over the layers, one of `DISTRIBUTIONS`: "global", by one threshold for the magnitudes of all, BatchNorm folded
            in; "uniform", the same in every layer; "erk", Erdős–Rényi-Kernel.
        granularity: "RxC" prunes whole blocks of R output channels by C weights.
        round: of a run directory; None: the last finished one.
        input_shape: of one image [C, H, W], or with batch; None: as the source states, 3 x 224 x 224 for torchvision's networks.
        batch: images of one run; None: as the source states, else 1.
        device: a core of `ticketkit.cores`, with a clock if not its own: "cortex-a55@2.0". Times are simulated for it; None: predicted by
            the cost model, which was fitted on a processor of servers.

    Raises:
        TicketError: a sparsity, distribution or granularity that is none, or a sparsity below that of a pruned source with "global".
        TicketkitError: no such core.
        ModelError, FormatError, ExportError: the source is missing, damaged or unsupported, or has no prunable layer.
    """
    how = {"distribution": distribution, "granularity": granularity, "round": round, "input_shape": input_shape, "batch": batch}
    (found,) = estimates(source, sparsity, [device], **how)  # type: ignore[arg-type]
    return found


def estimates(
    source: Source,
    sparsity: float | Sequence[float],
    devices: Sequence[str | None],
    *,
    distribution: str = "global",
    granularity: str = "1x1",
    round: int | None = None,
    input_shape: Sequence[int] | None = None,
    batch: int | None = None,
) -> list[Estimate]:
    """`estimate` for several devices, of the same zeros and plans."""
    levels, block = _fractions(sparsity), masks.parse_block(granularity)
    chosen = [cores.get(device) if device is not None else None for device in devices]
    if distribution not in DISTRIBUTIONS:
        raise TicketError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    named = _is_name(source)
    model = _torchvision(str(source), input_shape or IMAGE) if named else load(source, round, input_shape).model
    network = lower(_batched(model, batch), input_shape)
    layers, rule = prunable(network)
    weights = {layer.name: layer.weight for layer in layers}
    share = sum(w.size for w in weights.values()) / sum(layer.weight.size for layer in network.layers)
    pruned = [_pruned(network, DISTRIBUTIONS[distribution](weights, s, block)) for s in levels]
    plans = [plan(of) for of in pruned]
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "model"
    made = []
    for core in chosen:
        timed = [_simulated(of, one, core) for of, one in zip(pruned, plans, strict=True)] if core else plans
        found = tuple(Level(s, one) for s, one in zip(levels, timed, strict=True))
        machine = core.label if core else str(cost.table()["machine"])
        counted = COUNTED.format(machine=machine)
        if core:
            counted = SIMULATED.format(core=core.label, processor=core.processor, share=core.dense_sustained)
        notes = (counted, *([RANDOM if named else FOLDED] if distribution == "global" else []))
        made.append(Estimate(name, tuple(weights), rule, share, distribution, granularity, machine, found, notes, core))
    return made


def _simulated(network: Network, chosen: Plan, core: Core) -> Plan:
    """The plan with the times of its layers on a core."""
    choices = []
    for layer, choice in zip(network.layers, chosen.choices, strict=True):
        dense = predict.predict_us(core, layer, cost.DENSE)
        us = dense if choice.format == cost.DENSE else predict.predict_us(core, layer, choice.format)
        if choice.format == cost.DENSE and choice.reason.startswith("predicted"):  # for another processor
            choice = replace(choice, reason="dense, as `export` chooses")  # noqa: PLW2901
        elif us is not None and choice.format != cost.DENSE:
            choice = replace(choice, reason=f"simulated {us:.0f} µs, dense {dense:.0f}")  # noqa: PLW2901
        choices.append(replace(choice, dense_us=dense, chosen_us=us))
    return replace(chosen, choices=tuple(choices))


def prunable(network: Network) -> tuple[Sequence[Layer], str]:
    """(the layers that `estimate` prunes, the rule in words).

    Raises:
        ModelError: there is none.
    """
    convolutions = [layer for layer in network.layers if layer.op == "Conv"][1:]
    if convolutions:
        return convolutions, "every convolution but the first"
    if len(network.layers) < 3:
        raise ModelError(f"nothing to prune: all but the first and the last layer would be, and the model has {len(network.layers)}")
    return network.layers[1:-1], "every layer but the first and the last, for it has no convolution beyond the first"


# Distributions: weights by layer, sparsity, block -> masks by layer --------------------------------------------------------------


def global_magnitude(weights: masks.Weights, sparsity: float, block: Block) -> dict[str, Mask]:
    """Zero are the weights of least magnitude over all layers together, see `ticketkit.masks.global_magnitude`.

    Raises:
        TicketError: more weights than that are zero already, by more than `SLACK`, so that magnitudes do not rank them.
    """
    zeros = sum(int(np.count_nonzero(w == 0)) for w in weights.values()) / sum(w.size for w in weights.values())
    if 0 < sparsity < zeros - SLACK:
        raise TicketError(
            f"sparsity {sparsity:g}: {zeros:.2%} of the prunable weights are zero already, and global magnitude cannot rank those;"
            " ask for more, choose another distribution, or give the dense model"
        )
    return masks.global_magnitude(weights, masks.full(weights), sparsity, block)


def uniform(shapes: Shapes, sparsity: float) -> Densities:
    """Density of each layer: the same."""
    return np.full(len(shapes), 1 - sparsity)


def erk(shapes: Shapes, sparsity: float) -> Densities:
    """Density of each layer: Erdős–Rényi-Kernel (Evci et al. 2020, Rigging the Lottery, section 3).

    Proportional to the sum of its weight's dimensions over their product; layers that would exceed 1 stay dense, and the others share
    what is left.
    """
    sizes, sums = np.array([np.prod(shape) for shape in shapes], float), np.array([sum(shape) for shape in shapes], float)
    dense = np.zeros(len(sizes), bool)
    while True:
        left = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        density = np.where(dense, 1.0, left / max(sums[~dense].sum(), 1) * sums / sizes)
        if (density <= 1).all():
            return density
        dense |= density > 1


def _scattered(densities: Callable[[Shapes, float], Densities]) -> Callable[[masks.Weights, float, Block], dict[str, Mask]]:
    """The distribution with these densities; zeros lie anywhere in a layer, and those of less sparsity are among those of more."""

    def distribution(weights: masks.Weights, sparsity: float, block: Block) -> dict[str, Mask]:
        """Masks by layer, bool of each weight's shape, that keep as many of it as its density says, whole blocks of them."""
        generator = np.random.Generator(np.random.Philox(0))
        found: dict[str, Mask] = {}
        for kept, (name, weight) in zip(_kept(weights, densities, sparsity), weights.items(), strict=True):
            noise = {name: generator.random(weight.shape, np.float32)}
            if kept:
                found |= masks.global_magnitude(noise, masks.full(noise), 1 - kept / weight.size, block)
            else:
                found[name] = np.zeros(weight.shape, np.bool_)
        return found

    return distribution


def _kept(weights: masks.Weights, densities: Callable[[Shapes, float], Densities], sparsity: float) -> list[int]:
    """Whole numbers of weights for layers of these densities, exact in total: the largest remainders are rounded up."""
    sizes = np.array([w.size for w in weights.values()])
    exact = sizes * densities([w.shape for w in weights.values()], sparsity)
    kept = np.floor(exact).astype(int)
    short = sizes.sum() - round(sparsity * sizes.sum()) - kept.sum()
    kept[np.argsort(kept - exact, kind="stable")[:short]] += 1
    return [int(k) for k in kept]


DISTRIBUTIONS: Mapping[str, Callable[[masks.Weights, float, Block], dict[str, Mask]]] = {
    "global": global_magnitude,
    "uniform": _scattered(uniform),
    "erk": _scattered(erk),
}


def _pruned(network: Network, found: Mapping[str, Mask]) -> Network:
    """The network as the planner sees it once pruned: masks in place of these layers' weights."""
    layers = (replace(x, weight=found[x.name].astype(x.weight.dtype)) if x.name in found else x for x in network.layers)
    return replace(network, layers=tuple(layers))


# What is asked for ------------------------------------------------------------------------------------------------------------


def _fractions(sparsity: float | Sequence[float]) -> list[float]:
    levels = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity]
    wrong = [s for s in levels if not 0 <= s < 1]
    if wrong or not levels:
        got = f"got {wrong[0]:g}" if wrong else "got none"
        hint = f"; {wrong[0]:g} % is {wrong[0] / 100:g}" if wrong and 1 < wrong[0] < 100 else ""
        raise TicketError(f"sparsity: expected fractions, 0 <= s < 1, such as 0.9, {got}{hint}")
    return levels


def _batched(model: ModelProto, batch: int | None) -> ModelProto:
    """The model with this batch in every input, changed in place; None leaves it as it is."""
    for info in model.graph.input if batch is not None else []:
        for first in info.type.tensor_type.shape.dim[:1]:
            if first.HasField("dim_value") and first.dim_value != batch:
                raise ModelError(f"input {info.name!r}: expected batch {batch}, the model has {first.dim_value}; leave --batch out")
            first.dim_value = batch
    return model


def _is_name(source: Source) -> bool:
    return isinstance(source, str) and source.isidentifier() and not Path(source).exists()


def _torchvision(name: str, shape: Sequence[int]) -> ModelProto:
    """A network of torchvision for such images, randomly initialised, always alike."""
    if find_spec("torch") is None or find_spec("torchvision") is None:
        raise ModelError(f"{name}: no such file; if a network of torchvision is meant, pip install 'ticketkit[find]'")
    import torch
    from torchvision import models as zoo

    from ticketkit.capture import capture

    if name not in zoo.list_models(module=zoo):
        raise ModelError(f"{name}: no such file, and torchvision.models has no such network; names are such as resnet50, mobilenet_v2")
    if min(shape) < 1:
        raise ModelError(f"input shape: expected positive whole numbers such as 3,224,224, got {list(shape)}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two families announce that their initialisation will change
        torch.manual_seed(0)
        return capture(zoo.get_model(name, weights=None), tuple(shape)[-3:])


def render(found: Estimate, layers: bool = False) -> Group:
    """The estimate as a table, and with `layers` one of every layer at every sparsity, for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ticketkit import planner

    table = Table(box=None, header_style="bold", pad_edge=False)
    of = f"{cores.LABEL} " if found.device else ""
    for title in ("sparsity", f"{of}dense ms", f"{of}sparse ms", "speedup", "FLOPs left", *PACKED, "of layers", "dense MB", "stored MB"):
        table.add_column(title, justify="right", no_wrap=True)
    for level in found.levels:
        t, (dense, sparse) = level.plan.totals(), level.ms
        times = [f"{dense:.4g}", f"{sparse:.4g}", f"{level.speedup:.2f}x", f"{t['flops_left'] / max(t['flops_dense'], 1):.1%}"]
        counts = [str(n) for n in (*map(level.count, PACKED), len(level.plan.choices))]
        table.add_row(f"{level.sparsity:.2%}", *times, *counts, *(f"{t[f'weight_bytes_{k}'] / 1e6:.4g}" for k in ("dense", "stored")))
    shape = ", ".join(f"{name} {list(shape)}" for name, shape in found.levels[0].plan.inputs.items())
    head = (
        f"{found.model} at {shape}: {found.distribution} sparsity, {found.granularity}, of {len(found.prunable)} layers"
        f" ({found.rule}) with {found.share:.1%} of the weights"
    )
    how = f"{cores.LABEL} on {found.device.label}" if found.device else "predicted on one core"
    tables = [part for level in found.levels for part in (f"\nat {level.sparsity:.2%}", planner.render(level.plan, how))] if layers else []
    return Group(Text(head), "", table, "", *map(Text, found.notes), *tables)
