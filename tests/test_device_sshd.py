"""A device behind a real `ssh` and a real sshd on loopback, with keys, a port and a configuration of their own."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from boards import Board, program
from test_bench import eventually, save_model

from ticketkit.bench import devices, timing
from ticketkit.bench.devices import _run, _runner
from ticketkit.errors import DeviceError
from ticketkit.runtime import native

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SSH, KEYGEN = shutil.which("ssh"), shutil.which("ssh-keygen")
pytestmark = pytest.mark.skipif(
    not (Path(SSHD).exists() and SSH and KEYGEN), reason="no OpenSSH server and client (Debian: openssh-server)"
)
PROTOCOL = timing.Protocol(rounds=4, seconds=0, warmup=0, timeout=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "net.onnx")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running sshd: (its process, name for --device, folder with the client's configuration)."""
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user", "stranger"):
        subprocess.run([KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd asks for it, and a service manager would have made it
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    settings = (
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\nPidFile none\n"
    )
    settings += "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPermitUserEnvironment no\n"
    (folder / "sshd_config").write_text(settings + f"AcceptEnv FAKE_* TMPDIR\nMaxStartups 100\nSetEnv HOME={folder}\n")  # no .bashrc
    known = f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}"
    (folder / "known").write_text(known)
    client = (
        f"Host *\n  UserKnownHostsFile {folder / 'known'}\n  StrictHostKeyChecking yes\n  IdentitiesOnly yes\n  SendEnv FAKE_* TMPDIR\n"
    )
    (folder / "ssh_config").write_text(f"{client}  IdentityFile {folder / 'user'}\n")
    (folder / "stranger_config").write_text(f"{client}  IdentityFile {folder / 'stranger'}\n")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        if not eventually(lambda: _listens(port), 10):
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
        yield process, f"ssh:{getpass.getuser()}@127.0.0.1:{port}", folder
    finally:
        process.kill()
        process.wait()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def board(tmp_path, monkeypatch, server, model):
    """The real client, told of this server's keys; the runner is that of `boards`."""
    made = Board(tmp_path, monkeypatch)
    program(tmp_path / "clients" / "ssh", f'#!/bin/sh\nexec {SSH} -F "${{SSH_CONFIG:-{server[2] / "ssh_config"}}}" "$@"\n')
    made.runners(model)
    monkeypatch.setattr(_run, "SLACK", 0.0)
    return made


def measure(server, model, **changes):
    protocol = timing.Protocol(**{**vars(PROTOCOL), **changes})
    return _run.measure(_run.Target(server[1]), model, protocol=protocol)


def test_a_run_over_ssh(server, board, model):
    report = measure(server, model)
    assert [(row.engine, row.n, row.device["kind"]) for row in report.rows] == [("onnxruntime", 12, "ssh"), ("ticketkit", 12, "ssh")]
    assert not report.stopped and board.left() == []


def test_files_over_ssh(server, board, tmp_path):
    device = devices.open_device(server[1])
    made, file = device.reserve(), tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))
    device.push(file, f"{made}/it")
    device.pull(f"{made}/it", tmp_path / "back", 3_000_000)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    device.remove(made)
    assert board.left() == []
    with pytest.raises(DeviceError, match=r"while copying file$"):
        device.push(file, f"{made}/it")


def test_a_connection_that_drops_keeps_the_rounds_and_the_device_cleans_up(server, board, model):
    board.do("waits")
    with board.once_it_waits(lambda: [session.kill() for session in _sessions(server[0].pid)]):
        report = measure(server, model)
    assert [row.n for row in report.rows] == [6, 6]
    assert "the run was cut off: exit code 255" in report.stopped
    assert eventually(lambda: board.left() == [], 20) and eventually(board.ended, 20)


def _sessions(pid):
    """The processes of sshd that serve connections: what a network that goes away takes down."""
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name().startswith("sshd")]


def test_ctrl_c_over_ssh(server, board, model):
    board.do("waits")
    with board.once_it_waits(lambda: os.kill(os.getpid(), signal.SIGINT)):
        report = measure(server, model)
    assert report.interrupted and [row.n for row in report.rows] == [6, 6]
    assert board.left() == [] and eventually(board.ended, 20)


def test_a_runner_killed_over_ssh(server, board, model):
    board.do("killed")
    report = measure(server, model)
    assert [row.n for row in report.rows] == [6, 6] and "signal 9" in report.stopped
    assert board.left() == []


def test_a_key_that_is_not_let_in(server, board, model, monkeypatch):
    monkeypatch.setenv("SSH_CONFIG", str(server[2] / "stranger_config"))
    with pytest.raises(DeviceError, match=r"cannot connect: .*Permission denied"):
        measure(server, model)


def test_a_port_where_nobody_listens(board, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DeviceError, match=r"cannot connect: .*Connection refused; expected that `ssh -p"):
        _run.measure(_run.Target(f"ssh:127.0.0.1:{port}"), model, protocol=PROTOCOL)


def test_the_device_cleans_up_when_this_side_is_killed(server, board, model):
    board.do("waits")
    board.measure_and_be_killed(lambda: measure(server, model))
    assert eventually(lambda: board.left() == [], 20) and eventually(board.ended, 20)


HERE = native.library_path().parent


@pytest.mark.skipif(
    not (HERE / "device").exists() and not (HERE / _runner.NETWORK).exists(), reason="the runners are not built beside the library"
)
def test_the_real_runner_over_ssh(server, board, model, monkeypatch):
    monkeypatch.undo()  # the fake runner goes; the client and its folder stay
    monkeypatch.setenv("PATH", f"{board.folder / 'clients'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(board.root))
    report = measure(server, model, rounds=2)
    assert not report.failures and not report.stopped
    dense, sparse = report.rows
    assert min(dense.min_ms, sparse.min_ms) > 0 and dense.peak_rss_bytes > 10e6
    assert max(dense.max_abs_diff, sparse.max_abs_diff) < 1e-4 * dense.max_abs_output
    assert sparse.isa == native.active_isa().name
    assert board.left() == []
