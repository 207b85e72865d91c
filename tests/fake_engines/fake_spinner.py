"""A right engine with a thread that never rests: it writes down every half millisecond in which it was awake."""

import os
import threading
import time

from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


class Spinner(threading.Thread):
    stamps = 0

    def run(self):
        with open(os.environ["FAKE_ENGINE_LOG"], "a", buffering=1) as log:
            while True:
                now = time.monotonic()
                print(__name__, now, now, file=log)
                self.stamps += 1
                time.sleep(0.0005)


def load(path, threads, feeds):
    run, spinner = onnxruntime.load(path, threads, feeds), Spinner(daemon=True)
    spinner.start()

    def spun():
        enough = spinner.stamps + 3
        while spinner.stamps < enough:
            time.sleep(0.0005)
        return run()

    return spun
