"""OpenVINO on the CPU: dense, latency hint, one stream, shapes fixed to those of the feeds.

float32 is asked for by name: on CPUs with bf16 or AMX units OpenVINO would otherwise lower the precision, and its speed would
not be comparable. Its threads are not pinned, as nobody else's are: bound to a core that something else keeps busy, it would lose
through no fault of its own (seen: 70 times slower).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ticketkit.bench.engines import Arrays, Feeds

MULTIPLIES_ZEROS = True
PLAIN_ONNX = True


def available() -> tuple[bool, str]:
    return (True, "") if find_spec("openvino") else (False, "openvino is not installed (pip install 'ticketkit[bench]')")


def version() -> str:
    import openvino

    return str(openvino.__version__).partition("-")[0]


def isa() -> str:
    return "own choice"


def load(path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
    """The model compiled for the CPU at the shapes of the feeds.

    Args:
        path: ONNX file, float32, of standard operators.
        threads: of inference; one stream, so all of them work on one call.
        feeds: input name -> array [N, ...], N the batch; its shape becomes the model's. Shared with OpenVINO, not copied.

    Returns:
        The call to be timed: the outputs, each [N, ...], in graph order. They are OpenVINO's own buffers: the next call overwrites them.

    Raises:
        RuntimeError: OpenVINO cannot read or compile the model, or a feed names no input or has an impossible shape.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: list(request.infer(feeds, share_inputs=True, share_outputs=True).values())
