"""The seal by which an exported file is known as whole: it is that of `lower.reader`, and one changed byte breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from batches import CHANNELS, sparse_model, whole
from graphs import conv_net, normal, pruned

from ticketkit.errors import FormatError
from ticketkit.exporters import export
from ticketkit.exporters.onnx import finish
from ticketkit.formats import gaps
from ticketkit.lower import operators, read
from ticketkit.runtime import seal
from ticketkit.session import InferenceSession

DATA = finish(sparse_model())


def test_the_names_are_those_of_the_operators() -> None:
    assert (seal.KEY.decode(), seal.DOMAIN.decode()) == (operators.DIGEST, operators.DOMAIN)


@pytest.mark.parametrize("chunk", [len(DATA) // 2, len(DATA) - 1, len(DATA), 10 * len(DATA)])
def test_a_whole_file_has_it(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "CHUNK", chunk)
    (tmp_path / "whole.onnx").write_bytes(DATA)
    stated = next(entry.value for entry in read(DATA).metadata_props if entry.key == operators.DIGEST)
    assert seal.unbroken(DATA) == seal.unbroken(tmp_path / "whole.onnx") == seal.unbroken(str(tmp_path / "whole.onnx")) == stated


def test_one_byte_breaks_it() -> None:
    for at in np.linspace(0, len(DATA) - 1, 500).astype(int):
        damaged = bytearray(DATA)
        damaged[at] ^= 1 << (at % 8)
        assert seal.unbroken(bytes(damaged)) is None
    for damaged in (DATA[:-1], DATA[1:], DATA + b"\0", DATA[: len(DATA) // 2] + DATA[len(DATA) // 2 + 1 :]):
        assert seal.unbroken(bytes(damaged)) is None


def test_a_broken_seal_is_refused(tmp_path: Path) -> None:
    at = DATA.index(seal.ENTRY) + len(seal.ENTRY)
    forged = DATA[:at] + b"0" * seal.DIGITS + DATA[at + seal.DIGITS :]
    with pytest.raises(FormatError, match="sha256 differs"):
        InferenceSession(forged)


def test_other_files_have_none(tmp_path: Path) -> None:
    """Plain files and dense exports are to be looked into: their zeros may be worth something."""
    export(conv_net().SerializeToString(), tmp_path / "dense.onnx", format="onnx-dense")
    assert operators.DIGEST.encode() in (tmp_path / "dense.onnx").read_bytes()
    for source in (tmp_path / "dense.onnx", tmp_path / "none.onnx", tmp_path, b"", b"\0" * 1000, conv_net().SerializeToString()):
        assert seal.unbroken(source) is None


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_sealed_file_runs(as_bytes: bool, tmp_path: Path) -> None:
    (tmp_path / "sealed.onnx").write_bytes(DATA)
    x = normal(3, CHANNELS, 6, 6)
    session = InferenceSession(DATA if as_bytes else tmp_path / "sealed.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], whole(sparse_model(), x))


PEAK = """
import sys
from pathlib import Path
from ticketkit.session import InferenceSession

def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

before = peak()
InferenceSession(sys.argv[1], threads=1)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of a process' memory")
def test_a_sealed_file_is_not_held_many_times(tmp_path: Path) -> None:
    """Its message and its tensors in onnxruntime, and the positions of a layer while they are checked. Others are parsed here first."""
    parts = {**gaps.pack(pruned((2048, 2048), 0.5)), "bias": np.zeros(2048, np.float32)}
    made = operators.make_node(operators.GEMM, ["x", *parts], "y", "fc", (2048, 2048), {}, operators.Epilogue(), operators.Execution())
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2048]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([made], "fc", infos[:1], infos[1:], [onnx.numpy_helper.from_array(v, k) for k, v in parts.items()])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    model = onnx.helper.make_model(graph, functions=[operators.function(made.op_type, 17)], opset_imports=opsets, ir_version=8)
    (tmp_path / "unsealed.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "sealed.onnx").write_bytes(finish(model))
    size = (tmp_path / "sealed.onnx").stat().st_size

    def times(name: str) -> float:
        words = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) / size

    assert times("sealed.onnx") < 4 < times("unsealed.onnx")
