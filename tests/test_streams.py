"""Batches in pieces: how they are cut, and that outputs, errors and Ctrl-C are those of the whole. test_batch: which models allow it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from batches import CHANNELS, sparse_model, whole
from graphs import Array, Dims, conv_net, node, normal
from hypothesis import given
from hypothesis import strategies as st
from onnx import NodeProto

from ticketkit.errors import DataError, ModelError
from ticketkit.exporters.onnx import finish
from ticketkit.lower.batch import independent
from ticketkit.runtime import streams
from ticketkit.runtime.streams import IDLE, PIECE_BYTES, Streams, cores, pieces
from ticketkit.session import InferenceSession

# What is cut, and where


@given(st.integers(1, 300), st.integers(0, 2**20), st.integers(1, 9))
def test_pieces(batch: int, image_bytes: int, threads: int) -> None:
    parts = pieces(batch, image_bytes, threads)
    if batch // threads < 2 or batch // threads * image_bytes < PIECE_BYTES or -batch % threads > batch / IDLE:
        assert not parts
        return
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == batch
    sizes = {part.stop - part.start for part in parts}
    assert min(sizes) > 0 and max(sizes) - min(sizes) < 2
    assert len(parts) % threads == 0 or sizes == {1}
    assert all(size == 1 or size * image_bytes <= PIECE_BYTES for size in sizes)


def test_the_cores_of_this_process() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


# Runs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each batch was cut into, 0 for whole."""
    counts = []

    def spy(batch: int, image_bytes: int, threads: int) -> list[slice]:
        parts = pieces(batch, 1 << 20, threads)  # as if images were large
        counts.append(len(parts))
        return parts

    monkeypatch.setattr(streams, "pieces", spy)
    return counts


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2, 4, 6, 7, 9, 23])
def test_bit_for_bit(batch: int, threads: int | None, asked: list[int]) -> None:
    model = sparse_model()
    x = normal(batch, CHANNELS, 6, 6)
    session = InferenceSession(model.SerializeToString(), threads=threads)
    first = session.run(None, {"x": x})
    np.testing.assert_array_equal(first[0], whole(model, x))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], first[0])
    cut = {1: (2, 4, 6, 7, 9, 23), 2: (4, 6, 9, 23), 3: (6, 9, 23)}
    if threads:
        assert asked == ([batch if batch in cut[threads] else 0] * 2 if batch > 1 else [])


def test_a_network(asked: list[int]) -> None:
    """Dense operators round as they like; the tolerance is that of tests/test_session.py."""
    model = conv_net(0.9, channels=64)
    x = normal(9, 3, 32, 32)
    session = InferenceSession(model.SerializeToString(), threads=2)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], whole(model, x), atol=3e-5, rtol=0)
    assert asked == [9]


def test_outputs_and_inputs_by_name(asked: list[int]) -> None:
    model = sparse_model(node("Sub", "b x", "y"))
    for info in (model.graph.input.add(), model.graph.output.add()):
        info.CopyFrom(model.graph.input[0])
    model.graph.input[1].name, model.graph.output[1].name, model.graph.node[-1].input[1] = "x2", "a", "x2"
    assert independent(model)
    session = InferenceSession(model.SerializeToString(), threads=2)
    feed = {"x2": normal(4, CHANNELS, 6, 6, seed=1), "x": normal(4, CHANNELS, 6, 6)}
    y, a = session.run(None, feed)
    for names in (["a"], ["a", "y"], ["y", "y"]):
        for name, output in zip(names, session.run(names, feed), strict=True):
            np.testing.assert_array_equal(output, {"y": y, "a": a}[name])
    assert asked == [4] * 4
    np.testing.assert_array_equal(session.run(None, feed, onnxruntime.RunOptions())[0], y)
    with pytest.raises(ModelError, match="cannot run the model"):  # batches that differ are onnxruntime's to judge
        session.run(None, {**feed, "x2": feed["x2"][:3]})
    assert asked == [4] * 5


def test_a_slice_of_memory(asked: list[int]) -> None:
    model, x = sparse_model(), normal(4, 6, 6, CHANNELS).transpose(0, 3, 1, 2)[::-1]
    np.testing.assert_array_equal(InferenceSession(model.SerializeToString(), threads=2).run(None, {"x": x})[0], whole(model, x.copy()))
    assert asked == [4]


