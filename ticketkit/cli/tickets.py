"""Commands that find tickets and look at them: find, verify, compare."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from ticketkit.cli import _options


@click.command()
@click.argument("task")
@click.option("--model", metavar="NAME", help="Network, e.g. resnet20 or resnet50.  [default: the task's]")
@click.option("--weights", metavar="W", help="Pretrained weights: a checkpoint file (safetensors or torch), a torchvision name"
              " such as IMAGENET1K_V1, or random.  [default: random; IMAGENET1K_V1 for torchvision's networks]")
@click.option("--objective", default="supervised", show_default=True, metavar="NAME", help="What is learnt: supervised, simclr or moco.")
@click.option("--temperature", type=float, metavar="T", help="Of simclr and moco.  [default: 0.5, 0.2]")
@click.option("--strength", type=float, metavar="S", help="Of simclr's colour distortion.  [default: 0.5 below 64 pixels, else 1]")
@click.option("--queue", type=int, metavar="N", help="Keys in moco's queue.  [default: 4096]")
@click.option("--key-momentum", type=float, metavar="M", help="Of moco's key encoder.  [default: 0.999]")
@click.option("--method", default="imp", show_default=True, metavar="NAME", help="How it is pruned: imp, oneshot, gmp or acdc, see above.")
@click.option("--rounds", type=int, metavar="N", help="Pruning rounds after the dense reference, round 0.  [default: 3 of imp]")
@click.option("--sparsity", multiple=True, metavar="S[,S...]", callback=_options.fractions,
              help="Instead of --rounds: prune until this fraction, e.g. 0.9; but for imp one round for each.  [default: 0.9 but for imp]")
@click.option("--rate", type=float, default=0.2, show_default=True, help="Fraction of the remaining weights pruned each round.")
@click.option("--granularity", default="1x1", show_default=True, metavar="RxC",
              help="Prune whole blocks of R output channels by C weights, e.g. 4x1, 16x1 or 1x16; 1x1 is single weights.")
@click.option("--rewind", default="pretrained", show_default=True, metavar="POINT", help="Where each round restarts from, see above.")
@_options.training
@click.option("--accumulate", type=int, default=1, show_default=True, metavar="N", help="Parts of a batch, to save memory.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of initialisation, data order and augmentation.")
@click.option("--devices", type=int, default=1, show_default=True, metavar="N", help="Processes on each node, each with its own device.")
@click.option("--nodes", type=int, default=1, show_default=True, metavar="N", help="Of a cluster; torchrun and SLURM are recognised.")
@click.option("--strategy", default="auto", show_default=True, metavar="NAME", help="How several processes train as one: auto or ddp.")
@click.option("--precision", default="32-true", show_default=True, metavar="P", help="32-true or bf16-mixed.")
@click.option("--accelerator", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, or another of Lightning Fabric's.")
@click.option("--compile", is_flag=True, help="Train through torch.compile.")
@click.option("--log", metavar="KIND", help="Write curves to RUN_DIR/logs, too: csv or tensorboard.")
@click.option("--out", type=click.Path(), metavar="RUN_DIR", help="Where rounds are written.  [default: runs/TASK-MODEL-seedN]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line a round in place of the table.")
def find(
    task: str, as_json: bool, sparsity: list[float], devices: int, nodes: int, strategy: str, precision: str, accelerator: str,
    compile: bool, **options: Any,
) -> None:  # fmt: skip
    """Find lottery tickets on TASK: train, prune the smallest weights, rewind, repeat.

    Round 0 trains the dense network for reference. Each further round prunes 20% of the remaining weights, those of
    smallest magnitude over all layers together, puts the others back to where they started, and trains again: iterative
    magnitude pruning. The first convolution, the head, norms and biases are never pruned. The same command again goes on
    where it was stopped, even by kill -9.

    \b
    TASK is one of   digits (needs no data), cifar10, cifar100, svhn, fashion-mnist, visda, image-folder
    --recipe is one of   paper-imagenet, paper-simclr, paper-moco, paper-cifar10, paper-cifar100, paper-svhn,
                         paper-fashion-mnist, paper-visda (Table 1 of Chen et al. 2021)

    \b
    --method imp      iterative magnitude pruning (Chen et al. 2021, Algorithm 1)
    --method oneshot  each level at once from the trained dense network, then rewound and trained
    --method gmp      gradual magnitude pruning in one training (Zhu and Gupta 2017)
    --method acdc     alternating compressed and decompressed phases in one training (Peste et al. 2021)

    \b
    --rewind pretrained  to the given weights           --rewind early  to 5% of the dense training
    --rewind init        to the random initialisation   --rewind lr     the learning rate alone (Renda et al. 2020)

    \b
    ticketkit find digits
    ticketkit find cifar10 --data DIR --weights resnet20.th --epochs 2 --lr 0.01 --sparsity 0.9
    ticketkit find cifar10 --data DIR --weights random --objective simclr --epochs 10
    torchrun --nproc-per-node 4 -m ticketkit.cli find image-folder --data DIR --devices 4 --strategy ddp
    """
    # Read when torch is first loaded: threads that wait sleep and do not spin, twice as fast where others use the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ticketkit.search.find import find as search
    from ticketkit.search.progress import choose, table
    from ticketkit.search.ranks import Machine, first_speaks

    with first_speaks():
        machine = Machine(devices, nodes, strategy, precision, accelerator, compile)
        result = search(task, sparsity=sparsity or None, machine=machine, **options, progress=choose())
    if not result.first:
        return
    if as_json:
        for row in result.rows:
            click.echo(json.dumps(row))
    else:
        table(result.rows, result.path)


@click.command()
@click.argument("ticket", metavar="TICKET|RUN[@K]")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="To train on; repeat it.  [default: where the ticket was found]")
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="Runs of each training, with seeds 0 to N-1.")
@click.option("--levels", metavar="K,K|all", callback=_options.levels, help="Rounds of the run directory, or all.  [default: the last]")
@click.option("--control", "controls", multiple=True, metavar="C", help="Train a control beside each level, see above; repeat it.")
@click.option("--mode", default="full", show_default=True, metavar="M",
              help="full: everything trains; linear: the head alone, the rest is frozen.")
@click.option("--select", default="last", show_default=True, metavar="W",
              help="Weights that are measured: the last, or those of the epoch best on validation images (best).")
@click.option("--start", default="rewound", show_default=True, metavar="W",
              help="Weights of the ticket: rewound, or the sparse-trained ones of its round (trained).")
@click.option("--dense-weights", type=click.Path(), metavar="FILE", help="Pretrained weights, where the ticket was rewound to others.")
@_options.training
@click.option("--out", type=click.Path(), default="runs/verify", show_default=True, metavar="DIR",
              help="Store of all trainings; calls and processes may share it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def verify(ticket: str, as_json: bool, **options: Any) -> None:
    """Does the ticket match the dense network? Train both alike, over several seeds, on one or more tasks.

    Given is a ticket file with weights or the run directory of `ticketkit find`; RUN@K is its round K, as is --levels K.
    Every training starts with a new head.
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


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="TICKET|RUN[@K]...")
@click.option("--round", type=int, metavar="K", help="Round of the run directories named without @K.  [default: the last finished one]")
@click.option("--layers", is_flag=True, help="Show sparsity and zero kernels of every layer, too.")
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw similarities and zero kernels by layer, as .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison, with every layer, as JSON.")
def compare(sources: tuple[str, ...], round: int | None, layers: bool, plot: str | None, as_json: bool) -> None:
    """Compare the masks of two or more tickets of one network: what they share, and which kernels they leave empty.

    Each is a ticket file or a run directory of `ticketkit find`; RUN@K is its round K. Relative similarity is the number of
    weights that both keep over the number that either keeps; beside it stands what independent random masks of the same
    sparsity would share.

    \b
    ticketkit compare runs/cifar10 runs/digits
    ticketkit compare runs/a@5 runs/b@5 other.safetensors --layers --plot masks.svg
    """
    from rich.console import Console

    from ticketkit.analysis import compare as comparison
    from ticketkit.analysis import plot as figure
    from ticketkit.analysis import table

    found = comparison.compare(*sources, round=round)
    if plot:
        figure.save(found, plot)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table.render(found, layers))
