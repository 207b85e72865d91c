"""Does a pretrained checkpoint keep its published accuracy in this pipeline? One row per checkpoint, appended to results/pretrained.jsonl.

    python benchmarks/pretrained.py cifar10 resnet20 resnet20-12fca82f.th --data DIR

Test images, no augmentation, the weights as they came. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import command

from ticketkit import __version__, models, tasks
from ticketkit.bench import machine
from ticketkit.pretrain.supervised import Supervised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks.names())
    parser.add_argument("model", choices=models.names(), metavar="MODEL")
    parser.add_argument("weights", help="checkpoint file or torchvision weight name")
    parser.add_argument("--data", type=Path, help="folder of the task's images")
    chosen = parser.parse_args()
    task = tasks.get(chosen.task)
    data = task.load(chosen.data)
    module = models.build(chosen.model, len(data.classes), task.size)
    source = models.load_weights(chosen.model, module, chosen.weights)
    accuracy, loss = Supervised().evaluate(module, task, data.test, len(data.classes))
    row = {
        "task": task.name,
        "model": chosen.model,
        "weights": Path(source.name).name,
        "weights_sha256": source.sha256,
        "accuracy": accuracy,
        "loss": loss,
        "images": len(data.test),
        "cpu": machine.cpu_name(),
        "ticketkit": __version__,
        "commit": machine.commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with (Path(__file__).resolve().parent / "results" / "pretrained.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['model']} on {row['task']}: {accuracy:.2%} of {row['images']} test images")


if __name__ == "__main__":
    command.run(main)
