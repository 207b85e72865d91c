"""The clean graph every later step works on: constants folded, identities gone, BatchNorm and biases folded into the convolutions.

ONNX Runtime's own offline optimizer does it, at the level where it still writes standard ONNX: the engine that will run the file is the
best judge of what it folds. Folding multiplies weights by a scale per channel, so a pruned weight stays exactly zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto

from ticketkit.errors import ModelError, first_line
from ticketkit.lower import operators
from ticketkit.lower.graph import Dim, Graph, every_node, shapes
from ticketkit.lower.storage import save, skeleton, split

CPU = ["CPUExecutionProvider"]
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def clean(model: ModelProto) -> ModelProto:
    """The folded graph, computing what the model computes; layers are named after their weights where those have names.

    Args:
        model: from `ticketkit.lower.read`; nodes of domain ai.ticketkit are written out as dense ones first.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    if any(operators.nodes(model)):
        model = operators.expand(model)
    bare, large = split(model)
    _name_layers(bare)
    return _tidy(_optimized(bare, large), model)


def concrete_shapes(model: ModelProto, fixed: dict[str, tuple[int, ...]]) -> dict[str, tuple[Dim, ...]]:
    """Shapes of the tensors of a clean model once its inputs have these shapes.

    Where ONNX cannot tell them all because the graph computes sizes, onnxruntime does: it folds whatever depends on them alone.
    """
    known = shapes(model, fixed)
    tensors = [name for node in model.graph.node if node.op_type in LINEAR for name in (node.input[0], node.output[0])]
    if all(name in known and all(isinstance(d, int) for d in known[name]) for name in tensors):
        return known
    bare = skeleton(model)
    for info in bare.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, fixed.get(info.name, ()), strict=False):
            dim.dim_value = size
    try:
        return known | shapes(_optimized(bare, [], without=["MatMulAddFusion"]), {})  # products keep their names
    except (ModelError, onnx.shape_inference.InferenceError):  # sizes that the network does not take
        return known


def _optimized(bare: ModelProto, large: Iterable[TensorProto], without: Sequence[str] = ()) -> ModelProto:
    """What onnxruntime makes of a model that was split, but for the optimizers of these names."""
    with tempfile.TemporaryDirectory(prefix="ticketkit-", ignore_cleanup_errors=True) as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "clean.onnx"
        save(bare, large, source)
        try:
            onnxruntime.InferenceSession(source, _options(target), providers=CPU, disabled_optimizers=without)
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            raise ModelError(f"onnxruntime cannot load the model: {reason(error)}") from None
        return onnx.load(target)


def _options(target: Path) -> Any:
    """Optimize, write to `target` with large weights in a file beside it, and do no more than that."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.stem}.weights")
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def reason(error: Exception) -> str:
    """The readable part of an onnxruntime error: its first line, without codes and build paths."""
    return first_line(error).rsplit("] : ", 1)[-1]


def _name_layers(model: ModelProto) -> None:
    """Name each layer after its weight, `layer1.0.conv1` for `layer1.0.conv1.weight`; folding renames weights but keeps nodes."""
    makers = {output: node for node in model.graph.node for output in node.output}
    taken = {node.name for node in model.graph.node if node.op_type not in LINEAR}
    for position, node in enumerate(model.graph.node):
        if node.op_type not in LINEAR:
            continue
        weight = _through_identity(node.input[1], makers)
        by_node = node.name.strip("/").removesuffix(f"/{node.op_type}").replace("/", ".")
        name = weight.removesuffix(".weight") if weight.endswith(".weight") else by_node or f"{node.op_type}_{position}"
        while name in taken:  # a weight shared by several layers names the first
            name = f"{name}_{position}"
        taken.add(name)
        node.name = name


def _through_identity(name: str, makers: dict[str, NodeProto]) -> str:
    while name in makers and makers[name].op_type in ("Identity", "Transpose"):
        name = makers[name].input[0]
    return name


def _rename_weights(model: ModelProto) -> None:
    """`NAME.weight` and `NAME.bias` again for the layer NAME, where folding made up other names; shared ones keep theirs."""
    view = Graph(model)
    tensors, reads = view.constants, view.consumers
    taken = {name for node in every_node(model.graph) for name in (*node.input, *node.output)}
    for node in (node for node in model.graph.node if node.op_type in LINEAR):
        for i, (old, part) in enumerate(zip(node.input[1:], ("weight", "bias"), strict=False), start=1):
            wanted = f"{node.name}.{part}"
            if old in tensors and len(reads[old]) == 1 and wanted not in taken:
                taken.add(wanted)
                tensors[old].name = wanted
                node.input[i] = wanted


def _reorder(cleaned: ModelProto, model: ModelProto) -> None:
    """Nodes in the order of the model, by the tensors they write: onnxruntime keeps it only where it writes weights into the same file."""
    places = {name: at for at, node in enumerate(model.graph.node) for name in node.output}
    nodes, readers = list(cleaned.graph.node), Graph(cleaned).consumers
    needs: dict[int, set[int]] = {at: set() for at in range(len(nodes))}
    for at, node in enumerate(nodes):
        for reader in (reader for name in node.output for reader in readers.get(name, ()) if reader >= 0):
            needs[reader].add(at)
    sorter, ready, order = TopologicalSorter(needs), list[tuple[int, int]](), list[NodeProto]()
    sorter.prepare()
    while sorter.is_active():
        for at in sorter.get_ready():
            heappush(ready, (places.get(nodes[at].output[0], -1), at))
        _, at = heappop(ready)
        order.append(nodes[at])
        sorter.done(at)
    del cleaned.graph.node[:]
    cleaned.graph.node.extend(order)


def _tidy(cleaned: ModelProto, model: ModelProto) -> ModelProto:
    """Undo what the optimizer adds: imports nobody uses, orders of its own, suffixes of names."""
    graph = cleaned.graph
    _reorder(cleaned, model)
    for node in graph.node:
        node.name = node.name.removesuffix("/MatMulAddFusion")
    _rename_weights(cleaned)
    graph.initializer.sort(key=lambda t: t.name)
    del graph.value_info[:]
    used = {node.domain for node in every_node(graph)} | {""}
    imports = [o for o in cleaned.opset_import if o.domain in used]
    del cleaned.opset_import[:], cleaned.metadata_props[:]
    cleaned.opset_import.extend(imports)
    cleaned.metadata_props.extend(entry for entry in model.metadata_props if entry.key not in operators.OWN)
    for message in (*graph.node, *graph.input, *graph.output):  # torch writes stack traces of the exporting machine here
        message.ClearField("doc_string")
        del message.metadata_props[:]
    graph.ClearField("doc_string")
    return cleaned
