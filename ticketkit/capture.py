"""nn.Module, a checkpoint or a Ticket to ONNX: evaluation mode, free batch, dense weights with exact zeros, parameter names kept."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torchvision import models as zoo

from ticketkit import models
from ticketkit.errors import ModelError, TicketError, first_line
from ticketkit.quiet import quiet
from ticketkit.ticket import Ticket, split_pruned

Array: TypeAlias = NDArray[Any]
Examples: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
OPSETS = range(18, 21)  # what torch's exporter writes itself; older ones it converts to, often in vain
SIDE, CLASSES = 224, 1000  # of torchvision's networks


@dataclass(frozen=True, eq=False)
class Captured:
    """A module's inference graph.

    Attributes:
        model: as ONNX.
        run: the same in torch, arrays by input name -> arrays by output name; to compare with.
    """

    model: ModelProto
    run: Callable[[Mapping[str, Array]], dict[str, Array]]


def capture(module: nn.Module, input_shape: Sequence[int], opset: int = 18) -> ModelProto:
    """The inference graph of a module that takes images [N, *input_shape], as ONNX; see `trace`."""
    return trace_images(module, input_shape, opset).model


def trace_images(module: nn.Module, input_shape: Sequence[int], opset: int = 18) -> Captured:
    """The inference graph of a module that takes one float32 tensor [N, *input_shape]; see `trace`."""
    return trace(module, torch.zeros(1, *input_shape), opset)


def trace(module: nn.Module, example_inputs: Examples, opset: int = 18) -> Captured:
    """The inference graph of a module.

    Args:
        module: any; left as it was, masks, training mode, device and all (see `bake`).
        example_inputs: what it takes: a tensor, several in a sequence (by position) or in a mapping (by keyword). Axis 0 becomes free, one
            "batch" for all tensors where it is as long as that of the first, if the module can be traced so; else sizes are fixed.
        opset: 18 to 20.

    Returns:
        A model with the inputs "input", "input_1", ... or those of the mapping, and the outputs "output", "output_1", ...; initializers
        carry the module's parameter names; BatchNorm is folded by the exporter's optimizer.

    Raises:
        ModelError: unsupported opset, weights with NaN or infinity or without values, inputs the module does not take, or a module that
            cannot be copied, or traced by torch.export.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset}: expected {OPSETS.start} to {OPSETS.stop - 1}; choose one of these")
    frozen = bake(module)
    for name, tensor in frozen.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or infinity; the network is broken, train or load it again")
    examples = _Examples.of(example_inputs)
    examples.run(frozen)
    try:
        several = examples.doubled()
        several.run(frozen)
        model = _export(frozen, several, several.free(frozen), opset)
    except ModelError:  # it is made for just this batch, or cannot be traced at all
        model = _export(frozen, examples, None, opset)
    names = [info.name for info in model.graph.input], [info.name for info in model.graph.output]
    return Captured(model, lambda feeds: examples.like(feeds, names[0]).outputs(frozen, names[1]))


def bake(module: nn.Module) -> nn.Module:
    """A copy of the module, on the CPU and in evaluation mode, whose weights are plain parameters with exact zeros.

    Masks of torch.nn.utils.prune and parametrizations are multiplied in, their hooks and `_orig` parameters gone; wrappers of DataParallel
    and torch.compile are taken off. `torch.save(bake(module).state_dict(), path)` is the dense state dict with exact zeros.

    Raises:
        ModelError: it cannot be copied, or is on the meta device.
    """
    while (inner := _wrapped(module)) is not None:
        module = inner
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError("the module is on the meta device, where weights have no values; load them first")
    computed = (t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf)
    try:  # deepcopy refuses what autograd computed, such as the weights that torch.nn.utils.prune multiplies with their masks
        baked = copy.deepcopy(module, {id(t): t.detach().clone() for t in computed}).cpu().eval()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the module cannot be copied: {first_line(error)}") from None
    with torch.no_grad():
        for part in list(baked.modules()):
            for name in [h._tensor_name for h in part._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]:
                setattr(part, f"{name}_orig", _plain(getattr(part, f"{name}_orig")))  # other layers may share the old one
                prune.remove(part, name)
            if parametrize.is_parametrized(part):
                weights = {name: _plain(getattr(part, name)) for name in part.parametrizations}
                part.__class__ = type(part).__bases__[0]  # copies share the class that makes them parametrized: it must stay whole
                del part.parametrizations
                for name, weight in weights.items():
                    part.register_parameter(name, weight)
    return baked


