"""Instructions counted under emulation: exactly those of loops whose length is known."""

import shutil
import subprocess

import pytest

from ticketkit.bench.devices import _trace, qemu
from ticketkit.errors import DeviceError

COMPILER = shutil.which("aarch64-linux-gnu-g++")
pytestmark = pytest.mark.skipif(not (COMPILER and qemu.available()[0]), reason="no qemu-aarch64-static or no aarch64-linux-gnu-g++")

LOOPS = r"""
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
static void say(const char* line) {
  if (write(1, line, strlen(line)) < 0) _exit(1);
}
static void event(void) { say("{\"event\":\"failed\",\"engine\":\"a\",\"message\":\"b\"}\n"); }
static void loop(long turns) {  // two instructions a turn
  __asm__ volatile("1: subs %0, %0, #1\n b.ne 1b" : "+r"(turns) : : "cc");
}
int main(int count, char**) {
  event();
  loop(1000);
  event();
  loop(51000);
  event();
  if (fork() == 0) {  // instructions of children count, what they print does not
    loop(1000);
    dup2(2, 1);
    event();
    _exit(0);
  }
  wait(0);
  event();
  if (count > 1) say("something else\n");
  say("{\"event\":\"end\"}\n");
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    (folder / "loops.cc").write_text(LOOPS)
    subprocess.run([COMPILER, "-O1", "-static", str(folder / "loops.cc"), "-o", str(folder / "loops")], check=True)
    return folder / "loops"


@pytest.fixture
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    device = qemu.Qemu("qemu")
    made = device.reserve()
    yield made
    device.remove(made)


def test_loops_are_counted_to_the_instruction(program, directory):
    found = []
    _trace.follow([str(program)], directory, 60, lambda event, since: found.append((event["event"], since)))
    assert [kind for kind, _ in found] == ["failed"] * 4 + ["end"]
    (_, start), (_, short), (_, long), (_, child), _ = found
    assert long - short == 2 * 50_000
    assert 2000 < short < 2000 + 500  # the loop, and what it takes to print
    assert 2000 < child < 2000 + 20_000  # the child's loop, fork and wait
    assert start > 1000


def test_counts_that_fit_no_event_are_not_told(program, directory):
    with pytest.raises(DeviceError, match="the emulator's log has 6 lines printed, 5 came; instructions cannot be told"):
        _trace.follow([str(program), "more"], directory, 60, lambda event, since: None)


def test_a_directory_that_cannot_be_filled_does_not_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(qemu, "sysroot", lambda: tmp_path / "none")
    with pytest.raises(DeviceError, match="cannot be filled: No such file or directory"):
        qemu.Qemu("qemu").reserve()
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_cannot_start_is_no_hang(directory):
    with pytest.raises(DeviceError, match="the run was cut off: exit code"):
        _trace.follow(["/no/such/program"], directory, 60, lambda event, since: None)
