"""The command line: each command parses its words, makes one call and prints. Nothing else lives here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ticketkit import __version__
from ticketkit.cli import files, measure, tickets
from ticketkit.errors import TicketkitError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


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


for module in (tickets, files, measure):
    for command in vars(module).values():
        if isinstance(command, click.Command):
            cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure is one line on stderr and an exit code other than 0."""
    try:
        sys.exit(cli.main(args=None if argv is None else list(argv), prog_name="ticketkit", standalone_mode=False))
    except (click.exceptions.Abort, KeyboardInterrupt) as stop:  # click makes the one of the other
        why = str(stop.__cause__ or stop)
        _stop("interrupted; what was finished is kept" + (f"; {why}" if why else ""), 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TicketkitError as error:
        _stop(str(error), 1)
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
