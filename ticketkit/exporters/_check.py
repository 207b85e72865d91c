"""Is the exported network the original? Its weights must be those of the network, bit for bit; then both are run on random inputs and
the largest difference of each output is compared with a tolerance derived from the network itself.

The tolerance. One layer with k stored weights per output computes in float32, in whatever order, to within

    t = eps * (k + 1) * max|w| * max|x| * 2

of the exact result: k products and sums and a bias, twice because original and export both round. How such errors grow on their way
through the network depends on the network, and worst-case bounds multiply up to nothing useful; so it is measured, by Monte Carlo
arithmetic (Parker, "Monte Carlo Arithmetic", 1997): the original runs again with noise, uniform in [-t, t], on the output of every layer, t
computed from that layer's own input. The largest change of each output over `DRAWS` runs, plus one rounding per node, is what float32
permits it. Nothing in it is tuned; a missing weight or activation shifts the output by far more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnxruntime
from onnx import ModelProto, helper, numpy_helper

from ticketkit.errors import ExportError, KernelError
from ticketkit.formats import Array
from ticketkit.lower import Layer, Network, operators, storage
from ticketkit.lower.cleanup import reason
from ticketkit.lower.graph import dims
from ticketkit.runtime import native, ort

Runner: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs by name -> outputs by name

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float64).tiny)
BATCH = 2  # where the batch is free: more than one, so that mixed-up images show
DRAWS = 3


@dataclass(frozen=True)
class Comparison:
    """One engine against the original: the largest absolute difference of an output, and what rounding permits it; of several outputs
    the one that comes nearest to its tolerance."""

    engine: str
    difference: float
    tolerance: float


def compare(
    original: ModelProto, exported: ModelProto, network: Network, seed: int = 0, others: Mapping[str, Runner] | None = None
) -> tuple[Comparison, ...]:
    """Run both on the same random inputs: the export in stock onnxruntime, and with ticketkit's operators where it has any.

    Args:
        original: the model as it came; exported: the model as it would be read from the file.
        network: the lowered original, for the tolerance.
        seed: of inputs and noise.
        others: whatever else must give the same outputs, by the name of its engine: the file as another engine runs it, or what the
            original was captured from.

    Raises:
        ExportError: a difference beyond the tolerance, outputs that are not finite, or a file that does not run.
    """
    feeds = random_inputs(network, seed)
    expected = _run(original, feeds, "the original")
    for name, array in expected.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ExportError(f"output {name!r} of the original is NaN or infinite on random input, so the export cannot be checked")
    tolerance = derive_tolerance(network, feeds, expected, seed)
    runners: dict[str, Runner] = {"onnxruntime": lambda feeds: _run(exported, feeds, "the export in onnxruntime")}
    if any(operators.nodes(exported)) and library_exists():
        runners["ticketkit"] = lambda feeds: _run(exported, feeds, "the export in ticketkit", with_library=True)
    found = []
    for engine, run in {**runners, **(others or {})}.items():
        got = run(feeds)
        differences = largest_differences(expected, got)
        for name, difference in differences.items():
            if not difference <= tolerance[name]:  # NaN fails too
                raise ExportError(
                    f"the export differs from the original by {difference:.3g} in {engine}, float32 rounding permits"
                    f" {tolerance[name]:.3g} (output {name!r}); nothing was written; please report the model"
                )
        worst = max(differences, key=lambda name: differences[name] / max(tolerance[name], TINY))
        found.append(Comparison(engine, differences[worst], tolerance[worst]))
    return tuple(found)


def difference(original: ModelProto, exported: ModelProto, network: Network, seed: int = 0) -> float:
    """The largest absolute difference of an output of the two in stock onnxruntime, on the inputs of `compare`; no judgement."""
    feeds = random_inputs(network, seed)
    return max(largest_differences(_run(original, feeds, "the original"), _run(exported, feeds, "the export")).values())


def require_equal(name: str, stored: Array | None, original: Array | None) -> None:
    """ExportError unless a stored weight or bias is exactly the network's; some mistakes hardly show in the outputs."""
    if (stored is None) != (original is None) or not np.array_equal(np.asarray(stored), np.asarray(original)):
        raise ExportError(f"{name}: what was stored differs from the network; nothing was written, please report the model")


