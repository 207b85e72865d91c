"""64-bit ARM emulated on this machine by qemu's user mode: right or wrong answers and counts of instructions, no times."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import join

from ticketkit.bench.devices import Device, _facts, shown
from ticketkit.bench.devices._shell import ShellDevice
from ticketkit.errors import DeviceError

USAGE, CLIENT = "qemu", "qemu-aarch64-static"
CPU = "cortex-a76"
SYSROOT = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler keeps the C library of 64-bit ARM
# Read in place of this machine's, which tells of another processor: onnxruntime crashes on that. As the emulator's CPU.
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1

"""


def available() -> tuple[bool, str]:
    if not shutil.which(CLIENT):
        return False, f"no {CLIENT} on the PATH (Debian: qemu-user-static)"
    if not (sysroot() / "lib" / "ld-linux-aarch64.so.1").exists():
        return False, f"no C library of 64-bit ARM in {sysroot()} (Debian: g++-aarch64-linux-gnu), or set QEMU_LD_PREFIX"
    return True, ""


def sysroot() -> Path:
    """Where the libraries of 64-bit ARM are: $QEMU_LD_PREFIX, or Debian's folder."""
    return Path(os.environ.get("QEMU_LD_PREFIX") or SYSROOT)


def make_root(root: Path) -> None:
    """Makes the folder that emulated programs see before this machine's files: the C library, and a processor that is no x86."""
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    for folder in sysroot().iterdir():
        if folder.name not in ("proc", "sys"):
            (root / folder.name).symlink_to(folder)


def open(rest: str) -> Device:
    if rest:
        raise DeviceError(f"--device qemu: expected nothing more, got {shown(rest)}")
    return Qemu("qemu")


class Qemu(ShellDevice):
    """Its client is the shell here; only the runners are emulated. They see the folder `root` of ours before this machine's files."""

    emulated = True
    options: Sequence[str] = ()  # of the emulator, as `_trace.py` sets them

    def client(self, line: str) -> list[str]:
        return ["sh", "-c", line]

    def describe(self) -> _facts.Facts:
        return _facts.Facts(label=self.label, machine="aarch64", system="Linux", release="", android_abi="", model=CLIENT, cpus=())

    def reserve(self) -> str:
        """A fresh directory, with the root folder in it that emulated programs see. DeviceError where either cannot be made."""
        directory = super().reserve()
        try:
            make_root(Path(directory) / "root")
        except BaseException as error:
            self.remove(directory)
            if isinstance(error, OSError):
                raise DeviceError(f"{self.label}: {directory} cannot be filled: {error.strerror or error}") from None
            raise
        return directory

    def program(self, words: Sequence[str]) -> str:
        return join([CLIENT, "-cpu", CPU, "-L", "root", *self.options, *words])  # in the directory that `reserve` made
