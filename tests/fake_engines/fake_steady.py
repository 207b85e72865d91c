"""An engine that is right, takes about 2 ms, and writes down when each of its runs began and ended."""

import os
import time

from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def load(path, threads, feeds):
    return load_as(__name__, path, threads, feeds)


def load_as(name, path, threads, feeds):
    run, log = onnxruntime.load(path, threads, feeds), open(os.environ["FAKE_ENGINE_LOG"], "a", buffering=1)  # noqa: SIM115

    def timed():
        start = time.monotonic()
        time.sleep(0.002)
        outputs = run()
        print(name, start, time.monotonic(), file=log)
        return outputs

    return timed
