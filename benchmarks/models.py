"""End to end: whole networks at several sparsities and settings, every usable engine; rows are appended to benchmarks/results/.

    python benchmarks/models.py                                       ResNet-50, batch 1, one thread
    python benchmarks/models.py --model gm-90.00 --setting b1t1 b1t2 b16t2 --engine ticketkit onnxruntime openvino
    python benchmarks/models.py --model mobilenet_v2-uniform-90.00 uniform-70.00-4x1
    python benchmarks/models.py --set guard                           nothing gets slower: 11 networks at 0, 30 and 50 %

A name is [NETWORK-]DISTRIBUTION-PERCENT[-Bx1]: a network of torchvision (resnet50 if left out) with random weights; the layer-wise
sparsity of global magnitude pruning (gm, for ResNet-50 at the levels of ticketkit/bench/resnet50_global_magnitude.csv), the same
everywhere (uniform), or everywhere but in depthwise layers (pointwise); zeros shared by B consecutive output channels. Needs the extras
`find` and `bench`. The protocol is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import command
from rich.console import Console

from ticketkit import export
from ticketkit.bench import engines, table, timing
from ticketkit.errors import TicketkitError
from ticketkit.exporters import examine
from ticketkit.quickstart import global_magnitude, network, uniform

HERE = Path(__file__).resolve().parent
NAME = re.compile(r"((?P<network>\w+)-)?(?P<distribution>gm|uniform|pointwise)-(?P<percent>\d+\.\d\d)(-(?P<block>\d+)x1)?")
GUARDED = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "vgg11", "densenet121", "squeezenet1_1"),
    *("regnet_y_400mf", "shufflenet_v2_x1_0", "vit_b_16"),
)
SETTINGS = {"b1t1": (1, 1), "b1t2": (1, 2), "b16t2": (16, 2)}  # name -> (batch, threads)


@dataclass(frozen=True)
class Model:
    """A network with random weights and zeros among them; `block` consecutive output channels have theirs in the same places."""

    network: str
    distribution: str
    level: float
    block: int

    @classmethod
    def parse(cls, name: str) -> Model:
        """The model of that name (see the docstring of this file); ArgumentTypeError for what is none."""
        found = NAME.fullmatch(name)
        if not found:
            raise argparse.ArgumentTypeError(f"expected [NETWORK-]gm|uniform|pointwise-PERCENT[-Bx1] such as gm-90.00, got {name!r}")
        return cls(found["network"] or "resnet50", found["distribution"], float(found["percent"]) / 100, int(found["block"] or 1))

    def __str__(self) -> str:
        """Its whole name, with the network in it."""
        return f"{self.network}-{self.distribution}-{100 * self.level:.2f}" + (f"-{self.block}x1" if self.block > 1 else "")

    def sparsity(self) -> dict[str, float]:
        """Layer -> fraction of zeros."""
        if self.distribution == "gm":
            return global_magnitude(self.level)
        return uniform(self.level, self.network, depthwise=self.distribution == "uniform")

    def file(self, image: int, folder: Path) -> Path:
        """The file for the engines: exported anew from plain ONNX, which is kept; that itself where no layer would gain."""
        plain, exported = folder / f"{self}-{image}px-plain.onnx", folder / f"{self}-{image}px.onnx"
        if not plain.exists():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"building {plain.name}", file=sys.stderr)
            export(network(self.network, self.sparsity(), image, block=self.block), plain, format="onnx-dense")
        if not examine(plain).sparse:
            return plain
        print(export(plain, exported), file=sys.stderr)
        return exported


@dataclass(frozen=True)
class Set:
    """Models to be measured together: by which engines (none: all usable ones), and the speedup (by round) each must reach."""

    models: tuple[str, ...]
    engines: tuple[str, ...] = ()
    floor: float = 0.0


SETS = {
    "resnet50": Set(("gm-67.23", "gm-79.03", "gm-90.00", "gm-95.60", "uniform-90.00")),
    "blocks": Set(("uniform-70.00-4x1", "uniform-90.00-4x1")),
    "mobile": Set(
        (
            *("mobilenet_v2-uniform-70.00", "mobilenet_v2-uniform-80.00", "mobilenet_v2-uniform-90.00"),
            *("mobilenet_v2-pointwise-90.00", "mobilenet_v3_large-uniform-90.00", "efficientnet_b0-uniform-90.00"),
        )
    ),
    "guard": Set(
        tuple(f"{name}-uniform-{percent}.00" for name in GUARDED for percent in ("0", "30", "50")), ("onnxruntime", "ticketkit"), 0.97
    ),
}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--set", choices=SETS, default="resnet50", help="default %(default)s")
    which.add_argument("--model", nargs="+", type=Model.parse, metavar="M", help="instead of a set; names as above")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["b1t1"], metavar="S", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--engine", nargs="+", choices=engines.names(), metavar="E", help="default: all usable ones, or as the set says")
    parser.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed, per engine and round; default %(default)s")
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels; default %(default)s")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "models.jsonl", help="rows are appended to this file")
    parser.add_argument("--files", type=Path, default=HERE.parent / "build" / "benchmarks", help="the networks are kept here")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure; 0 when every engine asked for was timed everywhere, and nothing was slower than the set allows."""
    chosen = arguments(words)
    group = Set(()) if chosen.model else SETS[chosen.set]
    asked = chosen.engine or group.engines
    picked = engines.require(asked) if asked else engines.usable()[0]
    required = asked or [engines.label(engine) for engine in picked]
    protocol = timing.Protocol(rounds=chosen.rounds, seconds=chosen.seconds)
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for model in chosen.model or map(Model.parse, group.models):
        path = model.file(chosen.image, chosen.files)
        for batch, threads in (SETTINGS[setting] for setting in chosen.setting):
            what = f"{model} batch {batch} threads {threads}"
            with table.progress(what) as progress:
                report = timing.measure(path, picked, threads, batch, protocol, progress)
            try:
                table.conclude(report, str(chosen.results), {}, required)
            except TicketkitError as error:
                failures.append(f"{what}: {error}")
            ratios = [row.speedup_rounds for row in report.rows if not row.multiplies_zeros and row.speedup_rounds is not None]
            slow = [ratio for ratio in ratios if ratio < group.floor]
            failures += [f"{what}: expected a speedup of {group.floor:g} or more, got {ratio:.3f}" for ratio in slow]
            console.print()
    for failure in failures:
        console.print(f"error: {failure}", markup=False, highlight=False, soft_wrap=True)
    return int(bool(failures))


if __name__ == "__main__":
    command.run(main)