def restore(path: str | os.PathLike[str], name: str, classes: int | None = None, image_size: int | None = None) -> nn.Module:
    """The network of that name with the weights of a checkpoint.

    Args:
        path: safetensors, or a torch file read with `weights_only=True`; see `ticketkit.models.load_checkpoint`. Masks of
            torch.nn.utils.prune (NAME_orig, NAME_mask) are multiplied in.
        name: one of `ticketkit.models.names()`, or a classification network of torchvision.
        classes: width of the head; None: that of the checkpoint.
        image_size: as `ticketkit.models.build` takes it.

    Raises:
        ModelError: an unknown network, or a checkpoint that is not wholly and exactly of it (the tensor is named).
    """
    state = models.load_checkpoint(path)
    try:
        plain, _ = split_pruned(state)
        if classes is None:
            with torch.device("meta"):
                last = list(_build(name, CLASSES, image_size).state_dict())[-1]  # of the head, which comes last in all of them
            classes = len(plain[last]) if last in plain and plain[last].ndim else CLASSES
        module = _build(name, classes, image_size)
        left_out = models.fit(module, state, (), ())
    except (ModelError, TicketError) as error:
        raise ModelError(f"{path}: {error}") from None
    if left_out:
        raise ModelError(f"{path}: {left_out[0]}; not of {name}, remove them or name another --model")
    return module.eval()


def image_shape(name: str) -> tuple[int, int, int]:
    """[C, H, W] of the images that a network was published for; torchvision's where it is not ours."""
    side = models.family(name).SIDE if name in models.names() else SIDE
    return 3, side, side


def capture_ticket(ticket: Ticket, input_shape: Sequence[int] | None = None) -> ModelProto:
    """The ticket's model with its rewind weights under the masks, as ONNX.

    Args:
        ticket: with weights, and the model's name in its metadata.
        input_shape: [C, H, W]; None: as the ticket states.

    Raises:
        TicketError: the ticket lacks weights, model, image size, or anything to tell the number of classes from.
        ModelError: the weights do not fit the model.
    """
    weights = ticket.merge()
    shape = input_shape or ticket.meta.get("input_shape")
    classes = ticket.meta.get("num_classes") or next((len(weights[w]) for w in _heads(ticket) if w in weights), None)
    if "model" not in ticket.meta or classes is None:
        raise TicketError("the ticket does not name its model and head; export the run directory instead")
    if shape is None:
        raise TicketError("the ticket does not state its input shape; give it (--input-shape 3,32,32)")
    module = models.build_for(ticket.meta["model"], weights, classes, shape[-2])
    models.assign(module, weights)
    return capture(module, shape)


