"""The clean graph every later step works on: constants folded, identities gone, BatchNorm and biases folded into the convolutions.

ONNX Runtime's own offline optimizer does it, at the level where it still writes standard ONNX: the engine that will run the file is the
best judge of what it folds. Folding multiplies weights by a scale per channel, so a pruned weight stays exactly zero.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto

from ticketkit.errors import ModelError, first_line
from ticketkit.lower import operators

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def clean(model: ModelProto) -> ModelProto:
    """The folded graph, computing what the model computes; layers are named after their weights where those have names.

    Args:
        model: from `ticketkit.lower.read`; nodes of domain ai.ticketkit are written out as dense ones first.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    model = operators.expand(model)
    _name_layers(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory(prefix="ticketkit-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "clean.onnx")
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            raise ModelError(f"onnxruntime cannot load the model: {reason(error)}") from None
        cleaned = onnx.load(options.optimized_model_filepath)
    return _tidy(cleaned, model)


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


def _rename_weights(graph: GraphProto) -> None:
    """`NAME.weight` and `NAME.bias` again for the layer NAME, where folding made up other names; shared ones keep theirs."""
    reads = Counter(name for node in graph.node for name in node.input)
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in (node for node in graph.node if node.op_type in LINEAR):
        for i, (old, part) in enumerate(zip(node.input[1:], ("weight", "bias"), strict=False), start=1):
            wanted = f"{node.name}.{part}"
            if old in tensors and reads[old] == 1 and wanted not in taken:
                taken.add(wanted)
                tensors[old].name = wanted
                node.input[i] = wanted


def _tidy(cleaned: ModelProto, model: ModelProto) -> ModelProto:
    """Undo what the optimizer adds: imports nobody uses, an order of initializers that changes from run to run, suffixes of names."""
    graph = cleaned.graph
    for node in graph.node:
        node.name = node.name.removesuffix("/MatMulAddFusion")
    _rename_weights(graph)
    tensors = sorted(graph.initializer, key=lambda t: t.name)
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensors)
    used = {node.domain for node in graph.node} | {""}
    imports = [o for o in cleaned.opset_import if o.domain in used]
    del cleaned.opset_import[:], cleaned.metadata_props[:]
    cleaned.opset_import.extend(imports)
    cleaned.metadata_props.extend(entry for entry in model.metadata_props if entry.key not in operators.OWN)
    for message in (*graph.node, *graph.input, *graph.output):  # torch writes stack traces of the exporting machine here
        message.ClearField("doc_string")
        del message.metadata_props[:]
    graph.ClearField("doc_string")
    return cleaned
