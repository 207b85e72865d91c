"""onnxruntime's CPU provider: dense, and the reference every other engine's output is compared with.

Given a ticketkit file it is fed the dense ONNX converted from it, like the other dense engines: the model-local function
bodies would fold to the same convolutions at load, but one file for all dense engines keeps load time and file size comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ticketkit.bench.engines import Arrays, Feeds

MULTIPLIES_ZEROS = True
PLAIN_ONNX = True


def available() -> tuple[bool, str]:
    return True, ""  # a dependency of the base install


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def isa() -> str:
    return "own choice"


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """A session of onnxruntime alone, all its graph optimisations on.

    Args:
        path: ONNX file, float32, of standard operators.
        threads: within one operator; operators run one after the other.
        feeds: input name -> array [N, ...] of the shape that input declares, N the batch.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order. onnxruntime checks names and shapes of the feeds only there.

    Raises:
        Exception: onnxruntime's own (they have no common base below it), if it cannot load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)  # type: ignore[no-any-return]
