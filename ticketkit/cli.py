"""The command line: each command parses its words, makes one call and prints. Nothing else lives here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ticketkit import __version__
from ticketkit.errors import TicketkitError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

TARGETS = sorted(file.stem.replace("_", "-") for file in (Path(__file__).parent / "exporters").glob("[!_]*.py"))
DISTRIBUTIONS = ["global", "uniform", "erk"]


def _numbers(text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {text!r}") from None


def _shape(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | None:
    return _numbers(text, int)


def _floats(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | None:
    return _numbers(text, float)


def _fractions(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> list[Any]:
    return [number for text in texts for number in _numbers(text, float) or []]


def _levels(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | str | None:
    return text if text == "all" else _numbers(text, int)


def _training(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that trains."""
    options = (
        click.option("--epochs", type=int, metavar="N", help="Epochs of each training.  [default: the task's]"),
        click.option("--steps", type=int, metavar="N", help="Instead of --epochs: optimizer steps of each training."),
        click.option("--batch-size", type=int, metavar="N", help="Images per step.  [default: the task's]"),
        click.option("--lr", type=float, help="Learning rate of SGD at the start of a training.  [default: the task's]"),
        click.option("--schedule", metavar="NAME", help="Of the learning rate: multistep, cosine or constant.  [default: the task's]"),
        click.option("--weight-decay", type=float, help="L2 penalty.  [default: the task's]"),
        click.option("--data", type=click.Path(), metavar="DIR", envvar="TICKETKIT_DATA", show_envvar=True,
                     help="Folder that holds the task's images, in the layout torchvision downloads."),
        click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: torch's choice]"),
        click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="At most this much is lost by a crash."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="ticketkit")
def cli() -> None:
    """Find lottery tickets in pretrained vision models, export them, and run them faster than dense.

    \b
    ticketkit quickstart                          the whole line on embedded data, one honest table
    ticketkit find digits --out runs/digits       a ticket by iterative magnitude pruning
    ticketkit verify runs/digits --seeds 3        does it match the dense network, over three seeds?
    ticketkit export runs/digits -o digits.onnx   one small ONNX file that runs everywhere
    ticketkit bench digits.onnx                   sparse against the fastest dense engine
    """


@cli.command()
@click.argument("task")
@click.option("--model", metavar="NAME", help="Network, e.g. resnet20 or resnet50.  [default: the task's]")
@click.option("--weights", metavar="W", help="Pretrained weights: a checkpoint file (safetensors or torch), a torchvision name"
              " such as IMAGENET1K_V1, or random.  [default: random; IMAGENET1K_V1 for torchvision's networks]")
@click.option("--rounds", type=int, metavar="N", help="Pruning rounds after the dense reference, round 0.  [default: 3]")
@click.option("--sparsity", type=float, metavar="S", help="Instead of --rounds: prune until this fraction, e.g. 0.9.")
@click.option("--rate", type=float, default=0.2, show_default=True, help="Fraction of the remaining weights pruned each round.")
@click.option("--granularity", default="1x1", show_default=True, metavar="RxC",
              help="Prune whole blocks of R output channels by C weights, e.g. 4x1, 16x1 or 1x16; 1x1 is single weights.")
@_training
@click.option("--seed", type=int, default=0, show_default=True, help="Of initialisation, data order and augmentation.")
@click.option("--rewind", default="pretrained", show_default=True, metavar="POINT",
              help="Weights each round restarts from: pretrained, init (random) or early (after 5% of the dense training).")
