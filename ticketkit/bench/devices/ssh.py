"""A board that `ssh` reaches without asking anything: keys, ports and names as in ~/.ssh/config.

Of a host, user and port only plain names are taken: nothing that ssh or a shell could read as an option, a command or a second word.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from shlex import quote

from ticketkit.bench.devices import Device, shown
from ticketkit.bench.devices._client import Done
from ticketkit.bench.devices._shell import ShellDevice
from ticketkit.errors import DeviceError

USAGE, CLIENT = "ssh:[USER@]HOST[:PORT]", "ssh"
NAME = re.compile(
    r"(?:(?P<user>\w[\w.-]{0,63})@)?(?P<host>[A-Za-z0-9][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>\d{1,5}))?", re.ASCII
)
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")

LONGEST = 80  # characters of a folder whose sockets still have a name that systems take (104 and 108), with what ssh appends


def available() -> tuple[bool, str]:
    found = shutil.which(CLIENT) is not None
    return found, "" if found else "no ssh on the PATH; install OpenSSH's client (Debian: openssh-client)"


def open(rest: str) -> Device:
    named = NAME.fullmatch(rest)
    if not named or not 0 < int(named["port"] or 22) < 65536:
        raise DeviceError(f"--device ssh: expected {USAGE} such as ssh:pi@raspberrypi:22, [ADDRESS] for IPv6, got {shown(rest)}")
    return Ssh(rest, named["user"], named["host"].strip("[]"), named["port"])


class Ssh(ShellDevice):
    """Its client is `ssh`."""

    def __init__(self, name: str, user: str | None, host: str, port: str | None) -> None:
        super().__init__(f"ssh:{name}")
        login = ["-l", user] if user else []
        self._words = [CLIENT, *OPTIONS, *self._shared(), *login, *(["-p", port] if port else []), "--", host]
        self._by_hand = " ".join(["ssh", *(["-p", port] if port else []), f"{user}@{host}" if user else host])

    def _shared(self) -> list[str]:
        """Options by which all lines share one connection, which ends 20 s after the last: a handshake may take a small board a second."""
        folder = tempfile.mkdtemp(prefix="tk-ssh-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if len(folder) > LONGEST or not re.fullmatch(r"[\w./+-]+", folder, re.ASCII):  # which ssh would read as several words, or as %h
            return []
        return ["-o", "ControlMaster=auto", "-o", "ControlPersist=20", "-o", f"ControlPath={folder}/s"]

    def client(self, line: str) -> list[str]:
        return [*self._words, f"exec sh -c {quote(line)}"]  # the login shell may be another

    def failure(self, done: Done) -> str:
        if done.code == 255:  # ssh's own; the reason is in its words
            why = done.words or "no reason given"
            return f"{self.label}: cannot connect: {why}; expected that `{self._by_hand} true` works without a question"
        return super().failure(done)
