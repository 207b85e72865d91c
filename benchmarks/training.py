"""What a training step of the search costs beside a bare torch loop, and how much of it is data loading.

    python benchmarks/training.py                                 ResNet-20, 32 x 32, batch 128, all cores
    python benchmarks/training.py --batch-size 256 --threads 1 --precision bf16-mixed

Three ways, in alternating rounds of one run, every second round backwards:
    bare     the textbook loop in the same memory format: one batch in memory, forward, cross-entropy, backward, SGD step
    search   the loop of `ticketkit find`, masks on (90 % sparse), batches cropped, mirrored and normalised, loss and accuracy read
    batches  the search's batches alone

Images are random, which changes no speed. Medians of images per second; `ratio` is search over bare, the median over the rounds.
One row is appended to results/training.jsonl. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F

from ticketkit import __version__, masks, models, tasks
from ticketkit.bench import machine
from ticketkit.search.ranks import Machine, Ranks
from ticketkit.search.train import Settings, Training
from ticketkit.tasks import Batches, Crops, Split

RESULTS = Path(__file__).resolve().parent / "results" / "training.jsonl"
SPARSITY = 0.9


class Done(Exception):
    """The search's loop has done the steps of a turn."""


def bare(module: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Callable[[int], None]:
    """The textbook loop on one batch; what is returned does so many steps."""
    module = module.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = F.cross_entropy(module(images), labels)
            loss.backward()
            optimizer.step()

    return steps


def search(module: nn.Module, name: str, batches: Batches, precision: str) -> Callable[[int], None]:
    """The loop of `find`; what is returned goes on for so many steps."""
    weights = models.arrays(module)
    mask = masks.random(masks.full({key: weights[key] for key in models.prunable(name, module)}), SPARSITY, 0)
    settings = Settings(10**9, batches.batch_size, 0.01, "constant", (), 1e-4, 0.9, 0)
    training = Training(module, mask, settings, 0, ranks=Ranks(Machine(precision=precision)))

    def steps(count: int) -> None:
        last = training.step + count

        def after_step(now: Training) -> None:
            if now.step == last:
                raise Done

        with contextlib.suppress(Done):
            training.run(batches, after_step)

    return steps


def loading(batches: Batches) -> Callable[[int], None]:
    """The batches alone."""
    endless: Iterator[Any] = itertools.chain.from_iterable(batches.epoch(0, 0, epoch) for epoch in itertools.count())

    def steps(count: int) -> None:
        for _ in itertools.islice(endless, count):
            pass

    return steps


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """One result row."""
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    task = tasks.get("cifar10")
    pixels = np.random.Generator(np.random.Philox(0))
    split = Split(pixels.integers(0, 256, (4096, 32, 32, 3), np.uint8), pixels.integers(0, 10, 4096))
    batches = Batches(split, Crops(task), chosen.batch_size)
    (images,), labels = next(batches.epoch(0, 0, 0))
    ways = {
        "bare": bare(models.build(chosen.model, 10, 32), images, labels, chosen.precision),
        "search": search(models.build(chosen.model, 10, 32), chosen.model, batches, chosen.precision),
        "batches": loading(batches),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(2)
    for turn in track(range(chosen.rounds), "rounds", transient=True):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            ways[name](chosen.steps)
            rates[name].append(chosen.steps * chosen.batch_size / (time.perf_counter() - start))
    return {
        "model": chosen.model,
        "batch_size": chosen.batch_size,
        "threads": chosen.threads,
        "precision": chosen.precision,
        "sparsity": SPARSITY,
        "rounds": chosen.rounds,
        "steps": chosen.steps,
        **{f"{name}_images_per_s": statistics.median(found) for name, found in rates.items()},
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(rates["search"], rates["bare"], strict=True)),
        "images_per_s": rates,
        "cpu": machine.cpu_name(),
        "torch": torch.__version__,
        "ticketkit": __version__,
        "commit": machine.commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=models.names(), metavar="NAME", help="default: resnet20")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--threads", type=int, default=machine.cores()[1], help="of torch; default: all cores")
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--rounds", type=int, default=10, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    chosen = parser.parse_args()
    row = measure(chosen)
    with chosen.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name in ("bare", "search", "batches"):
        print(f"{name:8} {row[f'{name}_images_per_s']:9.0f} images/s")
    print(f"search / bare {row['ratio']:.3f} (median of {chosen.rounds} rounds)")


if __name__ == "__main__":
    command.run(main)
