"""The operators of domain ``ai.ticketkit``, version 1: the node, its function body for runtimes without the library, and the way back.

    SparseConv(X [N,C,H,W], values [n], gaps u16 [n], B [M], Z? [N,M,OH,OW]) -> Y [N,M,OH,OW] = act(conv(X, W) + B (+ Z))
    SparseGemm(X [N,K],     values [n], gaps u16 [n], B [M])                 -> Y [N,M]       = act(X Wᵀ + B)

Everything else is float32; a file may store values as float16 behind a Cast (`ticketkit.lower.half_weights`). Attributes: ``weight_shape``
[M,C,kh,kw] or [M,K], ``numel`` [its product, below 2^29], ``activation``, a name of `ACTIVATIONS`, with the floats that go with it, and for
SparseConv ``strides`` [2], ``pads`` [top, left, bottom, right], ``dilations`` [2] and ``group``, 1 (also where it is absent, as in older
files) or C for a depthwise W [C,1,kh,kw]. W is gap-coded (`ticketkit.formats.gaps`). How a library should run it is
said by ``format`` "csr" (default), "bsr" (not for depthwise) or, for SparseGemm, "bsr1x4", the form the weight is packed in (tk_format of
kernels/ticketkit.h), and for SparseConv
``tuning`` [6]: how it is cut up on vectors of so many lanes and images of such height and width (tile_vectors, block_channels, group_tiles
of kernels/ticketkit.h); zeros leave it to the library, other lanes and images too. ``x_layout`` and ``y_layout`` "planes" (default), "csr"
or "bsr" give the order of the floats of X, and of Y and Z, in memory (tk_layout of the same header; `ticketkit.lower.layouts`): both ends
of a tensor must agree, and whoever reads it from outside gets them in that order. They mean nothing to the function body.

An operator has one function body, so each body has an operator of its own: the name is SparseConv or SparseGemm + ("Add" if Z) +
the activation if there is one, such as SparseConvAddRelu. (ONNX has overloads for this, but onnxruntime ignores them before 1.27.)

The body decodes W by Cast, CumSum and ScatterElements into zeros. All of that is constant, so a stock runtime folds it at load and is
left with one ordinary Conv or Gemm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, prod
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, helper, numpy_helper

from ticketkit.errors import FormatError, ModelError
from ticketkit.formats import MOST, Array, finite, gaps
from ticketkit.lower import half_weights
from ticketkit.lower.graph import Graph

DOMAIN = "ai.ticketkit"
VERSION = 1
IR_VERSION = 8  # the first with functions
CONV, GEMM = "SparseConv", "SparseGemm"
DIGEST = "ticketkit.sha256"  # metadata key: hash of the whole model, by which `read` knows damage
OWN = ("ticketkit.version", DIGEST)  # metadata of the file that was read, not of what is made from it
WINDOW = ("strides", "pads", "dilations")
ACTIVATIONS: dict[str, tuple[str, ...]] = {  # name -> the attributes that go with it
    "None": (), "Relu": (), "Clip": ("min", "max"), "LeakyRelu": ("alpha",), "HardSwish": (), "Silu": (),
}  # fmt: skip
# Name -> the standard nodes it stands for: operator, inputs as steps back (1 is the node before), attributes. Others are operators.
STEPS: dict[str, list[tuple[str, tuple[int, ...], dict[str, float]]]] = {
    "None": [],
    "HardSwish": [("HardSigmoid", (1,), {"alpha": 1 / 6, "beta": 0.5}), ("Mul", (2, 1), {})],
    "Silu": [("Sigmoid", (1,), {}), ("Mul", (2, 1), {})],
}
PACKED = ("csr", "bsr", "bsr1x4")
TILES = ("csr", "bsr")  # orders of floats in tiles, those that convolutions of these formats have
LAYOUTS = ("planes", *TILES)


@dataclass(frozen=True)
class Execution:
    """How a library should run a node; results differ in rounding only.

    Attributes:
        format: the form its weight is packed in, of `PACKED`; convolutions have no "bsr1x4".
        tuning: (lanes, image height, image width, tile_vectors, block_channels, group_tiles), zeros for the library's choice.
        x_layout, y_layout: of its input, and of its output and residual, of `LAYOUTS`.
    """

    format: str = "csr"
    tuning: tuple[int, ...] = (0,) * 6
    x_layout: str = "planes"
    y_layout: str = "planes"


@dataclass(frozen=True)
class Epilogue:
    """What follows a convolution or product inside one node: (+ residual), then an activation.

    Attributes:
        residual: name of the tensor added before the activation, "" for none.
        activation: a name of `ACTIVATIONS`.
        parameters: the values of its attributes, in that order.
    """

    residual: str = ""
    activation: str = "None"
    parameters: tuple[float, ...] = ()

    @property
    def suffix(self) -> str:
        """What it adds to the operator's name."""
        return ("Add" if self.residual else "") + ("" if self.activation == "None" else self.activation)


