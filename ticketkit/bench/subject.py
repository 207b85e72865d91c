"""The model under measurement: the file as given, the same network in plain ONNX, one input, and what is known of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper

from ticketkit.bench.engines import Engine, Feeds
from ticketkit.errors import ModelError
from ticketkit.lower import half_weights, lower, operators, read, sparse
from ticketkit.lower.graph import input_shapes
from ticketkit.planner import Plan, plan

SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model file made ready for every engine, its input bound to one batch size.

    Attributes:
        path: the file as given.
        plain: the same network in standard operators and float32 weights only; `path` itself where it has no others.
        sha256: of the file as given.
        inputs: names of the graph inputs; `feeds_file` (npz) holds their arrays as arr_0, arr_1, ...
        plan: of the network for one sample: sparsity and FLOPs of every layer.
        sparse_layers: how many of them ticketkit runs sparse: as stored in the file, or as planned for a plain one.
        scratch: folder for what the engines produce.
    """

    path: Path
    plain: Path
    sha256: str
    batch: int
    inputs: list[str]
    feeds_file: Path
    plan: Plan
    sparse_layers: int
    scratch: Path

    @staticmethod
    def open(path: Path, batch: int, scratch: Path) -> Subject:
        """Read and check the ONNX file; conversions and the input go to the folder `scratch`.

        Raises ModelError or FormatError for a file that is missing, damaged, or does not take this batch.
        """
        model, plain = read(path), path
        stored = len(list(operators.nodes(model)))
        # engines without constant folding would cast float16 weights in every run; none but onnxruntime knows sparse initializers
        if stored or half_weights.is_narrow(model) or sparse.stored(path):
            model, plain = operators.expand(model), scratch / "plain.onnx"
            onnx.save(model, str(plain))
        feeds = make_feeds(model, batch)
        feeds_file = scratch / "feeds.npz"
        np.savez(feeds_file, *feeds.values())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        planned = plan(lower(model))
        return Subject(path, plain, digest, batch, list(feeds), feeds_file, planned, stored or len(planned.sparse), scratch)

    def file_for(self, engine: Engine) -> Path:
        """The file this engine is to load."""
        return self.plain if engine.PLAIN_ONNX else self.path

    def facts(self, multiplies_zeros: bool) -> dict[str, Any]:
        """What every row of an engine says of the model, by the names of `rows.Row`."""
        return {
            "multiplies_zeros": multiplies_zeros,
            "model": self.path.name,
            "model_sha256": self.sha256,
            "sparsity_prunable": self.sparsity_prunable,
            "sparsity": self.plan.model_sparsity,
            "flops_dense": self.plan.flops[0],
            "flops_left": self.plan.flops[1],
            "layers": len(self.plan.choices),
            "sparse_layers": 0 if multiplies_zeros else self.sparse_layers,
            "batch": self.batch,
        }

    @property
    def sparsity_prunable(self) -> float | None:
        """Zeros among the prunable weights, None for a network with no convolution but its first."""
        convolutions = sum(choice.op == "Conv" for choice in self.plan.choices)
        return self.plan.prunable_sparsity if convolutions > 1 else None


def make_feeds(model: ModelProto, batch: int) -> Feeds:
    """Standard normal floats (zeros for integer inputs), seed 0; first axis `batch`, open image sides 224.

    Raises ModelError for a batch the model does not take.
    """
    rng = np.random.default_rng(SEED)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    feeds: Feeds = {}
    for name, shape in input_shapes(model, batch=batch).items():
        if not shape or shape[0] != batch:
            fixed = shape[0] if shape else "none"
            raise ModelError(f"input {name!r}: expected batch {batch}, the model has {fixed}; bench that, or export it dynamic")
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(types[name]))
        feeds[name] = rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
    return feeds
