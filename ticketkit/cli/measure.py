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
@click.option("--timeout", default=300.0, show_default=True, type=float, help="Seconds until an engine, or a silent device, is given up.")
@click.option("--json", "json_to", metavar="FILE|-", help="Append the rows as JSON lines to FILE, or print them (-).")
@click.option("--device", metavar="DEVICE",
              help="Measure there: local, ssh:[USER@]HOST[:PORT], adb[:SERIAL], or qemu (64-bit ARM, emulated: no times).")
@click.option("--layers", is_flag=True, help="On a device: each layer alone, one thread; XNNPACK too if the runner has it.")
@click.option("--instructions", is_flag=True, help="With --device qemu: count the instructions of one run; takes minutes.")
@click.option("--cpus", metavar="LIST",
              help="On a device: run on these processors, 4-7, or on a cluster: big, little, middle.  [default: the fastest]")
@click.option("--runner", type=click.Path(path_type=Path), metavar="DIR", envvar="TICKETKIT_RUNNER", show_envvar=True,
              help="On a device: the folder with built runners.  [default: built and kept]")
@click.option("--onnxruntime", "library", type=click.Path(path_type=Path), metavar="FILE",
              help="On a device: its libonnxruntime.so; needed for Android.  [default: PyPI's]")
def bench(
    model: str, names: tuple[str, ...], threads: int, batch: int, rounds: int, seconds: float, timeout: float, json_to: str | None,
    device: str | None, layers: bool, instructions: bool, cpus: str | None, runner: Path | None, library: Path | None,
) -> None:  # fmt: skip
    """Time MODEL (.onnx) on several engines, in alternating rounds, against the fastest dense one.

    With --device on a phone or board: onnxruntime and ticketkit run there, natively, and nothing stays behind.

    \b
    ticketkit bench small.onnx --device ssh:pi@raspberrypi --cpus 0-3 --threads 4
    ticketkit bench small.onnx --device adb --cpus big --onnxruntime jni/arm64-v8a/libonnxruntime.so
    ticketkit bench small.onnx --device adb --layers   each layer alone; needs no onnxruntime there
    ticketkit bench small.onnx --device qemu          no device: are the answers right on ARM?

    ssh must work without a question (keys), adb as `adb devices` shows it. Runners are built with cmake and a compiler for the device,
    see `ticketkit doctor`.
    """
    from ticketkit.bench import engines, table, timing

    table.check_writable(json_to)
    protocol = timing.Protocol(rounds, seconds, timeout=timeout)
    if device is not None:
        from ticketkit.bench import device as on

        target = on.Target(device, cpus, runner, library)
        on.bench(target, Path(model), names, threads, batch, protocol, json_to, layers, instructions)
        return
    for option, value in (("--layers", layers), ("--instructions", instructions), ("--cpus", cpus), ("--onnxruntime", library)):
        if value:
            raise click.UsageError(f"{option} needs --device")
    chosen, unusable = (engines.require(names), {}) if names else engines.usable()
    with table.progress("bench") as progress:
        report = timing.measure(Path(model), chosen, threads, batch, protocol, progress)
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