MEAN_OVER_THE_BATCH = node("ReduceMean", "b c", "m", keepdims=1), node("Sub", "b m", "y")
REFUSED: dict[str, Callable[[], InferenceSession]] = {
    "own options": lambda: InferenceSession(sparse_model().SerializeToString(), onnxruntime.SessionOptions(), threads=2),
    "dense": lambda: InferenceSession(conv_net(0.0).SerializeToString(), threads=2),
    "mixed": lambda: InferenceSession(sparse_model(*MEAN_OVER_THE_BATCH, constants={"c": np.array([0])}).SerializeToString(), threads=2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_whole(name: str, asked: list[int]) -> None:
    session = REFUSED[name]()
    shape = [d if isinstance(d, int) else 4 for d in session.get_inputs()[0].shape]
    assert len(session.run(None, {"x": normal(*shape)})[0]) == 4
    assert asked == []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads each onnxruntime session has, in the order they are made."""
    counts: list[int] = []
    original = onnxruntime.InferenceSession

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(args[1].intra_op_num_threads)
        return original(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    return counts


def unsealed(*tail: NodeProto) -> bytes:
    return sparse_model(*tail).SerializeToString()


def sealed(*tail: NodeProto) -> bytes:
    """As `export` writes it: loaded without a look inside, which is had when a batch is first to be cut."""
    return finish(sparse_model(*tail))


@pytest.mark.parametrize("content", [unsealed, sealed])
def test_one_copy_of_the_weights_until_needed(content: Callable[[], bytes], made: list[int], asked: list[int]) -> None:
    data = content()
    one, two = InferenceSession(data, threads=1), InferenceSession(data, threads=2)
    for batch in (4, 1, 4, 6):
        for session in (one, two):
            session.run(None, {"x": normal(batch, CHANNELS, 6, 6)})
            assert made == ([1, 2] if session is one and len(asked) < 2 else [1, 2, 1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sealed_file(threads: int, made: list[int], asked: list[int], tmp_path: Path) -> None:
    """Cut where its images are apart; run whole where they are not, and where another file has taken its place since."""
    x, path = normal(4, CHANNELS, 6, 6), tmp_path / "sealed.onnx"
    path.write_bytes(sealed())
    expected = whole(sparse_model(), x)
    made.clear()
    cut, later = InferenceSession(path, threads=threads), InferenceSession(path, threads=threads)
    np.testing.assert_array_equal(cut.run(None, {"x": x})[0], expected)
    path.write_bytes(finish(sparse_model(node("Tanh", "b", "y"))))
    np.testing.assert_array_equal(later.run(None, {"x": x})[0], expected)
    path.write_bytes(finish(sparse_model(*MEAN_OVER_THE_BATCH, constants={"c": np.array([0])})))
    mixed = InferenceSession(path, threads=threads)
    assert np.isfinite(mixed.run(None, {"x": x})[0]).all()
    assert asked == [4] * 3
    assert made == ([1, 1, 1] if threads == 1 else [2, 2, 1, 2]), "a further session for the first alone"


def test_run_options_reach_every_piece(asked: list[int]) -> None:
    session, options = InferenceSession(unsealed(), threads=2), onnxruntime.RunOptions()
    options.terminate = True
    with pytest.raises(ModelError, match="terminate"):
        session.run(None, {"x": normal(4, CHANNELS, 6, 6)}, options)
    options.terminate = False
    assert len(session.run(None, {"x": normal(4, CHANNELS, 6, 6)}, options)[0]) == 4
    assert asked == [4] * 2


def test_wrong_inputs_and_errors_in_a_stream(asked: list[int]) -> None:
    free: Dims = ["N", CHANNELS, "H", "W"]
    tail = [node("Slice", "b s e d", "c"), node("MatMul", "c w", "y")]
    constants = {"s": np.array([0]), "e": np.array([6]), "d": np.array([3]), "w": normal(6, 2)}
    session = InferenceSession(
        sparse_model(*tail, image=free, outputs=["N", CHANNELS, "H", 2], constants=constants).SerializeToString(), threads=2
    )
    assert session.run(None, {"x": normal(4, CHANNELS, 6, 9)})[0].shape == (4, CHANNELS, 6, 2)
    with pytest.raises(ModelError, match="onnxruntime cannot run the model") as caught:
        session.run(None, {"x": normal(4, CHANNELS, 6, 5)})
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected float32"):
        session.run(None, {"x": np.zeros((4, CHANNELS, 6, 6))})
    assert asked == [4] * 2
    assert session.run(None, {"x": normal(4, CHANNELS, 6, 6)})[0].shape == (4, CHANNELS, 6, 2), "usable after an error"


class Fake:
    """A session whose outputs are its inputs; it stops at the image that is `bad`, at others after an event."""

    def __init__(self, bad: BaseException | None = None) -> None:
        self.bad, self.seen, self.go = bad, list[int](), threading.Event()

    def run(self, names: Any, feed: dict[str, Array], options: Any) -> list[Array]:
        image = int(feed["x"].flat[0])
        self.seen.append(image)
        if image == 0 and self.bad is not None:
            self.go.set()
            raise self.bad
        if self.bad is not None:
            self.go.wait(10)
        return [feed["x"], feed["x"] * 2]


LARGE = np.broadcast_to(np.arange(40.0).reshape(-1, 1, 1, 1), (40, 1, 256, 256)).copy()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_order(threads: int) -> None:
    fake = Fake()
    outputs = Streams(fake, threads, lambda: fake).run(None, {"x": LARGE})
    np.testing.assert_array_equal(outputs[0], LARGE)
    np.testing.assert_array_equal(outputs[1], LARGE * 2)
    assert sorted(fake.seen) == [*range(40)]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_runs_on_after_an_error(error: BaseException) -> None:
    fake = Fake(error)
    runner = Streams(fake, 2, lambda: fake)
    with pytest.raises(type(error)):
        runner.run(None, {"x": LARGE})
    seen = list(fake.seen)
    assert len(seen) < 40
    fake.bad = None
    runner.run(None, {"x": LARGE})
    assert len(fake.seen) == len(seen) + 40, "nothing of the first batch was left to run"


def test_many_threads_may_run_one_session(asked: list[int]) -> None:
    model = sparse_model()
    session = InferenceSession(model.SerializeToString(), threads=2)
    batches = [normal(2 + i % 5, CHANNELS, 6, 6, seed=i) for i in range(20)]
    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda x: session.run(None, {"x": x})[0], batches))
    for x, result in zip(batches, results, strict=True):
        np.testing.assert_array_equal(result, whole(model, x))


def test_the_threads_end_with_the_session() -> None:
    before = set(threading.enumerate())
    runner = Streams(fake := Fake(), 2, lambda: fake)
    runner.run(None, {"x": LARGE})
    workers = set(threading.enumerate()) - before
    assert workers and all(worker.name.startswith("ticketkit") for worker in workers)
    del runner
    gc.collect()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