@click.option("--out", type=click.Path(), metavar="RUN_DIR", help="Where rounds are written.  [default: runs/TASK-MODEL-seedN]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line a round in place of the table.")
def find(task: str, as_json: bool, **options: Any) -> None:
    """Find lottery tickets on TASK: train, prune the smallest weights, rewind, repeat.

    Round 0 trains the dense network for reference. Each further round prunes 20% of the remaining weights, those of
    smallest magnitude over all layers together, puts the others back to where they started, and trains again: iterative
    magnitude pruning. The first convolution, the head, norms and biases are never pruned. The same command again goes on
    where it was stopped, even by kill -9.

    \b
    TASK is one of   digits (needs no data), cifar10, cifar100, fashion-mnist, image-folder
    ticketkit find digits
    ticketkit find cifar10 --data DIR --weights resnet20.th --epochs 2 --lr 0.01 --sparsity 0.9
    """
    # Read when torch is first loaded: threads that wait sleep and do not spin, twice as fast where others use the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ticketkit.search.imp import find as search
    from ticketkit.search.progress import choose, table

    result = search(task, **options, progress=choose())
    if as_json:
        for row in result.rows:
            click.echo(json.dumps(row))
    else:
        table(result.rows, result.path)


@cli.command()
@click.argument("ticket", metavar="RUN_DIR|TICKET")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="To train on; repeat it.  [default: where the ticket was found]")
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="Runs of each training, with seeds 0 to N-1.")
@click.option("--levels", metavar="K,K|all", callback=_levels, help="Rounds of the run directory, or all.  [default: the last]")
@click.option("--control", "controls", multiple=True, metavar="C", help="Train a control beside each level, see above; repeat it.")
@click.option("--mode", default="full", show_default=True, metavar="M",
              help="full: everything trains; linear: the head alone, the rest is frozen.")
@click.option("--select", default="last", show_default=True, metavar="W",
              help="Weights that are measured: the last, or those of the epoch best on validation images (best).")
@click.option("--start", default="rewound", show_default=True, metavar="W",
              help="Weights of the ticket: rewound, or the sparse-trained ones of its round (trained).")
@click.option("--dense-weights", type=click.Path(), metavar="FILE", help="Pretrained weights, where the ticket was rewound to others.")
@_training
@click.option("--out", type=click.Path(), default="runs/verify", show_default=True, metavar="DIR",
              help="Store of all trainings; calls and processes may share it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def verify(ticket: str, as_json: bool, **options: Any) -> None:
    """Does the ticket match the dense network? Train both alike, over several seeds, on one or more tasks.

    TICKET is a ticket file with weights or the run directory of `ticketkit find`. Every training starts with a new head.
    Trainings are kept by content: the same command goes on where it was stopped, even by kill -9, and other calls reuse
    what they share. What is chosen is chosen on validation images; test images are measured once a training.

    \b
    matching    strict: mean accuracy at least the dense one; one sd: at least that less one standard deviation
    winning     matching, from the pretrained weights
    universal   matching on every task

    \b
    --control random      as many weights, chosen uniformly over all layers
    --control shuffled    as many weights in each layer, at other places
    --control complement  the weights that the ticket prunes
    --control perturb=P   the fraction P of the ones, and as many zeros, flipped
    --control reinit      the ticket's mask on random weights

    \b
    ticketkit verify runs/digits
    ticketkit verify runs/c10 --task cifar10 --task fashion-mnist --levels all --control random --data DIR
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in find
    from ticketkit.search.progress import choose
    from ticketkit.verifier import table
    from ticketkit.verifier import verify as compare

    report = compare(ticket, **options, progress=choose())
    click.echo(json.dumps(report.to_dict())) if as_json else table.show(report)


@cli.command()
@click.argument("model")
@click.option("-e", "--engine", "names", multiple=True, help="An engine to time; repeat it. Default: all usable ones.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every engine.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Samples per run.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="Alternating rounds.")
@click.option("--seconds", default=0.5, show_default=True, type=click.FloatRange(0), help="Timed seconds per engine and round.")
@click.option("--timeout", default=300.0, show_default=True, type=float, help="Seconds until an engine is given up.")
@click.option("--json", "json_to", metavar="FILE|-", help="Append the rows as JSON lines to FILE, or print them (-).")
def bench(
    model: str, names: tuple[str, ...], threads: int, batch: int, rounds: int, seconds: float, timeout: float, json_to: str | None
) -> None:
    """Time MODEL (.onnx) on several engines, in alternating rounds, against the fastest dense one."""
    from ticketkit.bench import engines, table, timing

    chosen, unusable = (engines.require(names), {}) if names else engines.usable()
    table.check_writable(json_to)
    with table.progress("bench") as progress:
        report = timing.measure(Path(model), chosen, threads, batch, timing.Protocol(rounds, seconds, timeout=timeout), progress)
    table.conclude(report, json_to, unusable, required=names or ("ticketkit",))


@cli.command()
@click.option("--out", default="runs/quickstart", show_default=True, metavar="DIR", help="Where everything made is kept.")
def quickstart(out: str) -> None:
    """Find a ticket on embedded data, export, run and bench it, and a ResNet-50 too: under four minutes on two cores."""
    from rich.console import Console

    from ticketkit import quickstart

    quickstart.quickstart(Path(out), quickstart.Budget(), Console())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Show CPU, instruction sets, versions, and which engines work here; fails only if the native library cannot be loaded."""
    import json

    from rich.console import Console

    from ticketkit import doctor

    found = doctor.examine()
    Console().print_json(json.dumps(found)) if as_json else Console().print(doctor.render(found))
    sys.exit(1 if found["library"]["error"] else 0)


@cli.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write; an old one stays until the new one is checked.")
@click.option("--format", "target", type=click.Choice(TARGETS), default="onnx", show_default=True, help="What to write, see above.")
@click.option("--values", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
              help="How weights are stored (formats onnx, onnx-dense): fp16 rounds them, and they are computed in float32.")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_shape, help="Of one image, where SRC leaves it open.")
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


