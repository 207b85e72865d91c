"""In which order the floats of the tensors between sparse convolutions lie, so that pointwise ones read them in place.

A pointwise convolution (1x1, stride 1) reads its input tile by tile of pixels, all channels of a tile. In C order these are pieces far
apart that the kernels gather first; kept in tiles by whoever writes the tensor, nothing is left to gather (kernels/README.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from ticketkit.lower.fuse import Fused
from ticketkit.lower.graph import Graph
from ticketkit.lower.operators import TILES, Execution

IN_PIECES = -4.0  # gained by a layout in tiles of another width than its writer's, in gatherings of every element


def layouts(graph: Graph, fused: Sequence[Fused], chosen: Mapping[str, Execution]) -> dict[str, Execution]:
    """The executions of the fused layers by name, with the layouts that save most.

    Args:
        graph: where the layers are.
        fused: the layers that become nodes of ours, each with what it absorbs.
        chosen: layer name -> how it runs.

    A tensor can be in tiles only if nodes of ours alone write and read it. A node has its residual in the order of its output, so all
    tensors of a chain of residual blocks share one.
    """
    convolutions = [f for f in fused if f.layer.op == "Conv" and f.layer.group == 1 and not f.layer.sequence]
    chains, gains = _Chains(), defaultdict[str, Counter[str]](Counter)
    for f in convolutions:
        if f.epilogue.residual:
            chains.join(f.output, f.epilogue.residual)
    for f in convolutions:
        format = chosen[f.layer.name].format
        gains[chains.of(f.layer.x)].update(_gains(f, format))
        gains[chains.of(f.output)].update({layout: IN_PIECES for layout in TILES if layout != format})
    read = Counter(name for f in convolutions for name in (f.layer.x, f.epilogue.residual) if name)
    inside = {f.output for f in convolutions if len(graph.consumers.get(f.output, ())) == read[f.output]}
    fixed = {chains.of(name) for name in read.keys() | {f.output for f in convolutions} if name not in inside}

    def layout(name: str) -> str:
        chain = chains.of(name)
        best, gain = max(gains[chain].items(), key=lambda item: item[1], default=("", 0.0))
        return best if gain > 0 and chain not in fixed else "planes"

    found = {f.layer.name: chosen[f.layer.name] for f in fused}
    for f in convolutions:
        found[f.layer.name] = replace(found[f.layer.name], x_layout=layout(f.layer.x), y_layout=layout(f.output))
    return found


def _gains(f: Fused, format: str) -> dict[str, float]:
    """What a reader gains from each layout of its input; 1 is gathering every element once."""
    if f.layer.pointwise:
        return {layout: 1.0 if layout == format else -0.25 for layout in TILES}
    gathered = f.layer.weight.shape[3] / prod(f.layer.window["strides"])
    return dict.fromkeys(TILES, -gathered)  # gathered from tiles in about twice the time


class _Chains:
    """Sets of tensors that must share a layout (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The tensor that stands for the set."""
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, a: str, b: str) -> None:
        self._parent[self.of(a)] = self.of(b)
