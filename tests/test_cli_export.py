"""`export`, `run` and `inspect` as typed: what they print, what they write, and one clear line with exit code 1 when they cannot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import targets
from graphs import conv_net, graph, node, normal, pruned, run
from onnx import numpy_helper

from ticketkit.cli import main
from ticketkit.cli.files import TARGETS
from ticketkit.exporters import names
from ticketkit.inputs import IMAGE_KEY, ImageRule, read_input, top
from ticketkit.lower import lower, operators, read
from ticketkit.planner import plan

SOURCE = conv_net(0.9, channels=64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(SOURCE, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


class Cli:
    """Runs a command line in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: object) -> str:
        code, out, err = self.raw(*words)
        assert (code, err) == (0, ""), err
        return out

    def fails(self, *words: object, code: int = 1) -> str:
        got, out, err = self.raw(*words)
        assert got == code and not out
        assert code != 1 or (err.startswith("ticketkit: error: ") and err.count("\n") == 1), err
        return err

    def raw(self, *words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        captured = self.capfd.readouterr()
        return caught.value.code or 0, captured.out, captured.err


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


def sparse_nodes(file: Path) -> dict[str, str]:
    """Name -> format of the sparse nodes in an exported file."""
    model = read(file)
    stored = operators.decode(model)
    return {each.name: stored[each.output[0]].execution.format for each in operators.nodes(model)}


# export ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", targets.TARGETS)
def test_export(target: str, cli: Cli, source: Path, tmp_path: Path) -> None:
    out = cli("export", source, "-o", tmp_path / "out", "--format", target)
    assert "smaller than dense" in out and "max |difference| in onnxruntime" in out and "prunable sparsity 90.00%" in out
    assert (tmp_path / "out").stat().st_size > 1000


def test_export_as_json(cli: Cli, source: Path, tmp_path: Path) -> None:
    report = json.loads(cli("export", source, "-o", tmp_path / "out", "--json"))
    assert report["bytes"] == (tmp_path / "out").stat().st_size
    assert {c["engine"] for c in report["comparisons"]} == {"onnxruntime", "ticketkit"}
    assert {c["name"]: c["format"] for c in report["plan"]["choices"] if c["format"] != "dense"} == sparse_nodes(tmp_path / "out")


def test_export_with_float16_values(cli: Cli, source: Path, tmp_path: Path) -> None:
    for values in ("fp32", "fp16"):
        out = cli("export", source, "-o", tmp_path / values, "--values", values, "--no-tune")
        assert ("weights rounded to float16: 0 more are zero, outputs move by up to 0.0" in out) == (values == "fp16")
    assert (tmp_path / "fp16").stat().st_size < 0.72 * (tmp_path / "fp32").stat().st_size
    stored = [json.loads(cli("inspect", tmp_path / values, "--json")) for values in ("fp32", "fp16")]
    assert stored[1]["values"] == "fp16" and stored[1]["weight_bytes_stored"] < 0.72 * stored[0]["weight_bytes_stored"]
    assert "bytes (fp16)" in cli("inspect", tmp_path / "fp16") and "(fp16)" not in cli("inspect", tmp_path / "fp32")
    assert "y: float32 [1, 10], min" in cli("run", tmp_path / "fp16")
    assert "format csr has no fp16 values" in cli.fails("export", source, "-o", tmp_path / "out", "--format", "csr", "--values", "fp16")
    assert "'int8' is not one of" in cli.fails("export", source, "-o", tmp_path / "out", "--values", "int8", code=2)


def test_the_choice_of_targets_is_the_folder(cli: Cli) -> None:
    assert names() == TARGETS
    text = cli("export", "--help")
    assert all(re.search(rf"^ +{target}\s", text, re.M) for target in TARGETS)
    assert "make them dense at load" in text


def damaged(source: Path, what: str) -> Path:
    data, model = source.read_bytes(), onnx.load(source)
    if what == "truncated":
        source.write_bytes(data[: len(data) // 2])
    elif what == "NaN":
        tensor = next(t for t in model.graph.initializer if t.name == "conv1.weight")
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0, 0, 0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, source)
    elif what == "opset":
        model.opset_import[0].version = 9
        onnx.save(model, source)
    elif what == "text":
        source.write_text("This is no model.")
    elif what == "dense":
        onnx.save(conv_net(0.0), source)
    elif what == "missing":
        source.unlink()
    return source


@pytest.mark.parametrize(
    ("what", "message"),
    [("truncated", "truncated or damaged"), ("NaN", "conv1: its weight holds NaN"), ("opset", "opset 9: expected 11"),
     ("text", "not a whole ONNX file"), ("dense", "no layer would run faster sparse"), ("missing", "no such file")],
)  # fmt: skip
def test_export_of_something_bad(what: str, message: str, cli: Cli, source: Path, tmp_path: Path) -> None:
    error = cli.fails("export", damaged(source, what), "-o", tmp_path / "out")
    assert message in error and not (tmp_path / "out").exists()


def test_export_to_nowhere_and_in_no_words(cli: Cli, source: Path, tmp_path: Path) -> None:
    assert "does not exist" in cli.fails("export", source, "-o", tmp_path / "none" / "out")
    assert "is a folder" in cli.fails("export", source, "-o", tmp_path)
    assert "'tflite' is not one of" in cli.fails("export", source, "-o", tmp_path / "out", "--format", "tflite", code=2)
    assert "numbers separated by commas" in cli.fails("export", source, "-o", tmp_path / "out", "--input-shape", "3xx", code=2)
    assert "Missing option" in cli.fails("export", source, code=2)


# inspect --------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_every_layer_and_the_totals(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = cli("inspect", source)
    for word in ("conv1", "64x64x3x3", "90.0%", "csr", "conv2d_csr_f32", "predicted", "no zeros"):
        assert word in out
    cli("export", source, "-o", tmp_path / "sparse.onnx")
    sparse = f"{len(sparse_nodes(tmp_path / 'sparse.onnx'))} of 5 layers"
    assert "prunable sparsity 90.00%" in out and sparse in out
    stored = cli("inspect", tmp_path / "sparse.onnx")
    assert "as stored in the file" in stored and sparse in stored


def test_inspect_as_json(cli: Cli, source: Path) -> None:
    found = json.loads(cli("inspect", source, "--json"))
    made = plan(lower(read(source)))
    assert made.sparse and found == json.loads(json.dumps({**made.to_dict(), **made.totals()}))
    assert found["prunable_sparsity"] == pytest.approx(0.9, abs=1e-3) and found["flops_left"] < found["flops_dense"]


def test_inspect_at_a_size(cli: Cli, tmp_path: Path) -> None:
    model = graph([node("Conv", "x c.weight", "y")], {"x": ["N", 64, "H", "W"]}, ["y"], {"c.weight": pruned((64, 64, 1, 1), 0.9)})
    onnx.save(model, tmp_path / "free.onnx")
    for size, pixels in (([], 224**2), (["--input-shape", "64,8,8"], 8**2)):
        assert json.loads(cli("inspect", tmp_path / "free.onnx", "--json", *size))["flops_dense"] == 2 * 64 * 64 * pixels
    assert "does not fit" in cli.fails("inspect", tmp_path / "free.onnx", "--input-shape", "3,8,8")
    assert "no such file" in cli.fails("inspect", tmp_path / "none.onnx")


# run ------------------------------------------------------------------------------------------------------------------------


def test_run_on_random_and_given_numbers(cli: Cli, source: Path, tmp_path: Path) -> None:
    assert "y: float32 [1, 10], min" in cli("run", source)
    assert "y: float32 [4, 10], min" in cli("run", source, "--batch", 4, "--threads", 1)
    x = normal(3, 3, 32, 32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "one.npy", x[:1])
    cli("run", source, "-i", tmp_path / "x.npy", "-o", tmp_path / "y.npz")
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], run(SOURCE, {"x": x})[0], atol=1e-4)
    named = cli("run", source, "-i", f"x={tmp_path / 'x.npy'}", "-i", f"x={tmp_path / 'one.npy'}")
    assert "float32 [4, 10]" in named


