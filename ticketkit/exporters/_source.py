"""What `export` and `inspect` take: a run directory, a ticket, or an ONNX file; all become one ONNX model.

Only here, below the verbs, does exporting reach torch, and only for the first two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from onnx import ModelProto

from ticketkit.errors import ExportError, ModelError, TicketError
from ticketkit.inputs import IMAGE_KEY
from ticketkit.lower import read
from ticketkit.ticket import Ticket

if TYPE_CHECKING:
    from torch import nn

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto


def load(source: Source, round: int | None = None, input_shape: Sequence[int] | None = None) -> ModelProto:
    """The model behind a source, with dense weights that hold exact zeros.

    Args:
        source: a run directory of `ticketkit find`, a ticket file (.safetensors) with weights, an ONNX file, its bytes, or a model.
        round: of a run directory; None: the last finished one.
        input_shape: [C, H, W] of the images, with batch or without; None: as the source states.

    Raises:
        ModelError, FormatError, TicketError: the source is missing, damaged or lacks something (the message says what).
    """
    if round is not None and (isinstance(source, bytes | ModelProto) or not Path(source).is_dir()):
        raise ExportError("--round chooses a round of a run directory; this source is no run directory, leave it out")
    if isinstance(source, ModelProto):
        return read(source.SerializeToString())
    if isinstance(source, bytes):
        return read(source)
    path = Path(source)
    if path.is_dir():
        return _from_run(path, round, input_shape)
    if path.suffix in (".safetensors", ".ticket"):
        return _from_ticket(path, input_shape)
    return read(path)


def _from_run(path: Path, round: int | None, input_shape: Sequence[int] | None) -> ModelProto:
    if not (path / "run.json").exists():
        raise ModelError(f"{path}: a folder without run.json; expected a run directory of `ticketkit find`, a ticket or an .onnx file")
    _require_torch(path)
    from ticketkit.search.imp import load_round

    module, config, _ = load_round(path, round)
    model = _capture(module, input_shape or config["input_shape"])
    rule = {key: config[key] for key in ("mean", "std", "classes")}
    model.metadata_props.add(key=IMAGE_KEY, value=json.dumps(rule))
    return model


def _from_ticket(path: Path, input_shape: Sequence[int] | None) -> ModelProto:
    ticket = Ticket.load(path)
    weights = ticket.merge()
    model = _stated(ticket, path, "model")
    shape = input_shape or _stated(ticket, path, "input_shape", "; give the input shape (--input-shape 3,32,32)")
    _require_torch(path)
    from ticketkit import models

    module = models.build(model, _classes(ticket, path), list(shape)[-2])
    models.assign(module, weights)
    return _capture(module, shape)


def _stated(ticket: Ticket, path: Path, key: str, advice: str = "; export the run directory instead") -> Any:
    if key not in ticket.meta:
        raise TicketError(f"{path}: the ticket does not state its {key.replace('_', ' ')}{advice}")
    return ticket.meta[key]


def _classes(ticket: Ticket, path: Path) -> int:
    """Number of classes: stated, else the width of the head the ticket names."""
    if "num_classes" in ticket.meta:
        return int(ticket.meta["num_classes"])
    for head in ticket.meta.get("head", []):
        if f"{head}.weight" in ticket.weights:
            return int(ticket.weights[f"{head}.weight"].shape[0])
    raise TicketError(f"{path}: the ticket states neither its number of classes nor its head; export the run directory instead")


def _require_torch(path: Path) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ExportError(f"{path}: exporting a run or a ticket needs torch; pip install 'ticketkit[find]'") from None


def _capture(module: nn.Module, input_shape: Sequence[int]) -> ModelProto:
    from ticketkit.capture import capture

    return read(capture(module, tuple(input_shape)[-3:]).SerializeToString())
