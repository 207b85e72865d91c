"""The measurement protocol: complete rows, alternating turns, workers that rest, and engines that fail alone."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from graphs import conv_net
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from ticketkit.bench import engines, rows, table, timing
from ticketkit.bench.process import Worker
from ticketkit.bench.subject import Subject, make_feeds
from ticketkit.errors import DataError, FormatError, ModelError, TicketkitError
from ticketkit.exporters import export

FAKES = Path(__file__).parent / "fake_engines"
QUICK = timing.Protocol(rounds=2, seconds=0, warmup=0, settle=1, least=3, timeout=60)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Engines of the folder fake_engines by name; the workers find them too, since they inherit sys.path."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_ENGINE_LOG", str(tmp_path / "log"))
    return lambda *names: [import_module(f"fake_{name}") for name in names]


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "net.onnx")


def save_model(path, batch="batch", sparsity=0.9, nan=False):
    """conv(3->8, dense stem) relu conv(8->16, sparse) relu pool fc(16->5), 12 x 12 images."""
    rng = np.random.default_rng(3)
    first, second, fc = (rng.standard_normal(s).astype(np.float32) for s in ((8, 3, 3, 3), (16, 8, 3, 3), (5, 16)))
    second.ravel()[rng.permutation(second.size)[: round(sparsity * second.size)]] = 0
    if nan:
        fc[0, 0] = np.nan
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["y"], transB=1),
    ]
    weights = [numpy_helper.from_array(w, n) for w, n in ((first, "first"), (second, "second"), (fc, "fc"))]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, *s]) for n, s in (("x", (3, 12, 12)), ("y", (5,)))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    return path


def turns(log):
    """(engine, start, end) of every run the fakes wrote down, in order of time."""
    found = [line.split() for line in Path(log).read_text().splitlines()]
    return sorted(((name, float(a), float(b)) for name, a, b in found), key=lambda run: run[1])


def usable_names():
    return [engines.label(e) for e in engines.usable()[0]]


# --- engines: the folder is the registry ---


def test_the_folder_is_the_registry():
    files = {p.stem for p in Path(engines.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(engines.names()) == files >= {"ticketkit", "onnxruntime", "openvino", "torch", "xnnpack", "executorch"}
    assert not engines.get("ticketkit").MULTIPLIES_ZEROS
    assert all(engines.get(name).MULTIPLIES_ZEROS for name in engines.names() if name != "ticketkit")


def test_unknown_and_unusable_engines_are_errors(monkeypatch):
    with pytest.raises(TicketkitError, match=r"expected one of .*onnxruntime, .*got 'deepsparse'"):
        engines.require(["onnxruntime", "deepsparse"])
    monkeypatch.setattr(engines.get("openvino"), "available", lambda: (False, "it is Tuesday"))
    with pytest.raises(TicketkitError, match="openvino cannot be used here: it is Tuesday"):
        engines.require(["openvino"])
    assert engines.usable()[1]["openvino"] == "it is Tuesday"
    assert [engines.label(e) for e in engines.require(["onnxruntime", "onnxruntime"])] == ["onnxruntime"]


@pytest.mark.parametrize("module", ["onnxruntime", "openvino", "torch", "xnnpack", "executorch"])
def test_listing_engines_imports_none_of_them(module):
    code = "import sys; from ticketkit.bench import engines, table; [*map(engines.get, engines.names())]; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "numpy" in loaded
    if module != "onnxruntime":  # lowering folds constants with it
        assert module not in loaded


@pytest.mark.parametrize("name", usable_names())
def test_every_usable_engine_gives_a_complete_row(model, name):
    patient = dataclasses.replace(QUICK, timeout=240)  # executorch compiles at load
    report = timing.measure(model, engines.require(["onnxruntime", name]), 2, 3, patient)
    assert not report.failures
    row = {r.engine: r for r in report.rows}[name]
    assert (row.batch, row.threads, row.n, len(row.rounds_p50_ms)) == (3, 2, 6, 2)
    assert 0 < row.min_ms <= row.p50_ms <= row.p90_ms <= row.p99_ms
    assert row.min_ms <= row.mean_ms
    assert row.sparsity_prunable == pytest.approx(0.9, abs=1e-3)
    assert 0 < row.sparsity < row.sparsity_prunable
    assert row.flops_dense == 2 * (8 * 27 * 144 + 16 * 72 * 36 + 80)
    assert row.flops_left == 2 * (8 * 27 * 144 + (16 * 72 - round(0.9 * 16 * 72)) * 36 + 80)
    assert row.max_abs_diff < 1e-4 < row.max_abs_output
    assert row.peak_rss_bytes > 10e6
    assert row.file_bytes == model.stat().st_size
    assert row.baseline in {e for e in ("onnxruntime", name) if engines.get(e).MULTIPLIES_ZEROS}
    assert row.multiplies_zeros == engines.get(name).MULTIPLIES_ZEROS
    empty = [k for k, v in dataclasses.asdict(row).items() if v in ("", None) and k != "commit"]
    assert not empty
    assert json.loads(row.to_json()) == dataclasses.asdict(row)


def test_an_exported_file_is_benched_against_the_same_network_in_plain_onnx(tmp_path):
    if "ticketkit" not in usable_names():
        pytest.skip("no native library")
    original, exported = conv_net(0.95), tmp_path / "sparse.onnx"
    export(original, exported)
    report = timing.measure(exported, engines.usable()[0], protocol=QUICK)
    assert not report.failures
    found = {row.engine: row for row in report.rows}
    assert found["ticketkit"].sparse_layers > 0
    assert found["ticketkit"].file_bytes == exported.stat().st_size
    for name, row in found.items():
        assert row.max_abs_diff < 1e-4 * row.max_abs_output
        if name != "ticketkit":
            assert row.sparse_layers == 0
            assert row.file_bytes > found["ticketkit"].file_bytes
    plain = timing.measure(save(original, tmp_path / "plain.onnx"), engines.require(["ticketkit"]), protocol=QUICK).rows[0]
    assert plain.sparse_layers == found["ticketkit"].sparse_layers  # exported in memory, the same layers
    assert plain.sparsity_prunable == pytest.approx(found["ticketkit"].sparsity_prunable)
    assert plain.flops_left == found["ticketkit"].flops_left


def save(model, path):
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("engine", ["ticketkit", "onnxruntime"])
def test_the_script_of_the_benchmarks_folder(tmp_path, monkeypatch, engine):
    if engine not in usable_names():
        pytest.skip("no native library")
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "models.py"
    monkeypatch.syspath_prepend(file.parent)
    spec = spec_from_file_location("benchmark_models", file)
    script = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "network", lambda name, sparsity, *rest, **more: conv_net(sparsity["layer1.0.conv1"]))
    places = ["--files", str(tmp_path), "--results", str(tmp_path / "results" / "rows.jsonl")]
    quick = ["--rounds", "1", "--seconds", "0", "--setting", "b1t1", "b16t2"]
    assert script.main(["--model", "uniform-90.00", "--engine", engine, *quick, *places]) == 0
    found = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    assert [(row["engine"], row["batch"], row["threads"]) for row in found] == [(engine, 1, 1), (engine, 16, 2)]
    assert {row["model"] for row in found} == {"resnet50-uniform-90.00-224px.onnx"}


# --- the protocol ---


def test_turns_alternate_and_come_back_in_reverse(model, fake, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = fake("steady", "steadier")
    protocol = dataclasses.replace(QUICK, rounds=4, settle=2, least=3)
    steps = []
    report = timing.measure(model, [first, second], protocol=protocol, progress=lambda *step: steps.append(step))
    order = [name for name, _, _ in turns(tmp_path / "log")]
    blocks = [(name, len(list(group))) for name, group in groupby(order)]
    a, b, turn = "fake_steady", "fake_steadier", 5
    # load (one run each), warm-up, then a b | b a | a b | b a, each turn 2 untimed and 3 timed runs
    assert blocks == [(a, 1), (b, 1), (a, turn), (b, turn), (a, turn), (b, 2 * turn), (a, 2 * turn), (b, 2 * turn), (a, turn)]
    assert [row.n for row in report.rows] == [4 * 3] * 2
    assert [done for done, _, _ in steps] == list(range(len(steps)))
    assert {total for _, total, _ in steps} == {len(steps)}


def test_a_worker_rests_while_others_run(model, fake, tmp_path):
    """Negative control inside: the spinner is awake in its own turns, at least three times a run, so there is something to find."""
    timing.measure(model, fake("steady", "spinner"), protocol=dataclasses.replace(QUICK, rounds=3))
    runs = turns(tmp_path / "log")
    steady = [(a, b) for name, a, b in runs if name == "fake_steady"]
    awake = [a for name, a, _ in runs if name == "fake_spinner"]
    assert len(awake) >= 3 * (1 + 4 * 4)  # one run to load, then four turns of four
    later = [(a, b) for a, b in steady if a > awake[0]]
    assert len(later) >= 9
    assert not [stamp for a, b in later for stamp in awake if a < stamp < b]


def test_the_baseline_is_the_fastest_dense_engine(model, fake):
    report = timing.measure(model, [*fake("slow", "sparse", "steady")], protocol=QUICK)
    found = {row.engine: row for row in report.rows}
    assert {row.baseline for row in report.rows} == {"fake_steady"}  # slow is slower, sparse is not dense
    assert found["fake_steady"].speedup == found["fake_steady"].speedup_rounds == 1
    assert found["fake_slow"].speedup < 1 < found["fake_sparse"].speedup
    assert found["fake_sparse"].speedup == pytest.approx(found["fake_steady"].p50_ms / found["fake_sparse"].p50_ms, rel=1e-4)


def test_without_a_dense_engine_there_is_no_speedup(model, fake):
    (row,) = timing.measure(model, fake("sparse"), protocol=QUICK).rows
    assert (row.baseline, row.speedup, row.speedup_rounds) == (None, None, None)


def test_ratios_by_hand():
    times = {"a": [[10, 12, 14], [10, 10, 10]], "b": [[6, 6, 6], [5, 5, 5]], "c": [[2, 3, 4], [2, 2, 2]]}
    baseline, found = rows.ratios(times, dense=["a", "b"])
    assert baseline == "b"
    assert found["c"] == (5.5 / 2, np.median([6 / 3, 5 / 2]))
    assert found["a"] == (0.55, np.median([6 / 12, 5 / 10]))
    assert rows.ratios(times, dense=["x"]) == (None, {})
    unfinished = {**times, "c": [[2, 3, 4]]}  # Ctrl-C in the second round
    assert rows.ratios(unfinished, dense=["a", "b"])[1]["c"] == (5.5 / 3, 2.0)


def test_statistics_by_hand():
    found = rows.statistics([4.0, 1.0, 3.0, 2.0, 10.0])
    assert found == {"min_ms": 1, "p50_ms": 3, "p90_ms": 7.6, "p99_ms": 9.76, "mean_ms": 4, "std_ms": 3.535534}
    assert rows.statistics([2.5])["std_ms"] == 0


# --- engines that fail, fail alone ---


class PatientlyLoading(Worker):
    """A short timeout is for the turns; importing an engine may take longer on a busy machine."""

    def ask(self, do, timeout, **arguments):
        return super().ask(do, 60 if do == "load" else timeout, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("killed", r"fake_killed: its process died during 'turn' \(SIGKILL\)"),
        ("dies", r"fake_dies: its process died during 'load' \(exit code 3; last words: something: cannot allocate\)"),
        ("hangs", r"fake_hangs: expected an answer to 'turn' within 1 s"),
        ("refuses", r"fake_refuses: ValueError: unsupported operator: Conv"),
        ("wrong", r"fake_wrong: expected onnxruntime's output within .* a wrong answer has no speed"),
        ("nan", r"fake_nan: expected onnxruntime's output within .*nan"),
    ],
)
def test_a_failing_engine_is_named_and_the_others_are_kept(model, fake, monkeypatch, name, message):
    protocol = dataclasses.replace(QUICK, timeout=1) if name == "hangs" else QUICK
    chosen = [*fake(name), *engines.require(["onnxruntime"])]
    monkeypatch.setattr(timing, "Worker", PatientlyLoading)
    report = timing.measure(model, chosen, protocol=protocol)
    assert list(report.failures) == [f"fake_{name}"]
    (text,) = report.failures.values()
    assert re.search(message, text), text
    assert "\n" not in text
    assert [row.n for row in report.rows] == [6]


def test_no_worker_outlives_a_measurement(model, fake):
    timing.measure(model, fake("spinner", "killed", "refuses"), protocol=QUICK)
    left = [p for p in psutil.Process().children(recursive=True) if "ticketkit.bench.worker" in " ".join(p.cmdline())]
    assert not left


@pytest.mark.skipif(not hasattr(os, "setpgid"), reason="process groups are POSIX")
def test_suspended_workers_die_with_a_killed_parent(fake):
    script = (
        "import fake_sparse, time; from ticketkit.bench.process import Worker\n"
        "workers = [Worker(fake_sparse, 1) for _ in range(2)]\n"
        "for w in workers:\n"
        "    try: w.ask('turn', 60)\n"  # no model is loaded: an error, and a suspended worker
        "    except Exception as e: print(w._child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
            assert eventually(lambda: all(w.status() == psutil.STATUS_STOPPED for w in workers))
        finally:
            parent.kill()
    assert eventually(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def test_ctrl_c_keeps_what_was_measured(model, fake):
    def interrupt(done, total, what):
        if what.startswith("round 3/9"):
            raise KeyboardInterrupt

    report = timing.measure(model, fake("sparse", "steady"), protocol=dataclasses.replace(QUICK, rounds=9), progress=interrupt)
    assert report.interrupted
    assert [row.n for row in report.rows] == [6, 6]
    with pytest.raises(KeyboardInterrupt):
        table.conclude(report, None, {}, required=())


# --- the model under measurement ---


def test_the_model_must_be_benchable(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        Subject.open(tmp_path / "missing.onnx", 1, tmp_path)
    (tmp_path / "cut.onnx").write_bytes(save_model(tmp_path / "net.onnx").read_bytes()[:300])
    with pytest.raises(FormatError, match=r"cut\.onnx"):
        Subject.open(tmp_path / "cut.onnx", 1, tmp_path)
    with pytest.raises(ModelError, match="expected batch 4, the model has 2"):
        Subject.open(save_model(tmp_path / "fixed.onnx", batch=2), 4, tmp_path)
    assert make_feeds(onnx.load(tmp_path / "fixed.onnx"), 2)["x"].shape == (2, 3, 12, 12)


def test_a_model_that_computes_nan_is_refused(tmp_path):
    with pytest.raises(TicketkitError, match="NaN"):
        timing.measure(save_model(tmp_path / "nan.onnx", nan=True), engines.require(["onnxruntime"]), protocol=QUICK)


def test_a_model_with_a_bool_output_is_benched(tmp_path):
    model = onnx.load(save_model(tmp_path / "net.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.node.append(helper.make_node("Greater", ["y", "zero"], ["positive"]))
    model.graph.output.append(helper.make_tensor_value_info("positive", TensorProto.BOOL, ["batch", 5]))
    names = [name for name in usable_names() if name not in ("torch", "xnnpack", "executorch")]  # these do not rebuild Greater, and say so
    report = timing.measure(save(model, tmp_path / "bool.onnx"), engines.require(names), protocol=QUICK)
    assert not report.failures and {row.engine for row in report.rows} == set(names)


@pytest.mark.parametrize("change", [{"rounds": 0}, {"rounds": 200_000}, {"least": 0}, {"seconds": -1}, {"timeout": float("nan")}])
def test_a_protocol_must_make_sense(change):
    with pytest.raises(DataError, match=r"expected (1 to 100,000 rounds|no negative times)"):
        dataclasses.replace(QUICK, **change)


# --- the table ---


def test_the_table_says_what_the_speedup_must_be_read_with(model, fake):
    report = timing.measure(model, fake("sparse", "steady"), protocol=QUICK)
    console = Console(width=200, file=io.StringIO())
    console.print(table.render(report))
    text = console.file.getvalue()
    for expected in (
        *("skipped", "multiplied", "90.02% of the prunable weights", "70.6 kFLOP of 145 kFLOP a sample left (48.6%)"),
        *("0% to 90%, median 0% of 3 layers", "fake_sparse runs", "of 3 layers sparse"),
        *("p50 of fake_steady, the fastest dense engine", f"largest output is {report.rows[0].max_abs_output:.3g}"),
    ):
        assert expected in text
    assert "interrupted" not in text


@pytest.mark.parametrize("with_onnxruntime", [True, False])
def test_the_table_holds_sizes_and_load_time_against_dense(model, fake, with_onnxruntime):
    """Of dense onnxruntime where it was timed, else of the fastest dense engine."""
    report = timing.measure(model, [*fake("sparse", "steady"), *engines.require(["onnxruntime"] * with_onnxruntime)], protocol=QUICK)
    sizes = {"fake_sparse": (30, 100, 1.5), "onnxruntime": (120, 400, 1.0), "fake_steady": (60, 1000, 3.0)}
    fields = ("file_bytes", "peak_rss_bytes", "load_s")
    known = [dataclasses.replace(row, **dict(zip(fields, sizes[row.engine], strict=True))) for row in report.rows]

    def text(rows):
        console = Console(width=200, file=io.StringIO())
        console.print(table.render(dataclasses.replace(report, rows=rows)))
        return console.file.getvalue()

    name, shares = ("onnxruntime", (0.25, 0.25, 1.5)) if with_onnxruntime else ("fake_steady", (0.5, 0.1, 0.5))
    file, memory, load = (f"{share:.2f}" for share in shares)
    assert f"fake_sparse against {name}: {file} of the file, {memory} of the memory, {load} of the load time" in text(known)
    untold = [dataclasses.replace(row, peak_rss_bytes=0) for row in known]
    assert f"{file} of the file, {load} of the load time" in text(untold)
    alone = [dataclasses.replace(row, baseline=None) for row in known if not row.multiplies_zeros]
    assert "of the load time" not in text(alone)