def test_run_on_images(cli: Cli, source: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "a.png")
    image.fromarray(pixels[:32, :32]).save(tmp_path / "exact.png")
    lines = cli("run", source, "-i", tmp_path / "a.png", "-i", tmp_path / "exact.png").splitlines()
    assert len(lines) == 12 and lines[0].endswith("a.png") and lines[6].endswith("exact.png") and "class " in lines[1]
    rule = ImageRule()
    (exact,) = read_input(tmp_path / "exact.png", ["N", 3, 32, 32], rule)
    np.testing.assert_allclose(exact, ((pixels[:32, :32] / 255 - rule.mean) / rule.std).transpose(2, 0, 1), atol=1e-5)
    best = top(run(SOURCE, {"x": exact[None]})[0][0])
    assert [f"class {i}" for i, _ in best] == [line.split("%")[1].strip() for line in lines[7:]]
    plain = read_input(tmp_path / "exact.png", ["N", 3, 32, 32], rule.changed([0.0] * 3, [1.0] * 3, None))
    np.testing.assert_allclose(plain[0], (pixels[:32, :32] / 255).transpose(2, 0, 1), atol=1e-6)


def test_run_uses_the_classes_and_the_normalisation_of_the_model(cli: Cli, tmp_path: Path) -> None:
    image, model = pytest.importorskip("PIL.Image"), conv_net(0.9, channels=64)
    rule = {"mean": [0.0] * 3, "std": [1.0] * 3, "classes": [f"kind {i}" for i in range(10)]}
    model.metadata_props.add(key=IMAGE_KEY, value=json.dumps(rule))
    onnx.save(model, tmp_path / "net.onnx")
    cli("export", tmp_path / "net.onnx", "-o", tmp_path / "sparse.onnx")
    image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    best = top(run(model, {"x": np.full((1, 3, 32, 32), 128 / 255, np.float32)})[0][0])
    for name in ("net", "sparse"):
        lines = cli("run", tmp_path / f"{name}.onnx", "-i", tmp_path / "grey.png").splitlines()[1:]
        assert [line.split("%")[1].strip() for line in lines] == [f"kind {i}" for i, _ in best]


