"""The networks people deploy, on a phone or board: dense onnxruntime against ticketkit there; rows are appended to results/device.jsonl.

    python benchmarks/device.py --device ssh:pi@raspberrypi
    python benchmarks/device.py --device adb --cpus big --onnxruntime jni/arm64-v8a/libonnxruntime.so
    python benchmarks/device.py --device adb --layers                  layer by layer: no onnxruntime needed there
    python benchmarks/device.py --device local --model mobilenet_v2-uniform-90.00

MobileNetV2, MobileNetV3-Large, EfficientNet-B0, ResNet-18 and ResNet-50 at 70, 80 and 90 %, the same in every layer but the first and the
last, random weights, 224 x 224, batch 1; names as in models.py. Phones get warm: wait between runs, and read the warnings under the tables
and `throttled` in the rows. Needs the extra `find` (torchvision) here, nothing there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import command
import models

from ticketkit.bench import device, table, timing
from ticketkit.errors import TicketkitError

HERE = Path(__file__).resolve().parent
DEPLOYED = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50")
MODELS = tuple(f"{network}-uniform-{percent}.00" for network in DEPLOYED for percent in (70, 80, 90))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, metavar="DEVICE", help="as `ticketkit bench --device`")
    parser.add_argument("--model", nargs="+", type=models.Model.parse, default=[*map(models.Model.parse, MODELS)], metavar="M")
    parser.add_argument("--layers", action="store_true", help="each layer alone")
    parser.add_argument("--cpus", metavar="LIST", help="processors or cluster; default: the biggest")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--runner", type=Path, metavar="DIR", help="folder with built runners; default: built and kept")
    parser.add_argument("--onnxruntime", type=Path, metavar="FILE", help="the device's libonnxruntime.so; needed for Android")
    parser.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed, per engine and round; default %(default)s")
    parser.add_argument("--rest", type=float, default=10.0, help="seconds between models, to cool down; default %(default)s")
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels; default %(default)s")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "device.jsonl", help="rows are appended to this file")
    parser.add_argument("--files", type=Path, default=HERE.parent / "build" / "benchmarks", help="the networks are kept here")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure; 0 when every model was measured to the end."""
    chosen = arguments(words)
    target = device.Target(chosen.device, chosen.cpus, chosen.runner, chosen.onnxruntime)
    protocol = timing.Protocol(rounds=chosen.rounds, seconds=chosen.seconds)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    table.check_writable(str(chosen.results))
    failures: list[str] = []
    for i, model in enumerate(chosen.model):
        if i:
            time.sleep(chosen.rest)
        path = model.file(chosen.image, chosen.files)
        try:
            device.bench(target, path, (), chosen.threads, 1, protocol, str(chosen.results), chosen.layers)
        except TicketkitError as error:  # a device that is gone now may be back for the next
            failures.append(f"{model}: {error}")
            print(f"error: {failures[-1]}", file=sys.stderr)
    print(f"{len(chosen.model) - len(failures)} of {len(chosen.model)} models measured on {chosen.device}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    command.run(main)
