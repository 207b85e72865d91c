"""nn.Module, or a Ticket, to ONNX: evaluation mode, dynamic batch, dense weights with exact zeros, parameter names kept."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import torch
from onnx import ModelProto
from torch import nn

from ticketkit import models
from ticketkit.errors import ModelError, TicketError, first_line
from ticketkit.ticket import Ticket

OPSETS = range(18, 21)  # what torch's exporter writes itself; older ones it converts to, often in vain
BATCH = 2  # of the example: torch.export takes sizes 0 and 1 for constants


def capture(module: nn.Module, input_shape: Sequence[int], opset: int = 18) -> ModelProto:
    """The module's inference graph as ONNX.

    Args:
        module: takes one float32 tensor [N, *input_shape]; left as it was, training mode and all.
        input_shape: of one sample, [C, H, W] for images.
        opset: 18 to 20.

    Returns:
        A model with the input "input" [batch, *input_shape] and the outputs "output", "output_1", ...; initializers carry the
        module's parameter names; BatchNorm is folded by the exporter's optimizer.

    Raises:
        ModelError: unsupported opset, weights with NaN or infinity, an input shape the module does not take, or a module that
            torch.export cannot trace.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset}: expected {OPSETS.start} to {OPSETS.stop - 1}; choose one of these")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or infinity; the network is broken, train or load it again")
    frozen = copy.deepcopy(module).cpu().eval()
    example = torch.zeros(BATCH, *input_shape)
    try:
        with torch.no_grad():
            frozen(example)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(f"the network does not take an input of shape {list(example.shape)}: {first_line(error)}") from None
    try:
        with _quiet():
            program = torch.onnx.export(
                frozen,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["input"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise ModelError(f"torch.export cannot trace the network: {cause[0] if cause else 'unknown cause'}") from None
    assert program is not None  # dynamo=True always returns one
    return _tidy(program.model_proto)


def capture_ticket(ticket: Ticket, input_shape: Sequence[int] | None = None) -> ModelProto:
    """The ticket's model with its rewind weights under the masks, as ONNX.

    Args:
        ticket: with weights, and the model's name in its metadata.
        input_shape: [C, H, W]; None: as the ticket states.

    Raises:
        TicketError: the ticket lacks weights, model, image size, or anything to tell the number of classes from.
        ModelError: the weights do not fit the model.
    """
    weights = ticket.merge()
    shape = input_shape or ticket.meta.get("input_shape")
    classes = ticket.meta.get("num_classes") or next((len(weights[w]) for w in _heads(ticket) if w in weights), None)
    if "model" not in ticket.meta or classes is None:
        raise TicketError("the ticket does not name its model and head; export the run directory instead")
    if shape is None:
        raise TicketError("the ticket does not state its input shape; give it (--input-shape 3,32,32)")
    module = models.build(ticket.meta["model"], classes, shape[-2])
    models.assign(module, weights)
    return capture(module, shape)


def _heads(ticket: Ticket) -> list[str]:
    return [f"{head}.weight" for head in ticket.meta.get("head", [])]


def _tidy(model: ModelProto) -> ModelProto:
    """Plain output names, and none of the stack traces of this machine that torch writes into its metadata."""
    outputs = {info.name: "output" if i == 0 else f"output_{i}" for i, info in enumerate(model.graph.output)}
    for node in model.graph.node:
        node.output[:] = [outputs.get(name, name) for name in node.output]
        node.input[:] = [outputs.get(name, name) for name in node.input]
    for info in model.graph.output:
        info.name = outputs[info.name]
    for message in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del message.metadata_props[:]
        message.ClearField("doc_string")
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter prints, warns and logs about its own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
