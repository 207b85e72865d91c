"""`bench --device`: one call that measures on a device and prints, whatever kind of device and measurement it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ticketkit.bench import table, timing
from ticketkit.bench.devices import _run

Target = _run.Target


def bench(
    target: Target,
    path: Path,
    names: Sequence[str] = (),
    threads: int = 1,
    batch: int = 1,
    protocol: timing.Protocol | None = None,
    json_to: str | None = None,
) -> None:
    """Measure the ONNX file at `path` on a device and print the table; rows go where `json_to` says (see `table.conclude`).

    Raises DeviceError, ModelError or DataError where nothing could be measured, and, once the rows so far are printed, where the run broke
    off; KeyboardInterrupt after a Ctrl-C.
    """
    chosen = tuple(dict.fromkeys(names)) or _run.ENGINES
    with table.progress(f"bench on {target.name}") as progress:
        report = _run.measure(target, path, chosen, threads, batch, protocol, progress)
    table.conclude(report, json_to, {}, required=chosen)
