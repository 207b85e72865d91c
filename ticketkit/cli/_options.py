"""What several commands take: numbers in one word, and the options of every command that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {text!r}") from None


def shape(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | None:
    """C,H,W"""
    return _numbers(text, int)


def floats(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | None:
    """F[,F...]"""
    return _numbers(text, float)


def fractions(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> list[Any]:
    """F[,F...], repeated."""
    return [number for text in texts for number in _numbers(text, float) or []]


def levels(context: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | str | None:
    """K[,K...], or all."""
    return text if text == "all" else _numbers(text, int)


def training(command: Command) -> Command:
    """The options of every command that trains."""
    options = (
        click.option("--recipe", metavar="NAME", help="Training settings, changed by the options below.  [default: the task's]"),
        click.option("--epochs", type=int, metavar="N", help="Epochs of each training.  [default: the recipe's]"),
        click.option("--steps", type=int, metavar="N", help="Instead of --epochs: optimizer steps of each training."),
        click.option("--batch-size", type=int, metavar="N", help="Images per step.  [default: the recipe's]"),
        click.option("--lr", type=float, help="Learning rate of SGD at the start of a training.  [default: the recipe's]"),
        click.option("--schedule", metavar="NAME", help="Of the learning rate: multistep, cosine or constant.  [default: the recipe's]"),
        click.option("--milestones", metavar="F[,F...]", callback=floats,
                     help="Where multistep divides it by 10: fractions of a training, e.g. 0.5,0.75.  [default: the recipe's]"),
        click.option("--warmup", type=int, metavar="N", help="Steps over which it first rises linearly.  [default: the recipe's]"),
        click.option("--momentum", type=float, help="Of SGD.  [default: the recipe's]"),
        click.option("--weight-decay", type=float, help="L2 penalty.  [default: the recipe's]"),
        click.option("--data", type=click.Path(), metavar="DIR", envvar="TICKETKIT_DATA", show_envvar=True,
                     help="Folder that holds the task's images, in the layout torchvision downloads."),
        click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: torch's choice]"),
        click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="At most this much is lost by a crash."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command
