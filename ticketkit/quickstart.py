"""`ticketkit quickstart`: find a ticket, export it, run it, measure it, in a few minutes on two cores and without a download.

The ticket is real but small (scikit-learn's digits). What sparsity does to the latency of a network that people deploy is shown
on a ResNet-50 with the layer-wise sparsity that global magnitude pruning is published to reach, and random weights.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from ticketkit import masks
from ticketkit.bench import engines, table, timing
from ticketkit.errors import ModelError, TicketkitError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

DISTRIBUTIONS = Path(__file__).with_name("bench") / "resnet50_global_magnitude.csv"
LEVEL = 0.9


@dataclass(frozen=True)
class Budget:
    """How much of everything. The default is for two cores and under four minutes."""

    rounds: int = 4
    rate: float = 0.44  # 1 - 0.56^4: 90 % after four rounds; the papers prune 20 % a round
    steps: int = 60  # of training, per round; on one thread, since two wait for each other on a shared machine
    image: int = 224  # height and width for ResNet-50
    protocol: timing.Protocol = field(default_factory=lambda: timing.Protocol(rounds=5, seconds=0.4, warmup=0.4))


def quickstart(out: Path, budget: Budget, console: Console) -> list[timing.Report]:
    """Find, export, run and bench; everything made stays in the folder `out`, the rows in `out/rows.jsonl`. Prints one table.

    Started again, it takes up the search where it stopped. Raises TicketkitError where a step fails.
    """
    _require_torch()
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    console.rule("1/4  find: a ticket on scikit-learn's digits, ResNet-20", align="left")
    notes = [_find(out, budget)]
    console.rule("2/4  export and run it", align="left")
    notes += [_export(out / "digits", out / "digits.onnx", console), _run(out / "digits.onnx")]
    console.rule(f"3/4  a ResNet-50, {LEVEL:.0%} sparse, {budget.image} x {budget.image}, random weights", align="left")
    with console.status("building the network, capturing it as ONNX, exporting it"):
        notes += [_export(resnet50(global_magnitude(LEVEL), image=budget.image), out / "resnet50.onnx", console)]
    notes += ["resnet50: random weights, layers as sparse as global magnitude pruning leaves them; its answers mean nothing"]
    console.rule("4/4  bench both: engines in turns, one thread, batch 1", align="left")
    reports = [_bench(out / name, budget, console) for name in ("digits.onnx", "resnet50.onnx")]
    with (out / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for report in reports for row in report.rows)
    _conclude(reports, notes, console)
    console.print(f"{time.monotonic() - start:.0f} s; all files are in {out}", markup=False, highlight=False)
    return reports


def global_magnitude(level: float) -> dict[str, float]:
    """ResNet-50 layer -> sparsity at an overall level of 0.6723, 0.7903, 0.9 or 0.956 (source in the head of the table file).

    Raises ModelError for a level that the table has not.
    """
    with DISTRIBUTIONS.open(encoding="utf-8", newline="") as file:
        table_rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    column = f"model_{level:.2%}".rstrip("%")
    if column not in table_rows[0]:
        known = ", ".join(name.removeprefix("model_") for name in table_rows[0] if name.startswith("model_"))
        raise ModelError(f"layer-wise sparsity is known at {known} %, got {level:.2%}")
    return {row["layer"]: float(row[column]) for row in table_rows}


def uniform(level: float, name: str = "resnet50", depthwise: bool = True) -> dict[str, float]:
    """Layer -> sparsity for torchvision's network `name`, the same for every layer but the first and the last, which stay dense.

    Args:
        depthwise: whether depthwise convolutions are pruned like the others, as the lottery-ticket papers do; they hold few of the weights.

    Raises ModelError for a name torchvision does not know.
    """
    import torch

    with torch.random.fork_rng(devices=[]):  # not on the meta device, where not every network can be built
        found = weights(_build(name))
    first, *_, last = found
    dense = {layer for layer, weight in found.items() if weight.dim() == 4 and weight.shape[1] == 1 and not depthwise}
    return {layer: 0.0 if layer in dense | {first, last} else level for layer in found}


def resnet50(sparsity: Mapping[str, float], image: int = 224, seed: int = 0) -> ModelProto:
    """`network` for ResNet-50."""
    return network("resnet50", sparsity, image, seed)


def network(name: str, sparsity: Mapping[str, float], image: int = 224, seed: int = 0, block: int = 1) -> ModelProto:
    """torchvision's network `name`, He-initialised, the smallest weights of each layer set to zero; input [batch, 3, image, image].

    Args:
        sparsity: fraction of zeros by layer name ("layer1.0.conv1", "fc"); every convolution and fully connected layer must be named.
        block: that many consecutive output channels have their zeros in the same places.

    Raises ModelError for a name torchvision does not know.
    """
    import torch
    from torch import nn

    from ticketkit.capture import capture

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = _build(name)
        for layer, weight in weights(module).items():
            # the largest weights of a layer carry most of its energy, so activations neither vanish nor overflow
            nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
            array = {layer: weight.numpy()}  # of the same memory
            array[layer][~masks.global_magnitude(array, masks.full(array), sparsity[layer], (block, 1))[layer]] = 0
        return capture(module, (3, image, image))


def _build(name: str) -> nn.Module:
    from torchvision import models as zoo

    if name not in zoo.list_models(module=zoo):
        raise ModelError(f"torchvision has no network {name!r} that classifies images; names are such as resnet50, mobilenet_v2")
    return zoo.get_model(name, weights=None)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Layer name -> weight of every convolution and fully connected layer, in the module's order.

    The joint projection of an attention layer is no module of its own: it goes by the name of its parameter.
    """
    return {name.removesuffix(".weight"): w.data for name, w in module.named_parameters() if name.endswith("weight") and w.dim() > 1}


