"""The cores that `estimate --device` simulates: their files, loops, and predictions against what was measured on one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import conv_net
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketkit import cores, estimate
from ticketkit.cli import main
from ticketkit.cli.files import CORES
from ticketkit.cores import Core, loops, predict
from ticketkit.errors import TicketkitError
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape, Vectors

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
ALL = [cores.get(name) for name in cores.names()]
POINTWISE = ConvShape(256, 28, 28, 256, 1, 1)


def rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    if not path.exists():
        pytest.skip(f"benchmarks/results/{name} is not in this checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Files ------------------------------------------------------------------------------------------------------------------------


def test_the_cores_there_are() -> None:
    assert cores.names() == CORES and {"cortex-a76", "cortex-a55", "neoverse-n1", "apple-m1", "zen3"} <= set(CORES)
    for core in ALL:
        assert core.sources and core.label == f"{core.name} at {core.ghz:g} GHz"
    assert cores.get("cortex-a76").peak_gflops == pytest.approx(2 * 2 * 4 * 2.4)
    assert cores.get("cortex-a55@2.0").ghz == 2.0 == cores.get("cortex-a55").ghz + 0.2


@pytest.mark.parametrize("core", ALL, ids=lambda core: core.name)
def test_vectors_are_those_of_the_kernels(core: Core) -> None:
    if core.isa in [isa.name for isa in native.isas()]:
        assert native.vectors(core.isa) == core.vectors
    else:  # of another processor family: as its source says
        code = (Path(__file__).resolve().parents[1] / "kernels" / "isa" / f"{core.isa}.cc").read_text(encoding="utf-8")
        said = dict(re.findall(r"\b(k\w+) = (\w+)[,;]", code.partition("struct Vec {")[2]))
        names = "kLanes", "kRegisters", "kTile", "kGoodTile", "kReadsPlanes"
        numbers = [{"true": 1, "false": 0}.get(said[name], said[name]) for name in names]
        rest = (int(said["kRegisters"]) - 1) // 5, *map(int, numbers[4:]), 4  # max_block_vectors of packed.h; weights are floats
        assert Vectors(*map(int, numbers[:4]), *rest) == core.vectors and int(said["kWeights"]) == core.weights_by_lane


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cortex-a77", "one of apple-m1, cortex-a55, cortex-a76, neoverse-n1, zen3.*got 'cortex-a77'"),
        ("", "got ''"), ("../cores/zen3", "got"), ("zen3.json", "got"), ("ZEN3", "got"),
        ("zen3@", "0.1 to 6 GHz behind zen3@, such as zen3@3.2, got ''"), ("zen3@fast", "got 'fast'"), ("zen3@nan", "got 'nan'"),
        ("zen3@0", "got '0'"), ("zen3@3200", "got '3200'"), ("zen3@-1", "got '-1'"), ("zen3@1e999", "got '1e999'"), ("@2", "got '@2'"),
    ],
)  # fmt: skip
def test_no_such_core(text: str, said: str) -> None:
    with pytest.raises(TicketkitError, match=said):
        cores.get(text)


def damaged(data: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(name, what a file holds instead, what is said of it)."""
    yield "a list", [], "expected an object, got list"
    for key in ("ghz", "caches", "vectors", "sources", "in_order"):
        yield f"no {key}", {k: v for k, v in data.items() if k != key}, f"{key} is missing"
        yield f"{key} is null", {**data, key: None}, key if key != "vectors" else "expected an object"
    yield "one more", {**data, "evil": 1}, "evil is unknown"
    numbers = ("fma", 0), ("fma", -1), ("fma", 1e9), ("loads", "2"), ("ghz", True), ("line", float("nan")), ("call", float("inf"))
    for key, value in numbers:
        yield f"{key} {value}", {**data, key: value}, f"{key}: expected a number"
    yield "flag", {**data, "pairs": 1}, "pairs: expected true or false"
    yield "words", {**data, "isa": 7}, "isa: expected words"
    yield "no cache", {**data, "caches": []}, "one level or more"
    yield "caches shrink", {**data, "caches": data["caches"][::-1]}, "larger than the one before"
    yield "cache", {**data, "caches": [{"bytes": 1}]}, "bytes_per_cycle is missing"
    yield "tile", {**data, "dense_tile": [0, 1]}, "1 to 32"
    yield "tile of three", {**data, "dense_tile": [1, 2, 3]}, "unpack"
    yield "good above tile", {**data, "vectors": {**data["vectors"], "good_tile": 20}}, "at most tile"


