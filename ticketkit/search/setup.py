"""From the words of the user to a search: settings, the network and its two starting points, and run.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from ticketkit import __version__, models, pretrain
from ticketkit import masks as algebra
from ticketkit.errors import TicketError
from ticketkit.models import Source
from ticketkit.pretrain import Objective
from ticketkit.search.methods import Method
from ticketkit.search.progress import Progress
from ticketkit.search.ranks import Machine, Ranks
from ticketkit.search.rundir import Arrays, RunDir
from ticketkit.search.train import Settings
from ticketkit.tasks import Data, Task

ROUNDS = 3  # of imp, where nothing is said
LEVEL = 0.9  # of the other methods


@dataclass(frozen=True)
class Start:
    """A network, its random initialisation θ_0, and its pretrained weights θ_p with where they came from."""

    module: nn.Module
    initial: Arrays
    pretrained: Arrays
    source: Source


def rounds(count: int | None, sparsity: float | None, rate: float) -> int:
    """Pruning rounds from either of the two ways to ask for them."""
    if count is not None and sparsity is not None:
        raise TicketError("--rounds and --sparsity say the same thing; give one of them")
    if count is not None and count < 0:
        raise TicketError(f"--rounds: expected 0 or more, got {count}")
    return (ROUNDS if count is None else count) if sparsity is None else algebra.rounds_to(sparsity, rate)


def levels(method: Method, count: int | None, sparsity: float | Sequence[float] | None, rate: float) -> list[float]:
    """The sparsity of each round, 0 for the dense reference first."""
    if not 0.0 < rate < 1.0:
        raise TicketError(f"--rate: expected a fraction between 0 and 1, got {rate:g}")
    several = [] if sparsity is None else [sparsity] if isinstance(sparsity, float | int) else list(sparsity)
    for level in several:
        if not 0.0 <= level < 1.0:
            raise TicketError(f"target sparsity: expected 0 <= s < 1, got {level:g}")
    if method.name == "imp" and len(several) > 1:
        raise TicketError(f"--sparsity: imp reaches one level after another; expected the last alone, got {len(several)} fractions")
    if method.name == "imp" or count is not None:
        return [1.0 - (1.0 - rate) ** k for k in range(rounds(count, several[0] if several else None, rate) + 1)]
    return [0.0, *(several or [LEVEL])]


def objective(name: str, **options: float | None) -> Objective:
    """The objective with the options that were given.

    Raises:
        TicketError: an unknown name, or an option the objective does not have.
    """
    chosen, given = pretrain.get(name), {key: value for key, value in options.items() if value is not None}
    known = {field.name for field in fields(chosen)}
    for key in given:
        if key not in known:
            raise TicketError(f"--{key.replace('_', '-')}: objective {name} has no such option; leave it out or choose another --objective")
    return chosen(**given)


def network(model: str, weights: str | None, num_classes: int, size: int, seed: int, goal: Objective) -> Start:
    """Build the network from the seed, with the head its objective needs, and give it its pretrained weights."""
    torch.manual_seed(seed)
    module = models.build(model, num_classes, size)
    if (head := goal.head(models.features(model, module), num_classes)) is not None:
        models.set_head(model, module, head)
    initial = models.arrays(module)
    source = models.load_weights(model, module, weights)
    return Start(module, initial, models.arrays(module), source)


def keep_start(run: RunDir, start: Start, rewind: str) -> None:
    """Write the weights that rounds rewind to, where they are known before training, and θ_p beside them where it is another."""
    if not run.has_rewind() and rewind != "early":
        run.save_rewind(start.initial if rewind == "init" else start.pretrained)
    if rewind in ("init", "early"):
        run.save_pretrained(start.pretrained)


@contextmanager
def shown(progress: Progress | None, ranks: Ranks) -> Iterator[Progress]:
    """The progress to be told, on the first process; nothing on the others."""
    with (progress or Progress()) if ranks.first else Progress() as told:
        yield told


def config(task: Task, model: str, data: Data, settings: Settings, source: Source, how: Mapping[str, Any]) -> dict[str, Any]:
    """The content of run.json: what every training has, and `how` it is special."""
    return {
        "task": task.name,
        "model": model,
        "num_classes": len(data.classes),
        "classes": list(data.classes),
        "input_shape": [3, task.size, task.size],
        "mean": list(task.mean),
        "std": list(task.std),
        "data_sha256": data.sha256,
        "weights": source.name,
        "weights_sha256": source.sha256,
        "weights_remarks": list(source.remarks),
        **how,
        **asdict(settings),
        "milestones": list(settings.milestones),
        "threads": torch.get_num_threads(),
        "version": __version__,
    }


def pruning(goal: Objective, method: Method, levels: Sequence[float], machine: Machine, **options: Any) -> dict[str, Any]:
    """How a search is special, for run.json; `options` are rewind, rate, granularity and the name of the recipe."""
    return {
        "objective": goal.name,
        "objective_options": asdict(goal),
        "method": method.name,
        "method_options": asdict(method),  # type: ignore[call-overload]
        "levels": [] if method.name == "imp" else list(levels),
        "rounds": len(levels) - 1,
        **options,
        **asdict(machine),
    }


def steps_left(run: RunDir, steps: int, rewound_step: int, rounds: int) -> int:
    """Training steps that are not yet on disk."""
    done = len(run.rows())
    left = sum(steps - (rewound_step if k else 0) for k in range(done, rounds + 1))
    state = run.state(done)
    return left - (int(state[0]["position"][1]) - (rewound_step if done else 0)) if state and done <= rounds else left


@contextmanager
def torch_threads(threads: int | None, run: RunDir) -> Iterator[None]:
    """Use `threads` threads, by default as many as the run began with: sums in another order would give other masks."""
    if threads is not None and threads < 1:
        raise TicketError(f"--threads: expected at least 1, got {threads}")
    before = torch.get_num_threads()
    began = run.config()["threads"] if (run.path / "run.json").exists() else before
    torch.set_num_threads(threads or began)
    try:
        yield
    finally:
        torch.set_num_threads(before)
