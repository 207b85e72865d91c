"""Export targets, one file each; listing this folder is the registry. A target named `onnx_dense` here is `onnx-dense` to users.

A target module says in the first line of its docstring what the file is, and holds ``SUFFIX`` and two functions:

    encode(network, plan) -> bytes         the file; ExportError where the target cannot hold the network. A target that can store values
                                           as the plan's `values` says lists those it takes in ``VALUES``; fp32 where it has none
    decode(data, network) -> ModelProto    the network the file stands for, its weights compared bit for bit with those of `network`

and, where not onnxruntime but another engine runs the file,

    runners(data, network) -> {engine: runner}    runs the file itself, to be compared with the original; none where the engine is missing

`export` is the public verb: load, lower, round where the values are to be float16, plan, encode, check, and only then write.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from onnx import ModelProto

from ticketkit import tune as tuning
from ticketkit.errors import ExportError, FormatError, ModelError, TicketError
from ticketkit.exporters import _source
from ticketkit.exporters._check import Comparison, Runner, compare, difference, random_inputs
from ticketkit.lower import Network, half_weights, lower, operators
from ticketkit.lower.graph import Dim, dims
from ticketkit.lower.storage import nbytes
from ticketkit.planner import VALUES, Plan, plan
from ticketkit.ticket import write_atomic

SLOWEST = 0.97  # measured speedup below which a sparse model is not worth having

__all__ = ["Comparison", "ExportReport", "Target", "examine", "export", "get", "names"]


class Target(Protocol):
    """What a module of this folder offers (see the package docstring)."""

    SUFFIX: str

    def encode(self, network: Network, plan: Plan) -> bytes: ...
    def decode(self, data: bytes, network: Network) -> ModelProto: ...


@dataclass(frozen=True)
class Rounding:
    """What storing weights as float16 did to the network.

    Attributes:
        zeros: weights that became zero, and are not stored sparse.
        difference: largest absolute difference of an output from that of the original on random inputs; None if the check was left out.
    """

    zeros: int
    difference: float | None


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        path, format: of the file.
        bytes: its size; dense_bytes: that of the network as plain ONNX.
        plan: how each layer was treated.
        comparisons: largest difference and tolerance for each engine, from the original, with its weights rounded where they are stored
            as float16; empty if the check was left out.
        inputs: dimensions of the network's inputs: numbers, names of free ones, None where it says nothing of one; None for unknown rank.
        rounding: what storing weights as float16 did; None where they are float32.
        speedup: over dense onnxruntime, measured here on one thread while tuning; None without it.
    """

    path: str
    format: str
    bytes: int
    dense_bytes: int
    plan: Plan
    comparisons: tuple[Comparison, ...]
    speedup: float | None
    inputs: dict[str, tuple[Dim, ...] | None]
    rounding: Rounding | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def __str__(self) -> str:
        (dense, left), kept = self.plan.flops, f"prunable sparsity {self.plan.prunable_sparsity:.2%}"
        lines = [
            f"{self.path}: {self.bytes:,} bytes, {self.dense_bytes / self.bytes:.2f}x smaller than dense",
            f"{kept}, whole model {self.plan.model_sparsity:.2%}, {left / max(dense, 1):.1%} of {dense / 1e9:.3g} GFLOP left",
            *([_shapes_text(self.inputs)] if self.format.startswith("onnx") or self.format == "torch" else []),
            *([f"{len(self.plan.sparse)} of {len(self.plan.choices)} layers run sparse"] if self.format in ("onnx", "torch") else []),
            *([f"{self.speedup:.2f}x faster than dense onnxruntime here, one thread"] if self.speedup else []),
            *(f"max |difference| in {c.engine}: {c.difference:.3g} (tolerance {c.tolerance:.3g})" for c in self.comparisons),
        ]
        if self.rounding:
            lines.append(f"weights rounded to float16: {self.rounding.zeros:,} more are zero")
            lines[-1] += "" if self.rounding.difference is None else f", outputs move by up to {self.rounding.difference:.3g}"
        return "\n".join(lines)


def _shapes_text(inputs: Mapping[str, tuple[Dim, ...] | None]) -> str:
    texts = {name: "?" if shape is None else ", ".join("?" if d is None else str(d) for d in shape) for name, shape in inputs.items()}
    return "inputs: " + ", ".join(f"{name} [{text}]" for name, text in texts.items())


