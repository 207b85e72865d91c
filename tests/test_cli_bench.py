"""`ticketkit bench`: what it prints, what it writes, and one clear line for what is wrong."""

import json
import os
import signal
import stat
import subprocess
import sys

import psutil
import pytest
from test_bench import eventually, save_model

QUICK = ("--rounds", "1", "--seconds", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "net.onnx")


def command(*arguments):
    return [sys.executable, "-m", "ticketkit.cli", "bench", *map(str, arguments)]


def run(*arguments, **environment):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def last_line(done):
    """The error: one line, the last on stderr."""
    return done.stderr.strip().splitlines()[-1]


def test_rows_on_stdout_table_on_stderr(model):
    done = run(model, "-e", "onnxruntime", "-e", "ticketkit", "--threads", 2, "--batch", 3, *QUICK, "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["engine"] for row in rows] == ["onnxruntime", "ticketkit"]
    assert {(row["threads"], row["batch"], row["model"], row["baseline"]) for row in rows} == {(2, 3, "net.onnx", "onnxruntime")}
    assert "× dense" in done.stderr
    assert "sparsity by layer" in done.stderr


def test_rows_are_appended_to_a_file(model, tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text('{"engine": "of yesterday"}\n')
    done = run(model, "-e", "onnxruntime", *QUICK, "--json", target)
    assert done.returncode == 0, done.stderr
    assert "× dense" in done.stdout
    assert [json.loads(line)["engine"] for line in target.read_text().splitlines()] == ["of yesterday", "onnxruntime"]


def test_by_default_every_usable_engine_runs_and_the_others_are_explained(model, tmp_path):
    """Without the native library ticketkit is an engine like any other that is missing: said, and not fatal."""
    done = run(model, *QUICK, "--json", "-", TICKETKIT_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in {json.loads(line)["engine"] for line in done.stdout.splitlines()}
    assert "not used: ticketkit: native library" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.onnx",), "missing.onnx: no such file"),
        (("{model}", "-e", "deepsparse"), "expected one of executorch, onnxruntime"),
        (("{model}", "-e", "onnxruntime", "--batch", "4", "--json", "no/such/folder/rows.jsonl"), "rows.jsonl"),
        (("{fixed}", "-e", "onnxruntime", "--batch", "4"), "expected batch 4, the model has 2"),
        (("{cut}", "-e", "onnxruntime"), "cut.onnx"),
        (("{nan}", "-e", "onnxruntime"), "NaN"),
        (("{model}", "-e", "onnxruntime", "--timeout", "-1"), "no negative times"),
        (("{model}", "--device", "usb"), "--device: expected adb[:SERIAL] or local or qemu or ssh:[USER@]HOST[:PORT], got 'usb'"),
        (("{model}", "--device", "ssh:-oProxyCommand=touch x"), "--device ssh: expected ssh:[USER@]HOST[:PORT]"),
        (("{model}", "--device", "local", "-e", "torch"), "--engine: expected onnxruntime or ticketkit on a device, got 'torch'"),
        (("{model}", "--device", "local", "--runner", "no/such/folder"), "no/such/folder: expected ticketkit-network"),
        (("{model}", "--device", "local", "--cpus", "big;little"), "--cpus: expected all or numbers such as 4-7, got 'big;little'"),
        (("{model}", "-e", "onnxruntime", "--timeout", "0.001"), "engine onnxruntime: expected an answer to 'load' within"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, model, arguments, message):
    files = {"model": model, "cut": tmp_path / "cut.onnx"}
    files["cut"].write_bytes(model.read_bytes()[:500])
    files["fixed"] = save_model(tmp_path / "fixed.onnx", batch=2)
    files["nan"] = save_model(tmp_path / "nan.onnx", nan=True)
    done = run(*(a.format(**files) for a in arguments), *QUICK)
    assert done.returncode == 1
    assert message in last_line(done)
    assert last_line(done).startswith("ticketkit: error: ")
    assert "Traceback" not in done.stderr


def test_options_of_devices_need_one(model):
    done = run(model, "--cpus", "0")
    assert done.returncode == 2
    assert "--cpus needs --device" in last_line(done)


def test_an_unusable_engine_asked_for_by_name_is_an_error(model, tmp_path):
    done = run(model, "-e", "ticketkit", *QUICK, TICKETKIT_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 1
    assert "engine ticketkit cannot be used here: native library" in last_line(done)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_is_refused_before_the_measurement(model, tmp_path):
    target = tmp_path / "rows.jsonl"
    target.touch()
    target.chmod(stat.S_IRUSR)
    done = run(model, "-e", "onnxruntime", *QUICK, "--json", target)
    assert done.returncode == 1
    assert "rows.jsonl: Permission denied" in last_line(done)


def workers_of(pid):
    """Worker processes of a running bench."""
    children = psutil.Process(pid).children(recursive=True)
    return [p for p in children if "ticketkit.bench.worker" in " ".join(p.cmdline())]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_prints_what_was_measured(model, tmp_path):
    """The interrupt comes once the rounds have begun, and before they can end."""
    arguments = command(model, "-e", "onnxruntime", "--rounds", 10**5, "--seconds", 0.01, "--json", "-")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert eventually(lambda: workers_of(bench.pid))
        (worker,) = workers_of(bench.pid)
        assert eventually(lambda: worker.cpu_times().user > 8, 60)  # past import, load and one second of warm-up
        bench.send_signal(signal.SIGINT)
        stdout, stderr = bench.communicate(timeout=60)
    assert bench.returncode == 130
    (row,) = map(json.loads, stdout.splitlines())
    assert row["n"] >= 3
    assert "interrupted: fewer rounds than asked for" in stderr
    assert stderr.strip().splitlines()[-1].startswith("ticketkit: error: interrupted")
    assert not worker.is_running()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_engine_is_named_and_the_other_is_printed(model):
    arguments = command(model, "-e", "onnxruntime", "-e", "ticketkit", "--rounds", 60, "--seconds", 0.05, "--json", "-")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert eventually(lambda: len(workers_of(bench.pid)) == 2)
        (victim,) = [p for p in workers_of(bench.pid) if "engines.ticketkit" in " ".join(p.cmdline())]
        assert eventually(lambda: victim.status() == psutil.STATUS_STOPPED)  # it has loaded the model and rests
        victim.kill()
        stdout, stderr = bench.communicate(timeout=120)
    assert bench.returncode == 1
    assert [json.loads(line)["engine"] for line in stdout.splitlines()] == ["onnxruntime"]
    assert "engine ticketkit: its process died" in stderr.strip().splitlines()[-1]
    assert "SIGKILL" in stderr