@cli.command()
@click.argument("model")
@click.option("-i", "--input", "files", multiple=True, metavar="[NAME=]FILE",
              help="A .npy array or an image; repeat it for a batch or for more inputs.  [default: random numbers]")
@click.option("-o", "--output", type=click.Path(), help="Write all outputs to this .npz file.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: one per core]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Of random inputs.")
@click.option("--resize", type=click.IntRange(1), metavar="PX", help="Shorter side of images before the centre crop.  [default: 8/7 of it]")
@click.option("--mean", metavar="R,G,B", callback=_floats, help="Of pixels in [0, 1].  [default: the model's, else ImageNet's]")
@click.option("--std", metavar="R,G,B", callback=_floats, help="Of pixels in [0, 1].  [default: the model's, else ImageNet's]")
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


@cli.command()
@click.argument("source", metavar="MODEL|RUN")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_shape, help="Image the FLOPs are for, where MODEL leaves it open.")
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


@cli.command()
@click.argument("source", metavar="MODEL|RUN|NAME")
@click.option("--sparsity", required=True, multiple=True, metavar="S[,S...]", callback=_fractions,
              help="Fractions of the prunable weights, e.g. 0.9 or 0.5,0.7,0.9; repeat it or separate them by commas.")
@click.option("--distribution", type=click.Choice(DISTRIBUTIONS), default="global", show_default=True, help="Of the zeros, see above.")
@click.option("--granularity", default="1x1", show_default=True, metavar="RxC",
              help="Zeros in whole blocks of R output channels by C weights, e.g. 4x1; 1x1 is single weights.")
@click.option("--round", type=int, metavar="K", help="Round of a run directory.  [default: the last finished one]")
@click.option("--input-shape", metavar="C,H,W", callback=_shape, help="Of one image, where MODEL leaves it open.  [torchvision: 3,224,224]")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Images of one run.  [default: the model's, else 1]")
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
    """
    from rich.console import Console

    from ticketkit import estimator

    found = estimator.estimate(source, sparsity, **options)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(estimator.render(found, layers))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure is one line on stderr and an exit code other than 0."""
    try:
        sys.exit(cli.main(args=None if argv is None else list(argv), prog_name="ticketkit", standalone_mode=False))
    except click.exceptions.Abort:
        _stop("interrupted; what was finished is kept", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TicketkitError as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; what was finished is kept", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ticketkit":
            raise
        _stop(f"{error.name} is needed for this and not installed: pip install 'ticketkit[find]' (search, runs, images) or [bench]", 1)
    except MemoryError:
        _stop("out of memory; use a smaller batch or model", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}", 1)


def _stop(message: str, code: int) -> None:
    click.echo(f"ticketkit: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
