"""`estimate` as typed: the table, the layers, JSON, --help, and one clear line where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from graphs import conv_net

from ticketkit import cost, estimator
from ticketkit.cli import main
from ticketkit.cli.files import DISTRIBUTIONS


@pytest.fixture
def source(tmp_path: Path) -> str:
    onnx.save(conv_net(0.0, channels=64), tmp_path / "net.onnx")
    return str(tmp_path / "net.onnx")


def say(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """(exit code, stdout, stderr) of `ticketkit estimate` with these words."""
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *words])
    captured = capfd.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_a_line_for_each_sparsity_and_how_to_read_it(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(capfd, source, "--sparsity", "0.5,0.9", "--sparsity", "0.95", "--distribution", "erk")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    (titles,) = (line for line in lines if line[:1] == ["sparsity"])
    found = {line[0]: line[1:] for line in lines if line and line[0].endswith("%")}
    assert list(found) == ["50.00%", "90.00%", "95.00%"] and "speedup" in titles
    speedups = [float(row[2].removesuffix("x")) for row in found.values()]
    assert speedups == sorted(speedups) and speedups[-1] > 1.5
    text = " ".join(out.split())
    for said in ("erk sparsity, 1x1, of 3 layers (every convolution but the first)", "An estimate", "on one core", cost.table()["machine"]):
        assert said in text
    assert "conv2d_csr_f32" not in out


def test_layers(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = say(capfd, source, "--sparsity", "0.9", "--granularity", "4x1", "--layers")
    for word in ("at 90.00%", "conv1", "conv2d_bsr_f32", "64x64x3x3", "no zeros", "prunable sparsity 90.0"):
        assert word in out


def test_json(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = "--sparsity 0.5,0.9 --distribution uniform --batch 2 --input-shape 3,32,32 --json"
    _, out, _ = say(capfd, source, *words.split())
    found = json.loads(out)
    expected = estimator.estimate(source, [0.5, 0.9], distribution="uniform", batch=2, input_shape=[3, 32, 32])
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert found["levels"][0]["inputs"] == {"x": [2, 3, 32, 32]} and found["distribution"] == "uniform"


def test_a_network_of_torchvision(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    code, out, err = say(capfd, "squeezenet1_1", "--sparsity", "0.9", "--input-shape", "3,64,64")
    assert (code, err) == (0, "") and "squeezenet1_1 at input [1, 3, 64, 64]" in out and "random initialisation" in out


def test_help_says_what_a_sparsity_is(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capfd, "--help")
    text = " ".join(out.split())
    assert code == 0 and "Fractions of the prunable weights, e.g. 0.9 or 0.5,0.7,0.9" in text and "before training" in text
    assert all(name in out for name in estimator.DISTRIBUTIONS) and list(estimator.DISTRIBUTIONS) == DISTRIBUTIONS


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [([], 2, "Missing option '--sparsity'"), (["--sparsity", "90%"], 2, "expected numbers separated by commas, got '90%'"),
     (["--sparsity", "90"], 1, "got 90; 90 % is 0.9"), (["--sparsity", "0.9", "--distribution", "fair"], 2, "'fair' is not one of"),
     (["--sparsity", "0.9", "--granularity", "x"], 1, "expected RxC"), (["--sparsity", "0.9", "--batch", "0"], 2, "not in the range"),
     (["--sparsity", "0.9", "--input-shape", "1,8,8"], 1, "does not fit"), (["--sparsity", "0.9", "--round", "2"], 1, "no run directory")],
)  # fmt: skip
def test_nonsense_is_one_line(words: list[str], code: int, message: str, source: str, capfd: pytest.CaptureFixture[str]) -> None:
    got, out, err = say(capfd, source, *words)
    assert got == code and not out and message in err
    assert code == 2 or (err.startswith("ticketkit: error: ") and err.count("\n") == 1)


def test_files_need_no_torch(source: str, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; from ticketkit import cli; cli.main({})"
    words = ["estimate", source, "--sparsity", "0.9"]
    done = subprocess.run([sys.executable, "-c", blocked.format(words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "90.00%" in done.stdout, done.stderr
    words[1] = "resnet18"
    done = subprocess.run([sys.executable, "-c", blocked.format(words)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install 'ticketkit[find]'" in done.stderr
