"""In place of onnxruntime: its options, bindings and values, many threads, forks and pickles."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from batches import CHANNELS, sparse_model, whole
from graphs import Array, normal

import ticketkit
from ticketkit.errors import KernelError, ModelError
from ticketkit.exporters.onnx import finish
from ticketkit.session import InferenceSession

X = normal(3, CHANNELS, 6, 6)
SPARSE = {"SparseConvRelu", "SparseConvAddRelu"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported file."""
    file = tmp_path_factory.mktemp("drop_in") / "sealed.onnx"
    file.write_bytes(finish(sparse_model()))
    return str(file)


@pytest.fixture(scope="module")
def expected() -> Array:
    return whole(sparse_model(), X)


# Code that is onnxruntime's


def ran(session: onnxruntime.InferenceSession) -> set[str]:
    """The sparse operators that a session with profiling has run."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return {op for event in events if (op := event.get("args", {}).get("op_name", "")).startswith("Sparse")}


@pytest.mark.parametrize("times", [0, 1, 2])
def test_register(times: int, path: str, expected: Array, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.intra_op_num_threads = 2
    for _ in range(times):
        ticketkit.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected, atol=1e-5, rtol=0)
    assert ran(session) == (SPARSE if times else set())


def test_options_may_be_shared(path: str, expected: Array, capfd: pytest.CaptureFixture[str]) -> None:
    options = onnxruntime.SessionOptions()
    ticketkit.register(options)
    sessions = [InferenceSession(path, options), InferenceSession(path, options, threads=2), onnxruntime.InferenceSession(path, options)]
    for session in sessions:
        np.testing.assert_array_equal(session.run(None, {"x": X})[0], expected)
    assert capfd.readouterr() == ("", "")


def test_io_binding(path: str, expected: Array) -> None:
    session = InferenceSession(path, threads=2)
    for binding in (session.io_binding(), onnxruntime.IOBinding(session)):
        binding.bind_cpu_input("x", X)
        y = np.empty_like(expected)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(y)
        binding.bind_ortvalue_output("y", value)
        for _ in range(2):
            session.run_with_iobinding(binding, onnxruntime.RunOptions())
            np.testing.assert_array_equal(value.numpy(), expected)


def test_ort_values(path: str, expected: Array) -> None:
    session, feed = InferenceSession(path, threads=2), {"x": onnxruntime.OrtValue.ortvalue_from_numpy(X)}
    np.testing.assert_array_equal(session.run_with_ort_values(["y"], feed)[0].numpy(), expected)
    np.testing.assert_array_equal(session.run(None, feed)[0], expected)


def test_run_options(path: str, expected: Array) -> None:
    session, options = InferenceSession(path, threads=2), onnxruntime.RunOptions()
    options.terminate = True
    with pytest.raises(ModelError, match="terminate"):
        session.run(None, {"x": X}, options)
    options.terminate = False
    np.testing.assert_array_equal(session.run(None, {"x": X}, options)[0], expected)


def by_run(session: InferenceSession, x: Array) -> Array:
    return session.run(None, {"x": x})[0]  # type: ignore[no-any-return]


def by_binding(session: InferenceSession, x: Array) -> Array:
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [by_run, by_binding])
@pytest.mark.parametrize("threads", [1, 3])
def test_eight_threads_at_once(run: Callable[[InferenceSession, Array], Array], threads: int, path: str) -> None:
    """Each with its own batch, so that one that got another's output shows."""
    session, batches = InferenceSession(path, threads=threads), [normal(1 + i % 4, CHANNELS, 6, 6, seed=i) for i in range(8)]
    outputs = [whole(sparse_model(), x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for got, want in zip(pool.map(lambda x: run(session, x), batches), outputs, strict=True):
                np.testing.assert_array_equal(got, want)


# Other processes


FORK = """
import os, sys
import numpy as np
from ticketkit import InferenceSession, TicketkitError

path, x, threads = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
session = InferenceSession(path, threads=threads)
expected, binding = session.run(None, {"x": x})[0], session.io_binding()
child = os.fork()
if child == 0:
    for use in (lambda: session.run(None, {"x": x}), lambda: session.run_with_iobinding(binding), lambda: session.get_inputs()):
        try:
            use()
        except TicketkitError as error:
            print(type(error).__name__, error, flush=True)
    assert np.array_equal(InferenceSession(path, threads=threads).run(None, {"x": x})[0], expected), "a session of the child's own"
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(session.run(None, {"x": x})[0], expected), "the parent's is unharmed"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_is_told_to_make_its_own(threads: int, path: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    words = [sys.executable, "-W", "ignore", "-c", FORK, path, str(tmp_path / "x.npy"), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line.split(" process")[0] for line in done.stdout.splitlines()] == ["KernelError this session was made by"] * 3
    assert "make a session in each process" in done.stdout


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_pickled(copied: Callable[[object], object], path: str) -> None:
    with pytest.raises(ModelError, match="cannot be pickled or copied: hand on the path"):
        copied(InferenceSession(path))


def test_nor_handed_to_another_process(path: str) -> None:
    with pytest.raises(ModelError, match="cannot be pickled"):
        multiprocessing.get_context("spawn").Process(target=print, args=(InferenceSession(path),)).start()


def test_an_exported_file_needs_no_onnx(path: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    code = "import sys; sys.modules['onnx'] = None; import numpy as np; from ticketkit import InferenceSession as Session; "
    code += f"print(Session({path!r}, threads=2).run(None, {{'x': np.load({str(tmp_path / 'x.npy')!r})}})[0].shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(X.shape), done.stderr


def test_without_the_library_nothing_is_registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TICKETKIT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(KernelError, match="TICKETKIT_LIBRARY not found"):
        ticketkit.register(onnxruntime.SessionOptions())