def names() -> list[str]:
    """The export targets, as `--format` spells them."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Target:
    """The target of that name; ExportError for an unknown one."""
    if name not in names():
        raise ExportError(f"unknown export format {name!r}; expected one of {', '.join(names())}")
    return cast(Target, import_module(f"{__name__}.{name.replace('-', '_')}"))


def export(
    source: _source.Source,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    values: str = "fp32",
    round: int | None = None,
    input_shape: Sequence[int] | None = None,
    example_inputs: _source.Examples | None = None,
    model: str | None = None,
    classes: int | None = None,
    check: bool = True,
    tune: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a pruned network as one file, checked against the original before it is kept.

    Args:
        source: a run directory of `ticketkit find`, a ticket file with weights, any dense-with-zeros ONNX file (or its bytes), a torch
            module, or a checkpoint file of a known network. A module stays as it is, on its device and in its mode: a copy is captured, in
            evaluation mode, with masks of torch.nn.utils.prune and parametrizations baked into its weights.
        path: the file to write; an old one is replaced only by a whole, checked new one.
        format: one of `names()`.
        values: "fp32", or "fp16" to store the weights of all layers as float16, rounded to the nearest (ties to even): the file is the
            network with these weights, computed in float32. Biases and everything else stay float32. For formats onnx and onnx-dense.
        round: of a run directory; None: the last finished one.
        input_shape: of one image [C, H, W], or with batch; None: as the source states.
        example_inputs: of a module: a tensor, or several, by position in a sequence or by keyword in a mapping. Axis 0 becomes a free batch
            wherever it is as long as that of the first one, if the module can be traced so. Without them `input_shape` says what it takes.
        model: of a checkpoint: the name of its network, one of `ticketkit.models` or a classification network of torchvision.
        classes: of a checkpoint: width of its head; None: what it holds.
        check: compare with the original on random inputs (see `ticketkit.exporters._check`).
        tune: seconds to search, on this machine, how each sparse convolution is best cut up (format onnx); the file is then measured
            against dense onnxruntime too, and refused where it is slower. 0: no search, the file depends on the source alone.
        progress: called with a word on what is being tuned.

    Raises:
        ExportError: the path cannot be written, no layer gains or the whole is slower (format onnx), the format has no such values, or
            the result differs beyond the tolerance.
        ModelError, FormatError, TicketError: the source is missing, damaged or unsupported, or a weight is too large for float16.
    """
    target, path = get(format), Path(path)
    _require_values(target, format, values)
    _require_writable(path, source)
    original = _source.load(source, round, input_shape, example_inputs=example_inputs, model=model, classes=classes)
    exact = lower(original.model, input_shape)
    network, zeros = _rounded(exact, input_shape) if values == "fp16" else (exact, 0)
    chosen, tuned = replace(plan(network), values=values), tune > 0 and format == "onnx"
    if tuned:
        chosen = tuning.tune(network, chosen, tune, progress)
    data = target.encode(network, chosen)
    try:
        exported = target.decode(data, network)
    except (FormatError, ModelError) as error:
        raise ExportError(f"the exported file does not read back: {error}; please report the model") from None
    comparisons: tuple[Comparison, ...] = ()
    moved = None
    if check:
        others = target.runners(data, network) if hasattr(target, "runners") else {}
        comparisons, moved = _compared(original, exact, network, exported, others)
    speedup = tuning.speedup(network.model.SerializeToString(), data, random_inputs(network, 0, 1)) if tuned else None
    if speedup is not None and speedup < SLOWEST:
        raise ExportError(
            f"measured here the sparse model takes {1 / speedup:.2f} times as long as dense onnxruntime, so nothing was written:"
            " prune more, export with --format onnx-dense, or with --no-tune for another machine"
        )
    try:
        write_atomic(path, data)
    except TicketError as error:
        raise ExportError(str(error)) from None
    rounded = Rounding(zeros, moved) if values == "fp16" else None
    inputs = {info.name: dims(info) for info in network.model.graph.input}
    return ExportReport(os.fspath(path), format, len(data), nbytes(network.model), chosen, comparisons, speedup, inputs, rounded)


def examine(source: _source.Source, *, round: int | None = None, input_shape: Sequence[int] | None = None) -> Plan:
    """The Plan of a source (see `export`): what each layer is and how it would run, or, for a sparse file, does run.

    Raises:
        ModelError, FormatError, TicketError: the source is missing, damaged or unsupported.
    """
    original = _source.load(source, round, input_shape).model
    decoded = operators.decode(original)
    stored = {node.name: decoded[node.output[0]].execution for node in operators.nodes(original)}
    found = plan(lower(original, input_shape), stored or None)
    return replace(found, values="fp16") if stored and half_weights.is_narrow(original) else found


def _rounded(network: Network, input_shape: Sequence[int] | None) -> tuple[Network, int]:
    """The network with the weights of its layers rounded to float16, and how many of them became zero."""
    model = ModelProto()
    model.CopyFrom(network.model)
    zeros = half_weights.round_weights(model, network.weights)
    return lower(model, input_shape), zeros


def _compared(
    original: _source.Original, exact: Network, network: Network, exported: ModelProto, others: Mapping[str, Runner]
) -> tuple[tuple[Comparison, ...], float | None]:
    """Compares export and original; with rounded weights export and rounded network, that network before rounding and the original,
    and gives what rounding did to the outputs."""
    if network is exact:
        return compare(original.model, exported, network, others={**original.runners, **others}), None
    compare(original.model, exact.model, exact, others=original.runners)
    return compare(network.model, exported, network, others=others), difference(original.model, exported, network)


def _require_values(target: Target, format: str, values: str) -> None:
    if values not in VALUES:
        raise ExportError(f"unknown type of values {values!r}; expected one of {', '.join(VALUES)}")
    if values not in _values(target):
        can = [name for name in names() if values in _values(get(name))]
        raise ExportError(f"format {format} has no {values} values; expected one of {', '.join(can)}, or leave the values fp32")


def _values(target: Target) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(target, "VALUES", ("fp32",))
    return found


def _require_writable(path: Path, source: _source.Source) -> None:
    """Say so before the work, not after it."""
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist; make it, or choose another place")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ExportError(f"{path}: is read-only; choose a writable place")
    if isinstance(source, str | os.PathLike) and path.exists() and Path(source).exists() and path.samefile(source):
        raise ExportError(f"{path}: would overwrite the source; choose another name")
