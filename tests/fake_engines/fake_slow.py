"""A right but slow engine: dense, at least 30 ms a run. It prints, as libraries do."""

import time

from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def load(path, threads, feeds):
    print("a banner on standard output")
    run = onnxruntime.load(path, threads, feeds)

    def slow():
        print("still talking")
        time.sleep(0.03)
        return run()

    return slow
