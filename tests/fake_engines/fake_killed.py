"""An engine whose process is killed in its second run, the first timed one."""

import os
import signal
from itertools import count

from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.engines.onnxruntime import available, isa, version

MULTIPLIES_ZEROS, PLAIN_ONNX = True, True
__all__ = ["available", "isa", "version"]


def load(path, threads, feeds):
    run, runs = onnxruntime.load(path, threads, feeds), count()

    def fatal():
        if next(runs):
            os.kill(os.getpid(), signal.SIGKILL)
        return run()

    return fatal
