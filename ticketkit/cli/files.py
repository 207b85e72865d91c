"""Commands on models and files: export, inspect, estimate, run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ticketkit.cli import _options

TARGETS = sorted(file.stem.replace("_", "-") for file in (Path(__file__).parents[1] / "exporters").glob("[!_]*.py"))
CORES = sorted(file.stem for file in (Path(__file__).parents[1] / "cores").glob("*.json"))
DISTRIBUTIONS = ["global", "uniform", "erk"]


@click.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write; an old one stays until the new one is checked.")
@click.option("--format", "target", type=click.Choice(TARGETS), default="onnx", show_default=True, help="What to write, see above.")
@click.option("--values", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
              help="How weights are stored (formats onnx, onnx-dense): fp16 rounds them, and they are computed in float32.")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_options.shape, help="Of one image, where SRC leaves it open.")
@click.option("--model", metavar="NAME", help="Network of a checkpoint: resnet20, resnet50 or any other classifier of torchvision.")
@click.option("--classes", type=click.IntRange(1), metavar="N", help="Of a checkpoint.  [default: what its head holds]")
@click.option("--no-check", is_flag=True, help="Do not compare with the original on random inputs.")
@click.option("--tune", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="At most so long, search how to cut up each sparse layer, then measure the whole against dense (format onnx).")
@click.option("--no-tune", is_flag=True, help="Neither search nor measure: the file then depends on SRC alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, with the plan of every layer, as JSON.")
def export(
    source: str, output: str, target: str, values: str, round: int | None, input_shape: list[int] | None, model: str | None,
    classes: int | None, no_check: bool, tune: float, no_tune: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write SRC as one file, checked against the original.

    SRC is a run directory of `ticketkit find`, a ticket file with weights, any pruned .onnx file (dense weights with
    exact zeros, from whatever tool), or, with --model, a checkpoint: a state dict of torch or safetensors with zeros or
    masks of torch.nn.utils.prune.

    \b
    onnx        small and fast: sparse layers become ai.ticketkit nodes. Runs in any onnxruntime; skips the zeros
                where ticketkit's library is registered (ticketkit.InferenceSession does it)
    onnx-dense  plain ONNX for any runtime, BatchNorm folded, pruned weights exactly zero
    onnx-sparse-initializer
                standard ONNX sparse tensors. Runtimes make them dense at load (onnxruntime too): small in the file,
                not faster
    csr         the weights alone: values, column indices and row pointers per layer, in safetensors
    bsr         the same in blocks, those the zeros are pruned in: values of a block share an index
    torch       a program of torch.export (.pt2) with the sparse layers as operators of ticketkit, for torch on processors
    executorch  a program of ExecuTorch (.pte) for phones, dense, on XNNPACK
    """
    from rich.console import Console

    from ticketkit.exporters import export as write

    with Console(stderr=True).status("reading") as status:
        report = write(
            source, output, format=target, values=values, round=round, input_shape=input_shape, model=model, classes=classes,
            check=not no_check, tune=0.0 if no_tune else tune, progress=lambda layer: status.update(f"tuning {layer}"),
        )  # fmt: skip
    click.echo(json.dumps(report.to_dict()) if as_json else str(report))


@click.command()
@click.argument("source", metavar="MODEL|RUN")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_options.shape, help="Image the FLOPs are for, where MODEL leaves it open.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def inspect(source: str, round: int | None, input_shape: list[int] | None, as_json: bool) -> None:
    """Show each layer of a model, a ticket or a run: shape, sparsity, FLOPs left, format, kernel, and why.

    For a pruned model or a run this is how `export` would treat it; for an exported file, how it is stored.
    """
    from rich.console import Console

    from ticketkit.exporters import examine
    from ticketkit.planner import render

    plan = examine(source, round=round, input_shape=input_shape)
    if as_json:
        click.echo(json.dumps({**plan.to_dict(), **plan.totals()}))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(render(plan))


