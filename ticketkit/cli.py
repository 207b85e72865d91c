"""The command line: each command parses its words, makes one call and prints. Nothing else lives here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ticketkit import __version__
from ticketkit.errors import TicketkitError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="ticketkit")
def cli() -> None:
    """Find lottery tickets in pretrained vision models, export them, and run them faster than dense.

    \b
    ticketkit quickstart                          the whole line on embedded data, one honest table
    ticketkit find digits --out runs/digits       a ticket by iterative magnitude pruning
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
@click.option("--epochs", type=int, metavar="N", help="Epochs of training in each round.  [default: the task's]")
@click.option("--steps", type=int, metavar="N", help="Instead of --epochs: optimizer steps in each round.")
@click.option("--batch-size", type=int, metavar="N", help="Images per step.  [default: the task's]")
@click.option("--lr", type=float, help="Learning rate of SGD at the start of a round.  [default: the task's]")
@click.option("--schedule", metavar="NAME", help="Of the learning rate: multistep, cosine or constant.  [default: the task's]")
@click.option("--weight-decay", type=float, help="L2 penalty.  [default: the task's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of initialisation, data order and augmentation.")
@click.option("--rewind", default="pretrained", show_default=True, metavar="POINT",
              help="Weights each round restarts from: pretrained, init (random) or early (after 5% of the dense training).")
@click.option("--data", type=click.Path(), metavar="DIR", envvar="TICKETKIT_DATA", show_envvar=True,
              help="Folder that holds the task's images, in the layout torchvision downloads.")
@click.option("--out", type=click.Path(), metavar="RUN_DIR", help="Where rounds are written.  [default: runs/TASK-MODEL-seedN]")
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: torch's choice]")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="At most this much is lost by a crash.")
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
    from ticketkit.search.imp import find as search
    from ticketkit.search.progress import choose, table

    result = search(task, **options, progress=choose())
    if as_json:
        for row in result.rows:
            click.echo(json.dumps(row))
    else:
        table(result.rows, result.path)


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
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Show CPU, instruction sets, versions, and which engines work here; fails only if the native library cannot be loaded."""
    import json

    from rich.console import Console

    from ticketkit import doctor

    found = doctor.examine()
    Console().print_json(json.dumps(found)) if as_json else Console().print(doctor.render(found))
    sys.exit(1 if found["library"]["error"] else 0)


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
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}", 1)


def _stop(message: str, code: int) -> None:
    click.echo(f"ticketkit: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
