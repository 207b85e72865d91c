"""The Plan: for every layer the weight format and kernel that should be fastest, with the predicted times and the reason.

The cost model is deliberately small: a layer takes a fixed call, its multiply-adds at the rate of the format, and a pass over its
input and output. The constants stand in `COST` and nowhere else; they are per core and machine-typical, since only their ratio decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ticketkit import formats
from ticketkit.errors import FormatError
from ticketkit.lower import Layer, Network

if TYPE_CHECKING:
    from rich.console import Group

DENSE = "dense"
STORED = {DENSE: DENSE, "csr": "gaps"}  # format of a kernel -> format of its weights in a file


@dataclass(frozen=True)
class Cost:
    """Of one format: GFLOP/s (2 per multiply-add, of stored weights only), ns per input and output element, µs per call."""

    gflops: float
    element_ns: float
    call_us: float


COST = {DENSE: Cost(110.0, 0.05, 1.0), "csr": Cost(56.0, 0.1, 4.0)}
BREAK_EVEN = 0.45  # below this sparsity no unstructured kernel beats a good dense one


@dataclass(frozen=True)
class Choice:
    """How one layer will run.

    Attributes:
        name, op: of the layer.
        shape: of its weight, [M, C/group, kh, kw] or [M, K].
        sparsity: fraction of zeros; nnz: number of the others.
        flops_dense, flops_left: of one run of the model, 2 per multiply-add, with and without the zeros; None if its size is unknown.
        format, kernel: what is chosen.
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
    """

    inputs: Mapping[str, tuple[int, ...]]
    choices: tuple[Choice, ...]
    parameters: int

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
            choices = tuple(Choice(**{**c, "shape": tuple(c["shape"])}) for c in data["choices"])
            return cls({name: tuple(shape) for name, shape in data["inputs"].items()}, choices, data["parameters"])
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"not a plan: {error}; expected the output of Plan.to_dict") from None

    def totals(self) -> dict[str, Any]:
        """The sums of `inspect`: sparsities, FLOPs, number of sparse layers, bytes of the layers' weights dense and as chosen."""
        dense, left = self.flops
        stored = sum(formats.get(STORED[c.format]).nbytes(c.shape, c.nnz) for c in self.choices)
        return {
            "prunable_sparsity": self.prunable_sparsity,
            "model_sparsity": self.model_sparsity,
            "flops_dense": dense,
            "flops_left": left,
            "sparse_layers": len(self.sparse),
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


def plan(network: Network, keep: Mapping[str, str] | None = None) -> Plan:
    """Choose format and kernel of every layer.

    Args:
        network: from `ticketkit.lower.lower`.
        keep: layer name -> format that was chosen earlier and stays, for files that are already sparse; layers it does not
            name stay dense.
    """
    parameters = sum(prod(t.dims) for t in network.graph.constants.values())
    return Plan(dict(network.inputs), tuple(_choose(layer, keep) for layer in network.layers), parameters)


def predict_us(format_name: str, layer: Layer) -> float | None:
    """Predicted time of a layer in µs on one core, None if its size is unknown."""
    if layer.uses is None or layer.x_shape is None or layer.y_shape is None:
        return None
    cost = COST[format_name]
    stored = layer.weight.size if format_name == DENSE else layer.nnz
    elements = prod(layer.x_shape) + prod(layer.y_shape)
    return cost.call_us + 2e-3 * stored * layer.uses / cost.gflops + 1e-3 * elements * cost.element_ns


def _choose(layer: Layer, keep: Mapping[str, str] | None) -> Choice:
    predicted = {name: predict_us(name, layer) for name in formats.names("compute") if name in COST}
    known = {name: time for name, time in predicted.items() if time is not None}
    if keep is not None:
        chosen, reason = keep.get(layer.name, DENSE), "as stored in the file"
    elif obstacle := _obstacle(layer):
        chosen, reason = DENSE, obstacle
    elif not known:
        chosen, reason = DENSE, "its output size is unknown; give the input shape"
    else:
        chosen = min(known, key=lambda name: known[name])
        other = min((name for name in known if name != chosen), key=lambda name: known[name])
        reason = f"predicted {known[chosen]:.0f} µs, {other} {known[other]:.0f}"
    return Choice(
        layer.name, layer.op, tuple(layer.weight.shape), layer.sparsity, layer.nnz, _flops(layer, layer.weight.size),
        _flops(layer, layer.nnz), chosen, _kernel(layer, chosen), known.get(DENSE), known.get(chosen), reason,
    )  # fmt: skip


def _obstacle(layer: Layer) -> str:
    if layer.nnz == layer.weight.size:
        return "no zeros"
    if layer.obstacle:
        return f"{layer.obstacle}: dense only"
    if layer.sparsity < BREAK_EVEN:
        return f"below {BREAK_EVEN:.0%} sparsity nothing beats dense"
    return ""


def _kernel(layer: Layer, format_name: str) -> str:
    if format_name == DENSE:
        return "onnxruntime"
    return f"{'conv2d' if layer.op == 'Conv' else 'gemm'}_{format_name}_f32"


def _flops(layer: Layer, weights: int) -> int | None:
    return None if layer.uses is None else 2 * weights * layer.uses


def render(plan: Plan) -> Group:
    """The plan as a table with its totals, for a terminal."""
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
        f" weights {t['weight_bytes_stored']:,} of {t['weight_bytes_dense']:,} bytes"
    )
    return Group(table, "", text)
