"""What `export` and `inspect` take: a run directory, a ticket, or an ONNX file; all become one ONNX model.

Only here, below the verbs, does exporting reach torch, and only for the first two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from onnx import ModelProto

from ticketkit.errors import ExportError, ModelError, TicketError
from ticketkit.inputs import IMAGE_KEY
from ticketkit.lower import read
from ticketkit.ticket import Ticket

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
    if isinstance(source, bytes | ModelProto):
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
    from ticketkit.capture import capture
    from ticketkit.search.imp import load_round

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


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    """[C, H, W], whether or not a batch stands before it; ModelError if it is neither."""
    if len(shape) not in (3, 4) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"input shape: expected 3 or 4 positive whole numbers such as 3,32,32, got {list(shape)}")
    return tuple(shape)[-3:]


def _require_torch(path: Path) -> None:
    if find_spec("torch") is None:
        raise ExportError(f"{path}: exporting a run or a ticket needs torch; pip install 'ticketkit[find]'")