def _build(name: str, classes: int, image_size: int | None) -> nn.Module:
    """A network by name, without touching torch's global generator."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two families announce that their initialisation will change
        if name in models.names():
            return models.build(name, classes, image_size)
        known = zoo.list_models(module=zoo)
        if name not in known:
            raise ModelError(f"unknown model {name!r}; expected one of {', '.join(dict.fromkeys([*models.names(), *known]))}")
        module: nn.Module = zoo.get_model(name, weights=None, num_classes=classes)
        return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds: DataParallel, or torch.compile; None for any other module."""
    inner = module.module if isinstance(module, nn.DataParallel | DistributedDataParallel) else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def _plain(weight: Tensor) -> nn.Parameter:
    """A parameter of its own with these values."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


@dataclass(frozen=True)
class _Examples:
    """Inputs of a module: by position, or by keyword."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @classmethod
    def of(cls, given: Examples) -> _Examples:
        args = (given,) if isinstance(given, Tensor) else () if isinstance(given, Mapping) else tuple(given)
        kwargs = dict(given) if isinstance(given, Mapping) else {}
        for tensor in (*args, *kwargs.values()):
            if not isinstance(tensor, Tensor):
                raise ModelError(f"example inputs: expected a tensor, or a sequence or mapping of them, got a {type(tensor).__name__}")
        if not args and not kwargs:
            raise ModelError("example inputs: expected at least one tensor, got none")
        return cls(tuple(t.detach().cpu() for t in args), {name: t.detach().cpu() for name, t in kwargs.items()})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.args, *self.kwargs.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> _Examples:
        return _Examples(tuple(map(function, self.args)), {name: function(t) for name, t in self.kwargs.items()})

    def batched(self, tensor: Tensor) -> bool:
        """Whether axis 0 of a tensor is the batch."""
        first = self.tensors[0]
        return bool(tensor.dim() and first.dim() and len(tensor) == len(first))

    def doubled(self) -> _Examples:
        """With a batch of two or more: torch.export takes the sizes 0 and 1 for constants."""
        first = self.tensors[0]
        if not first.dim() or len(first) > 1:
            return self
        return self.map(lambda t: torch.cat([t, t]) if self.batched(t) else t)

    def free(self, module: nn.Module) -> dict[str, Any] | None:
        """The free axes by parameter of `forward`, as torch.export wants them; None where there is no batch."""
        if not self.tensors[0].dim():
            return None
        batch = torch.export.Dim("batch")
        axes = [{0: batch} if self.batched(t) else None for t in self.tensors]
        args, kwargs = axes[: len(self.args)], dict(zip(self.kwargs, axes[len(self.args) :], strict=True))
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def like(self, feeds: Mapping[str, Array], names: Sequence[str]) -> _Examples:
        """The same inputs with these values; `names` are those of the tensors, in order, unless they come by keyword."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        return _Examples((), tensors) if self.kwargs else _Examples(tuple(tensors[name] for name in names), {})

    def run(self, module: nn.Module) -> Any:
        """What the module makes of copies of them; ModelError where it does not take them."""
        copies = self.map(torch.clone)
        try:
            with torch.no_grad():
                return module(*copies.args, **copies.kwargs)
        except Exception as error:  # the module is anybody's
            shapes = ", ".join(str(list(t.shape)) for t in self.tensors)
            raise ModelError(f"the network does not take an input of shape {shapes}: {first_line(error)}") from None

    def outputs(self, module: nn.Module, names: Sequence[str]) -> dict[str, Array]:
        """The module's outputs as arrays; ModelError if there are not as many as names."""
        found = list(_tensors(self.run(module)))
        if len(found) != len(names):
            raise ModelError(f"the network returns {len(found)} tensors, its graph {len(names)}; return each tensor once")
        return {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _export(module: nn.Module, examples: _Examples, free: dict[str, Any] | None, opset: int) -> ModelProto:
    """The module as ONNX, with the names of `trace`; ModelError if it cannot be traced."""
    names = ["input" if i == 0 else f"input_{i}" for i in range(len(examples.args))]
    try:
        with quiet():
            program = torch.onnx.export(
                module, examples.args, kwargs=examples.kwargs or None, dynamo=True, verbose=False, opset_version=opset,
                input_names=names or None, dynamic_shapes=free,
            )  # fmt: skip
        assert program is not None  # dynamo=True always returns one
        return _tidy(program.model_proto)
    except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise ModelError(f"torch.export cannot trace the network: {cause[0] if cause else 'unknown cause'}") from None


def _heads(ticket: Ticket) -> list[str]:
    return [f"{head}.weight" for head in ticket.meta.get("head", [])]


def _tidy(model: ModelProto) -> ModelProto:
    """Plain output names, and none of the stack traces of this machine that torch writes into its metadata."""
    outputs = {info.name: "output" if i == 0 else f"output_{i}" for i, info in enumerate(model.graph.output)}
    for node in model.graph.node:
        node.output[:] = [outputs.get(name, name) for name in node.output]
        node.input[:] = [outputs.get(name, name) for name in node.input]
    for info in model.graph.output:
        info.name = outputs[info.name]
    for message in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del message.metadata_props[:]
        message.ClearField("doc_string")
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model
