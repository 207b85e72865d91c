"""Programs of ExecuTorch: right on XNNPACK, and one clear error where the package is missing or made for another torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import graph, node, normal, pruned, run

pytest.importorskip("torch")
from ticketkit import exporters
from ticketkit.errors import ExportError, FormatError
from ticketkit.exporters import executorch as target
from ticketkit.exporters import export
from ticketkit.lower import lower, read

installed = pytest.mark.skipif(not find_spec("executorch"), reason="executorch is not installed")


@installed
def test_it_runs_on_xnnpack(source: Path, tmp_path: Path) -> None:
    report = export(source, tmp_path / "net.pte", format="executorch")
    assert [c.engine for c in report.comparisons] == ["onnxruntime", "executorch"]
    data, network = (tmp_path / "net.pte").read_bytes(), lower(read(source))
    assert target.BACKEND.encode() in data
    x = normal(3, 3, 32, 32)  # one image at a time
    got = target.runners(data, network)["executorch"]({"x": x})["y"]
    np.testing.assert_allclose(got, run(onnx.load(source), {"x": x})[0], rtol=1e-4, atol=1e-4)


@installed
def test_a_wrong_program_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the weights cannot be compared, so the outputs must tell."""
    honest = target.torch_graph.rebuild

    def wrong(model: Any) -> Any:
        program = honest(model)
        bias = program.constants["head.bias"]
        program.constants["head.bias"] = bias * np.float32(1.1)  # type: ignore[index]
        return program

    monkeypatch.setattr(target.torch_graph, "rebuild", wrong)
    with pytest.raises(ExportError, match=r"differs from the original by .* in executorch"):
        export(source, tmp_path / "net.pte", format="executorch")


@installed
def test_damaged_files_and_nothing_for_xnnpack(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "net.pte", format="executorch", check=False)
    data, network = (tmp_path / "net.pte").read_bytes(), lower(read(source))
    for damaged in (b"", b"text", data[:100], data[:4] + b"none" + data[8:]):
        with pytest.raises(FormatError, match="not a whole program of ExecuTorch"):
            target.decode(damaged, network)
    nothing = graph([node("Erf", "x", "y")], {"x": ["N", 8]}, ["y"], {"unused": pruned((2, 2), 0.5)})
    with pytest.raises(ExportError, match="XNNPACK takes over no operator"):
        export(nothing, tmp_path / "a.pte", format="executorch")


def test_a_package_that_is_missing_or_made_for_another_torch(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "executorch" in exporters.names()
    with monkeypatch.context() as patched:
        patched.setattr(target, "find_spec", lambda name: None)
        with pytest.raises(ExportError, match=r"pip install 'ticketkit\[executorch\]' \(a line of executorch .* 1\.3 for 2\.12"):
            export(source, tmp_path / "a.pte", format="executorch")
    monkeypatch.setattr(target, "find_spec", lambda name: object())
    monkeypatch.setattr(target, "version", {"executorch": "9.9", "torch": "2.12.1"}.__getitem__)
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"executorch 9\.9 does not load with torch 2\.12\.1: .*1\.3 for 2\.12"):
        export(source, tmp_path / "a.pte", format="executorch")
    assert not list(tmp_path.iterdir())