def derive_tolerance(network: Network, feeds: Mapping[str, Array], expected: Mapping[str, Array], seed: int = 0) -> dict[str, float]:
    """What float32 rounding permits two evaluations of this network to differ by in each output, on these inputs (see the module
    docstring)."""
    changes = [largest_differences(expected, _run(noisy(network, seed + draw), feeds, "the noisy original")) for draw in range(DRAWS)]
    rounding = EPS * len(network.model.graph.node)
    largest = {name: float(np.abs(a).max()) if a.size and a.dtype.kind == "f" else 0.0 for name, a in expected.items()}
    last = {name: float(np.finfo(a.dtype).eps) if a.dtype.kind == "f" else 0.0 for name, a in expected.items()}  # that of a float16 output
    return {name: max(change[name] for change in changes) + max(rounding, last[name]) * largest[name] for name in expected}


def noisy(network: Network, seed: int) -> ModelProto:
    """The network with uniform noise of its rounding bound on the output of every layer."""
    model = ModelProto()
    model.CopyFrom(network.model)
    following = {layer.at: layer for layer in network.layers}
    nodes = []
    for at, node in enumerate(network.model.graph.node):
        nodes.append(node)
        if at in following:
            layer, name = following[at], f"noise{at}"
            nodes[-1] = type(node)()
            nodes[-1].CopyFrom(node)
            nodes[-1].output[0] = f"{name}.exact"
            bound = np.array(rounding_bound(layer), np.float32)
            model.graph.initializer.append(numpy_helper.from_array(bound, f"{name}.bound"))
            nodes += [
                helper.make_node("Abs", [layer.x], [f"{name}.abs"]),
                helper.make_node("ReduceMax", [f"{name}.abs"], [f"{name}.max"], keepdims=0),
                helper.make_node("Mul", [f"{name}.max", f"{name}.bound"], [f"{name}.scale"]),
                helper.make_node("RandomUniformLike", [f"{name}.exact"], [f"{name}.unit"], low=-1.0, high=1.0, seed=seed + at / 8192),
                helper.make_node("Mul", [f"{name}.unit", f"{name}.scale"], [f"{name}.noise"]),
                helper.make_node("Add", [f"{name}.exact", f"{name}.noise"], [layer.y]),
            ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def rounding_bound(layer: Layer) -> float:
    """eps * (k + 1) * max|w| * 2, to be multiplied by max|x|; k is the most non-zero weights one output sums up."""
    weight = layer.weight.swapaxes(0, 1) if layer.op == "ConvTranspose" else layer.weight
    k = int(np.count_nonzero(weight.reshape(len(weight), -1), axis=1).max())
    return EPS * (k + 1) * float(np.abs(weight).max()) * 2


def random_inputs(network: Network, seed: int = 0, batch: int = BATCH) -> dict[str, Array]:
    """Standard normal floats, zeros and ones for other types, at the shapes of the network and at least that batch where it is free."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for info in network.model.graph.input:
        declared, shape = dims(info), list(network.inputs.get(info.name, ()))
        if declared and not isinstance(declared[0], int):
            shape[0] = max(shape[0], batch)
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        values = rng.standard_normal(shape) if np.dtype(dtype).kind == "f" else rng.integers(0, 2, shape)
        feeds[info.name] = values.astype(dtype)
    return feeds


def largest_differences(expected: Mapping[str, Array], got: Mapping[str, Array]) -> dict[str, float]:
    """max |difference| of each output; infinite where names or shapes differ."""
    found = dict.fromkeys(expected, float("inf"))
    for name, array in expected.items():
        if expected.keys() == got.keys() and array.shape == got[name].shape:
            difference = np.abs(array.astype(np.float64) - got[name].astype(np.float64))
            found[name] = float(difference.max()) if difference.size else 0.0
    return found


def library_exists() -> bool:
    """Whether there is a native library to compare with."""
    try:
        native.library_path()
    except KernelError:  # an export needs only stock onnxruntime; the report says which engines were compared
        return False
    return True


def _run(model: ModelProto, feeds: Mapping[str, Array], what: str, with_library: bool = False) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if with_library:
        ort.register(options)
    try:
        session = storage.session(model, options)
        outputs = session.run(None, dict(feeds))
    except KernelError:
        raise
    except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
        raise ExportError(f"{what} does not run: {reason(error)}") from None
    return {info.name: np.asarray(array) for info, array in zip(session.get_outputs(), outputs, strict=True)}
