"""Devices for tests: clients named ssh and adb that run everything here, and a runner that speaks the protocol without computing."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_bench import eventually

from ticketkit.bench.devices import _runner
from ticketkit.bench.engines import onnxruntime
from ticketkit.bench.subject import Subject

# What a fake client does before it obeys: note its words, greet like a login message, see the fake programs of $FAKE_BIN first.
COMMON = """#!/bin/sh
printf '%s\\n' "$0" "$@" ---- >>"$FAKE_LOG"
PATH=$FAKE_BIN:$PATH
"""
SSH = (
    COMMON
    + """
while [ "$1" != -- ]; do shift; done
case $2 in
  refused) echo 'ssh: connect to host refused port 22: Connection refused' >&2; exit 255 ;;
  stranger) echo 'Host key verification failed.' >&2; exit 255 ;;
esac
echo 'Welcome to the board! {"event": "round"} {"event":'
exec sh -c "$3"
"""
)
ADB = (
    COMMON
    + """
here() { printf '%s' "$1" | sed "s#/data/local/tmp#$FAKE_ROOT#g"; }
if [ "$1" = devices ]; then cat "$FAKE_BIN/list"; exit; fi
[ "$1" = -s ] || exit 9
case $3 in
  shell) exec sh -c "$(here "$4")" ;;
  push) if [ -e "$FAKE_BIN/full" ]; then echo "adb: error: failed to copy: remote No space left on device" >&2; exit 1; fi
        cp "$4" "$5" ;;
  pull) cp "$4" "$5" ;;
esac
"""
)
# $FAKE_DO says what it does after each round; the outputs it writes are those of the file $FAKE_OUTPUTS.
RUNNER = """#!{python} -ESs
import json, os, shutil, signal, sys, time
words, do = sys.argv[1:], os.environ.get("FAKE_DO", "")
value = lambda name, other=None: words[words.index(name) + 1] if name in words else other
names = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--engine"]
paths = [words[i + 1].split("=")[1] for i, word in enumerate(words) if word == "--engine"]
def say(event, **fields):
    os.write(1, (json.dumps(dict(event=event, **fields)) + "\\n").encode())
with open(os.environ["FAKE_LOG"], "a") as log:
    print("runner", *words, sep="\\n", file=log)
assert all(map(os.path.isfile, [*paths, value("--library"), value("--operators"), value("--input")]))
if do == "error":
    say("error", message="no such thing\\n\\x1b[31mred")
    sys.exit(1)
say("device", machine="aarch64", isa="neon", cpu=None, cpus=[], kernel="Linux 6.1", runtime="1.31.1")
for name in names:
    say("loaded", engine=name, load_s=0.25)
if "--check-only" in words:
    os.makedirs(value("--outputs"), exist_ok=True)
    for name in names:
        shutil.copy(os.environ["FAKE_OUTPUTS"], value("--outputs") + "/" + name + ".f32")
        if do == "wrong" and name == "ticketkit":
            with open(value("--outputs") + "/" + name + ".f32", "r+b") as file:
                file.write(b"\\0\\0\\x80\\x3f" * 4)
    say("end")
    sys.exit(0)
