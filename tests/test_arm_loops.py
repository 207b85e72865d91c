"""The scripts that count and estimate NEON code: which layers, which loops, and what they say where tools or files are missing."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("ticketkit.runtime.native").isas()
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import instructions  # noqa: E402
import mca  # noqa: E402

from ticketkit.errors import DataError, KernelError  # noqa: E402

LISTING = """
0000000000001000 <void tk::neon::rows_of<tk::neon::CsrRows, 2>(tk::neon::Tile const&)>:
    1000:	mov	x1, #0x0                   	// #0
    1004:	ldp	q1, q2, [x0]
    1008:	fmla	v3.4s, v1.4s, v0.s[0]
    100c:	b.ne	1004 <void tk::neon::rows_of<tk::neon::CsrRows, 2>(tk::neon::Tile const&)+0x4>  // b.any
    1010:	ret

0000000000002000 <void tk::neon::CsrRows::of<3, true, true>(tk::neon::Tile const&)>:
    2000:	ldp	q1, q2, [x0], #32
    2004:	ldr	q4, [x0]
    2008:	fmla	v5.4s, v1.4s, v0.s[0]
    200c:	fmla	v6.4s, v2.4s, v0.s[0]
    2010:	fmla	v7.4s, v4.4s, v0.s[0]
    2014:	cbnz	x2, 2000 <void tk::neon::CsrRows::of<3, true, true>(tk::neon::Tile const&)>
    2018:	fmla	v7.4s, v4.4s, v0.s[0]
    201c:	b.ne	2000 <void tk::neon::CsrRows::of<3, true, true>(tk::neon::Tile const&)>  // b.any
    2020:	ret

0000000000003000 <void tk::neon_fp16::HalfCsrRows::of<20, true, true>(tk::neon_fp16::Tile const&)>:
    3000:	fmla	v5.8h, v1.8h, v0.h[0]
    3004:	b.ne	3000 <void tk::neon_fp16::HalfCsrRows::of<20, true, true>(tk::neon_fp16::Tile const&)>  // b.any
"""


def test_the_inner_loop_is_the_innermost_of_the_widest_tile():
    vectors, body = mca.loop(LISTING, "CsrRows", "neon")
    assert vectors == 3 and [line.name for line in body] == ["ldp", "ldr", "fmla", "fmla", "fmla", "cbnz"]
    assert sum(line.loads for line in body) == 3 and sum(line.multiplies for line in body) == 3
    text = mca.assembly(body)
    assert text.startswith("again:\nldp q1, q2, [x0], #32\n") and text.endswith("cbnz x2, again\n") and "tk::" not in text
    assert mca.loop(LISTING, "HalfCsrRows", "neon_fp16")[0] == 20
    with pytest.raises(DataError, match="no inner loop of BsrRows on neon"):
        mca.loop(LISTING, "BsrRows", "neon")


def test_a_loop_is_estimated(monkeypatch):
    said = {"Total Cycles": 1200, "Block RThroughput": 5.0}
    monkeypatch.setattr(mca, "run", lambda words, text: "".join(f"{name}:  {value}\n" for name, value in said.items()))
    row = mca.estimate("llvm-mca", LISTING, "csr", "neon", "cortex-a55", "19")
    assert (row.vectors, row.multiply_adds, row.loads, row.instructions) == (3, 3, 3, 6)
    assert row.cycles == pytest.approx(1200 / mca.ITERATIONS / 12) and row.bound == pytest.approx(5 / 12)
    assert row.limit == pytest.approx(6 / 12)  # three loads of two cycles
    said.pop("Total Cycles")
    with pytest.raises(KernelError, match="expected lines 'Total Cycles'"):
        mca.estimate("llvm-mca", LISTING, "csr", "neon", "cortex-a55", "19")


def test_layers_that_are_counted():
    shapes = instructions.pointwise()
    assert len(shapes) == len({s.name for s in shapes}) == 31
    assert {(s.kernel, s.stride, s.pad) for s in shapes} == {(1, 1, 0)}


@pytest.mark.parametrize(("words", "error"), [(["--layer", "k3"], "k3: no 1x1 convolution"), ([], "no such file; expected a library")])
def test_what_cannot_be_counted(words, error, tmp_path):
    with pytest.raises(DataError, match=error):
        instructions.main(["--library", str(tmp_path / "no.so"), "--results", str(tmp_path / "rows.jsonl"), *words])
    with pytest.raises(DataError, match="no such file; expected a library for 64-bit ARM"):
        mca.main(["--library", str(tmp_path / "no.so")])


@pytest.mark.parametrize("script", [instructions, mca])
def test_tools_that_are_missing_or_fail(script):
    with pytest.raises(KernelError, match="qemu-or-mca is not installed; Debian has"):
        script.run(["qemu-or-mca"])
    with pytest.raises(KernelError, match="failed with status 3: no room"):
        script.run([sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"])


def test_rows_of_counts_add_up():
    """Of the rows in the repository: the ratio is that of the counts, and no layer at 90 % is above what is claimed of it."""
    rows = [json.loads(line) for line in (BENCHMARKS / "results" / "instructions.jsonl").read_text().splitlines()]
    csr = {row["layer"]: row for row in rows if (row["isa"], row["format"], row["sparsity"]) == ("neon", "csr", 0.9)}
    assert len(csr) == 31
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["xnnpack"]) for row in rows if row["ratio"])
    assert instructions.mean([row["ratio"] for row in csr.values()]) < 0.9
