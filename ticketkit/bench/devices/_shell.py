"""A device behind a client that runs a line of POSIX shell there: what ssh, adb, this machine and the emulator have in common.

Every word of ours that stands in such a line is quoted. Answers are found by a mark that no login message can know, so whatever else the
device prints is passed over.

A run is watched over there: beside the program waits a process that does nothing but read standard input. When that ends, because we
closed it, the connection broke or this program was killed, it ends the program with all it has started, and removes the directory.
Temporary files of libraries (onnxruntime writes one) are made in that directory too.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import join, quote

from ticketkit.bench.devices import _facts, shown
from ticketkit.bench.devices._client import Done, Stream, call
from ticketkit.errors import DeviceError

SECONDS = 60.0  # for a short question
BYTES_A_SECOND = 250_000  # the slowest link that a copy is waited for
GREETING = 1 << 16  # bytes that a device may print before it gives a file
OURS = re.compile(r"/(?:[\w.@+-]+/)*ticketkit\.\w{6,}")  # the directories that we make, and the only ones we remove
FULL = ("no space left", "disk quota", "not enough space", "disk full")

# A folder with another name than those, or none at all, is not for us to quote, print and remove: then /tmp.
RESERVE = """\
t=TEMPORARY
t=${t%/}
case $t in
  [!/]* | *//* | *[!ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.@+/-]*) t=/tmp ;;
esac
d=$(umask 077; mktemp -d "$t/ticketkit.XXXXXXXX" 2>&1) && say made "$d" || say failed "$d"
"""

# Ends what the watched program has started: the processes of its session where the shell leads one (as under sshd and adbd), else the
# program alone, which ends its own children.
WATCHED = """\
cd {directory} || exit 71
export TMPDIR={directory}
exec 3<&0 </dev/null
{program} 3<&- &
runner=$!
read -r _ _ _ _ group _ </proc/$$/stat
(
  trap 'kill $reader; exit' TERM
  cat <&3 &
  reader=$!
  wait $reader
  trap '' TERM
  rm -rf {directory}
  kill -TERM $runner
  if [ "$group" = $$ ]; then kill -KILL 0; else sleep 1; kill -KILL $runner; fi
) >/dev/null 2>&1 &
watch=$!
wait $runner
code=$?
kill $watch
printf '\\n{{"event":"exit","code":%d}}\\n' $code
exit $code"""


class ShellDevice(ABC):
    """Implements `Device`; a kind gives the words of its client, and says what its failures mean."""

    emulated = False
    temporary = "${TMPDIR:-/tmp}"  # where our directory is made, as the shell there reads it

    def __init__(self, label: str) -> None:
        self.label = label

    @abstractmethod
    def client(self, line: str) -> list[str]:
        """The client's words that run a line of shell on the device."""

    def failure(self, done: Done) -> str:
        """What a client that failed means."""
        return f"{self.label}: {done.words or 'no reason given'} (exit code {done.code})"

    def program(self, words: Sequence[str]) -> str:
        """A program and its arguments as one line of shell."""
        return join(words)

    def ask(self, script: str, seconds: float = SECONDS) -> list[str]:
        """What the script says with its function `say`, a line for each call. DeviceError unless it ran to its end."""
        mark = f"ticketkit-{secrets.token_hex(8)}"
        done = call(self.client(f"say() {{ printf '%s %s\\n' {mark} \"$*\"; }}\n{script}\nsay end"), seconds)
        said = [line.strip().removeprefix(mark).strip() for line in done.out.splitlines() if line.strip().startswith(f"{mark} ")]
        if not said or said[-1] != "end":
            raise DeviceError(self.failure(done))
        return said[:-1]

    def describe(self) -> _facts.Facts:
        """Architecture, system and processors, by one script. DeviceError where the device cannot be reached or says nothing of use."""
        return _facts.parse(self.label, self.ask(_facts.SCRIPT))

    def reserve(self) -> str:
        """A fresh directory of `mktemp -d`, mode 700; its absolute path there. DeviceError where none can be made."""
        said = self.ask(RESERVE.replace("TEMPORARY", self.temporary))
        made = said[0].removeprefix("made ") if said else ""
        if not OURS.fullmatch(made):
            raise DeviceError(f"{self.label}: expected a fresh directory from mktemp -d in {self.temporary}, got {shown(' '.join(said))}")
        return made

    def free_bytes(self, directory: str) -> int | None:
        """What `df` calls available there, in bytes; None where it says nothing that can be read."""
        said = self.ask(f'say "$(df -kP {quote(directory)} 2>/dev/null | tail -n 1)"')
        found = re.search(r"\s(\d{1,15})\s+-?\d+%\s", f"{said[0]} " if said else "")
        return int(found[1]) * 1024 if found else None

    def push(self, file: Path, to: str, executable: bool = False) -> None:
        """The file through standard input of `cat`, for its owner alone. DeviceError, a full disk named as such."""
        size = file.stat().st_size
        line = f"cat >{quote(to)} && chmod {700 if executable else 600} {quote(to)}"
        self.check_push(call(self.client(line), SECONDS + size / BYTES_A_SECOND, source=file), file, to)

    def check_push(self, done: Done, file: Path, to: str) -> None:
        """Raise what a copy that failed means, a full disk with how much is free."""
        if done.code == 0:
            return
        directory, size = to.rpartition("/")[0], file.stat().st_size
        free = self.free_bytes(directory)
        if any(words in done.words.lower() for words in FULL) or (free is not None and free < size and not done.words):
            raise DeviceError(
                f"{self.label}: expected room for {file.name}, {size:,} bytes, in {directory}, the disk is full"
                f"{'' if free is None else f' ({free:,} bytes free)'}; free some there, or set TMPDIR there"
            )
        raise DeviceError(f"{self.failure(done)}, while copying {file.name}")

    def run(self, words: Sequence[str], directory: str, silence: float) -> AbstractContextManager[Stream]:
        """A program, watched there: it ends when the connection does. Lines come from the stream; `silence` in seconds."""
        return Stream(self.client(WATCHED.format(directory=quote(directory), program=self.program(words))), silence)

    def pull(self, path: str, to: Path, limit: int) -> None:
        """The file through standard output of `cat`, behind a mark no greeting holds. DeviceError: beyond `limit` bytes, or broken off."""
        mark = f"ticketkit-{secrets.token_hex(8)}\n".encode()
        with to.open("w+b") as sink:
            line = f"printf '%s\\n' {mark.decode().strip()}; exec cat {quote(path)}"
            done = call(self.client(line), SECONDS + limit / BYTES_A_SECOND, sink=sink, limit=limit + GREETING)
            sink.seek(0)
            greeting, found, content = sink.read().partition(mark)
        if done.code or not found or len(greeting) > GREETING:
            raise DeviceError(f"{self.failure(done)}, while fetching {Path(path).name}")
        to.write_bytes(content)

    def remove(self, directory: str) -> None:
        """`rm -rf` of a directory that `reserve` could have made. DeviceError for any other, and where something stays."""
        if not OURS.fullmatch(directory):
            raise DeviceError(f"{self.label}: {shown(directory)} is not a directory that a bench made; it stays")
        said = self.ask(f'why=$(rm -rf {quote(directory)} 2>&1) || say "$why"')
        if said:
            raise DeviceError(f"{self.label}: rm -rf {directory} failed: {shown(said[0])}")
