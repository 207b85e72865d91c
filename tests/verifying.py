"""How the tests of `verify` call it and look at what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ticketkit import models  # noqa: E402
from ticketkit.search.progress import Progress  # noqa: E402
from ticketkit.search.train import Training  # noqa: E402
from ticketkit.ticket import Ticket  # noqa: E402
from ticketkit.verifier import verify  # noqa: E402
from ticketkit.verifier.plan import Plan  # noqa: E402

FAST: dict[str, Any] = {"seeds": 1, "steps": 1, "batch_size": 16, "lr": 0.05, "threads": 1}


class Count(Progress):
    """Counts the steps that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.lines = 0, list[str]()

    def advance(self, words: str) -> None:
        self.steps += 1

    def say(self, line: str) -> None:
        self.lines.append(line)


def planned(run: Path | str, *names: str, **options: Any) -> Plan:
    """The plan of a call, nothing trained."""

    class Planned(Exception):
        pass

    def stop(self: Plan, *rest: object) -> None:
        raise Planned(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Planned) as caught:
        patch.setattr(Plan, "train", stop)
        verify(run, names, **{**FAST, **options})
    found: Plan = caught.value.args[0]
    return found


@contextmanager
def trainings() -> Iterator[list[tuple[Training, dict[str, np.ndarray]]]]:
    """Every training that begins, with what it starts from."""
    seen: list[tuple[Training, dict[str, np.ndarray]]] = []
    original = Training.__init__

    def remember(self: Training, module: torch.nn.Module, *rest: object, **more: object) -> None:
        seen.append((self, models.arrays(module)))
        original(self, module, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", remember)
        yield seen


def results(store: Path) -> dict[str, dict[str, Any]]:
    """By key, without the seconds."""
    found = {path.parent.name: json.loads(path.read_text()) for path in store.glob("*/result.json")}
    return {key: {name: value for name, value in result.items() if name != "seconds"} for key, result in found.items()}


def rewritten(run: Path, to: Path, **meta: Any) -> Path:
    """The ticket of round 2 with another provenance."""
    ticket = Ticket.load(run / "round_02" / "ticket.safetensors")
    kept = {key: value for key, value in {**ticket.meta, **meta}.items() if value is not None}
    return Ticket(ticket.masks, ticket.weights, kept).save(to)
