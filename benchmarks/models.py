"""End to end: ResNet-50 at several sparsities and settings, every usable engine; rows are appended to benchmarks/results/.

    python benchmarks/models.py                                       all models, batch 1, one thread
    python benchmarks/models.py --model gm-90.00 --setting b1t1 b1t2 b16t2 --engine ticketkit onnxruntime openvino

The networks have random weights and the layer-wise sparsity of global magnitude pruning (gm-*, see
ticketkit/bench/resnet50_global_magnitude.csv) or the same sparsity everywhere (uniform-*). Needs the extras `find` and `bench`.
The protocol is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ticketkit import export
from ticketkit.bench import engines, table, timing
from ticketkit.errors import TicketkitError
from ticketkit.quickstart import global_magnitude, resnet50, uniform

HERE = Path(__file__).resolve().parent
MODELS = {f"gm-{level:.2%}".rstrip("%"): (global_magnitude, level) for level in (0.6723, 0.7903, 0.9, 0.956)}
MODELS["uniform-90.00"] = (uniform, 0.9)
SETTINGS = {"b1t1": (1, 1), "b1t2": (1, 2), "b16t2": (16, 2)}  # name -> (batch, threads)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="M", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["b1t1"], metavar="S", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--engine", nargs="+", choices=engines.names(), metavar="E", help="default: all usable ones")
    parser.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed, per engine and round; default %(default)s")
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels; default %(default)s")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "models.jsonl", help="rows are appended to this file")
    parser.add_argument("--files", type=Path, default=HERE.parent / "build" / "benchmarks", help="the networks are kept here")
    return parser.parse_args(words)


def network(name: str, image: int, folder: Path) -> Path:
    """The exported network as a file, built on the first call."""
    path = folder / f"resnet50-{name}-{image}px.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        distribution, level = MODELS[name]
        print(f"building {path.name}", file=sys.stderr)
        print(export(resnet50(distribution(level), image), path), file=sys.stderr)
    return path


def main(words: Sequence[str] | None = None) -> int:
    """Measure; 0 when every engine asked for was timed everywhere."""
    chosen = arguments(words)
    picked = engines.require(chosen.engine) if chosen.engine else engines.usable()[0]
    required = chosen.engine or [engines.label(engine) for engine in picked]
    protocol, console = timing.Protocol(rounds=chosen.rounds, seconds=chosen.seconds), Console()
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in chosen.model:
        path = network(name, chosen.image, chosen.files)
        for batch, threads in (SETTINGS[setting] for setting in chosen.setting):
            with table.progress(f"{name} batch {batch} threads {threads}") as progress:
                report = timing.measure(path, picked, threads, batch, protocol, progress)
            try:
                table.conclude(report, str(chosen.results), {}, required)
            except TicketkitError as error:
                console.print(f"error: {error}", markup=False)
                failed = True
            console.print()
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TicketkitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the rows so far are kept")
