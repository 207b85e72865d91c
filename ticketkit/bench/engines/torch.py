"""PyTorch eager on the CPU: dense, what a model costs before anybody deploys it.

The ONNX graph is rebuilt as a torch module by `runtime.torch_graph`; an operator unknown there is an error, not a wrong row.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx

from ticketkit.bench.engines import Arrays, Feeds

MULTIPLIES_ZEROS = True
PLAIN_ONNX = True


def available() -> tuple[bool, str]:
    return (True, "") if find_spec("torch") else (False, "torch is not installed (pip install 'ticketkit[find]')")


def version() -> str:
    import torch

    return str(torch.__version__)


def isa() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability()).lower()


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """The graph rebuilt as a torch module, run eagerly in inference mode.

    Args:
        path: ONNX file, float32, of the operators that `runtime.torch_graph` knows.
        threads: of this whole process: `torch.set_num_threads`.
        feeds: arrays [N, ...] by input name, N the batch, in the order of the graph inputs: they are handed over by position. Shared
            with torch, not copied.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order. Wrong shapes show only there (torch's RuntimeError).

    Raises:
        ModelError: an operator or a padding rule unknown to `runtime.torch_graph`.
    """
    import torch

    from ticketkit.runtime.torch_graph import as_module

    torch.set_num_threads(threads)
    module, inputs = as_module(onnx.load(str(path))), [torch.from_numpy(array) for array in feeds.values()]

    def run() -> Arrays:
        with torch.inference_mode():
            return [y.numpy() for y in module(*inputs)]

    return run
