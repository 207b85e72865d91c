"""ticketkit: onnxruntime with the sparse operators registered; the only engine here that skips zeros.

A plain dense-with-zeros file is exported in memory by `InferenceSession`, and that is part of its load time.
"""

from __future__ import annotations

from collections.abc import Callable
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

    return __version__


def isa() -> str:
    from ticketkit.runtime import native

    return native.active_isa().name


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    from ticketkit.session import InferenceSession

    session = InferenceSession(path, threads=threads)
    return lambda: session.run(None, feeds)
