"""A phone that `adb` reaches, by cable or network; any 64-bit ARM Android.

Without a serial there must be exactly one device. Of a serial only plain names are taken, as `adb devices` lists them.
"""

from __future__ import annotations

import re
import shutil
from functools import cached_property
from pathlib import Path
from shlex import quote

from ticketkit.bench.devices import Device, shown
from ticketkit.bench.devices._client import call
from ticketkit.bench.devices._shell import BYTES_A_SECOND, SECONDS, ShellDevice
from ticketkit.errors import DeviceError

USAGE, CLIENT = "adb[:SERIAL]", "adb"
SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
ADVICE = {
    "unauthorized": "allow this computer on the device's screen",
    "offline": "plug it in again, or `adb reconnect`",
    "no permissions": "give this user the right to the USB device (udev), then `adb kill-server`",
    "recovery": "start its system",
    "sideload": "start its system",
    "bootloader": "start its system",
}


def available() -> tuple[bool, str]:
    found = shutil.which(CLIENT) is not None
    return found, "" if found else "no adb on the PATH; install Android's platform tools (Debian: adb)"


def open(rest: str) -> Device:
    if rest and not SERIAL.fullmatch(rest):
        raise DeviceError(f"--device adb: expected {USAGE}, a serial as `adb devices` lists it, got {shown(rest)}")
    return Adb(rest)


class Adb(ShellDevice):
    """Its client is `adb`; the device is looked for when it is first talked to."""

    temporary = "/data/local/tmp"  # where the shell user of Android may run programs

    def __init__(self, serial: str) -> None:
        super().__init__(f"adb:{serial}" if serial else "adb")
        self._asked = serial

    @cached_property
    def _serial(self) -> str:
        """The serial of the one device that is meant, and ready. DeviceError naming what is there else."""
        done = call([CLIENT, "devices"], SECONDS)
        if done.code:
            raise DeviceError(f"{self.label}: `adb devices` failed: {done.words or 'no reason given'}")
        lines = [line.strip() for line in done.out.splitlines() if line.strip() and not line.startswith(("*", "List of", "adb server"))]
        states = {words[0]: words[1] for words in (line.split(None, 1) for line in lines) if len(words) == 2 and SERIAL.fullmatch(words[0])}
        listed = ", ".join(f"{serial} ({shown(state)[1:-1]})" for serial, state in states.items()) or "none"
        ready = [serial for serial, state in states.items() if state.split()[0] == "device"]
        wanted = [self._asked] if self._asked else ready if len(ready) > 1 else list(states) if len(states) == 1 else ready
        if len(wanted) > 1:
            raise DeviceError(f"adb: expected one device or --device adb:SERIAL, there are {len(wanted)}: {listed}")
        if not wanted or wanted[0] not in states:
            what = f"the device {self._asked}" if self._asked else "a device"
            raise DeviceError(f"adb: expected {what}, connected and with USB debugging on, `adb devices` lists: {listed}")
        (serial,) = wanted
        if serial not in ready:
            state = states[serial]
            advice = next((advice for start, advice in ADVICE.items() if state.startswith(start)), "see `adb devices`")
            raise DeviceError(f"adb: device {serial} is {shown(state)[1:-1]}; {advice}")
        self.label = f"adb:{serial}"
        return serial

    def client(self, line: str) -> list[str]:
        return [CLIENT, "-s", self._serial, "shell", f"exec sh -c {quote(line)}"]

    def push(self, file: Path, to: str, executable: bool = False) -> None:
        size = file.stat().st_size
        done = call([CLIENT, "-s", self._serial, "push", str(file.resolve()), to], SECONDS + size / BYTES_A_SECOND)
        self.check_push(done, file, to)
        self.ask(f"chmod {700 if executable else 600} {quote(to)}")

    def pull(self, path: str, to: Path, limit: int) -> None:
        if self.ask(f'[ "$(wc -c <{quote(path)})" -le {limit} ] && say fits') != ["fits"]:
            raise DeviceError(f"{self.label}: expected {Path(path).name} of at most {limit:,} bytes")
        done = call([CLIENT, "-s", self._serial, "pull", path, str(to.resolve())], SECONDS + limit / BYTES_A_SECOND)
        if done.code:
            raise DeviceError(f"{self.failure(done)}, while fetching {Path(path).name}")
