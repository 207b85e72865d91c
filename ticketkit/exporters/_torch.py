"""What the torch targets share: an ONNX graph as a torch module with named tensors, and that as a program of torch.export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ticketkit.errors import ExportError, first_line
from ticketkit.quiet import quiet
from ticketkit.runtime.torch_graph import Program

if TYPE_CHECKING:
    import torch


def require_torch(target: str) -> None:
    """ExportError where torch is not installed."""
    if find_spec("torch") is None:
        raise ExportError(f"--format {target} needs torch; pip install 'ticketkit[find]'")


def as_module(program: Program) -> tuple[torch.nn.Module, dict[str, str]]:
    """A module that runs the program, graph inputs in order -> tuple of outputs, with its constants as buffers.

    Returns:
        The module, and for each constant the name of its buffer: its own, but for signs and clashes that attributes cannot have.
    """
    import torch

    class Rebuilt(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return program.run({name: getattr(owner, leaf) for name, (owner, leaf) in homes.items()}, inputs)

    module = Rebuilt().eval()
    homes: dict[str, tuple[torch.nn.Module, str]] = {}
    names: dict[str, str] = {}
    for name, array in program.constants.items():
        owner, path = module, list[str]()
        *folders, leaf = (re.sub(r"\W", "_", part) or "_" for part in name.split("."))
        for folder in folders:
            path.append(_unused(folder, set(dir(owner)) - dict(owner.named_children()).keys()))
            if not hasattr(owner, path[-1]):
                owner.add_module(path[-1], torch.nn.Module())
            owner = owner.get_submodule(path[-1])
        path.append(_unused(leaf, set(dir(owner))))
        owner.register_buffer(path[-1], torch.from_numpy(array.copy()))
        homes[name], names[name] = (owner, path[-1]), ".".join(path)
    return module, names


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def trace(module: torch.nn.Module, examples: Sequence[torch.Tensor], free: Sequence[dict[int, Any]]) -> torch.export.ExportedProgram:
    """The module as a program of torch.export.

    Args:
        module: from `as_module`.
        examples: one tensor for each input.
        free: for each input, the `torch.export.Dim` of its axes of no fixed size.

    Raises:
        ExportError: torch cannot trace it.
    """
    import torch

    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, tuple(examples), dynamic_shapes={"inputs": tuple(free)})
    except Exception as error:  # whatever torch's passes raise
        raise ExportError(f"torch.export cannot trace the network: {first_line(error)}; try another --format") from None
