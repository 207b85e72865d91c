"""The examples in other languages (kernels/examples): they load an exported file and give the outputs that Python gives."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Array, conv_net

import ticketkit

EXAMPLES = Path(__file__).resolve().parents[1] / "kernels" / "examples"
RUNTIME = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    onnx.save(conv_net(0.9, channels=64), folder / "plain.onnx")
    ticketkit.export(folder / "plain.onnx", folder / "sparse.onnx")
    return folder / "sparse.onnx"


@pytest.fixture(scope="module")
def expected(model: Path) -> Array:
    """Of the input that the examples make up."""
    x = (np.arange(3 * 32 * 32, dtype=np.uint64) * 2654435761 % 2**32 / 2**32 - 0.5).astype(np.float32)
    return ticketkit.InferenceSession(model, threads=1).run(None, {"x": x.reshape(1, 3, 32, 32)})[0][0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built by the command it states."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler or not RUNTIME:
        pytest.skip("no C++ compiler" if not compiler else "this wheel of onnxruntime has no shared library to load")
    built = tmp_path_factory.mktemp("cpp") / "run"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(EXAMPLES / "run.cc"), "-o", str(built), "-ldl"], check=True)
    return built


def said(text: str) -> dict[str, Array]:
    """The outputs a program prints, a line `name: numbers` each."""
    lines = [line.split(": ") for line in text.splitlines() if line.startswith(("sparse: ", "stock: "))]
    return {name: np.array(numbers.split(), np.float64) for name, numbers in lines}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=100)


def test_cpp(program: Path, model: Path, expected: Array) -> None:
    done = run(program, RUNTIME[0], ticketkit.get_library_path(), model)
    assert done.returncode == 0, done.stderr
    outputs = said(done.stdout)
    assert outputs.keys() == {"sparse", "stock"}
    np.testing.assert_allclose(outputs["sparse"], expected, rtol=0, atol=1e-7)  # the same kernels; nine digits are printed
    np.testing.assert_allclose(outputs["stock"], expected, rtol=0, atol=3e-5)
    assert "largest difference" in done.stdout


def test_cpp_needs_the_function_bodies_for_the_stock_session_only(program: Path, model: Path, tmp_path: Path) -> None:
    """So the sparse one has the operators from the library."""
    bare = onnx.load(model)
    del bare.functions[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    done = run(program, RUNTIME[0], ticketkit.get_library_path(), tmp_path / "bare.onnx")
    assert done.returncode == 1 and "SparseConv" in done.stderr and "stock session" in done.stderr


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_cpp_says_what_is_missing(missing: int, program: Path, model: Path, tmp_path: Path) -> None:
    words: list[object] = [RUNTIME[0], ticketkit.get_library_path(), model]
    words[missing] = tmp_path / "none"
    done = run(program, *words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and str(tmp_path / "none") in done.stderr
    assert run(program).returncode == 2


def test_node(model: Path, expected: Array) -> None:
    """A stock runtime: onnxruntime-node has no call that registers operators."""
    node = shutil.which("node")
    if not node or run(node, "-e", "require.resolve('onnxruntime-node')").returncode:
        pytest.skip("no node, or no package onnxruntime-node on $NODE_PATH (npm install onnxruntime-node)")
    done = run(node, EXAMPLES / "run.js", model, "1,3,32,32")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(said(done.stdout)["stock"], expected, rtol=0, atol=3e-5)
    for wrong in ((model.with_name("none.onnx"), "1,3,32,32"), (model, "1,3,16,32")):
        assert run(node, EXAMPLES / "run.js", *wrong).stderr.startswith("error: ")
    assert run(node, EXAMPLES / "run.js").returncode == 2
