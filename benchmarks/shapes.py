"""The table of layer shapes, layers.csv: what stands in it, reading it, and writing it from torchvision's networks."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from math import inf, prod
from pathlib import Path
from typing import Any, TypeAlias

from onnx import helper

from ticketkit import formats
from ticketkit.errors import DataError
from ticketkit.lower import operators
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape

TABLE = Path(__file__).with_name("layers.csv")
VISION = {name: 224 for name in ("resnet50", "resnet152", "mobilenet_v2", "efficientnet_b0", "deeplabv3_resnet50", "vit_b_16")}
NETWORKS = (*VISION, "bert_base")
HEAD = """\
# Every distinct layer of these networks that may have sparse weights, and how often each network has it: convolutions without groups
# (square; 224 x 224 images, DeepLabv3 too) and matrix products with constant weights (rows = outputs, cols = inputs, batch = tokens: 197
# in ViT-B/16, 128 in the encoder of BERT-base). Stem and head are a network's first and last layer, usually left dense.
# Written by `python benchmarks/layers.py --table` from torchvision's modules.
"""


@dataclass(frozen=True)
class Conv:
    """A convolution of one image: square kernel, the same stride, padding and dilation on both axes, ReLU after it."""

    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel: int
    stride: int
    pad: int
    dilation: int

    op = "conv2d"
    packed = operators.TILES
    minimum = 0.0

    @property
    def name(self) -> str:
        size = f"{self.in_channels}x{self.in_h}x{self.in_w}-{self.out_channels}"
        return f"{self.op}-{size}-k{self.kernel}s{self.stride}p{self.pad}d{self.dilation}"

    @property
    def geometry(self) -> ConvShape:
        k, s, p, d = self.kernel, self.stride, self.pad, self.dilation
        return ConvShape(self.in_channels, self.in_h, self.in_w, self.out_channels, k, k, s, s, p, p, p, p, d, d)

    @property
    def x(self) -> tuple[int, ...]:
        return 1, self.in_channels, self.in_h, self.in_w

    @property
    def y(self) -> tuple[int, ...]:
        return 1, self.out_channels, self.geometry.out_h, self.geometry.out_w

    @property
    def weight(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, self.kernel, self.kernel

    def pack(self, parts: formats.Parts, name: str, isa: str) -> native.Layer:
        """The layer with the weight, given as CSR arrays, in the format of that name."""
        return native.conv2d(self.geometry, parts, format=name, isa=isa)

    def nodes(self) -> list[Any]:
        """The same in ONNX, from x, w and b to y."""
        sizes = {"strides": [self.stride] * 2, "pads": [self.pad] * 4, "dilations": [self.dilation] * 2}
        return [helper.make_node("Conv", ["x", "w", "b"], ["z"], **sizes), helper.make_node("Relu", ["z"], ["y"])]


@dataclass(frozen=True)
class Gemm:
    """A matrix product: `batch` tokens of `cols` numbers to `rows` each, and a bias."""

    rows: int
    cols: int
    batch: int

    op = "gemm"
    packed = operators.PACKED
    minimum = -inf

    @property
    def name(self) -> str:
        return f"{self.op}-{self.rows}x{self.cols}-b{self.batch}"

    @property
    def x(self) -> tuple[int, ...]:
        return self.batch, self.cols

    @property
    def y(self) -> tuple[int, ...]:
        return self.batch, self.rows

    @property
    def weight(self) -> tuple[int, ...]:
        return self.rows, self.cols

    def pack(self, parts: formats.Parts, name: str, isa: str) -> native.Layer:
        """The layer with the weight, given as CSR arrays, in the format of that name."""
        return native.gemm(self.rows, self.cols, parts, format=name, isa=isa)

    def nodes(self) -> list[Any]:
        """The same in ONNX, from x, w and b to y."""
        return [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]


Shape: TypeAlias = Conv | Gemm


@dataclass(frozen=True)
class Entry:
    """A row of the table: a shape, whether it is "stem", "body" or "head", and its occurrences by network."""

    shape: Shape
    part: str
    counts: dict[str, int]


def read(path: Path = TABLE) -> list[Entry]:
    """The table of layer shapes."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    kinds: dict[str, type[Conv] | type[Gemm]] = {kind.op: kind for kind in (Conv, Gemm)}
    return [
        Entry(kind(**{f.name: int(line[f.name]) for f in fields(kind)}), line["part"], {n: int(line[n]) for n in NETWORKS if line[n]})
        for line in lines
        for kind in (kinds[line["op"]],)
    ]


def write(path: Path = TABLE) -> None:
    """Walk the networks and write the table."""
    found = {name: list(walk(name, image)) for name, image in VISION.items()}
    found["bert_base"] = [("body", Gemm(*sizes, 128)) for sizes in ((768, 768),) * 4 + ((3072, 768), (768, 3072)) for _ in range(12)]
    counts = {name: Counter(layers) for name, layers in found.items()}
    columns = ["op", "part", *(f.name for kind in (Conv, Gemm) for f in fields(kind)), *NETWORKS]
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(HEAD)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for part, shape in dict.fromkeys(layer for layers in found.values() for layer in layers):
            numbers = {name: counts[name][part, shape] or "" for name in NETWORKS}
            writer.writerow({"op": shape.op, "part": part, **asdict(shape), **numbers})


def walk(name: str, image: int) -> Iterator[tuple[str, Shape]]:
    """(part, shape) of torchvision's network in the order of execution; nothing is computed."""
    import torch
    from torch import nn
    from torchvision import models as zoo

    found: list[Shape] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        size = tuple(inputs[0].shape)
        if isinstance(layer, nn.MultiheadAttention):  # its projections are functions, not modules
            found.extend(Gemm(rows, layer.embed_dim, prod(size[:-1])) for rows in (3 * layer.embed_dim, layer.embed_dim))
        elif isinstance(layer, nn.Linear):
            found.append(Gemm(layer.out_features, layer.in_features, prod(size[:-1])))
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            sides = [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
            if any(a != b for a, b in sides):
                raise DataError(f"{name}: expected square convolutions, got {layer}")
            _, channels, height, width = size
            found.append(Conv(channels, height, width, layer.out_channels, *(a for a, _ in sides)))

    backbone = {"weights_backbone": None} if name.startswith("deeplab") else {}
    with torch.device("meta"), torch.no_grad():
        module = zoo.get_model(name, weights=None, **backbone).eval()
        for layer in module.modules():
            layer.register_forward_hook(note)
        module(torch.empty(1, 3, image, image))
    last = len(found) - 1
    return ((("stem" if i == 0 else "head" if i == last else "body"), shape) for i, shape in enumerate(found))
