"""ticketkit: onnxruntime with the sparse operators registered; the only engine here that skips zeros.

A plain dense-with-zeros file is exported in memory by `InferenceSession`, and that is part of its load time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ticketkit.bench.engines import Arrays, Feeds
from ticketkit.errors import KernelError

MULTIPLIES_ZEROS = False
PLAIN_ONNX = False


def available() -> tuple[bool, str]:
    from ticketkit.runtime import native

    try:
        native.active_isa()
    except KernelError as error:
        return False, str(error)
    return True, ""


def version() -> str:
    from ticketkit import __version__

    import_module("ticketkit.session")  # and onnxruntime: as for every engine, importing is not the model's load time
    return __version__


def isa() -> str:
    from ticketkit.runtime import native

    return native.active_isa().name


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """An `InferenceSession` of ticketkit.

    Args:
        path: a file of `ticketkit export`, or any ONNX file, float32.
        threads: within one operator.
        feeds: input name -> array [N, ...] of the shape that input declares, N the batch.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order. Names and shapes of the feeds are checked only there (DataError).

    Raises:
        ModelError, FormatError: the file is missing, damaged or unsupported.
        KernelError: the native library is missing or cannot run here.
    """
    from ticketkit.session import InferenceSession

    session = InferenceSession(path, threads=threads)
    return lambda: session.run(None, feeds)
