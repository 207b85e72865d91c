"""A right engine whose idle thread never rests: it writes down every half millisecond in which it was awake."""

import os
import threading
import time

from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def spin():
    with open(os.environ["FAKE_ENGINE_LOG"], "a", buffering=1) as log:
        while True:
            now = time.monotonic()
            print(__name__, now, now, file=log)
            time.sleep(0.0005)


def load(path, threads, feeds):
    threading.Thread(target=spin, daemon=True).start()
    return onnxruntime.load(path, threads, feeds)
