"""XNNPACK through PyTorch: dense, the engine of phones (`torch.backends.xnnpack`), as `optimize_for_mobile` sets it up.

The traced module's convolutions become prepacked XNNPACK operators with fused clamps; the input is channels_last, XNNPACK's
own layout. PyTorch 2.12 is the last line that carries it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx

from ticketkit.bench.engines import Arrays, Feeds
from ticketkit.errors import ModelError

MULTIPLIES_ZEROS = True
PLAIN_ONNX = True
LAST_LINE = "this torch is built without XNNPACK; 2.12 is the last line that has it (pip install 'torch<2.13')"


def available() -> tuple[bool, str]:
    if not find_spec("torch"):
        return False, "torch is not installed (pip install 'ticketkit[find]')"
    try:
        from torch.backends import xnnpack
    except ImportError:
        return False, LAST_LINE
    return (True, "") if xnnpack.enabled else (False, LAST_LINE)


def version() -> str:
    import torch

    return f"torch {torch.__version__}"


def isa() -> str:
    return "own choice"


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """The graph rebuilt as a torch module, traced on the feeds, with XNNPACK's operators put in where it has them.

    Args:
        path: ONNX file, float32, of the operators that `runtime.torch_graph` knows.
        threads: of this whole process: `torch.set_num_threads`.
        feeds: arrays [N, ...] by input name, N the batch, in the order of the graph inputs: they are handed over by position. Images
            [N, C, H, W] are turned to channels_last here, untimed.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order, contiguous whatever order XNNPACK left them in.

    Raises:
        ModelError: an operator or a padding rule unknown to `runtime.torch_graph`, or XNNPACK took over no operator.
        RuntimeError: torch cannot trace the module, for example on feeds of the wrong shape.
    """
    import torch
    from torch.utils.mobile_optimizer import optimize_for_mobile

    from ticketkit.runtime.torch_graph import as_module

    torch.set_num_threads(threads)  # sets the size of XNNPACK's pool too
    tensors = [torch.from_numpy(array) for array in feeds.values()]
    inputs = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still the only way to XNNPACK
        traced = torch.jit.trace(as_module(onnx.load(str(path))), tuple(inputs), check_trace=False)
        mobile = optimize_for_mobile(traced)
    if not any(node.kind().startswith("prepacked::") for node in mobile.graph.nodes()):
        raise ModelError("XNNPACK took over no operator of this model; a row named xnnpack would time plain torch")

    def run() -> Arrays:
        with torch.inference_mode():
            return [y.contiguous().numpy() for y in mobile(*inputs)]

    return run
