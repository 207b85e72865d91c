"""An engine that cannot take the model and says so over two lines."""


from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def load(path, threads, feeds):
    raise ValueError("unsupported\noperator: Conv")
