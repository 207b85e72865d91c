"""InferenceSession: onnxruntime's methods, the same outputs, sparse underneath, and one clear line when something is wrong."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Array, conv_net, normal, run

import ticketkit
from ticketkit.errors import DataError, FormatError, KernelError, ModelError
from ticketkit.exporters import export
from ticketkit.lower import lower, operators, read, storage
from ticketkit.planner import plan
from ticketkit.session import InferenceSession

MODEL = conv_net(0.9, channels=64)
X = normal(2, 3, 32, 32)
TOLERANCE = 3e-5  # of this network at this input, as `ticketkit.exporters._check.derive_tolerance` gives it


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network as a plain pruned file and as an exported one."""
    folder = tmp_path_factory.mktemp("session")
    onnx.save(MODEL, folder / "plain.onnx")
    tolerance = export(folder / "plain.onnx", folder / "sparse.onnx").comparisons[-1].tolerance
    assert tolerance <= TOLERANCE
    return {"plain": folder / "plain.onnx", "sparse": folder / "sparse.onnx"}


@pytest.fixture(scope="module")
def sparse(files: dict[str, Path]) -> set[str]:
    """Names of the sparse nodes in the exported file; `export` writes none without."""
    return {node.name for node in operators.nodes(read(files["sparse"]))}


@pytest.fixture(scope="module")
def expected() -> Array:
    return run(MODEL, {"x": X})[0]


@pytest.mark.parametrize("kind", ["plain", "sparse"])
@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_same_outputs_as_onnxruntime(kind: str, as_bytes: bool, threads: int | None, files: dict[str, Path], expected: Array) -> None:
    session = InferenceSession(files[kind].read_bytes() if as_bytes else files[kind], threads=threads)
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(session.run(["y"], {"x": X[:1]})[0], expected[:1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_the_sparse_kernels_really_run(kind: str, files: dict[str, Path], sparse: set[str], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = InferenceSession(files[kind], options)
    session.run(None, {"x": X})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(event["name"] for event in events if event.get("args", {}).get("op_name", "").startswith("SparseConv"))
    assert {name.removesuffix("_kernel_time") for name in ran} == sparse


def test_everything_else_is_onnxruntimes(files: dict[str, Path], expected: Array) -> None:
    ours, theirs = InferenceSession(files["sparse"]), onnxruntime.InferenceSession(files["plain"])
    for method in ("get_inputs", "get_outputs"):
        for a, b in zip(getattr(ours, method)(), getattr(theirs, method)(), strict=True):
            assert (a.name, a.shape, a.type) == (b.name, b.shape, b.type)
    assert ours.get_providers() == ["CPUExecutionProvider"]
    assert ours.get_modelmeta().producer_name == "ticketkit"
    binding = ours.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    ours.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected, atol=TOLERANCE, rtol=0)
    ours.run(None, {"x": X}, onnxruntime.RunOptions())
    with pytest.raises(AttributeError):
        ours.no_such_method()


def test_the_plan_of_a_plain_file(files: dict[str, Path], sparse: set[str]) -> None:
    made = InferenceSession(files["plain"]).plan
    assert made == plan(lower(read(files["plain"]))) and {c.name for c in made.sparse} == sparse
    assert InferenceSession(files["sparse"]).plan is None


def test_a_dense_model_runs_as_it_is() -> None:
    session = InferenceSession(conv_net(0.0).SerializeToString())
    assert session.plan is not None and not session.plan.sparse
    np.testing.assert_allclose(session.run(None, {"x": X})[0], run(conv_net(0.0), {"x": X})[0], rtol=1e-6)


def test_a_dense_model_beyond_one_message_is_loaded_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(conv_net(0.0), path, save_as_external_data=True, location="apart.weights", size_threshold=0)
    loaded, honest = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, *rest, **more: loaded.append(model) or honest(model, *rest, **more))
    InferenceSession(path)
    monkeypatch.setattr(storage, "LIMIT", 1000)
    session = InferenceSession(path)
    assert session.plan is not None and not session.plan.sparse and loaded[-1] == str(path)
    assert str(path) not in loaded[:-1] and any(isinstance(model, bytes) for model in loaded)
    np.testing.assert_allclose(session.run(None, {"x": X})[0], run(conv_net(0.0), {"x": X})[0], rtol=1e-6)


def test_it_is_quiet(files: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    for path in files.values():
        InferenceSession(path).run(None, {"x": X})
    assert capfd.readouterr() == ("", "")


def test_many_threads_may_run_one_session(files: dict[str, Path], expected: Array) -> None:
    session, results = InferenceSession(files["sparse"], threads=2), [np.empty(0)] * 8

    def work(i: int) -> None:
        results[i] = session.run(None, {"x": X})[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=TOLERANCE, rtol=0)


FEEDS = [
    ({}, "inputs: expected x; got none"),
    ({"X": X}, "inputs: expected x; got X"),
    ({"x": X, "z": X}, "inputs: expected x; got x, z"),
    ({"x": X[:, :, :, :16]}, r"input 'x': expected shape \[N, 3, 32, 32\], got \[2, 3, 32, 16\]"),
    ({"x": X[0]}, r"expected shape \[N, 3, 32, 32\], got \[3, 32, 32\]"),
    ({"x": X.astype(np.float64)}, "expected float32, got float64"),
    ({"x": (X * 100).astype(np.uint8)}, "expected float32, got uint8"),
]


@pytest.mark.parametrize(("feed", "message"), FEEDS, ids=[m for _, m in FEEDS])
def test_wrong_inputs(feed: dict[str, Array], message: str, files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=message):
        InferenceSession(files["sparse"]).run(None, feed)


def test_wrong_outputs_and_threads(files: dict[str, Path]) -> None:
    session = InferenceSession(files["sparse"])
    with pytest.raises(DataError, match="outputs: expected some of y; got z"):
        session.run(["z"], {"x": X})
    with pytest.raises(DataError, match="threads: expected 1 or more, got 0"):
        InferenceSession(files["sparse"], threads=0)


def test_files_that_do_not_load(files: dict[str, Path], tmp_path: Path) -> None:
    data = files["sparse"].read_bytes()
    with pytest.raises(ModelError, match="no such file"):
        InferenceSession(tmp_path / "none.onnx")
    with pytest.raises(FormatError, match="truncated"):
        InferenceSession(data[: len(data) // 3])
    unknown = conv_net()
    unknown.graph.node[2].domain = "com.example"
    unknown.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(ModelError, match="onnxruntime cannot load the model") as caught:
        InferenceSession(unknown.SerializeToString())
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_said(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETKIT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(KernelError, match="native library"):
        InferenceSession(files["sparse"])


def test_it_is_the_public_name() -> None:
    assert ticketkit.InferenceSession is InferenceSession
