"""What `export` and `inspect` take: a run directory, a ticket, a checkpoint, a torch module, or an ONNX file; all become one ONNX model.

Only here, below the verbs, does exporting reach torch to make a model, and never for ONNX.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from onnx import ModelProto

from ticketkit.errors import ExportError, ModelError, TicketError
from ticketkit.exporters._check import Runner
from ticketkit.inputs import IMAGE_KEY
from ticketkit.lower import read
from ticketkit.ticket import Ticket

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ticketkit.capture import Captured

Source: TypeAlias = "str | os.PathLike[str] | bytes | ModelProto | nn.Module"
Examples: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".bin")  # safetensors hold tickets, too


@dataclass(frozen=True, eq=False)
class Original:
    """What is exported.

    Attributes:
        model: dense weights that hold exact zeros.
        runners: how it runs where it came from, by engine, to be compared with.
    """

    model: ModelProto
    runners: Mapping[str, Runner] = field(default_factory=dict)


def load(
    source: Source,
    round: int | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    example_inputs: Examples | None = None,
    model: str | None = None,
    classes: int | None = None,
) -> Original:
    """The model behind a source.

    Args:
        source: a run directory of `ticketkit find`, a ticket file (.safetensors) with weights, an ONNX file, its bytes, or a model; a torch
            module; a checkpoint file.
        round: of a run directory; None: the last finished one.
        input_shape: [C, H, W] of the images, with batch or without; None: as the source states, of a checkpoint as its network was
            published for.
        example_inputs: of a module, see `ticketkit.export`.
        model, classes: of a checkpoint: name of its network, and width of its head; None: what it holds.

    Raises:
        ModelError, FormatError, TicketError: the source is missing, damaged or lacks something (the message says what).
        ExportError: an argument that is for another kind of source.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if round is not None and (path is None or not path.is_dir()):
        raise ExportError("--round chooses a round of a run directory; this source is no run directory, leave it out")
    if model is not None and (path is None or path.is_dir()):
        raise ExportError("--model names the network of a checkpoint file; this source is no file, leave it out")
    if classes is not None and model is None:
        raise ExportError("--classes goes with the --model of a checkpoint; leave it out")
    if example_inputs is not None and not _is_module(source):
        raise ExportError("example_inputs are those of a torch module; this source is none, leave them out")
    if path is None:
        return _from_memory(source, input_shape, example_inputs)
    if path.is_dir():
        return Original(_from_run(path, round, input_shape))
    if model is not None:
        return _from_checkpoint(path, model, classes, input_shape)
    if path.suffix in CHECKPOINTS and path.is_file():
        raise ModelError(f"{path}: a checkpoint does not say what network it is of; name it, --model resnet50")
    if path.suffix in (".safetensors", ".ticket"):
        return Original(_from_ticket(path, input_shape))
    return Original(read(path))


def _from_memory(source: Any, input_shape: Sequence[int] | None, example_inputs: Examples | None) -> Original:
    if isinstance(source, bytes | ModelProto):
        return Original(read(source))
    if not _is_module(source):
        raise ModelError(f"expected a path, the bytes of an ONNX file, a ModelProto or a torch module, got a {type(source).__name__}")
    if example_inputs is None and input_shape is None:
        raise ModelError("a torch module does not state its inputs; give example_inputs=..., or input_shape=(3, 224, 224)")
    from ticketkit.capture import trace, trace_images

    return _original(trace_images(source, _image(input_shape or ())) if example_inputs is None else trace(source, example_inputs))


def _from_checkpoint(path: Path, model: str, classes: int | None, input_shape: Sequence[int] | None) -> Original:
    _require_torch(path)
    from ticketkit.capture import image_shape, restore, trace_images

    shape = _image(input_shape or image_shape(model))
    return _original(trace_images(restore(path, model, classes, shape[-2]), shape))


def _original(captured: Captured) -> Original:
    return Original(read(captured.model), {"the torch module": captured.run})


def _from_run(path: Path, round: int | None, input_shape: Sequence[int] | None) -> ModelProto:
    if not (path / "run.json").exists():
        raise ModelError(f"{path}: a folder without run.json; expected a run directory of `ticketkit find`, a ticket or an .onnx file")
    _require_torch(path)
    from ticketkit.capture import capture
    from ticketkit.search.find import load_round

    module, config, _ = load_round(path, round)
    model = capture(module, _image(input_shape or config["input_shape"]))
    rule = {key: config[key] for key in ("mean", "std", "classes")}
    model.metadata_props.add(key=IMAGE_KEY, value=json.dumps(rule))
    return read(model.SerializeToString())


def _from_ticket(path: Path, input_shape: Sequence[int] | None) -> ModelProto:
    ticket = Ticket.load(path)
    _require_torch(path)
    from ticketkit.capture import capture_ticket

    try:
        model = capture_ticket(ticket, None if input_shape is None else _image(input_shape))
    except TicketError as error:
        raise TicketError(f"{path}: {error}") from None
    return read(model.SerializeToString())


def _is_module(source: Any) -> bool:
    """Whether it is a torch module; there can be none where nobody has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    """[C, H, W], whether or not a batch stands before it; ModelError if it is neither."""
    if len(shape) not in (3, 4) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"input shape: expected 3 or 4 positive whole numbers such as 3,32,32, got {list(shape)}")
    return tuple(shape)[-3:]


def _require_torch(path: Path) -> None:
    if find_spec("torch") is None:
        raise ExportError(f"{path}: exporting a run, a ticket or a checkpoint needs torch; pip install 'ticketkit[find]'")
