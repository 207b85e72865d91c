"""An engine that answers quickly, and wrongly."""


from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def load(path, threads, feeds):
    run = onnxruntime.load(path, threads, feeds)
    return lambda: [y * 1.01 for y in run()]