def _require_torch() -> None:
    usable, why = engines.get("torch").available()
    if not usable:
        raise TicketkitError(f"quickstart trains a small network: {why}")


def _find(out: Path, budget: Budget) -> str:
    from ticketkit.search import find, progress

    shown = progress.choose()
    found = find.find(
        "digits", rounds=budget.rounds, rate=budget.rate, steps=budget.steps, threads=1, out=out / "digits", progress=shown
    )
    dense, ticket = found.rows[0], found.rows[-1]
    return (
        f"digits: accuracy {ticket['metric']:.2%} with {ticket['sparsity']:.2%} of the prunable weights gone, "
        f"dense {dense['metric']:.2%} (one run of {budget.steps} steps a round, both)"
    )


def _export(source: Path | ModelProto, path: Path, console: Console) -> str:
    from ticketkit.exporters import export

    report = export(source, path)
    console.print(str(report), markup=False, highlight=False)
    return f"{path.stem}: {report.bytes / 1e6:.2f} MB, {report.dense_bytes / report.bytes:.1f}x smaller than as dense ONNX"


def _run(path: Path) -> str:
    """Classify all test images with ticketkit and with stock onnxruntime."""
    from ticketkit import tasks
    from ticketkit.tasks import _data

    task = tasks.get("digits")
    test = task.load(None).test
    images, _ = next(_data.evaluation_batches(task, test, len(test)))
    feeds = {"input": np.ascontiguousarray(images.numpy())}
    found, stock = (engines.get(name).load(path, 1, feeds)()[0].argmax(1) for name in ("ticketkit", "onnxruntime"))
    same, right = int((found == stock).sum()), float((found == test.labels).mean())
    return f"digits: the file classifies {right:.2%}; ticketkit and stock onnxruntime agree on {same} of {len(test)} test images"


def _bench(path: Path, budget: Budget, console: Console) -> timing.Report:
    chosen, unusable = engines.usable()
    with table.progress(path.stem) as progress:
        report = timing.measure(path, chosen, protocol=budget.protocol, progress=progress)
    for name, why in (unusable | report.failures).items():
        console.print(f"{path.stem}: without {name}: {why}", markup=False, highlight=False)
    if report.interrupted:
        raise KeyboardInterrupt
    if "ticketkit" not in (row.engine for row in report.rows):
        raise TicketkitError(f"{path.stem}: ticketkit itself could not be timed: {(unusable | report.failures)['ticketkit']}")
    return report


def _conclude(reports: list[timing.Report], notes: list[str], console: Console) -> None:
    grid = Table("model", "zeros", "FLOPs left", "engine", "p50 ms", "p90 ms", "× dense", "file MB", box=None, pad_edge=False)
    for column in grid.columns[1:3] + grid.columns[4:]:
        column.justify = "right"
    for report in reports:
        dense, left = report.subject.plan.flops
        facts = [report.subject.path.stem, f"{report.subject.sparsity_prunable or 0:.1%}", f"{left / max(dense, 1):.1%}"]
        for row in sorted(report.rows, key=lambda row: row.p50_ms):
            ratio = "-" if row.speedup is None else f"{row.speedup:.2f}"
            numbers = [table.milliseconds(row.p50_ms), table.milliseconds(row.p90_ms), ratio, f"{row.file_bytes / 1e6:.3g}"]
            grid.add_row(*facts, row.engine, *numbers, style=None if row.multiplies_zeros else "bold")
            facts = ["", "", ""]
        notes.append(f"{report.subject.path.stem}: sparsity by layer {table.distribution(report.subject.plan)}")
    console.rule("the result: batch 1, one thread", align="left")
    console.print(grid)
    notes.append("zeros: of the prunable weights. × dense: p50 of the fastest dense engine of the same run over this p50")
    rows = reports[-1].rows
    notes.append(f"{rows[0].cpu}; " + ", ".join(f"{row.engine} {row.engine_version}" for row in rows))
    for note in notes:
        console.print(note, markup=False, highlight=False)
