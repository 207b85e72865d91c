"""Names of devices, what `adb` and `ssh` answer, and what a device is."""

import os
import tempfile
from pathlib import Path

import pytest
from boards import Board, program

from ticketkit.bench import devices
from ticketkit.bench.devices import _client, _facts, _shell, shown
from ticketkit.errors import DeviceError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake clients are shell scripts")


@pytest.fixture
def board(tmp_path, monkeypatch):
    return Board(tmp_path, monkeypatch)


# --- names ---


def test_the_folder_is_the_registry():
    files = {p.stem for p in Path(devices.__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    assert set(devices.names()) == files >= {"local", "ssh", "adb", "qemu"}
    assert all(devices.get(name).USAGE.startswith(name) for name in files)
    with pytest.raises(DeviceError, match=r"--device: expected adb\[:SERIAL\] or local or qemu or ssh:.*got 'usb'"):
        devices.open_device("usb:1")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ssh:board", ["--", "board"]),
        ("ssh:pi@192.168.0.7:2222", ["-l", "pi", "-p", "2222", "--", "192.168.0.7"]),
        ("ssh:me@[fe80::1]:22", ["-l", "me", "-p", "22", "--", "fe80::1"]),
        ("ssh:a_b@my_board-2.local", ["-l", "a_b", "--", "my_board-2.local"]),
    ],
)
def test_hosts(name, end):
    assert devices.open_device(name).client("true")[:-1][-len(end) :] == end


@pytest.mark.parametrize("folder", ["a b", "a%h"])
def test_no_shared_connection_where_ssh_would_read_its_name_as_another(folder, monkeypatch, tmp_path):
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    assert "Control" not in " ".join(devices.open_device("ssh:board").client("true"))


HOSTILE = (
    *(
        "-oProxyCommand=touch {c}",
        "a;touch {c}",
        "a$(touch {c})",
        "a`touch {c}`",
        "a|touch {c}",
        "a&touch {c}",
        "a\ntouch {c}",
        "a touch {c}",
    ),
    *(
        "a'b",
        'a"b',
        "a>{c}",
        "a\\b",
        "-p",
        "a\n",
        "",
        "@",
        "a@-b",
        "a@b@c",
        "a@b:0",
        "a@b:65536",
        "a@b:-1",
        "a@b:22:22",
        "ä",
        "a" * 300,
        "a\x00b",
    ),
)