say("state", at="before", temperatures=dict(soc=41000, broken=-274000), khz={{"0": 2000000}})
for i in range(int(value("--rounds"))):
    for name in names if i % 2 == 0 else names[::-1]:
        ms = [8.0 + i, 8.5, 8.25] if name == "onnxruntime" else [2.0 + i, 2.5, 2.25]
        say("round", engine=name, round=i, ms=[0, 0, 0] if do == "coarse" else [1234.56789] * 100_000 if do == "long" and i == 1 else ms)
    if i == 1 and do == "fails":
        say("failed", engine=names.pop(), message="out of memory")
    if i == 1 and do:
        if do == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "dropped":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "silent":
            while True:
                os.write(1, b"still here, without a word that makes sense\\n")
                time.sleep(0.1)
        if do == "waits":
            with open(os.environ["FAKE_LOG"] + ".pid", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
        if do == "noise":
            while True:
                os.write(1, b"x" * 65536)
        if do.startswith("{{"):
            os.write(1, do.encode() + b"\\n")
say("state", at="after", temperatures=dict(soc=78000), khz={{"0": 1500000}})
for name in names:
    say("finished", engine=name, peak_rss_bytes=12345678)
os.write(1, b"\\n\\xff\\xfe not utf-8\\n")
say("end")
"""

# The same for ticketkit-layers, of the layers that $FAKE_LAYERS names; after the first one $FAKE_DO happens.
LAYERS = """#!{python} -ESs
import json, os, signal, sys
do, words = os.environ.get("FAKE_DO", ""), sys.argv[1:]
def say(event, **fields):
    os.write(1, (json.dumps(dict(event=event, **fields)) + "\\n").encode())
with open(os.environ["FAKE_LOG"], "a") as log:
    print("runner", *words, sep="\\n", file=log)
assert os.path.isfile(words[0])
say("device", machine="aarch64", isa="neon", kernel="Linux 6.1")
for i, name in enumerate(json.loads(os.environ["FAKE_LAYERS"])):
    if i == 1 and do == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 1 and do.startswith("{{"):
        os.write(1, do.replace("LAYER", name).encode() + b"\\n")
    counts = dict(weights=576, nnz=58, multiply_adds=2088, multiply_adds_dense=20736)
    say("layer", layer=name, op="conv2d", shape=[1, 8, 6, 6, 8, 3, 3, 1, 1, 1], **counts)
    for engine, ms in (("sparse", 1.0), ("dense", 4.0), ("xnnpack-dense", 3.0)):
        ok = not (do == "wrong" and i == 1 and engine == "sparse")
        off = dict(max_abs_diff=1e-6 if ok else 0.5, max_abs_output=2.0, tolerance=1e-5)
        say("checked", layer=name, engine=engine, format="csr" if engine == "sparse" else "dense", ok=ok, **off)
        if do == "coarse":
            ms = 0.0
        if ok and "--check-only" not in words:
            for k in range(int(words[words.index("--rounds") + 1])):
                say("round", layer=name, engine=engine, format="csr", round=k, ms=[ms + 0.5 * k * (do != "coarse")])
say("end")
sys.exit(do == "wrong")
"""


class Board:
    """A fake device and what happened on it. `do` is for the next run of the fake runner."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.bin, self.root, self.log = folder / "bin", folder / "root", folder / "log"
        clients = folder / "clients"
        for made in (self.bin, self.root, clients):
            made.mkdir()
        program(clients / "ssh", SSH)
        program(clients / "adb", ADB)
        self.network = program(folder / "ticketkit-network", RUNNER.format(python=sys.executable))
        self.layers = program(folder / "ticketkit-layers", LAYERS.format(python=sys.executable))
        self.library = program(folder / "library", "a library\n")
        for name, value in {"FAKE_BIN": self.bin, "FAKE_ROOT": self.root, "FAKE_LOG": self.log, "TMPDIR": self.root}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("PATH", f"{clients}{os.pathsep}{os.environ['PATH']}")
        self.devices("emulator-5554\tdevice")

    def devices(self, *lines: str) -> None:
        """What `adb devices` prints."""
        text = "* daemon not running; starting now at tcp:5037\nList of devices attached\n" + "".join(f"{line}\n" for line in lines) + "\n"
        (self.bin / "list").write_text(text)

    def program(self, name: str, script: str) -> None:
        """A program that the device finds before its own."""
        program(self.bin / name, f"#!/bin/sh\n{script}\n")

    def do(self, what: str) -> None:
        self.monkeypatch.setenv("FAKE_DO", what)

    def left(self) -> list[str]:
        """What is left on the device."""
        return sorted(path.name for path in self.root.iterdir())

    def calls(self) -> list[str]:
        """Every word that a client or the runner got, and ---- after each client's."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    @contextmanager
    def once_it_waits(self, action: Callable[[], None]) -> Iterator[None]:
        """Do something from another thread when the runner, told to wait, has come to that."""

        def act() -> None:
            if eventually(self._waits, 30):
                time.sleep(0.2)  # its last line is on the way
                action()

        thread = threading.Thread(target=act)
        thread.start()
        yield
        thread.join()

    def measure_and_be_killed(self, measure: Callable[[], object]) -> None:
        """Measure in a child, which is killed when the runner waits."""
        child = os.fork()
        if child == 0:
            try:
                measure()
            finally:
                os._exit(1)
        assert eventually(self._waits, 30)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def ended(self) -> bool:
        """Whether the runner that waited is gone."""
        pid = int(self._told.read_text())
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    @property
    def _told(self) -> Path:
        return Path(f"{self.log}.pid")

    def _waits(self) -> bool:
        return self._told.exists() and bool(self._told.read_text())

    def runners(self, model: Path) -> None:
        """Let every ABI have the fake runner, and it the right outputs of this model."""
        files = {_runner.NETWORK: self.network, _runner.LAYERS: self.layers, _runner.OPERATORS: self.library}
        self.monkeypatch.setattr(_runner, "programs", lambda abi, names, given, say=None: {name: files[name] for name in names})
        self.monkeypatch.setattr(_runner, "onnxruntime", lambda abi, given, say=None: self.library)
        scratch = self.folder / "scratch"
        scratch.mkdir()
        subject = Subject.open(model, 1, scratch)
        with np.load(subject.feeds_file) as arrays:
            feeds = {name: arrays[f"arr_{i}"] for i, name in enumerate(subject.inputs)}
        outputs = onnxruntime.load(subject.plain, 1, feeds)()
        (self.folder / "outputs").write_bytes(b"".join(y.tobytes() for y in outputs))
        self.monkeypatch.setenv("FAKE_OUTPUTS", str(self.folder / "outputs"))


def program(path: Path, text: str) -> Path:
    """An executable script."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
