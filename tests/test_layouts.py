"""Layouts of the tensors between sparse convolutions: where they are tiles, where not, and that results stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from graphs import Array, graph, node, normal, pruned, run
from onnx import ModelProto, NodeProto

from ticketkit import exporters
from ticketkit.errors import FormatError
from ticketkit.lower import lower, operators
from ticketkit.lower.operators import Execution
from ticketkit.planner import plan

SIZE = (31, 29)  # no whole number of tiles on any instruction set


def bottlenecks(outside: str = "", stride: int = 2) -> ModelProto:
    """Two residual blocks "a" and "b" (1x1, 3x3, 1x1), then a block "c" of another size; `outside`: a tensor somebody else reads too."""
    shapes = {
        "a1": (8, 16, 1), "a2": (8, 8, 3), "a3": (16, 8, 1), "b1": (8, 16, 1), "b2": (8, 8, 3), "b3": (16, 8, 1),
        "c1": (12, 16, 1), "c2": (12, 12, 3), "c3": (24, 12, 1), "down": (24, 16, 1),
    }  # fmt: skip
    constants = {f"{name}.w": pruned((m, c, k, k), 0.6, seed) for seed, (name, (m, c, k)) in enumerate(shapes.items())}
    nodes: list[NodeProto] = [node("Relu", "x", "in")]

    def conv(name: str, source: str, relu: bool = True, stride: int = 1) -> str:
        pad = shapes[name][2] // 2
        made = node("Conv", f"{source} {name}.w", name if not relu else f"{name}.sum", pads=[pad] * 4, strides=[stride] * 2, name=name)
        nodes.extend([made, node("Relu", f"{name}.sum", name)] if relu else [made])
        return name

    def block(name: str, source: str, other: str, stride: int = 1) -> str:
        last = conv(f"{name}3", conv(f"{name}2", conv(f"{name}1", source), stride=stride), relu=False)
        nodes.extend([node("Add", f"{last} {other}", f"{name}.sum"), node("Relu", f"{name}.sum", name)])
        return name

    b = block("b", block("a", "in", "in"), "a")
    down = conv("down", b, relu=False, stride=stride)
    nodes.append(node("GlobalAveragePool", block("c", b, down, stride), "y"))
    outputs = ["y"]
    if outside:
        nodes.append(node("ReduceMean", outside, "seen", axes=[2, 3]))
        outputs.append("seen")
    return graph(nodes, {"x": ["N", 16, *SIZE]}, outputs, constants)


def sparse(model: ModelProto, formats: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, tuple[str, str]]]:
    """The file with every convolution sparse, in CSR or as said; layer -> layouts of x and y in it."""
    network = lower(model)
    keep = {layer.name: Execution((formats or {}).get(layer.name, "csr")) for layer in network.layers}
    data = exporters.get("onnx").encode(network, plan(network, keep))
    made = onnx.load_from_string(data)
    names = {n.output[0]: n.name for n in operators.nodes(made)}
    return data, {names[y]: (s.execution.x_layout, s.execution.y_layout) for y, s in operators.decode(made).items()}


def check_same(model: ModelProto, data: bytes, batch: int = 2) -> None:
    """The file in ticketkit and in stock onnxruntime, and the model itself, agree."""
    feeds = {"x": normal(batch, 16, *SIZE)}
    expected = run(model, feeds)
    for library in (True, False):
        for got, want in zip(run(data, feeds, library), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))


ALL_CSR = {
    "a1": ("planes", "planes"), "a2": ("planes", "csr"), "a3": ("csr", "planes"),  # its residual comes from outside
    "b1": ("planes", "planes"), "b2": ("planes", "csr"), "b3": ("csr", "planes"),  # the residual of a in planes, so b too
    "c1": ("planes", "planes"), "c2": ("planes", "csr"), "c3": ("csr", "planes"), "down": ("planes", "planes"),
}  # fmt: skip


def test_pointwise_layers_read_tiles() -> None:
    data, found = sparse(bottlenecks())
    assert found == ALL_CSR
    check_same(bottlenecks(), data)


def chain(model: ModelProto) -> ModelProto:
    """The same, but block "a" without a residual: now a and b can be in tiles."""
    changed = ModelProto()
    changed.CopyFrom(model)
    nodes = [n for n in changed.graph.node if n.op_type != "Add" or n.output[0] != "a.sum"]
    for n in nodes:
        n.input[:] = ["a3" if name == "a.sum" else name for name in n.input]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


TILED = ALL_CSR | {
    "a3": ("csr", "csr"), "b1": ("csr", "planes"), "b3": ("csr", "csr"), "c1": ("csr", "planes"), "down": ("csr", "planes"),
}  # fmt: skip


def test_chains_of_residual_blocks_share_a_layout() -> None:
    model = chain(bottlenecks())
    data, found = sparse(model)
    assert found == TILED
    check_same(model, data)


@pytest.mark.parametrize("tensor", ["a", "b"])
def test_tensors_read_from_outside_stay_planes(tensor: str) -> None:
    model = chain(bottlenecks(outside=tensor))
    data, found = sparse(model)
    assert found == ALL_CSR
    check_same(model, data)


def test_graph_outputs_stay_planes() -> None:
    model = chain(bottlenecks())
    model.graph.output.append(onnx.helper.make_tensor_value_info("a2", onnx.TensorProto.FLOAT, None))
    data, found = sparse(model)
    assert found == TILED | {"a2": ("planes", "planes"), "a3": ("planes", "csr")}
    check_same(model, data)


def test_formats_that_differ() -> None:
    """A reader in blocks wants their tiles; a chain with a writer of another format is not worth tiles."""
    model = chain(bottlenecks())
    data, found = sparse(model, dict.fromkeys(ALL_CSR, "bsr"))
    assert found == {name: tuple(layout.replace("csr", "bsr") for layout in pair) for name, pair in TILED.items()}
    check_same(model, data)
    data, found = sparse(model, {"b3": "bsr"})
    assert found["b3"] == ("planes", "planes") and found["b2"] == ("planes", "planes")  # b2 would write in pieces
    assert found["a2"] == ("planes", "csr")
    check_same(model, data)


def test_layouts_survive_a_round_trip_and_are_made_anew() -> None:
    model = chain(bottlenecks())
    data, _ = sparse(model)
    again, found = sparse(operators.expand(onnx.load_from_string(data)))
    assert found == TILED
    check_same(model, again)


def test_every_combination_by_hand() -> None:
    """Both ends of each tensor agree, whatever they agree on: results stay."""
    model = chain(bottlenecks())
    data, _ = sparse(model)
    chains = {"a1.y": ["a1"], "b1.y": ["b1"], "ab": ["a3", "b3"], "c1.y": ["c1"]}
    readers: dict[str, list[str]] = {"a1.y": ["a2"], "b1.y": ["b2"], "ab": ["b1", "c1", "down"], "c1.y": ["c2"]}
    for layout in ("csr", "bsr"):
        for tensor, writers in chains.items():
            changed = onnx.load_from_string(data)
            for made in operators.nodes(changed):
                for names, key in ((writers, "y_layout"), (readers[tensor], "x_layout")):
                    if made.name in names:
                        next(a for a in made.attribute if a.name == key).s = layout.encode()
            del changed.metadata_props[:]
            check_same(model, changed.SerializeToString())


@pytest.mark.parametrize("key", ["x_layout", "y_layout"])
def test_unknown_layouts_are_refused(key: str) -> None:
    changed = onnx.load_from_string(sparse(chain(bottlenecks()))[0])
    made = next(operators.nodes(changed))
    next(a for a in made.attribute if a.name == key).s = b"tiles"
    with pytest.raises(FormatError, match=f"{made.name}: {key}: expected one of planes, csr, bsr, got b'tiles'"):
        operators.decode(changed)
    with pytest.raises(Exception, match=f"{key}: expected one of planes, csr, bsr, got tiles"):
        run(changed, {"x": normal(1, 16, *SIZE)}, library=True)


def test_depthwise_layers_have_planes_only() -> None:
    weight: Array = pruned((16, 1, 3, 3), 0.3)
    nodes = [node("Conv", "x w", "m", pads=[1] * 4, group=16, name="deep"), node("Conv", "m v", "y", name="point")]
    model = graph(nodes, {"x": ["N", 16, *SIZE]}, ["y"], {"w": weight, "v": pruned((8, 16, 1, 1), 0.5)})
    data, found = sparse(model)
    assert found == {"deep": ("planes", "planes"), "point": ("planes", "planes")}
    changed = onnx.load_from_string(data)
    next(a for a in next(operators.nodes(changed)).attribute if a.name == "y_layout").s = b"csr"
    with pytest.raises(Exception, match="expected planes for a depthwise convolution"):
        run(changed, {"x": normal(1, 16, *SIZE)}, library=True)
