"""Runs a batch of images in pieces: a few images at a time stay in cache from layer to layer, and threads need not wait for each other.

This is ordinary data parallelism: every piece runs through the whole network by itself. For which networks that gives the same outputs
is for `ticketkit.lower.batch` to say.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit.formats import Array

# Of inputs. Measured, two threads: ResNet-20 at 32 x 32, 12 KiB an image, loses with streams of 4 or 8 images and gains with 32, in pieces
# of 8 to 64 alike; at 224 x 224, 588 KiB, single images are best or as good as two, and batches of 8 gain.
PIECE_BYTES = 256 * 1024
IDLE = 8  # a cut gains 1.1 to 1.3 times: no more than this part of it may be lost to streams without work


class Streams:
    """A session, and the streams of one thread each that share a batch.

    The streams are N threads that use one further session at once: of one thread, with a copy of the weights, made for the first batch that
    is cut. Where the session itself has one thread it is the stream, and runs the pieces one after the other.
    """

    def __init__(self, session: Any, threads: int, single: Callable[[], Any]) -> None:
        """Args:
        session: an `onnxruntime.InferenceSession`.
        threads: how many streams.
        single: makes the same session on one thread, or gives that itself where it has one; None where batches may not be cut. Called at
            most once, for the first batch worth cutting.
        """
        self._session = session
        self._threads = threads
        self._make: Callable[[], Any] | None = single
        self._single: Any = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "ticketkit") if threads > 1 else None  # starts no thread before it has work

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Array], run_options: Any = None) -> list[Any]:
        """As `onnxruntime.InferenceSession.run`; all inputs and outputs have the batch on axis 0.

        The pieces, hence the outputs, depend on the sizes of batch and image and on `threads` only. A batch too small to be cut, and
        inputs that are no numpy arrays or of unequal batch, run whole.
        """
        arrays = [value for value in feed.values() if isinstance(value, np.ndarray) and value.ndim > 0]
        batch = len(arrays[0]) if len(arrays) == len(feed) > 0 else 0
        parts: list[slice] = []
        if batch > 1 and all(len(array) == batch for array in arrays):
            parts = pieces(batch, sum(array.nbytes for array in arrays) // batch, self._threads)
        single = self._one_thread() if len(parts) > 1 else None
        if single is None:
            whole: list[Any] = self._session.run(output_names, dict(feed), run_options)
            return whole

        def work(part: slice) -> list[Any]:
            outputs: list[Any] = single.run(output_names, {name: value[part] for name, value in feed.items()}, run_options)
            return outputs

        results = [work(part) for part in parts] if self._pool is None else _all(self._pool, work, parts)
        return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]

    def _one_thread(self) -> Any:
        with self._lock:
            if self._make is not None:
                self._single = self._make()
                self._make = None  # and the model it held
        return self._single


def pieces(batch: int, image_bytes: int, threads: int) -> list[slice]:
    """How a batch is cut.

    Args:
        batch: images, 1 or more.
        image_bytes: of the inputs of one image.
        threads: streams, 1 or more.

    Returns:
        The pieces, in order, of sizes that differ by at most one, within `PIECE_BYTES` or of one image. None where cutting would not gain:
        the streams would get less than `PIECE_BYTES` or two images each, or some would have to wait for others more than an eighth of the
        time.
    """
    each, idle = batch // threads, -batch % threads
    if each * image_bytes < PIECE_BYTES or each < 2 or idle * IDLE > batch:
        return []
    most = max(PIECE_BYTES // image_bytes, 1)
    count = min(threads * -(-batch // (threads * most)), batch)
    return [slice(i * batch // count, (i + 1) * batch // count) for i in range(count)]


def cores() -> int:
    """Physical cores this process may use. onnxruntime's default is those of the machine, whatever the affinity of the process."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
        except OSError:
            return len(allowed)
    return len(siblings)


def _all(pool: ThreadPoolExecutor, work: Callable[[slice], list[Any]], parts: Sequence[slice]) -> list[list[Any]]:
    """The results in order. After an error or Ctrl-C nothing more starts, and what runs ends before the caller goes on."""
    futures: list[Future[list[Any]]] = []
    try:
        futures.extend(pool.submit(work, part) for part in parts)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
