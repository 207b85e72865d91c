"""Commands that measure: quickstart, bench, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.option("--out", default="runs/quickstart", show_default=True, metavar="DIR", help="Where everything made is kept.")
def quickstart(out: str) -> None:
    """Find a ticket on embedded data, export, run and bench it, and a ResNet-50 too: under four minutes on two cores."""
    from rich.console import Console

    from ticketkit import quickstart

    quickstart.quickstart(Path(out), quickstart.Budget(), Console())


@click.command()
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Show CPU, instruction sets, versions, and which engines work here; fails only if the native library cannot be loaded."""

    from rich.console import Console

    from ticketkit import doctor

    found = doctor.examine()
    Console().print_json(json.dumps(found)) if as_json else Console().print(doctor.render(found))
    sys.exit(1 if found["library"]["error"] else 0)
