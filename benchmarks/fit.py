"""Fits the cost model of the planner to measurements and writes ticketkit/cost.json.

    python benchmarks/layers.py && python benchmarks/fit.py

Sparse formats: the newest rows of results/layers.jsonl. Dense layers: onnxruntime's own profile of whole networks, where convolutions
keep the order of their tensors from one to the next, as they do not when measured alone. Both are brought to the same speed of the
machine by a probe, the layers' L1 limit. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import command
import layers
import numpy as np
import onnxruntime
import shapes
from rich.console import Console
from rich.table import Table
from torchvision.models import get_model

from ticketkit import cost, formats
from ticketkit.bench import machine
from ticketkit.capture import capture
from ticketkit.lower import lower
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16")
RUNS = 12
DEPTHWISE = (  # channels, size, kernel, stride: those of MobileNetV2, and the wider windows of EfficientNet-B0
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 3, 2), (192, 28, 3, 1), (192, 28, 3, 2), (384, 14, 3, 1), (576, 14, 3, 1),
    (576, 14, 3, 2), (960, 7, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2), (1152, 7, 5, 1),
)  # fmt: skip
Sample: TypeAlias = tuple[cost.Size, str, int, float]  # size, format, stored values, µs at unit speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=layers.RESULTS, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=cost.TABLE, help="default %(default)s")
    chosen = parser.parse_args()
    samples, speed = sparse_samples(chosen.rows)
    samples += depthwise_samples(speed)
    reorders: list[tuple[float, float]] = []
    for network in NETWORKS:
        samples += dense_samples(network, speed, reorders)
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample[0].operator, sample[1]].append(sample)
    table: dict[str, Any] = {
        "machine": f"{machine.cpu_name()}, {native.active_isa().name}, one thread at {speed:.0f} GFLOP/s of the L1 probe",
        "reorder": float(np.median([us * 1e3 / elements for elements, us in reorders])),
    }
    shown = Table("operator", "format", "samples", "coefficients, ns", "error p50", "p90", box=None)
    for operator, by_format in cost.COUNTS.items():
        table[operator] = {}
        for format, names in by_format.items():
            group = groups[operator, format]
            rows, times = [cost.counts(size, format, values) for size, _, values, _ in group], [us for *_, us in group]
            found = cost.fit(rows, times, names)
            found["call"] = max(found["call"], table[operator].get(cost.DENSE, found)["call"])  # nothing says that ours is cheaper
            table[operator][format] = {name: float(f"{ns:.4g}") for name, ns in found.items()}
            predicted = [1e-3 * sum(ns * row[name] for name, ns in found.items()) for row in rows]
            errors = np.abs(np.log(np.array(predicted) / times))
            text = ", ".join(f"{name} {ns:.4g}" for name, ns in table[operator][format].items())
            shown.add_row(operator, format, str(len(group)), text, f"{np.median(errors):.0%}", f"{np.percentile(errors, 90):.0%}")
    chosen.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    Console(width=180).print(shown)


def sparse_samples(path: Path) -> tuple[list[Sample], float]:
    """The newest row of every layer, sparsity and format, and the speed they are brought to: the probe's median GFLOP/s."""
    rows = {(row["layer"], row["sparsity"], row["format"]): row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    speed = float(np.median([row["limit_gflops"] for row in rows.values()]))
    overhead = call_overhead_us()
    print(f"a call from Python: {overhead:.1f} µs")
    samples = []
    for row in rows.values():
        conv = "kernel" in row["shape"]
        shape = shapes.Conv(**row["shape"]) if conv else shapes.Gemm(**row["shape"])
        size = cost.Size("Conv" if conv else "Gemm", shape.weight, shape.x, shape.y)
        us = row["median_ms"] * 1e3
        if us > 5 * overhead:  # benchmarked blocks are whole, so nothing but non-zeros is stored
            samples.append((size, row["format"], row["nnz"], (us - overhead) * row["limit_gflops"] / speed))
    return samples, speed


def call_overhead_us() -> float:
    """What a call from Python takes beyond the kernel, and an operator of onnxruntime does not: the time of a layer of one weight."""
    shape = shapes.Conv(1, 1, 1, 1, 1, 1, 0, 1)
    x, weight, bias = (np.ones(size, np.float32) for size in (shape.x, shape.weight, (1,)))
    run = layers.sparse(shape, weight, "csr", native.active_isa().name, x, bias)
    return float(np.median(layers.worker.turn(run, 0.2, settle=10, least=100)["ms"])) * 1e3


def depthwise_samples(speed: float) -> list[Sample]:
    """Depthwise layers without zeros in the kernel of ours."""
    isa, overhead, samples = native.active_isa().name, call_overhead_us(), []
    for channels, side, kernel, stride in DEPTHWISE:
        pad = kernel // 2
        shape = ConvShape(channels, side, side, channels, kernel, kernel, stride, stride, pad, pad, pad, pad, groups=channels)
        weight, bias = np.ones((channels, 1, kernel, kernel), np.float32), np.ones(channels, np.float32)
        layer = native.conv2d(shape, formats.get("csr").pack(weight), isa=isa)
        x, y = layers.buffer((1, *layer.in_shape)), layers.buffer((1, *layer.out_shape))
        run = partial(layer.run, x, bias, minimum=0.0, out=y, workspace=native.aligned(layer.workspace_bytes))
        (probe, flops), turns = layers.l1_limit(isa), []
        for _ in range(RUNS):
            rate = flops / float(np.median(layers.worker.turn(probe, 0.02, settle=2, least=3)["ms"])) / 1e6
            ms = float(np.median(layers.worker.turn(lambda: [run()], 0.02, settle=2, least=3)["ms"]))  # noqa: B023
            turns.append((ms * 1e3 - overhead) * rate / speed)
        samples.append((cost.Size("Depthwise", weight.shape, x.shape, y.shape), "csr", weight.size, float(np.median(turns))))
    return samples


def dense_samples(name: str, speed: float, reorders: list[tuple[float, float]]) -> list[Sample]:
    """The convolutions and products of a network with dense weights, from onnxruntime's profile; adds (elements, µs) of its reorders."""
    model = lower(capture(get_model(name), (3, 224, 224))).model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / name)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x = {session.get_inputs()[0].name: np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)}
        probe, flops = layers.l1_limit(native.active_isa().name)
        speeds = []
        for _ in range(RUNS):
            speeds += [flops / float(np.median(layers.worker.turn(probe, 0.02, settle=2, least=3)["ms"])) / 1e6]
            session.run(None, x)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, list[float]] = defaultdict(list)
    kernels = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            found[event["name"]].append(event["dur"])
            kernels[event["name"]] = event["args"]["op_name"], *(
                [tuple(shape) for entry in event["args"][f"{side}_type_shape"] for shape in entry.values()] for side in ("input", "output")
            )
    print(f"{name}: probe {np.median(speeds):.0f} GFLOP/s", flush=True)
    samples = []
    for node, times in found.items():
        us = float(np.median(times)) * float(np.median(speeds)) / speed
        op, inputs, outputs = kernels[node]
        if op.startswith("Reorder"):
            reorders.append((float(np.prod(outputs[0])), us))
        elif op in ("Conv", "FusedConv"):
            operator = "Depthwise" if 1 < inputs[1][0] == inputs[0][1] and inputs[1][1] == 1 else "Conv"
            samples.append((cost.Size(operator, inputs[1], inputs[0], outputs[0]), cost.DENSE, int(np.prod(inputs[1])), us))
        elif op in ("Gemm", "MatMul", "FusedGemm", "FusedMatMul") and all(len(shape) < 3 for shape in inputs[1:]):  # not two activations
            weight = outputs[0][-1], inputs[0][-1]  # onnxruntime has taken the weight itself out of the inputs
            samples.append((cost.Size("Gemm", weight, inputs[0], outputs[0]), cost.DENSE, weight[0] * weight[1], us))
    return samples


if __name__ == "__main__":
    command.run(main)
