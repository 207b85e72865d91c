"""benchmarks/gpu.py: without a GPU it checks and ends well; its rows become a page and a map."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def row(script: Any, **change: Any) -> dict[str, Any]:
    known = {"str": "a", "int": 1, "float": 1.0, "list[float]": [1.0], "dict[str, int]": {}, "dict[str, float]": {}}
    return {**{f.name: known[f.type] for f in fields(script.Row)}, "form": "bsr32", "sparsity": 0.9, "gpu": "H200", **change}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_kernels_are_checked_and_nothing_is_timed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device here: nothing is timed" in done.stderr and "36 kernels agree" in done.stderr


def test_a_map_of_rows(script: Any, tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    measured = ((0.9, (0.5, 2.0, 3.0)), (0.95, (4.0,)))
    rows = [row(script, layer=f"l{i}", speedup=s, sparsity=p) for p, ratios in measured for i, s in enumerate(ratios)]
    rows.append(row(script, layer="l0", speedup=1.5))  # measured again: the later row counts
    results.write_text("".join(json.dumps(r) + "\n" for r in rows))
    script.draw(results)
    page = results.with_suffix(".md").read_text().splitlines()
    assert "| H200 | a | 1 | bsr32 | 90% | 3 | 100% | 2.00x | 1.50x | 3.00x |" in page and len(page) == 4
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert script.load(results)[0] == script.Row(**{**rows[0]}) and asdict(script.load(results)[0]) == rows[0]


def test_rows_that_are_none(script: Any, tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    with pytest.raises(script.DataError, match="found no file"):
        script.draw(results)
    for line in ("{", '{"layer": 1}', "[]"):
        results.write_text(line + "\n")
        with pytest.raises(script.DataError, match="line 1: expected a row"):
            script.draw(results)


def test_blocks_are_pruned_whole(script: Any) -> None:
    import gpu_layers
    from shapes import Conv

    case = gpu_layers.make(Conv(64, 5, 5, 96, 3, 1, 1, 1), 2, torch.float16, 90, 32, "cpu")
    kept = (case.weight != 0).float().reshape(3, 32, 2, 32, 3, 3).mean((1, 3))
    assert set(kept.unique().tolist()) <= {0.0, 1.0} or kept[kept > 0].min() > 0.99  # a weight may be rounded to zero
    assert int((kept > 0).sum()) == round(3 * 2 * 9 * 0.1)
    assert case.x.shape == (2, 64, 5, 5) and case.x.is_contiguous(memory_format=torch.channels_last)
    two_of_four = gpu_layers.half(torch.arange(1.0, 9.0).reshape(1, 8))
    assert two_of_four.tolist() == [[0, 0, 3, 4, 0, 0, 7, 8]]