@dataclass(frozen=True)
class Sparse:
    """A decoded node: the shape and gap-coded arrays of its weight, window attributes (none for SparseGemm), group, epilogue, execution."""

    shape: tuple[int, ...]
    parts: dict[str, Array]
    window: dict[str, list[int]]
    group: int
    epilogue: Epilogue
    execution: Execution

    def weight(self) -> Array:
        """The dense weight, f32 of that shape."""
        return gaps.unpack(self.parts, self.shape)


def make_node(
    op: str,
    inputs: Sequence[str],
    output: str,
    name: str,
    shape: Sequence[int],
    window: dict[str, list[int]],
    epilogue: Epilogue,
    execution: Execution,
    group: int = 1,
) -> NodeProto:
    """A node of this domain, `op` being SparseConv or SparseGemm; inputs are X, values, gaps, B, to which the residual is appended."""
    parameters = dict(zip(ACTIVATIONS[epilogue.activation], epilogue.parameters, strict=True))
    layouts = {"x_layout": execution.x_layout, "y_layout": execution.y_layout}
    conv = {"tuning": list(execution.tuning), "group": group, **layouts} if op == CONV else {}
    operands = [*inputs, epilogue.residual] if epilogue.residual else list(inputs)
    return helper.make_node(
        op + epilogue.suffix, operands, [output], name=name, domain=DOMAIN, weight_shape=list(shape), numel=[prod(shape)],
        activation=epilogue.activation, format=execution.format, **conv, **window, **parameters,
    )  # fmt: skip


