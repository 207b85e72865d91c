"""ExecuTorch's XNNPACK delegate: dense, the way of newer torch to phones. The program of `ticketkit export --format executorch`, made for
the batch that is measured, in ExecuTorch's own runtime.

Its XNNPACK has a sparse path, which ExecuTorch never asks for: zeros are multiplied like all others.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ticketkit.bench.engines import Arrays, Feeds
from ticketkit.errors import ModelError

MULTIPLIES_ZEROS = True
PLAIN_ONNX = True


def available() -> tuple[bool, str]:
    if not find_spec("torch"):
        return False, "torch is not installed (pip install 'ticketkit[executorch]')"
    if not find_spec("executorch"):
        return False, "executorch is not installed (pip install 'ticketkit[executorch]')"
    return True, ""


def version() -> str:
    return installed("executorch")


def isa() -> str:
    return "own choice"


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """The graph lowered to XNNPACK, as much of it as that takes, for inputs of the feeds' shapes, and loaded.

    Args:
        path: ONNX file, float32, of the operators that `runtime.torch_graph` knows.
        threads: of ExecuTorch's pool, which is this process's.
        feeds: arrays [N, ...] by input name, N the batch, in the order of the graph inputs: they are handed over by position.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order.

    Raises:
        ExportError: executorch does not fit the torch installed, cannot lower the network, or XNNPACK takes over nothing of it.
        ModelError: an operator unknown to `runtime.torch_graph`, or a pool of another size than asked for.
    """
    import torch

    from ticketkit.exporters import executorch as target
    from ticketkit.lower import lower, read

    data = target.lowered(lower(read(path)).model, list(feeds.values()))
    program, inputs = target.method(data), [torch.from_numpy(array) for array in feeds.values()]
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    if (size := portable_lib._threadpool_get_thread_count()) != threads:
        raise ModelError(f"executorch: expected a pool of {threads} threads, got {size}; its times would not compare")

    def run(held: bytes = data) -> Arrays:  # the program reads its weights from there
        return [np.asarray(y) for y in program.execute(inputs)]

    return run