@pytest.mark.parametrize("kind", ["ssh", "adb"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_reach_nobody(kind, text, board, tmp_path):
    canary = tmp_path / "canary"
    text = text.format(c=canary)
    if kind == "adb" and not text:
        pytest.skip("no serial: the one device")
    try:
        device = devices.open_device(f"{kind}:{text}")
    except DeviceError as error:
        assert "\n" not in str(error) and "expected" in str(error)
    else:
        assert kind == "adb" and ":" not in text.partition("@")[0]
        with pytest.raises(DeviceError):
            device.describe()
    assert not canary.exists()
    assert "shell" not in board.calls()


@pytest.mark.parametrize("name", ["local:x", "qemu:x"])
def test_kinds_without_a_name(name):
    with pytest.raises(DeviceError, match="expected nothing more, got 'x'"):
        devices.get(name.partition(":")[0]).open("x")


def test_a_missing_client_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, what in (("ssh:board", "no ssh on the PATH"), ("adb", "no adb on the PATH"), ("qemu", "no qemu-aarch64-static on the PATH")):
        with pytest.raises(DeviceError, match=what):
            devices.open_device(name)


def test_foreign_text_is_made_fit_to_be_printed():
    assert shown("a\x1b[2Jb\nc\x00\u202e" + "x" * 500) == repr("a?[2Jb c??" + "x" * 190 + "…")


# --- adb ---


@pytest.mark.parametrize(
    ("lines", "name", "message"),
    [
        ([], "adb", "expected a device, connected and with USB debugging on, `adb devices` lists: none"),
        (["A1\tdevice", "B2\tdevice"], "adb", r"expected one device or --device adb:SERIAL, there are 2: A1 \(device\), B2 \(device\)"),
        (["A1\tdevice"], "adb:B2", r"expected the device B2, .*lists: A1 \(device\)"),
        (["A1\tunauthorized"], "adb", "device A1 is unauthorized; allow this computer on the device's screen"),
        (["A1\toffline"], "adb:A1", "device A1 is offline; plug it in again"),
        (["A1\tno permissions (user in plugdev group; are your udev rules wrong?)"], "adb", "device A1 is no permissions .*udev"),
        (["A1\tevil\x1b[31m"], "adb", r"device A1 is evil\?\[31m; see `adb devices`"),
    ],
)
def test_adb_devices_that_cannot_be_used(lines, name, message, board):
    board.devices(*lines)
    with pytest.raises(DeviceError, match=message):
        devices.open_device(name).describe()
    assert "shell" not in board.calls()


def test_adb_without_a_serial_takes_the_one_that_is_ready(board):
    board.devices("A1\toffline", "192.168.0.7:5555\tdevice product:x", "C3\tunauthorized")
    device = devices.open_device("adb")
    board.program("getprop", 'case $1 in *abi) echo arm64-v8a ;; *model) echo "Pixel 8" ;; esac')
    facts = device.describe()
    assert (device.label, facts.abi, facts.model) == ("adb:192.168.0.7:5555", "aarch64-android", "Pixel 8")


# --- ssh ---


@pytest.mark.parametrize(("host", "why"), [("refused", "Connection refused"), ("stranger", "Host key verification failed")])
def test_ssh_that_cannot_connect(host, why, board):
    with pytest.raises(DeviceError, match=rf"cannot connect: .*{why}.*expected that `ssh -p 22 pi@{host} true` works without a question"):
        devices.open_device(f"ssh:pi@{host}:22").describe()


# --- what a device is ---

BIG_LITTLE = [f"cpu {i} khz={khz} capacity={capacity}" for i, (khz, capacity) in enumerate([(1704000, 180)] * 4 + [(2367000, 790)] * 4)]
TENSOR = [*BIG_LITTLE, "cpu 8 khz=2914000 capacity=1024"]
PARTS = [f"part {i} {part}" for i, part in enumerate(["0xd05"] * 4 + ["0xd4d"] * 4 + ["0xd4e"])]


def facts(*said, machine="aarch64", system="Linux"):
    return _facts.parse("ssh:board", [f"machine {machine}", f"system {system}", *said])


def test_clusters_are_named_from_slow_to_fast():
    found = facts(*TENSOR, *PARTS)
    assert [(c.name, c.cpus, c.core) for c in found.clusters] == [
        ("little", (0, 1, 2, 3), "Cortex-A55"),
        ("middle", (4, 5, 6, 7), "Cortex-A715"),
        ("big", (8,), "Cortex-X3"),
    ]
    assert str(found.clusters[0]) == "little: 4 Cortex-A55 (cpu 0-3) at up to 1.70 GHz"
    assert [c.name for c in facts(*BIG_LITTLE).clusters] == ["little", "big"]
    assert [c.name for c in facts("cpu 0 khz= capacity=", "cpu 1 khz= capacity=").clusters] == ["all"]
    assert facts().clusters == ()


@pytest.mark.parametrize(
    ("text", "cpus"),
    [(None, (8,)), ("big", (8,)), ("little", (0, 1, 2, 3)), ("middle", (4, 5, 6, 7)), ("0,4-6", (0, 4, 5, 6)), ("3", (3,))],
)
def test_which_processors_are_meant(text, cpus):
    assert facts(*TENSOR).choose(text) == cpus
    assert _facts.numbers(_facts.ranges(cpus)) == cpus


@pytest.mark.parametrize(("threads", "cpus"), [(1, (8,)), (2, (4, 5, 6, 7, 8)), (5, (4, 5, 6, 7, 8)), (6, ())], ids=str)
def test_as_many_clusters_as_threads_need(threads, cpus):
    assert facts(*TENSOR).choose(None, threads) == cpus


@pytest.mark.parametrize("text", ["huge", "9", "0-9", "4-", "0,,1", "-1", "1;reboot", "", " 1", "5-4"])
def test_processors_that_are_not_there(text):
    with pytest.raises(DeviceError, match="--cpus: expected little or middle or big or numbers such as 4-7, got "):
        facts(*TENSOR).choose(text)


def test_without_sorts_nothing_is_pinned():
    assert facts("cpu 0 khz= capacity=").choose(None) == ()


@pytest.mark.parametrize(
    ("machine", "system", "said", "abi"),
    [
        ("aarch64", "Linux", (), "aarch64-linux"),
        ("x86_64", "Linux", (), "x86_64-linux"),
        ("aarch64", "Linux", ("abi arm64-v8a",), "aarch64-android"),
    ],
)
def test_abis(machine, system, said, abi):
    assert facts(*said, machine=machine, system=system).abi == abi


@pytest.mark.parametrize(
    ("machine", "system", "said", "got"),
    [
        ("armv7l", "Linux", (), "armv7l on Linux"),
        ("riscv64", "Linux", (), "riscv64 on Linux"),
        ("aarch64", "Linux", ("bits 32",), "aarch64 on Linux with a 32-bit user space"),
        ("x86_64", "Linux", ("abi x86_64",), "x86_64 on Android"),
        ("aarch64", "Linux", ("abi armeabi-v7a",), "armeabi-v7a on Android"),
        ("arm64", "Darwin", (), "arm64 on Darwin"),
        ("\x1b[31m", "", (), r"\?\[31m on nothing"),
    ],
)
def test_wrong_abis_are_named(machine, system, said, got):
    with pytest.raises(DeviceError, match=f"ssh:board: expected a device of aarch64-linux, x86_64-linux, aarch64-android, got {got}$"):
        _ = facts(*said, machine=machine, system=system).abi


def test_wrong_abis_of_real_answers(board):
    board.program("uname", "case $1 in -m) echo armv7l ;; -s) echo Linux ;; esac")
    with pytest.raises(DeviceError, match="got armv7l on Linux"):
        _ = devices.open_device("ssh:board").describe().abi
    board.program("getprop", "echo x86_64")
    with pytest.raises(DeviceError, match="got x86_64 on Android"):
        _ = devices.open_device("adb").describe().abi


def test_this_machine_describes_itself():
    found = devices.open_device("local").describe()
    assert found.machine == os.uname().machine and found.system == "Linux"
    assert {cpu.cpu for cpu in found.cpus} >= os.sched_getaffinity(0)


# --- directories ---


@pytest.mark.parametrize(
    "answer", ["/tmp/x; touch {c}/ticketkit.abcdefgh", "/", "/tmp/../ticketkit", "", "/tmp/ticketkit.abcdefgh/..", "$(touch {c})"]
)
def test_only_directories_of_ours_are_taken_and_removed(answer, board, tmp_path):
    canary = tmp_path / "canary"
    program(board.bin / "answer", answer.format(c=canary))
    board.program("mktemp", f"cat '{board.bin / 'answer'}'")
    device = devices.open_device("ssh:board")
    with pytest.raises(DeviceError, match="expected a fresh directory from mktemp"):
        device.reserve()
    with pytest.raises(DeviceError, match="is not a directory that a bench made; it stays"):
        device.remove(answer.format(c=canary))
    assert not canary.exists()


def test_a_directory_that_cannot_be_made(board):
    board.program("mktemp", "echo 'mktemp: failed to create directory: Read-only file system' >&2; exit 1")
    with pytest.raises(DeviceError, match="Read-only file system"):
        devices.open_device("ssh:board").reserve()


def test_a_directory_is_for_this_user_only():
    device = devices.open_device("local")
    made = device.reserve()
    try:
        assert Path(made).stat().st_mode & 0o777 == 0o700
        assert device.free_bytes(made) > 0
    finally:
        device.remove(made)
    assert not Path(made).exists()
    device.remove(made)  # gone already


def test_files_survive_greetings_and_strange_bytes(board, tmp_path):
    device = devices.open_device("ssh:board")
    made, file = device.reserve(), tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 1000)
    device.push(file, f"{made}/it")
    device.pull(f"{made}/it", tmp_path / "back", 256_000)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    with pytest.raises(DeviceError, match="expected at most"):
        device.pull(f"{made}/it", tmp_path / "back", 256_000 - _shell.GREETING - 1)
    with pytest.raises(DeviceError, match="while fetching none"):
        device.pull(f"{made}/none", tmp_path / "back", 10)


# --- clients ---


def test_clients_are_bounded_in_time_and_size(tmp_path):
    with pytest.raises(DeviceError, match=r"sleep: expected an end within 0\.2 s"):
        _client.call(["sleep", "60"], 0.2)
    with pytest.raises(DeviceError, match="yes: expected at most 1,000 bytes"):
        _client.call(["yes"], 60, limit=1000)
    with pytest.raises(DeviceError, match="'no-such-client' cannot be started"):
        _client.call(["no-such-client"], 1)
    assert _client.call(["sh", "-c", "echo no >&2; exit 3"], 60) == _client.Done(3, "", "no")