def test_files_that_are_no_cores(tmp_path: Path) -> None:
    good = json.loads((cores.FOLDER / "zen3.json").read_text(encoding="utf-8"))
    path = tmp_path / "zen3.json"
    path.write_text(json.dumps(good))
    assert cores.read(path) == cores.get("zen3")
    for name, data, said in damaged(good):
        path.write_text(json.dumps(data))
        with pytest.raises(TicketkitError) as caught:
            cores.read(path)
        assert str(path) in str(caught.value) and said in str(caught.value) and "copy the form" in str(caught.value), name
    for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(text)
        with pytest.raises(TicketkitError, match="expected"):
            cores.read(path)
    with pytest.raises(TicketkitError, match="nothing"):
        cores.read(tmp_path / "nothing.json")


VALUES = st.none() | st.booleans() | st.floats() | st.text(max_size=5)


@given(VALUES | st.lists(VALUES, max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_field(tmp_path_factory: pytest.TempPathFactory, value: Any, data: st.DataObject) -> None:
    good = json.loads((cores.FOLDER / "cortex-a55.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.getbasetemp() / "cortex-a55.json"
    path.write_text(json.dumps({**good, data.draw(st.sampled_from(sorted(good))): value}))
    try:
        found = cores.read(path)
    except TicketkitError as error:
        assert "\n" not in str(error)
    else:
        assert predict.conv2d(found, POINTWISE, 1, "csr", 6554) > 0


# Loops ------------------------------------------------------------------------------------------------------------------------


def test_limits_of_the_inner_loops() -> None:
    """Cycles for a non-zero and a pixel, by hand: two multiply-adds, or two loads, of four lanes a cycle are an eighth."""
    ideal = replace(cores.get("neoverse-n1"), sustained=1.0)
    assert 1 / 8 < predict.loop_cycles(ideal, "bsr", 6) < 0.15  # and a copy of each weight
    assert 1 / 8 < predict.loop_cycles(ideal, "csr", 20) < 0.14
    small = cores.get("cortex-a55")  # loads of two cycles and multiply-adds of one, which wait for each other
    assert predict.loop_cycles(small, "csr", 20) == pytest.approx(3 / 4, rel=0.1)
    assert predict.loop_cycles(small, "bsr", 6) == pytest.approx((2 + 4 + 4 / 6) / 16, rel=0.15)
    assert loops.chains(1) == 4 and predict.loop_cycles(ideal, "csr", 1) > predict.loop_cycles(ideal, "csr", 10)


def test_the_avx2_loop_takes_what_was_counted() -> None:
    """kernels/README.md: 14 multiply-adds need 14 loads and a broadcast, 7.5 cycles; our count has the load of the offset too."""
    ideal = replace(cores.get("zen3"), sustained=1.0)
    assert loops.cycles(ideal, loops.csr(ideal, 14)) == pytest.approx(8.0)
    assert ideal.peak_gflops == pytest.approx(102.4)


def test_loops_against_llvm_mca() -> None:
    """Cycles of the loops as compiled, by its scheduling models of the cores that it knows: ours are within 15 % of them."""
    known = {core.name: replace(core, sustained=1.0) for core in ALL}
    compared = set()
    for row in rows("mca.jsonl"):
        core, format = known.get(row["core"]), row["kernel"].split("_")[1]
        if core and row["isa"] == core.isa:
            assert predict.loop_cycles(core, format, row["vectors"]) == pytest.approx(row["cycles"], rel=0.15), row
            compared.add((core.name, format))
    assert len(compared) >= 4


# Layers -----------------------------------------------------------------------------------------------------------------------


def measured() -> list[tuple[dict[str, Any], ConvShape | tuple[int, int, int]]]:
    """Rows of benchmarks/layers.py beyond 50 µs, without stems, which stay dense and of which an edge of the image takes most."""
    found: list[tuple[dict[str, Any], ConvShape | tuple[int, int, int]]] = []
    for row in rows("layers.jsonl"):
        s = row["shape"]
        if row["isa"] != "avx2" or row["median_ms"] < 0.05 or row["part"] == "stem":
            continue
        if "kernel" not in s:
            found.append((row, (s["rows"], s["cols"], s["batch"])))
            continue
        k, stride, pad, d = s["kernel"], s["stride"], s["pad"], s["dilation"]
        size = s["in_channels"], s["in_h"], s["in_w"], s["out_channels"]
        found.append((row, ConvShape(*size, k, k, stride, stride, pad, pad, pad, pad, d, d)))
    return found


def errors(core: Core, format: str) -> np.ndarray:
    """|log(predicted / measured)| of each layer in a format."""
    ratios = []
    for row, shape in measured():
        if row["format"] == format:
            of = (core, shape, 1, format) if isinstance(shape, ConvShape) else (core, *shape, format)
            cycles = predict.conv2d(*of, row["nnz"]) if isinstance(shape, ConvShape) else predict.gemm(*of, row["nnz"])  # type: ignore[call-arg, arg-type]
            ratios.append(core.us(cycles) / 1e3 / row["median_ms"])
    return np.abs(np.log(ratios))


@pytest.mark.parametrize(("format", "median", "worst_tenth"), [("csr", 0.08, 0.18), ("bsr", 0.10, 0.27), ("bsr1x4", 0.08, 0.16)])
def test_layers_on_the_core_that_was_measured(format: str, median: float, worst_tenth: float) -> None:
    zen3 = cores.get("zen3")
    off = errors(zen3, format)
    assert len(off) >= 50 and np.median(off) < median and np.percentile(off, 90) < worst_tenth
    wrong = replace(zen3, loads=1.0)  # a negative control: the data do tell cores apart
    assert np.median(errors(wrong, format)) > 2 * median


def test_dense_layers_on_the_core_that_was_measured() -> None:
    zen3, ratios = cores.get("zen3"), {}
    for row, shape in measured():
        if isinstance(shape, ConvShape):
            if shape.dilation_h > 2:
                continue  # onnxruntime skips what falls outside the image, and most of the window does
            x, y = prod((shape.in_channels, shape.in_h, shape.in_w)), shape.out_channels * shape.out_h * shape.out_w
            weights, uses = shape.out_channels * shape.cols, shape.out_h * shape.out_w
        else:
            x, y, weights, uses = shape[1] * shape[2], shape[0] * shape[2], shape[0] * shape[1], shape[2]
        ratios[row["layer"]] = zen3.us(predict.dense(zen3, weights * uses, x, y, weights)) / 1e3 / row["dense_ms"]
    off = np.abs(np.log(list(ratios.values())))
    assert len(off) >= 50 and np.median(off) < 0.10 and np.percentile(off, 90) < 0.25


@pytest.mark.parametrize("core", ALL, ids=lambda core: core.name)
@pytest.mark.parametrize("format", ["csr", "bsr"])
def test_more_zeros_take_less_time(core: Core, format: str) -> None:
    for shape in (POINTWISE, ConvShape(64, 56, 56, 64, 3, 3, 1, 1, 1, 1, 1, 1), ConvShape(128, 28, 28, 256, 1, 1, 2, 2)):
        weights = shape.out_channels * shape.cols
        cycles = [predict.conv2d(core, shape, 1, format, round(weights * left / 4) * 4) for left in (0.02, 0.1, 0.3, 0.5, 1.0)]
        assert cycles == sorted(cycles) and cycles[-1] > 5 * cycles[0]
        assert predict.conv2d(core, shape, 3, format, weights) - core.call == pytest.approx(3 * (cycles[-1] - core.call))
    products = [predict.gemm(core, 512, 512, batch, format, 26216) for batch in (1, 8, 64, 128)]
    assert products == sorted(products)


# The command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> str:
    onnx.save(conv_net(0.0, channels=64), tmp_path / "net.onnx")
    return str(tmp_path / "net.onnx")


def say(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """(exit code, stdout, stderr) of `ticketkit` with these words."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capfd.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_everything_is_labelled(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(capfd, "estimate", source, "--sparsity", "0.9", "--device", "cortex-a55@2.0", "--layers")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for said in ("simulated dense ms", "simulated sparse ms", "Simulated, nothing was run", "cortex-a55 at 2 GHz", "simulated on cortex"):
        assert said in text
    assert "predicted" not in text
    _, out, _ = say(capfd, "estimate", source, "--sparsity", "0.9", "--device", "cortex-a55@2.0", "--json")
    found = json.loads(out)
    assert (found["simulated"], found["device"], found["ghz"]) == (True, "cortex-a55", 2.0)
    assert found == json.loads(json.dumps(estimate(source, 0.9, device="cortex-a55@2.0").to_dict()))
    assert all("predicted" not in choice["reason"] for choice in found["levels"][0]["choices"])
    _, out, _ = say(capfd, "estimate", "--help")
    assert "simulated" in out and all(name in out for name in cores.names())


def test_without_a_device_nothing_is_simulated(source: str) -> None:
    plain = estimate(source, 0.9)
    assert plain.device is None and not {"simulated", "device", "ghz"} & plain.to_dict().keys()
    assert "simulated" not in json.dumps(plain.to_dict())


def test_a_core_at_half_the_clock(source: str) -> None:
    """Everything in caches, whose bandwidths go with the clock: twice the time, the same speedup."""
    fast, slow = (estimate(source, 0.9, device=f"cortex-a76@{ghz}").levels[0] for ghz in (2.4, 1.2))
    assert slow.ms[0] == pytest.approx(2 * fast.ms[0], rel=0.05) and slow.speedup == pytest.approx(fast.speedup, rel=0.05)
    in_order = estimate(source, 0.9, device="cortex-a55@2.4").levels[0]
    assert in_order.ms[0] > 2 * fast.ms[0]


def test_a_core_that_is_none(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    for device in ("pentium", "zen3@9"):
        code, out, err = say(capfd, "estimate", source, "--sparsity", "0.9", "--device", device)
        assert code != 0 and out == "" and len(err.splitlines()) == 1 and "expected a c" in err and device.split("@")[-1] in err