def test_run_on_something_bad(cli: Cli, source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", normal(1, 3, 16, 16))
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "bad.png").write_bytes(b"no image")
    garbage = b"{'descr': ((((" + b" " * 40
    (tmp_path / "garbage.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(garbage).to_bytes(2, "little") + garbage)
    np.savez(tmp_path / "archive.npz", x=normal(1, 3, 32, 32))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    pytest.importorskip("PIL.Image").new("1", (16000, 16000)).save(tmp_path / "huge.png")
    for words, message in (
        (["-i", tmp_path / "none.npy"], "no such file"),
        (["-i", tmp_path / "small.npy"], "expected shape [N, 3, 32, 32], got [1, 3, 16, 16]"),
        (["-i", tmp_path / "bad.npy"], "not a .npy array"),
        (["-i", tmp_path / "garbage.npy"], "not a .npy array"),
        (["-i", tmp_path / "archive.npy"], "not a .npy array"),
        (["-i", tmp_path / "bad.png"], "not a readable image"),
        (["-i", tmp_path / "huge.png"], "not a readable image"),
        (["-i", "z=x.npy"], "the model has no input 'z'"),
        (["-o", tmp_path / "none" / "y.npz"], "cannot write"),
        (["--std", "1,0,1"], "expected positive numbers"),
    ):
        assert message in cli.fails("run", source, *words)
    assert "no such file" in cli.fails("run", tmp_path / "none.onnx")


def test_help_is_quick_to_import() -> None:
    """None of the three commands pulls torch, onnx or onnxruntime in before it runs."""
    code = "import sys, ticketkit.cli; print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
