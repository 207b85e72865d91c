"""The run directory: what a search leaves on disk, written so that a crash at any moment loses at most the last minute.

    run.json              what defines the run
    rounds.jsonl          one line for each finished round; a round counts as finished once its line is there
    round_KK/             ticket.safetensors (masks, rewind weights), weights.safetensors (trained, pruned weights exactly zero)
    rewind.safetensors    the weights each round starts from
    pretrained.safetensors, early.safetensors    θ_p where that is another; all state after 5 % of round 0, for --rewind early
    state.safetensors     the round in progress
    logs/                 curves, if asked for
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from ticketkit.errors import TicketError
from ticketkit.ticket import Ticket, read_safetensors, write_atomic

Arrays = dict[str, NDArray[Any]]
Row = dict[str, Any]
Keys = Mapping[str, tuple[str, Callable[[Any], bool]]]  # key of a JSON object: what it must be, in words and as a test


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


# What readers of a run rely on.
CONFIG: Keys = {
    "model": ("a name", lambda value: isinstance(value, str)),
    "num_classes": ("a positive integer", _count),
    "input_shape": ("[C, H, W]", lambda value: isinstance(value, list) and len(value) == 3 and all(map(_count, value))),
    "mean": ("a list of numbers", _numbers),
    "std": ("a list of numbers", _numbers),
    "classes": ("a list of names", lambda value: isinstance(value, list)),
    "threads": ("a positive integer", _count),
}
ROW: Keys = {
    "round": ("an integer", lambda value: isinstance(value, int)),
    "metric_name": ("a name", lambda value: isinstance(value, str)),
    **dict.fromkeys(("metric", "sparsity", "sparsity_model", "kept", "seconds"), ("a number", _number)),
}
# May differ when a run is taken up again: how far it goes, where its files lie, and what only describes it.
FREE = {
    "rounds", "threads", "version", "weights", "weights_remarks", "classes", "recipe", "devices", "nodes", "strategy", "accelerator",
    "compile",
}  # fmt: skip
EARLIER = {  # what runs of versions without these options did
    "granularity": "1x1", "warmup": 0, "method": "imp", "method_options": {}, "levels": [], "objective_options": {}, "accumulate": 1,
    "precision": "32-true",
}  # fmt: skip
INTACT = "restore the file or choose another --out; the rounds' own folders are still there"


class BusyError(TicketError):
    """Another process is at work in the directory."""


class RunDir:
    """Reads and writes one run directory; every write is atomic."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @contextmanager
    def claim(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Make the directory for a run of this configuration, or check that it holds one; nobody else may write it meanwhile.

        Args:
            config: what defines the run.

        Raises:
            BusyError: another process is at work in it.
            TicketError: it holds a run of another configuration (the fields are named) or other files, or it cannot be written.
        """
        self._check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise TicketError(f"{self.path}: cannot make the run directory ({error.strerror}); choose another --out") from None
        with lock:
            _lock(lock, self.path)
            for leftover in self.path.rglob(".*.tmp"):  # of a write that a crash cut short
                leftover.unlink(missing_ok=True)
            write_atomic(self.path / "run.json", (json.dumps(dict(config), indent=2) + "\n").encode())
            yield

    def _check(self, config: Mapping[str, Any]) -> None:
        if (self.path / "run.json").exists():
            there = {**{key: value for key, value in EARLIER.items() if key in config}, **self.config()}
            differ = [key for key in sorted({*config, *there} - FREE) if config.get(key) != there.get(key)]
            if differ:
                fields = "; ".join(f"{key} is {_short(there.get(key))} there, {_short(config.get(key))} here" for key in differ)
                raise TicketError(f"{self.path} holds a different run ({fields}); repeat its options or choose another --out")
        elif self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise TicketError(f"{self.path} is not empty and holds no run; choose another --out")

    def config(self) -> dict[str, Any]:
        """The content of run.json; TicketError where it is missing, damaged or incomplete."""
        path = self.path / "run.json"
        return self._json(path, self._read(path), CONFIG)

    def rows(self) -> list[Row]:
        """The finished rounds, in order; TicketError where a line is damaged, incomplete or missing."""
        path = self.path / "rounds.jsonl"
        rows = [self._json(path, line, ROW) for line in self._read(path).splitlines()] if path.exists() else []
        for k, row in enumerate(rows):
            if row["round"] != k:
                raise TicketError(f"{path}: expected round {k} in line {k + 1}, got round {row['round']}; {INTACT}")
        return rows

    def finish(self, row: Row, weights: Arrays, ticket: Ticket) -> None:
        """Keep a finished round. The line in rounds.jsonl comes last: without it the round is done again from its state."""
        folder = self.folder(row["round"])
        folder.mkdir(exist_ok=True)
        write_atomic(folder / "weights.safetensors", to_safetensors(weights))
        ticket.save(folder / "ticket.safetensors")
        lines = [json.dumps(each) + "\n" for each in (*self.rows(), row)]
        write_atomic(self.path / "rounds.jsonl", "".join(lines).encode())
        (self.path / "state.safetensors").unlink(missing_ok=True)

    def finished(self, round: int | None = None) -> int:
        """The number of a finished round: this one, or by default the last.

        Raises:
            TicketError: no run directory, or no such round.
        """
        self.config()
        rows = self.rows()
        if not rows or (round is not None and not 0 <= round < len(rows)):
            raise TicketError(f"{self.path}: round {round or 0} is not finished, {len(rows)} rounds are; run find again")
        return len(rows) - 1 if round is None else round

    def folder(self, round: int) -> Path:
        """The directory of one round."""
        return self.path / f"round_{round:02d}"

    def round(self, round: int) -> tuple[Arrays, Ticket]:
        """Trained weights and ticket of a finished round."""
        return self._weights(self.folder(round) / "weights.safetensors"), Ticket.load(self.folder(round) / "ticket.safetensors")

    def save_state(self, state: Arrays, seconds: float) -> None:
        """Keep the round in progress."""
        write_atomic(self.path / "state.safetensors", to_safetensors(state, {"seconds": json.dumps(seconds)}))

    def state(self, round: int) -> tuple[Arrays, float] | None:
        """The state of `round` in progress and the seconds spent on it, if there is one.

        Raises:
            TicketError: the file is damaged or lacks something.
        """
        if not (self.path / "state.safetensors").exists():
            return None
        try:
            tensors, metadata = read_safetensors(self.path / "state.safetensors")
            at, step = map(int, tensors["position"])
            seconds = float(metadata["seconds"])
            if step < 0 or tensors["rng"].ndim != 1 or not math.isfinite(seconds):
                raise ValueError(f"step {step}, random numbers {list(tensors['rng'].shape)}, {seconds} seconds")
        except (TicketError, KeyError, ValueError, TypeError) as error:
            raise self.unusable_state(error) from None
        return (tensors, seconds) if at == round else None

    def unusable_state(self, error: Exception) -> TicketError:
        """The error for a state that cannot be gone on from."""
        path = self.path / "state.safetensors"
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        return TicketError(
            f"{path}: expected the state of a round in progress, got a damaged file ({reason}); "
            "delete it, only the round in progress is lost"
        )

    def save_rewind(self, weights: Arrays) -> None:
        """Keep the weights that rounds rewind to."""
        write_atomic(self.path / "rewind.safetensors", to_safetensors(weights))

    def save_early(self, state: Arrays, weights: Arrays) -> None:
        """Keep all state of the dense reference at its early point, and the weights that rounds then rewind to."""
        write_atomic(self.path / "early.safetensors", to_safetensors(state))
        self.save_rewind(weights)

    def early(self) -> Arrays:
        """What `save_early` kept."""
        return self._weights(self.path / "early.safetensors")

    def save_pretrained(self, weights: Arrays) -> None:
        """Keep θ_p, the dense reference's start, where rounds rewind to something else."""
        if not (self.path / "pretrained.safetensors").exists():
            write_atomic(self.path / "pretrained.safetensors", to_safetensors(weights))

    def has_rewind(self) -> bool:
        """True once the weights that rounds rewind to are known."""
        return (self.path / "rewind.safetensors").exists()

    def rewind(self) -> Arrays:
        """The weights that rounds rewind to."""
        return self._weights(self.path / "rewind.safetensors")

    def _weights(self, path: Path) -> Arrays:
        return read_safetensors(path)[0]

    def _read(self, path: Path) -> str:
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError):
            raise TicketError(f"{path}: cannot be read; expected the run directory of `ticketkit find`") from None

    def _json(self, path: Path, text: str, keys: Keys) -> Row:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TicketError(f"{path}: damaged ({error}); {INTACT}") from None
        if not isinstance(value, dict):
            raise TicketError(f"{path}: expected a JSON object, got {_short(value)}; {INTACT}")
        for key, (words, holds) in keys.items():
            if key not in value or not holds(value[key]):
                got = _short(value[key]) if key in value else "none"
                raise TicketError(f"{path}: expected {key!r} to be {words}, got {got}; {INTACT}")
        return value


def named(source: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """(path, round) of PATH or PATH@K; what is there under the whole name is a path."""
    path, sign, round = os.fspath(source).rpartition("@")
    if sign and round.isdecimal() and not Path(source).exists():
        return Path(path), int(round)
    return Path(source), None


def _lock(file: IO[str], path: Path) -> None:
    """Released by the system when the file is closed, also by kill -9. Windows has no such lock and goes without."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"{path}: another process is at work on this run; wait for it or choose another --out") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
