"""This machine, through the same runners as a device: what a board would print, without the board."""

from __future__ import annotations

import platform

from ticketkit.bench.devices import Device, shown
from ticketkit.bench.devices._shell import ShellDevice
from ticketkit.errors import DeviceError

USAGE, CLIENT = "local", ""


def available() -> tuple[bool, str]:
    system = platform.system()
    return system == "Linux", "" if system == "Linux" else f"the runners are for Linux and Android, this is {system}"


def open(rest: str) -> Device:
    if rest:
        raise DeviceError(f"--device local: expected nothing more, got {shown(rest)}")
    return Local("local")


class Local(ShellDevice):
    """Its client is the shell here."""

    def client(self, line: str) -> list[str]:
        return ["sh", "-c", line]
