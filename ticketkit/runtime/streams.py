"""Runs a batch of images in pieces: a few images at a time stay in cache from layer to layer, and threads need not wait for each other.

This is ordinary data parallelism: every piece runs through the whole network by itself. For which networks that gives the same outputs
is for `ticketkit.lower.batch` to say.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit.formats import Array

# Of inputs, measured on ResNet-20 at 32 x 32, 12 KiB an image: on two threads pieces of 1 to 3 images cost more in calls and wake-ups than
# they save, those of 4 and more gain, those of 8 to 64 alike. At 224 x 224 single images are best, or as good as two.
PIECE_BYTES, LEAST_BYTES = 256 * 1024, 48 * 1024


class Streams:
    """A session, and the streams of one thread each that share a batch.

    The streams are N threads that use one further session at once: of one thread, with a copy of the weights, made for the first batch that
    is cut. Where the session itself has one thread it is the stream, and runs the pieces one after the other.
    """

    def __init__(self, session: Any, threads: int, single: Callable[[], Any] | None) -> None:
        """Args:
        session: an `onnxruntime.InferenceSession`.
        threads: how many streams.
        single: makes the same session on one thread; called at most once. None: the session itself has one thread, and so has `threads`.
        """
        self._session = session
        self._threads = threads
        self._make = single
        self._single = session
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "ticketkit") if threads > 1 else None  # starts no thread before it has work

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Array], run_options: Any = None) -> list[Any]:
        """As `onnxruntime.InferenceSession.run`; all inputs and outputs have the batch on axis 0.

        The pieces, hence the outputs, depend on the sizes of batch and image and on `threads` only. A batch too small to be cut, and
        inputs that are no numpy arrays or of unequal batch, run whole.
        """
        arrays = [value for value in feed.values() if isinstance(value, np.ndarray) and value.ndim > 0]
        batch = len(arrays[0]) if len(arrays) == len(feed) > 0 else 0
        parts, rest = [slice(0, batch)], 0
        if batch > 1 and all(len(array) == batch for array in arrays):
            parts, rest = pieces(batch, sum(array.nbytes for array in arrays) // batch, self._threads)
        if len(parts) < 2:
            whole: list[Any] = self._session.run(output_names, dict(feed), run_options)
            return whole

        def work(session: Any, part: slice) -> list[Any]:
            outputs: list[Any] = session.run(output_names, {name: value[part] for name, value in feed.items()}, run_options)
            return outputs

        one = partial(work, self._one_thread())
        results = [one(part) for part in parts] if self._pool is None else _all(self._pool, one, parts)
        if rest:
            results.append(work(self._session, slice(batch - rest, batch)))  # last, as onnxruntime's threads spin for a while afterwards
        return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]

    def _one_thread(self) -> Any:
        with self._lock:
            if self._make is not None:
                self._single = self._make()
                self._make = None  # and the model it held
        return self._single


def pieces(batch: int, image_bytes: int, threads: int) -> tuple[list[slice], int]:
    """How a batch is cut.

    Args:
        batch: images, 1 or more.
        image_bytes: of the inputs of one image.
        threads: streams, 1 or more.

    Returns:
        The pieces for the streams, as many for each, all within one image of each other and within `PIECE_BYTES` or one image; and how
        many images, fewer than `threads`, are left at the end. No pieces, and all left, where a stream would get less than `LEAST_BYTES`.
    """
    each, rest = divmod(batch, threads)
    if each * image_bytes < LEAST_BYTES:
        return [], batch
    most = min(max(PIECE_BYTES // image_bytes, 1), each)
    count = threads * -(-each // most)
    ends = [i * (batch - rest) // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)], rest


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
