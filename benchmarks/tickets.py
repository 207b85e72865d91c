"""Does an exported ticket still answer as its network did? Every round of a run, on all test images, with and without the library.

    python benchmarks/tickets.py RUN_DIR --data DIR

For each round: accuracy while searching, after export in stock onnxruntime and in ticketkit, whether both give the same class for every
image, the largest difference between their logits, file bytes against plain dense ONNX. Rows are appended to results/tickets.jsonl; the
dense reference is round 0; early rounds, too dense for any sparse layer, are exported as plain ONNX. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import command
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ticketkit import InferenceSession, __version__, export, tasks
from ticketkit.bench import machine
from ticketkit.errors import ExportError
from ticketkit.search.rundir import RunDir

HERE = Path(__file__).resolve().parent


def logits(session: Any, batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs [images, classes] of the whole test set."""
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def measure(run: RunDir, row: dict[str, Any], batches: list[NDArray[np.float32]], labels: NDArray[Any], folder: Path) -> dict[str, Any]:
    """One result row; a round too dense for any sparse layer is exported as plain ONNX."""
    path = folder / f"round_{row['round']:02}.onnx"
    try:
        report = export(run.path, path, format="onnx", round=row["round"])
    except ExportError:
        report = export(run.path, path, format="onnx-dense", round=row["round"])
    stock = logits(onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"]), batches)
    sparse = logits(InferenceSession(report.path), batches)
    return {
        "round": row["round"],
        "sparsity": row["sparsity"],
        "sparsity_model": row["sparsity_model"],
        "accuracy_search": row["metric"],
        "accuracy_onnxruntime": float((stock.argmax(1) == labels).mean()),
        "accuracy_ticketkit": float((sparse.argmax(1) == labels).mean()),
        "same_class": int((stock.argmax(1) == sparse.argmax(1)).sum()),
        "images": len(labels),
        "max_abs_diff": float(np.abs(stock - sparse).max()),
        "logit_scale": float(np.abs(stock).max()),
        "tolerance": max((c.tolerance for c in report.comparisons), default=None),
        "sparse_layers": len(report.plan.sparse) if report.format == "onnx" else 0,
        "flops_left": report.plan.flops[1] / report.plan.flops[0],
        "file_bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "layer_sparsity": row["layer_sparsity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--data", type=Path, help="folder of the task's images")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "tickets.jsonl", help="rows are appended to this file")
    chosen = parser.parse_args()
    run = RunDir(chosen.run)
    config = run.config()
    task = tasks.get(config["task"])
    test = task.load(chosen.data).test
    batches = [np.ascontiguousarray(images.numpy()) for images, _ in tasks.evaluation_batches(task, test)]
    keep = ("task", "model", "weights_sha256", "epochs", "steps", "batch_size", "lr", "schedule", "weight_decay", "rewind", "rate", "seed")
    common = {
        "run": {key: config[key] for key in keep if key in config},
        "cpu": machine.cpu_name(),
        "onnxruntime": onnxruntime.__version__,
        "ticketkit": __version__,
        "commit": machine.commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print("round  sparsity  search   stock ORT  ticketkit  same class    max |diff|  bytes (dense/this)")
    with tempfile.TemporaryDirectory() as folder, chosen.results.open("a", encoding="utf-8") as file:
        for row in run.rows():
            found = measure(run, row, batches, test.labels, Path(folder))
            file.write(json.dumps(found | common) + "\n")
            file.flush()
            print(
                f"{found['round']:5}  {found['sparsity']:7.2%}  {found['accuracy_search']:.2%}   {found['accuracy_onnxruntime']:.2%}"
                f"     {found['accuracy_ticketkit']:.2%}     {found['same_class']}/{found['images']}   {found['max_abs_diff']:.2e}"
                f"    {found['file_bytes']} ({found['dense_bytes'] / found['file_bytes']:.2f}x)"
            )


if __name__ == "__main__":
    command.run(main)
