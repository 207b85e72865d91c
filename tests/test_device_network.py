"""ticketkit-network: outputs as in Python, engines apart from each other, whatever one of them or the parent meets."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import Array, conv_net, normal
from runners import RUNTIME, events, refused, runner, say

import ticketkit

ENGINES = ["onnxruntime", "ticketkit"]
QUICK = ["--rounds", 2, "--seconds", 0, "--warmup", 0, "--least", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: plain.onnx and the same one exported, other.onnx with other weights; inputs: x.f32, and two.f32 of two images."""
    if not RUNTIME:
        pytest.skip("this wheel of onnxruntime has no shared library to load")
    folder = tmp_path_factory.mktemp("network")
    onnx.save(conv_net(0.9, channels=64), folder / "plain.onnx")
    onnx.save(conv_net(0.9, channels=64, seed=9), folder / "other.onnx")
    ticketkit.export(folder / "plain.onnx", folder / "sparse.onnx")
    normal(2, 3, 32, 32).tofile(folder / "two.f32")
    normal(1, 3, 32, 32).tofile(folder / "x.f32")
    return folder


def words(folder: Path, *more: object, engines: tuple[str, ...] = ("onnxruntime=plain", "ticketkit=sparse")) -> list[object]:
    """A command line; engines are NAME=STEM of a model in the folder."""
    named = [part for each in engines for part in ("--engine", each.replace("=", f"={folder}/") + ".onnx")]
    libraries = ["--library", RUNTIME[0], "--operators", ticketkit.get_library_path()]
    inputs = [] if "--input" in more else ["--input", folder / "x.f32"]
    return [runner("ticketkit-network"), *libraries, *inputs, *named, *more]


def floats(path: Path) -> Array:
    return np.fromfile(path, "<f4")


@pytest.mark.parametrize(("stem", "batch"), [("x", 1), ("two", 2)])
def test_outputs_and_rounds(folder: Path, tmp_path: Path, stem: str, batch: int) -> None:
    done = say(*words(folder, *QUICK, "--threads", 2, "--outputs", tmp_path / "out", "--input", folder / f"{stem}.f32"))
    assert done.returncode == 0 and not done.stderr, done
    x = floats(folder / f"{stem}.f32").reshape(batch, 3, 32, 32)
    expected = ticketkit.InferenceSession(folder / "sparse.onnx", threads=1).run(None, {"x": x})[0].ravel()
    for name in ENGINES:
        np.testing.assert_allclose(floats(tmp_path / "out" / f"{name}.f32"), expected, rtol=0, atol=3e-5)
    said = events(done.stdout)
    assert said[0]["event"] == "device" and said[0]["isa"] and said[0]["runtime"].count(".") == 2 and said[0]["ticketkit"]
    assert said[-1] == {"event": "end"}
    assert [(r["round"], r["engine"]) for r in events(done.stdout, "round")] == [
        (0, "onnxruntime"), (0, "ticketkit"), (1, "ticketkit"), (1, "onnxruntime"),
    ]  # fmt: skip
    assert all(len(r["ms"]) == 2 and min(r["ms"]) > 0 for r in events(done.stdout, "round"))
    assert [e["at"] for e in events(done.stdout, "state")] == ["before", "after"]
    for kind, key in (("loaded", "load_s"), ("finished", "peak_rss_bytes")):
        assert [e["engine"] for e in events(done.stdout, kind)] == ENGINES and all(e[key] > 0 for e in events(done.stdout, kind))
    reference, checked = events(done.stdout, "checked")
    assert reference["max_abs_diff"] == 0 and checked["ok"] and 0 < checked["max_abs_diff"] < 1e-4 * checked["max_abs_output"]


