"""The Plan: for every layer the weight format and kernel that should be fastest, with the predicted times and the reason.

The cost model (`ticketkit.cost`) predicts layers; handing a tensor between dense and sparse layers costs time too, so the choices are
made together. A whole model that would hardly gain stays dense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ticketkit import cost, formats
from ticketkit.cost import DENSE
from ticketkit.errors import FormatError
from ticketkit.lower import Layer, Network
from ticketkit.lower.operators import PACKED, Execution

if TYPE_CHECKING:
    from rich.console import Group

VALUES = {"fp32": 4, "fp16": 2}  # how the values of weights can be stored -> bytes of one
STORED = {DENSE: DENSE, **dict.fromkeys(PACKED, "gaps")}  # format of a kernel -> format of its weights in a file
WORTH = 0.9  # of the predicted dense time: a model that would not get below it stays dense, for predictions err


@dataclass(frozen=True)
class Choice:
    """How one layer will run.

    Attributes:
        name, op: of the layer.
        shape: of its weight, [M, C/group, kh, kw] or [M, K].
        sparsity: fraction of zeros; nnz: number of the others.
        flops_dense, flops_left: of one run of the model, 2 per multiply-add, with and without the zeros; None if its size is unknown.
        format, kernel: what is chosen.
        tuning: how a sparse convolution is cut up, see `ticketkit.lower.operators.Execution`.
        dense_us, chosen_us: predicted time, µs on one core, None without a prediction.
        reason: why, in words.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    sparsity: float
    nnz: int
    flops_dense: int | None
    flops_left: int | None
    format: str
    kernel: str
    tuning: tuple[int, ...]
    dense_us: float | None
    chosen_us: float | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """The choices for a whole network.

    Attributes:
        inputs: input name -> the concrete shape the FLOPs and times are for.
        choices: one per layer, in execution order.
        parameters: number of constants of the whole network, biases and unplanned ones too.
        values: how a file stores the values of weights, of `VALUES`; they are computed in float32 either way.
    """

    inputs: Mapping[str, tuple[int, ...]]
    choices: tuple[Choice, ...]
    parameters: int
    values: str = "fp32"

    @property
    def sparse(self) -> tuple[Choice, ...]:
        """The layers that do not stay dense."""
        return tuple(c for c in self.choices if c.format != DENSE)

    @property
    def prunable_sparsity(self) -> float:
        """Over the prunable weights: every convolution but the first (Chen et al. 2021, section 3); 0 if there is none."""
        prunable = [c for c in self.choices if c.op == "Conv"][1:]
        total = sum(prod(c.shape) for c in prunable)
        return 1 - sum(c.nnz for c in prunable) / total if total else 0.0

    @property
    def model_sparsity(self) -> float:
        """Zero weights of layers over all parameters of the network."""
        return sum(prod(c.shape) - c.nnz for c in self.choices) / self.parameters if self.parameters else 0.0

    @property
    def predicted_us(self) -> tuple[float, float]:
        """(all dense, as chosen) over the layers whose size is known, on one core."""
        return sum(c.dense_us or 0 for c in self.choices), sum(c.chosen_us or 0 for c in self.choices)

    @property
    def flops(self) -> tuple[int, int]:
        """(dense, left) over the layers whose size is known."""
        return sum(c.flops_dense or 0 for c in self.choices), sum(c.flops_left or 0 for c in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan `to_dict` wrote; FormatError for anything else."""
        try:
            choices = tuple(Choice(**{**c, "shape": tuple(c["shape"]), "tuning": tuple(c["tuning"])}) for c in data["choices"])
            values = data.get("values", "fp32")  # absent from plans of before there was a choice
            if values not in VALUES:
                raise KeyError(values)
            return cls({name: tuple(shape) for name, shape in data["inputs"].items()}, choices, data["parameters"], values)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"not a plan: {error}; expected the output of Plan.to_dict") from None

    def totals(self) -> dict[str, Any]:
        """The sums of `inspect`: sparsities, FLOPs, number of sparse layers, bytes of the layers' weights dense and as chosen."""
        dense, left = self.flops
        stored = sum(formats.get(STORED[c.format]).nbytes(c.shape, c.nnz, VALUES[self.values]) for c in self.choices)
        return {
            "prunable_sparsity": self.prunable_sparsity,
            "model_sparsity": self.model_sparsity,
            "flops_dense": dense,
            "flops_left": left,
            "sparse_layers": len(self.sparse),
            "predicted_us_dense": self.predicted_us[0],
            "predicted_us": self.predicted_us[1],
            "weight_bytes_dense": sum(4 * prod(c.shape) for c in self.choices),
            "weight_bytes_stored": stored,
        }

    @property
    def sha256(self) -> str:
        """Hash of everything in the plan."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        dense, left = self.flops
        head = f"{len(self.sparse)} of {len(self.choices)} layers sparse, {left / max(dense, 1):.1%} of {dense / 1e9:.3g} GFLOP left"
        return "\n".join([head, *(f"{c.name}: {c.sparsity:.1%} zero, {c.kernel}, {c.reason}" for c in self.choices)])


def plan(network: Network, keep: Mapping[str, Execution] | None = None) -> Plan:
    """Choose format and kernel of every layer.

    Args:
        network: from `ticketkit.lower.lower`.
        keep: layer name -> what was chosen earlier and stays, for files that are already sparse; layers it does not
            name stay dense.
    """
    parameters = sum(prod(t.dims) for t in network.graph.constants.values())
    predicted = [_predictions(layer) for layer in network.layers]
    if keep is not None:
        executions = [keep.get(layer.name) for layer in network.layers]
        chosen = [e.format if e else DENSE for e in executions]
        reasons = ["as stored in the file"] * len(chosen)
    else:
        executions = [None] * len(predicted)
        chosen, reasons = _assign(network, predicted)
    choices = (
        Choice(
            layer.name, layer.op, tuple(layer.weight.shape), layer.sparsity, layer.nnz, _flops(layer, layer.weight.size),
            _flops(layer, layer.nnz), format, _kernel(layer, format), (execution or Execution()).tuning,
            times.get(DENSE), times.get(format), reason,
        )
        for layer, times, format, execution, reason in zip(network.layers, predicted, chosen, executions, reasons, strict=True)
    )  # fmt: skip
    return Plan(dict(network.inputs), tuple(choices), parameters)


def _predictions(layer: Layer) -> dict[str, float]:
    """Format -> predicted µs, of the formats open to a layer; empty if its size is unknown."""
    open_to_it = not layer.obstacle and (layer.depthwise or _smaller(layer))
    candidates = cost.formats_for(layer) if open_to_it else [DENSE]
    times = {format: cost.predict_us(layer, format) for format in candidates}
    return {format: time for format, time in times.items() if time is not None}


def _assign(network: Network, predicted: list[dict[str, float]]) -> tuple[list[str], list[str]]:
    """Format and reason for each layer: the best of each alone, or nothing dense, then changes one by one while the whole gets faster.

    A depthwise layer without zeros may be taken out of onnxruntime too, where its neighbours are: it gains nothing by itself.
    """
    edges = _edges(network)

    def total(formats: list[str]) -> float:
        layers = sum(times.get(format, 0.0) for times, format in zip(predicted, formats, strict=True))
        return layers + sum(edge.us(formats) for edge in edges)

    def improved(chosen: list[str]) -> list[str]:
        """The choices after as many changes of one layer as make the whole faster."""
        best, changed = total(chosen), True
        while changed:
            changed = False
            for at, times in enumerate(predicted):
                for format in times:
                    changed_one = [*chosen[:at], format, *chosen[at + 1 :]]
                    if (time := total(changed_one)) < best:
                        chosen, best, changed = changed_one, time, True
        return chosen

    alone = [_fastest(times) for times in predicted]
    not_dense = [_fastest({format: us for format, us in times.items() if format != DENSE} or times) for times in predicted]
    chosen = min((improved(start) for start in (alone, not_dense)), key=total)
    dense = [DENSE] * len(chosen)
    pays = any(format != DENSE and not layer.depthwise for format, layer in zip(chosen, network.layers, strict=True))
    if not pays or total(chosen) > WORTH * total(dense):
        why = "the whole model would hardly gain"
        return dense, [_dense_reason(layer, times, why) for layer, times in zip(network.layers, predicted, strict=True)]
    return chosen, [
        _dense_reason(layer, times, "dense neighbours") if format == DENSE else _sparse_reason(times, format)
        for layer, times, format in zip(network.layers, predicted, chosen, strict=True)
    ]


def _fastest(times: Mapping[str, float]) -> str:
    return min(times, key=lambda format: times[format]) if times else DENSE


@dataclass(frozen=True)
class _Edge:
    """A layer that feeds another, through whatever lies between: what it costs if they want their tensor in different orders, µs.

    Attributes:
        producer, consumer: positions of the layers.
        dense: where one of them is dense and the other not.
        formats: where both are sparse, in different formats, hence in tiles of different width (`ticketkit.lower.layouts`).
    """

    producer: int
    consumer: int
    dense: float
    formats: float

    def us(self, formats: list[str]) -> float:
        a, b = formats[self.producer], formats[self.consumer]
        return 0.0 if a == b else self.dense if DENSE in (a, b) else self.formats


def _edges(network: Network) -> list[_Edge]:
    """Every pair of convolutions of which one feeds the other."""
    nodes = network.model.graph.node
    makers = {name: at for at, node in enumerate(nodes) for name in node.output}
    layer_at = {layer.at: index for index, layer in enumerate(network.layers)}
    edges = []
    for index, layer in enumerate(network.layers):
        if layer.op != "Conv" or layer.x_shape is None:
            continue
        seen, waiting = set(), [layer.x]
        while waiting:
            at = makers.get(waiting.pop())
            if at is None or at in seen:
                continue
            seen.add(at)
            if at not in layer_at:
                waiting.extend(nodes[at].input)
            elif network.layers[layer_at[at]].op == "Conv":
                retile = cost.gather_us(layer.x_shape) if layer.pointwise and not network.layers[layer_at[at]].depthwise else 0.0
                edges.append(_Edge(layer_at[at], index, cost.reorder_us(layer.x_shape), retile))
    return edges


def _smaller(layer: Layer) -> bool:
    """Whether the sparse form takes fewer bytes in a file than the dense one: more than a third of zeros."""
    shape = layer.weight.shape
    return formats.get(STORED["csr"]).nbytes(shape, layer.nnz) < formats.get(DENSE).nbytes(shape, layer.nnz)


def _dense_reason(layer: Layer, times: Mapping[str, float], otherwise: str) -> str:
    if layer.nnz == layer.weight.size and not layer.depthwise:
        return "no zeros"
    if layer.obstacle:
        return f"{layer.obstacle}: dense only"
    if not _smaller(layer) and not layer.depthwise:
        return "too few zeros: sparse would take more bytes"
    if not times:
        return "its output size is unknown; give the input shape"
    return _comparison(times, DENSE) if times[DENSE] == min(times.values()) else f"{_comparison(times, DENSE)}, but {otherwise}"


def _sparse_reason(times: Mapping[str, float], format: str) -> str:
    return _comparison(times, format) + (", but sparse neighbours" if times[format] > times[DENSE] else "")


def _comparison(times: Mapping[str, float], format: str) -> str:
    others = ", ".join(f"{name} {time:.0f}" for name, time in times.items() if name != format)
    return f"predicted {times[format]:.0f} µs, {others}"


def _kernel(layer: Layer, format_name: str) -> str:
    if format_name == DENSE:
        return "onnxruntime"
    operation = "depthwise" if layer.depthwise else "conv2d" if layer.op == "Conv" else "gemm"
    return f"{operation}_{format_name}_f32"


def _flops(layer: Layer, weights: int) -> int | None:
    return None if layer.uses is None else 2 * weights * layer.uses


def render(plan: Plan, how: str = "predicted on one core") -> Group:
    """The plan as a table with its totals, for a terminal; `how` its times came about."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("layer", "weight", "zeros", "FLOPs left", "format", "kernel", "reason"):
        table.add_column(title, justify="right" if title in ("zeros", "FLOPs left") else "left", no_wrap=title != "reason")
    for c in plan.choices:
        left = "?" if c.flops_left is None else f"{c.flops_left / 1e6:,.2f} M"
        style = "green" if c.format != DENSE else None
        table.add_row(c.name, "x".join(map(str, c.shape)), f"{c.sparsity:.1%}", left, c.format, c.kernel, c.reason, style=style)
    t, shape = plan.totals(), ", ".join(f"{name} {list(shape)}" for name, shape in plan.inputs.items())
    text = (
        f"{t['sparse_layers']} of {len(plan.choices)} layers sparse at {shape}; prunable sparsity {t['prunable_sparsity']:.2%},"
        f" whole model {t['model_sparsity']:.2%}; {t['flops_left'] / 1e6:,.1f} of {t['flops_dense'] / 1e6:,.1f} MFLOP left;"
        f" weights {t['weight_bytes_stored']:,} of {t['weight_bytes_dense']:,} bytes{' (fp16)' if plan.values == 'fp16' else ''};"
        f" {how} {t['predicted_us'] / 1e3:.1f} of {t['predicted_us_dense'] / 1e3:.1f} ms"
    )
    return Group(table, "", text)