@click.command()
@click.argument("source", metavar="MODEL|RUN|NAME")
@click.option("--sparsity", required=True, multiple=True, metavar="S[,S...]", callback=_options.fractions,
              help="Fractions of the prunable weights, e.g. 0.9 or 0.5,0.7,0.9; repeat it or separate them by commas.")
@click.option("--distribution", type=click.Choice(DISTRIBUTIONS), default="global", show_default=True, help="Of the zeros, see above.")
@click.option("--granularity", default="1x1", show_default=True, metavar="RxC",
              help="Zeros in whole blocks of R output channels by C weights, e.g. 4x1; 1x1 is single weights.")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_options.shape,
              help="Of one image, where MODEL leaves it open.  [torchvision: 3,224,224]")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Images of one run.  [default: the model's, else 1]")
@click.option("--device", metavar="CORE[@GHZ]", help=f"Simulate one of {', '.join(CORES)}, at another clock than its usual one if given.")
@click.option("--layers", is_flag=True, help="Show every layer at every sparsity, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate, with every layer, as JSON.")
def estimate(source: str, sparsity: list[float], layers: bool, as_json: bool, **options: Any) -> None:
    """Predict how fast MODEL would run at some sparsities, before training it.

    MODEL is an .onnx file; a run directory or a ticket will do, as will the NAME of a network of torchvision.models, such as
    resnet50, with random weights. Nothing is run or timed: the planner's cost model predicts convolutions and matrix
    products on one core. Pruned is every convolution but the first; in a network without others, such as a transformer,
    every layer but the first and the last.

    \b
    global   the smallest weights of all layers together, as `ticketkit find` prunes
    uniform  every layer alike
    erk      Erdos-Renyi-Kernel (Evci et al. 2020): small layers denser

    \b
    ticketkit estimate resnet50 --sparsity 0.7,0.8,0.9 --distribution erk
    ticketkit estimate model.onnx --sparsity 0.9 --granularity 4x1 --layers
    ticketkit estimate mobilenet_v2 --sparsity 0.8,0.9 --distribution uniform --device cortex-a55@1.8

    With --device the times are simulated: computed from what starts in a cycle on that core, its caches and its clock
    (ticketkit/cores), for the kernels as they would run there. Nothing is known of the device beyond that; to measure it,
    use `ticketkit bench`.
    """
    from rich.console import Console

    from ticketkit import estimator

    found = estimator.estimate(source, sparsity, **options)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(estimator.render(found, layers))


@click.command()
@click.argument("model")
@click.option("-i", "--input", "files", multiple=True, metavar="[NAME=]FILE",
              help="A .npy array or an image; repeat it for a batch or for more inputs.  [default: random numbers]")
@click.option("-o", "--output", type=click.Path(), help="Write all outputs to this .npz file.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: one per core]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Of random inputs.")
@click.option("--resize", type=click.IntRange(1), metavar="PX", help="Shorter side of images before the centre crop.  [default: 8/7 of it]")
@click.option("--mean", metavar="R,G,B", callback=_options.floats, help="Of pixels in [0, 1].  [default: the model's, else ImageNet's]")
@click.option("--std", metavar="R,G,B", callback=_options.floats, help="Of pixels in [0, 1].  [default: the model's, else ImageNet's]")
def run(model: str, files: tuple[str, ...], output: str | None, threads: int | None, batch: int, **image: Any) -> None:
    """Run MODEL (.onnx, sparse or plain) once and print what it says.

    Images are resized, cropped to the size of the model's input and normalised; the five likeliest classes are printed.
    For other inputs the shape, range, mean and deviation of every output are.
    """
    from ticketkit import inputs
    from ticketkit.session import InferenceSession

    session = InferenceSession(model, threads=threads)
    rule = inputs.ImageRule.stated(session.get_modelmeta().custom_metadata_map).changed(**image)
    outputs = session.run(None, inputs.gather(files, session.get_inputs(), rule, batch))
    named = dict(zip([info.name for info in session.get_outputs()], outputs, strict=True))
    if output:
        inputs.save(output, named)
    click.echo("\n".join(inputs.describe(named, files, rule)))
