"""A run on a device from beginning to end: rows, partial rows of runs that break off, and nothing left behind."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
from boards import Board
from test_bench import eventually, save_model

from ticketkit.bench import device as on
from ticketkit.bench import timing
from ticketkit.bench.devices import _run, local
from ticketkit.cli import main
from ticketkit.errors import DeviceError, ModelError, TicketkitError

PROTOCOL = timing.Protocol(rounds=4, seconds=0, warmup=0, timeout=20)
DEVICES = ["local", "ssh:pi@board:2222", "adb:emulator-5554"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake clients are shell scripts")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "net.onnx")


@pytest.fixture
def board(tmp_path, monkeypatch, model):
    made = Board(tmp_path, monkeypatch)
    made.runners(model)
    monkeypatch.setattr(_run, "SLACK", 0.0)
    return made


def measure(name, model, protocol=PROTOCOL, **settings):
    return _run.measure(_run.Target(name, **settings), model, protocol=protocol)


@pytest.mark.parametrize("name", DEVICES)
def test_rows_come_back_and_nothing_stays(name, board, model):
    report = measure(name, model)
    dense, sparse = report.rows
    assert (dense.engine, sparse.engine) == ("onnxruntime", "ticketkit")
    assert not report.failures and not report.stopped and not report.interrupted
    assert (sparse.n, sparse.rounds_p50_ms, dense.p50_ms) == (12, [2.25, 2.5, 2.5, 2.5], pytest.approx(8.5))
    assert (sparse.baseline, sparse.speedup, sparse.speedup_rounds) == ("onnxruntime", pytest.approx(3.4), pytest.approx(3.4))
    assert (sparse.isa, sparse.engine_version != "", dense.engine_version) == ("neon", True, "1.31.1")
    assert (sparse.peak_rss_bytes, sparse.load_s, sparse.max_abs_diff) == (12345678, 0.25, 0.0)
    found = sparse.device
    assert (found["kind"], found["kernel"], found["complete"]) == (name.partition(":")[0], "Linux 6.1", True)
    assert found["temperatures"] == {"before": {"soc": 41.0}, "after": {"soc": 78.0}}  # -274 degrees is no temperature
    assert found["throttled"]
    assert any("cpu 0 fell from 2.00 to 1.50 GHz" in note for note in report.notes)
    assert json.loads(sparse.to_json())["device"] == found
    assert board.left() == []


def test_what_the_clients_are_called_with(board, model):
    """No word for a local shell, options that cannot be names, and a directory that only this user may read."""
    measure("ssh:pi@board:2222", model)
    (first, *_) = "\n".join(board.calls()).split("\n----\n")
    words = first.splitlines()[1:]
    options = " ".join(words[: words.index("--") + 2])
    assert options.startswith("-T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o Control")
    assert options.endswith("/s -l pi -p 2222 -- board")
    runs = "\n".join(board.calls()).split("\nrunner\n")[1:]
    assert ["--check-only" in run.splitlines() for run in runs] == [True, False]
    assert "--rounds\n4\n" in runs[1] and "--shape\n1,3,12,12\n" in runs[1]


def test_processors_are_chosen_by_number(board, model):
    report = measure("local", model, cpus="0")
    assert report.rows[0].device["cpus"] == [0]
    assert "--cpus\n0\n" in "\n".join(board.calls())
    with pytest.raises(DeviceError, match=r"--cpus: expected .*numbers such as 4-7, got '0; touch x'"):
        measure("local", model, cpus="0; touch x")


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("killed", "signal 9"),
        ("dropped", "signal 9"),
        ('{"event": "round", "engine": "ticketkit", "round": 2, "ms": [-1]}', "none below 0"),
    ],
)
def test_a_run_that_breaks_off_keeps_its_rounds(name, what, why, board, model):
    board.do(what)
    report = measure(name, model)
    assert [row.n for row in report.rows] == [6, 6]
    assert report.rows[1].speedup == pytest.approx(3.4, rel=0.1)
    assert not any(row.device["complete"] for row in report.rows)
    assert why in report.stopped and "the rows are of the rounds before that" in report.stopped
    assert board.left() == []


def test_a_turn_of_many_short_runs_is_taken_whole(board, model):
    board.do("long")
    report = measure("ssh:board", model)
    assert not report.stopped and [row.n for row in report.rows] == [100_009, 100_009]


def test_times_below_a_tick_of_the_clock_have_no_ratio(board, model):
    board.do("coarse")
    report = measure("local", model)
    assert not report.stopped and [(row.n, row.p50_ms, row.speedup, row.baseline) for row in report.rows] == [(12, 0, None, None)] * 2
    assert on.table.render(report)


def test_rows_of_an_engine_that_died_are_not_complete(board, model):
    board.do("fails")
    report = measure("local", model)
    assert [(row.engine, row.n, row.device["complete"]) for row in report.rows] == [("onnxruntime", 12, True), ("ticketkit", 6, False)]
    assert report.failures == {"ticketkit": "engine ticketkit: out of memory"}


def test_a_silent_device_is_given_up_whatever_it_mumbles(board, model):
    board.do("silent")
    start = time.monotonic()
    report = measure("ssh:board", model, timing.Protocol(rounds=4, seconds=0, warmup=0, timeout=1))
    assert time.monotonic() - start < 40
    assert "silent for 1 s and counts as dead" in report.stopped
    assert [row.n for row in report.rows] == [6, 6]
    assert board.left() == []


def test_endless_noise_is_refused(board, model):
    board.do("noise")
    report = measure("local", model)
    assert "bytes that are no events, such as 'xxx" in report.stopped
    assert board.left() == []


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ('{"event": "round", "engine": "ticketkit", "round": 2, "ms": [NaN]}', "sent NaN in"),
        ('{"event": "round", "engine": "ticketkit", "round": 2, "ms": []}', "ms is '[]'"),
        ('{"event": "round", "engine": "ticketkit", "round": 2, "ms": [1, true]}', "ms is '[1, true]'"),
        ('{"event": "round", "engine": "ticketkit", "round": 2, "ms": [1e300]}', "expected 1 to 100,000 times"),
        ('{"event": "loaded", "engine": "ticketkit", "load_s": 1' + "0" * 400 + "}", "load_s is '1000"),
        ('{"event": "round", "engine": "ticketkit", "round": 7, "ms": [1]}', "sent round 7 of ticketkit; expected 2"),
        ('{"event": "round", "engine": "tflite", "round": 2, "ms": [1]}', "engine 'tflite'; expected onnxruntime or ticketkit"),
        ('{"event": "round", "round": 2, "ms": [1]}', "engine is nothing"),
        ('{"event": "finished", "engine": "ticketkit", "peak_rss_bytes": -5}', "peak_rss_bytes is '-5'"),
        ('{"event": "loaded", "engine": "ticketkit", "load_s": "1"}', "load_s is '\"1\"'"),
        ('{"event": "state", "at": "after", "temperatures": {"a": "hot"}, "khz": {}}', "expected millidegrees by zone"),
    ],
)
def test_numbers_that_cannot_be_are_refused(event, why, board, model):
    board.do(event)
    report = measure("local", model)
    assert why in report.stopped
    assert [row.n for row in report.rows] == [6, 6]


@pytest.mark.parametrize(
    "line",
    ['{"event": "rou', "{" * 5000, "[1, 2]", '{"event": 7}', '{"event": "news"}', '"event"', "motd", '{"event": "round"' + "9" * 9000],
)
def test_what_is_no_event_is_passed_over(line, board, model):
    board.do(line if line.startswith("{") else "{\n" + line)
    report = measure("local", model)
    assert not report.stopped and [row.n for row in report.rows] == [12, 12]


def test_a_wrong_answer_has_no_speed(board, model):
    board.do("wrong")
    report = measure("local", model)
    assert [row.engine for row in report.rows] == ["onnxruntime"]
    assert "a wrong answer has no speed" in report.failures["ticketkit"]


def test_an_error_of_the_runner_is_one_line_without_control_characters(board, model):
    board.do("error")
    with pytest.raises(DeviceError) as caught:
        measure("ssh:board", model)
    assert str(caught.value) == "ssh:board: no such thing ?[31mred"
    assert board.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", DEVICES)
def test_ctrl_c_ends_the_program_there_and_keeps_the_rounds(name, number, board, model):
    board.do("waits")
    start = time.monotonic()
    with board.once_it_waits(lambda: os.kill(os.getpid(), number)):
        report = measure(name, model)
    assert report.interrupted and [row.n for row in report.rows] == [6, 6]
    assert time.monotonic() - start < 40
    assert board.left() == [] and eventually(board.ended, 20)


def test_the_device_cleans_up_when_this_side_is_killed(board, model):
    """No chance to do anything here: standard input of the client ends, and that is all the device learns."""
    board.do("waits")
    board.measure_and_be_killed(lambda: measure("ssh:board", model))
    assert eventually(lambda: board.left() == [], 20) and eventually(board.ended, 20)


@pytest.mark.parametrize("shell", [["bash"], ["busybox", "sh"], ["dash"], ["mksh"]], ids=lambda words: words[0])
def test_every_shell_of_a_device_will_do(shell, board, model, monkeypatch):
    """Debian's, Android's (mksh) and that of small systems."""
    if not shutil.which(shell[0]):
        pytest.skip(f"no {shell[0]}")
    monkeypatch.setattr(local.Local, "client", lambda self, line: [*shell, "-c", line])
    report = measure("local", model)
    assert [row.n for row in report.rows] == [12, 12] and not report.stopped
    board.do("waits")
    with board.once_it_waits(lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert measure("local", model).interrupted
    assert board.left() == [] and eventually(board.ended, 20)


# --- what stays behind ---


def test_a_copy_that_breaks_off_says_what_may_be_left(board, model):
    """The connection goes while the first file is copied, and does not come back."""
    board.program("cat", 'case $1 in "") kill -9 $PPID; exit 1;; esac; exec /bin/cat "$@"')
    board.program("rm", "echo 'rm: the device is gone' >&2; exit 1")
    left = r"while copying ticketkit-network; \S+/ticketkit\.\w+ may be left on the device: .*the device is gone"
    with pytest.raises(DeviceError, match=left):
        measure("ssh:board", model)
    assert len(board.left()) == 1


def test_an_interrupt_before_anything_is_measured_says_what_may_be_left(board, model, monkeypatch, capsys):
    board.program("rm", "echo 'rm: cannot remove: Read-only file system' >&2; exit 1")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "check", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(model), "--device", "ssh:board"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 130
    assert said.startswith("ticketkit: error: interrupted") and "may be left on the device" in said


@pytest.mark.parametrize("name", DEVICES[1:])
def test_a_directory_that_cannot_be_removed_is_a_note(name, board, model):
    board.program("rm", "echo 'rm: cannot remove: Read-only file system' >&2; exit 1")
    report = measure(name, model)
    assert [row.n for row in report.rows] == [12, 12] and not report.stopped
    assert "may be left on the device" in report.notes[-1] and "Read-only file system" in report.notes[-1]


@pytest.mark.parametrize("folder", ["a b", "a'b", "rel"])
def test_a_folder_for_temporary_files_that_is_none_of_ours(folder, board, model, monkeypatch, tmp_path):
    made = folder if folder == "rel" else str(tmp_path / folder)
    if made == str(tmp_path / folder):
        os.mkdir(made)
    with monkeypatch.context() as changed:
        changed.setenv("TMPDIR", made)
        device = local.open("")
        directory = device.reserve()
    try:
        assert directory.startswith("/tmp/ticketkit.")
    finally:
        device.remove(directory)


def test_a_folder_for_temporary_files_with_a_slash_at_the_end(board, monkeypatch):
    monkeypatch.setenv("TMPDIR", f"{board.root}/")
    device = local.open("")
    device.remove(device.reserve())
    assert board.left() == []


def test_signals_that_are_ignored_stay_ignored(board, model):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        board.do("waits")
        with board.once_it_waits(lambda: (os.kill(os.getpid(), signal.SIGHUP), time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM))):
            report = measure("local", model)
        assert report.interrupted and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- room on the device ---


@pytest.mark.parametrize("name", DEVICES[1:])
def test_too_little_room_is_said_before_anything_is_copied(name, board, model):
    board.program("df", "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'; echo '/dev/x 1000 900 100 90% /tmp'")
    with pytest.raises(DeviceError, match=r"expected [\d,]+ bytes free in \S+, there are 102,400; free some there"):
        measure(name, model)
    assert board.left() == []
    assert "push" not in board.calls()


def test_a_disk_that_fills_up_while_copying(board, model):
    (board.bin / "full").touch()
    with pytest.raises(
        DeviceError, match=r"expected room for ticketkit-network, [\d,]+ bytes, in \S+, the disk is full \([\d,]+ bytes free\)"
    ):
        measure("adb", model)
    board.program("cat", 'case $1 in "") echo "cat: write error: No space left on device" >&2; exit 1;; esac; exec /bin/cat "$@"')
    board.program("df", "exit 1")
    with pytest.raises(DeviceError, match="the disk is full; free some there"):
        measure("ssh:board", model)
    assert board.left() == []


# --- the models a device can run, the table, the command line ---


def test_models_that_no_runner_takes(board, tmp_path):
    import onnx
    from graphs import graph, node

    two = graph([node("Add", "a b", "y")], {"a": [1, 4], "b": [1, 4]}, ["y"], {})
    onnx.save(two, tmp_path / "two.onnx")
    with pytest.raises(ModelError, match=r"two\.onnx: expected one float32 input on a device, got a \(float32\), b \(float32\)"):
        measure("local", tmp_path / "two.onnx")


def test_engines_that_no_runner_has(board, model):
    with pytest.raises(DeviceError, match="--engine: expected onnxruntime or ticketkit on a device, got 'torch'"):
        _run.measure(_run.Target("local"), model, ["torch"], protocol=PROTOCOL)
    assert [row.engine for row in _run.measure(_run.Target("local"), model, ["ticketkit"], protocol=PROTOCOL).rows] == ["ticketkit"]


def test_the_table_says_where_and_how_warm(board, model, capsys, tmp_path):
    board.do("killed")
    with pytest.raises(TicketkitError, match="was cut off"):
        on.bench(on.Target("ssh:pi@board"), model, protocol=PROTOCOL, json_to=str(tmp_path / "rows.jsonl"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "device ssh:pi@board" in printed and "broken off: fewer rounds than asked for" in printed
    assert [json.loads(line)["engine"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["onnxruntime", "ticketkit"]


def test_no_text_of_a_stranger_reaches_the_terminal_as_more_than_text(board, model, capsys):
    """Neither rich's markup, which here would be an error, nor control characters; and the rows are out before the table is made."""
    report = measure("local", model)
    rows = [dataclasses.replace(row, engine_version="[/x]\x1b[2J[bold]", model="\x1b]0;a\x07") for row in report.rows]
    on.table.conclude(dataclasses.replace(report, rows=rows, notes=["\x1b[31m"]), None, {"a": "\x1b[1m"}, ())
    printed = capsys.readouterr().out
    assert "[/x]?[2J[bold]" in printed and "\x1b[2J" not in printed and "\x1b]" not in printed and "\x1b[31m" not in printed
    assert "not used: a: ?[1m" in printed

    def broken():
        raise RuntimeError("no table")

    with pytest.raises(RuntimeError):
        on.table.publish(broken, report.rows, "-", {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_rounds_that_take_longer_and_longer_are_a_warning():
    assert _run.slowing({"ticketkit": [[10.0 + i] for i in range(9)]}) == ["ticketkit slowed down from 11 to 17 ms"]
    assert _run.slowing({"ticketkit": [[10.0 + i % 2] for i in range(9)], "onnxruntime": [[1.0], [9.0]]}) == []