def function(name: str, opset: int) -> FunctionProto:
    """The body of one operator, by its full name, in standard operators of that opset."""
    op = CONV if name.startswith(CONV) else GEMM
    residual, activation = name.startswith(f"{op}Add"), name.removeprefix(op).removeprefix("Add") or "None"
    attributes = ["weight_shape", "numel", "activation", "format", *ACTIVATIONS[activation]]
    nodes = [
        _constant("weight_shape", "value_ints", "weight_shape", AttributeProto.INTS),
        _constant("numel", "value_ints", "numel", AttributeProto.INTS),
        *(_constant(key, "value_float", key, AttributeProto.FLOAT) for key in ACTIVATIONS["Clip"] if activation == "Clip"),
        helper.make_node("Constant", [], ["axis"], value_int=0),
        helper.make_node("ConstantOfShape", ["numel"], ["zeros"], value=helper.make_tensor("zero", onnx.TensorProto.FLOAT, [1], [0.0])),
        helper.make_node("Cast", ["gaps"], ["steps"], to=onnx.TensorProto.INT64),
        helper.make_node("CumSum", ["steps", "axis"], ["positions"]),
        helper.make_node("ScatterElements", ["zeros", "positions", "values"], ["flat"], axis=0),
        helper.make_node("Reshape", ["flat", "weight_shape"], ["W"]),
    ]
    if op == CONV:
        product = helper.make_node("Conv", ["X", "W", "B"], ["product"])
        product.attribute.extend(_reference(key, key, AttributeProto.INTS) for key in WINDOW)
        product.attribute.append(_reference("group", "group", AttributeProto.INT))
        attributes += ["tuning", *WINDOW, "group", "x_layout", "y_layout"]
    else:
        product = helper.make_node("Gemm", ["X", "W", "B"], ["product"], transB=1)
    nodes.append(product)
    if residual:
        nodes.append(helper.make_node("Add", ["product", "Z"], ["sum"]))
    if activation == "None":
        nodes.append(helper.make_node("Identity", [nodes[-1].output[0]], ["identity"]))
    _activate(nodes, activation, "")
    if activation == "LeakyRelu":
        nodes[-1].attribute.append(_reference("alpha", "alpha", AttributeProto.FLOAT))
    nodes[-1].output[0] = "Y"
    inputs = ["X", "values", "gaps", "B"] + ["Z"] * residual
    return helper.make_function(DOMAIN, name, inputs, ["Y"], nodes, [helper.make_opsetid("", opset)], attributes)


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of this domain in a graph."""
    return (node for node in model.graph.node if node.domain == DOMAIN)


def decode(model: ModelProto) -> dict[str, Sparse]:
    """The nodes of this domain by the name of their output, each checked; no dense weight is made.

    Raises:
        FormatError: an attribute or array of a node is missing or out of range; the message names node and field.
    """
    constants = half_weights.constants(model)
    found = {}
    for node in nodes(model):
        try:
            if len(node.output) != 1:
                raise FormatError(f"outputs: expected Y, got {len(node.output)}")
            found[node.output[0]] = _decode(node, constants)
        except FormatError as error:
            raise FormatError(f"{node.name or node.op_type}: {error}") from None
    return found


def expand(model: ModelProto) -> ModelProto:
    """A copy with every node of this domain written out as Conv or Gemm, Add and activation on dense float32 weights.

    Raises:
        FormatError: as `decode`.
        ModelError: dense weights of 2 GiB or more.
    """
    decoded = decode(model)
    if (total := sum(prod(sparse.shape) for sparse in decoded.values())) >= MOST:
        raise ModelError(f"its sparse weights are {total / 2**28:.3g} GiB when dense, 2 GiB or more do not fit in one ONNX message")
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:], plain.functions[:]
    for node in model.graph.node:
        plain.graph.node.extend(_expanded(node, decoded[node.output[0]], plain) if node.domain == DOMAIN else [node])
    half_weights.widen(plain)
    drop_unused(plain)
    foreign = [entry for entry in plain.metadata_props if entry.key not in OWN]
    del plain.metadata_props[:]
    plain.metadata_props.extend(foreign)
    return plain


def drop_unused(model: ModelProto) -> None:
    """Removes the initializers that no node, subgraph or graph output reads."""
    graph = Graph(model)
    kept = [tensor for name, tensor in graph.constants.items() if name in graph.consumers]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _decode(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> Sparse:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    op = CONV if node.op_type.startswith(CONV) else GEMM
    shape = tuple(_ints(attributes, "weight_shape", 4 if op == CONV else 2, 1))
    if _ints(attributes, "numel", 1, 1) != [prod(shape)]:
        raise FormatError(f"numel: expected {[prod(shape)]} for shape {list(shape)}, got {attributes['numel']}")
    if len(node.input) not in ((4, 5) if op == CONV else (4,)):
        raise FormatError(f"inputs: expected X, values, gaps, B and, for {CONV}, Z; got {len(node.input)}")
    values, gap, bias = (_array(field, name, constants) for field, name in zip(("values", "gaps", "B"), node.input[1:4], strict=True))
    parts = {"values": values, "gaps": gap}
    gaps.validate(parts, shape)
    if bias.shape != shape[:1] or bias.dtype != np.float32:
        raise FormatError(f"B: expected float32 [{shape[0]}], got {bias.dtype} {list(bias.shape)}")
    finite("B", bias)
    window = {key: _ints(attributes, key, 4 if key == "pads" else 2, key != "pads") for key in WINDOW} if op == CONV else {}
    group = attributes.get("group", 1)
    if group != 1 and (op != CONV or [group, 1] != list(shape[:2])):
        raise FormatError(f"group: expected 1, or {shape[0]} for weight [{shape[0]}, 1, kh, kw], got {group} for weight {list(shape)}")
    epilogue = _epilogue(attributes, node.input[4] if len(node.input) == 5 else "")
    if node.op_type != op + epilogue.suffix:
        raise FormatError(f"operator {node.op_type}: inputs and attributes are those of {op + epilogue.suffix}")
    return Sparse(shape, parts, window, group, epilogue, _execution(attributes, op))


def _execution(attributes: dict[str, Any], op: str) -> Execution:
    default = Execution()
    form = _name(attributes, "format", PACKED if op == GEMM else TILES)
    tuning = _ints(attributes, "tuning", 6, 0) if "tuning" in attributes else default.tuning
    return Execution(form, tuple(tuning), _name(attributes, "x_layout", LAYOUTS), _name(attributes, "y_layout", LAYOUTS))


def _name(attributes: dict[str, Any], key: str, names: Sequence[str]) -> str:
    """One of the names, the first where the attribute is absent."""
    value = attributes.get(key, names[0].encode())
    for name in names:
        if value == name.encode():
            return name
    raise FormatError(f"{key}: expected one of {', '.join(names)}, got {value!r}")


def _epilogue(attributes: dict[str, Any], residual: str) -> Epilogue:
    activation = _name(attributes, "activation", tuple(ACTIVATIONS))
    keys = ACTIVATIONS[activation]
    values = tuple(value for key in keys if isinstance(value := attributes.get(key), float) and not isnan(value))
    got = f"got {', '.join(str(attributes.get(key)) for key in keys)}"
    if activation == "Clip" and (len(values) < len(keys) or values[0] > values[1]):
        raise FormatError(f"min, max: expected two floats in this order, {got}")
    if activation == "LeakyRelu" and not (values and isfinite(values[0])):
        raise FormatError(f"alpha: expected a finite float, {got}")
    return Epilogue(residual, activation, values)


def _ints(attributes: dict[str, Any], key: str, count: int, least: int) -> list[int]:
    values = attributes.get(key)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, int) and v >= least for v in values):
        raise FormatError(f"{key}: expected {count} ints of at least {int(least)}, got {values}")
    return values


def _expanded(node: NodeProto, sparse: Sparse, model: ModelProto) -> list[NodeProto]:
    """The standard nodes one node stands for; its dense weight becomes an initializer of the model."""
    base = node.name or node.output[0]
    op, options = ("Conv", {**sparse.window, "group": sparse.group}) if sparse.window else ("Gemm", {"transB": 1})
    constants = {f"{base}.weight": sparse.weight()}
    epilogue = sparse.epilogue
    made = [helper.make_node(op, [node.input[0], f"{base}.weight", node.input[3]], [f"{base}.{op}"], name=base, **options)]
    if epilogue.residual:
        made.append(helper.make_node("Add", [made[-1].output[0], epilogue.residual], [f"{base}.Add"], name=f"{base}.Add"))
    parameters = dict(zip(ACTIVATIONS[epilogue.activation], epilogue.parameters, strict=True))
    if epilogue.activation == "Clip":  # whose bounds are inputs
        constants |= {f"{base}.{key}": np.array(value, np.float32) for key, value in parameters.items()}
    _activate(made, epilogue.activation, f"{base}.")
    if epilogue.activation == "LeakyRelu":
        made[-1].attribute.append(helper.make_attribute("alpha", parameters["alpha"]))
    made[-1].output[0] = node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return made


def _activate(nodes: list[NodeProto], activation: str, prefix: str) -> None:
    """Appends what the activation of the last node's output is in standard operators, their names and outputs beginning with the prefix.
    The bounds of Clip are the tensors {prefix}min and {prefix}max; LeakyRelu has yet to get its alpha."""
    for kind, back, options in STEPS.get(activation, [(activation, (1,), {})]):
        operands = [nodes[-each].output[0] for each in back] + [prefix + key for key in ACTIVATIONS["Clip"] if kind == "Clip"]
        nodes.append(helper.make_node(kind, operands, [prefix + kind], name=prefix + kind, **options))


def _array(field: str, name: str, constants: dict[str, onnx.TensorProto]) -> Array:
    if name not in constants:
        raise FormatError(f"{field}: expected an initializer, but {name!r} is none")
    return half_weights.array(name, constants)


def _constant(output: str, key: str, attribute: str, kind: int) -> NodeProto:
    node = helper.make_node("Constant", [], [output])
    node.attribute.append(_reference(key, attribute, kind))
    return node


def _reference(key: str, attribute: str, kind: int) -> AttributeProto:
    """Attribute `key` of a node in a function body, taken from `attribute` of the calling node."""
    return AttributeProto(name=key, ref_attr_name=attribute, type=kind)