def test_check_only_times_nothing(folder: Path, tmp_path: Path) -> None:
    done = say(*words(folder, "--check-only", "--outputs", tmp_path))
    kinds = [event["event"] for event in events(done.stdout)]
    assert kinds == ["device", "loaded", "checked", "loaded", "checked", "finished", "finished", "end"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnxruntime.f32", "ticketkit.f32"]


def test_the_operators_are_those_of_the_library(folder: Path, tmp_path: Path) -> None:
    """Without function bodies only an engine with the operators can run the file."""
    bare = onnx.load(folder / "sparse.onnx")
    del bare.functions[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    done = say(*words(tmp_path, *QUICK, "--input", folder / "x.f32", engines=("stock=bare", "ticketkit=bare")))
    (failed,) = events(done.stdout, "failed")
    assert done.returncode == 0 and failed["engine"] == "stock" and "SparseConv" in failed["message"]
    assert [e["engine"] for e in events(done.stdout, "finished")] == ["ticketkit"]


def test_engines_that_fail_leave_the_others_alone(folder: Path, tmp_path: Path) -> None:
    done = say(*words(folder, *QUICK, engines=("onnxruntime=plain", "gone=missing", "wrong=other", "ticketkit=sparse")))
    failed = {e["engine"]: e["message"] for e in events(done.stdout, "failed")}
    assert done.returncode == 0 and failed.keys() == {"gone", "wrong"}
    assert "missing.onnx" in failed["gone"] and "a wrong answer has no speed" in failed["wrong"]
    checked = {e["engine"]: e["ok"] for e in events(done.stdout, "checked")}
    assert checked == {"onnxruntime": True, "wrong": False, "ticketkit": True}
    assert {r["engine"] for r in events(done.stdout, "round")} == set(ENGINES)
    alone = say(*words(folder, *QUICK, engines=("gone=missing",)))
    assert alone.returncode == 1 and events(alone.stdout)[-1] == {"event": "end"}


def test_models_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for name, text in {
        "two": "(float[1,2] x, float[1,2] z) => (float[1,2] y) { y = Add (x, z) }",
        "free": "(float[N,C] x) => (float[N,C] y) { y = Relu (x) }",
        "nan": "(float[N] x) => (float[N] y) { y = Log (x) }",
        "int": "(float[N] x) => (int64[1] y) { y = Shape (x) }",
    }.items():
        onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {name} {text}'), tmp_path / f"{name}.onnx")
    engines = ("two=two", "free=free", "nan=nan", "int=int")
    done = say(*words(tmp_path, "--check-only", "--input", folder / "x.f32", engines=engines))
    failed = {e["engine"]: e["message"] for e in events(done.stdout, "failed")}
    assert "one input, got 2" in failed["two"] and "--shape" in failed["free"]
    assert "finite outputs" in failed["nan"] and "expected float32" in failed["int"]
    shaped = say(*words(tmp_path, "--check-only", "--input", folder / "x.f32", "--shape", "3,1024", engines=("free=free",)))
    assert shaped.returncode == 0, shaped
    other = say(*words(folder, "--check-only", "--shape", "1,3,16,64"))
    assert "--shape: expected one that fits the model's input [?,3,32,32]" in events(other.stdout, "failed")[0]["message"]


@contextmanager
def running(command: list[object]) -> Iterator[tuple[subprocess.Popen[str], list[int], list[str]]]:
    """A run in progress: its process, its children, and the lines up to its first round."""
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines: list[str] = []
            assert process.stdout
            while '"round"' not in "".join(lines[-1:]):
                lines.append(process.stdout.readline())
                assert lines[-1], process.communicate()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process, [*map(int, children)], lines
        finally:
            process.kill()


def state(pid: int) -> str:
    """The letter of /proc/PID/stat: T is stopped; Z or nothing, gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


LONG = ["--rounds", 40, "--seconds", 0.05, "--warmup", 0]


def test_one_engine_is_awake_at_a_time(folder: Path) -> None:
    with running(words(folder, *LONG)) as (_, children, _):
        assert len(children) == 2
        awake = []
        for _ in range(300):
            awake.append(sum(state(child) not in "TtZ" for child in children))
            time.sleep(0.001)
    assert max(awake) == 1, "the other one is stopped"


def test_a_killed_engine_is_a_result(folder: Path) -> None:
    with running(words(folder, *LONG)) as (process, children, lines):
        os.kill(children[0], signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
        said = events("".join(lines) + rest)
    (failed,) = (e for e in said if e["event"] == "failed")
    assert failed["engine"] == "onnxruntime" and "signal 9" in failed["message"]
    assert process.returncode == 0 and said[-1] == {"event": "end"}
    assert len([e for e in said if e["event"] == "round" and e["engine"] == "ticketkit"]) == 40


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_killed_run(folder: Path, by: signal.Signals) -> None:
    with running(words(folder, *LONG)) as (process, children, lines):
        process.send_signal(by)
        rest, _ = process.communicate(timeout=30)
        deadline = time.monotonic() + 5
        while any(state(child) not in ("", "Z") for child in children) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [state(child) for child in children if state(child) not in ("", "Z")] == []
    assert process.returncode == -by and '"end"' not in rest
    assert all(line.endswith("\n") for line in lines), "what was finished is whole"


def test_nobody_reads(folder: Path) -> None:
    """A connection that broke ends the run."""
    with running(words(folder, *LONG)) as (process, _, _):
        assert process.stdout
        process.stdout.close()
        process.wait(timeout=30)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--engine", "a"], "--engine: expected NAME=MODEL.onnx"),
        (["--engine", "../a=b"], "--engine: expected NAME=MODEL.onnx"),
        (["--engine", "onnxruntime=b"], "got onnxruntime twice"),
        (["--threads", "0"], "--threads: expected a whole number"),
        (["--shape", "1,x"], "--shape: expected sizes"),
        (["--input", "/none.f32"], "/none.f32: No such file"),
        (["--input", "/"], "expected a file of float32 numbers"),
        (["--library", "/none.so"], "/none.so"),
        (["--operators", "/none.so"], "--operators: /none.so"),
        (["--library", "OPERATORS"], "expected libonnxruntime"),
        (["--operators", "RUNTIME"], "expected libticketkit"),
        (["--outputs", "/proc/none"], "--outputs: /proc/none"),
        (["--rounds"], "expected a value after it"),
        (["--fast"], "unknown option '--fast'"),
    ],
)
def test_options_that_make_no_sense(folder: Path, more: list[str], text: str) -> None:
    paths = {"OPERATORS": str(ticketkit.get_library_path()), "RUNTIME": str(RUNTIME[0])}
    assert text in refused(say(*words(folder), *(paths.get(word, word) for word in more)))


def test_what_is_missing(folder: Path) -> None:
    program = runner("ticketkit-network")
    assert "--help" in refused(say(program))
    lonely = ["--library", RUNTIME[0], "--input", folder / "x.f32", "--engine", f"ticketkit={folder}/sparse.onnx"]
    assert "--operators: expected the path of libticketkit" in refused(say(program, *lonely))
    assert "--rounds" in say(program, "--help").stdout


def test_cpus(folder: Path) -> None:
    assert say(*words(folder, "--check-only", "--cpus", min(os.sched_getaffinity(0)))).returncode == 0
    done = say(*words(folder, "--check-only", "--cpus", "1000-1001"))
    assert "processors 1000,1001" in events(done.stdout, "failed")[0]["message"]
