"""kill -9 at any moment: the same command goes on, and ends with the same bits.

The killed processes are forked by a server that has torch loaded already, so that a moment costs no start of torch. One search is
killed at ten moments, one after another, each in a new process: at random files, some of them written but not yet in place,
others followed by 0 to 50 ms of whatever comes next. test_search.py kills the command itself.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import kills
from small import few_digits

from ticketkit import tasks
from ticketkit.search.find import find
from ticketkit.search.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")

# checkpoint_seconds 0: a file for every step.
SEARCHES: dict[str, dict[str, Any]] = {
    "supervised": {"rounds": 2, "steps": 20},
    "moco": {"objective": "moco", "queue": 64, "rounds": 1, "steps": 8},
}
COMMON = {"batch_size": 8, "lr": 0.05, "threads": 1, "checkpoint_seconds": 0.0}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Where processes come from that have torch and the search loaded."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver on this system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ticketkit.search.find", "sklearn.datasets"])  # of installed packages alone
    yield context


def killed(server: ForkServerContext, options: dict[str, Any], write: int, within: bool, wait: float) -> bool:
    """Start the search, or go on with it, and kill it at that moment; False if it was done before."""
    listen, tell = server.Pipe(duplex=False)
    process = server.Process(target=kills.search, args=(tell, write, within, options))
    process.start()
    tell.close()
    try:
        if listen.poll(120):
            listen.recv_bytes()
            time.sleep(wait)
    except EOFError:  # it ended by itself
        pass
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kept(run: RunDir) -> list[tuple[bytes, bytes, str, float]]:
    """Of each round its files, the hash of its masks and its metric."""
    files = ("weights.safetensors", "ticket.safetensors")
    found = []
    for row in run.rows():
        weights, ticket = ((run.folder(row["round"]) / name).read_bytes() for name in files)
        found.append((weights, ticket, str(row["mask_sha256"]), float(row["metric"])))
    return found


@pytest.mark.parametrize(("name", "moments", "longest"), [("supervised", 10, 6), ("moco", 3, 4)])
def test_killed_at_random_moments_the_search_ends_with_the_same_bits(
    name: str, moments: int, longest: int, server: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.tasks(), "digits", few_digits())
    options, choice = {**SEARCHES[name], **COMMON}, random.Random(0)
    whole = kept(RunDir(find("digits", out=tmp_path / "whole", **options).path))
    out = tmp_path / "killed"
    for number in range(moments):
        write, within, wait = 1 if number == 0 else choice.randint(2, longest), choice.random() < 0.5, choice.uniform(0, 0.05)
        assert killed(server, {**options, "out": out}, write, within, 0.0 if within else wait), f"kill {number} came too late"
    assert len(whole) == options["rounds"] + 1 > len(RunDir(out).rows()), "killed before the end"
    find("digits", out=out, **options)
    assert kept(RunDir(out)) == whole
    assert not [file for file in os.listdir(out) if file.endswith(".tmp")]
    other = kept(RunDir(find("digits", out=tmp_path / "other", **{**options, "seed": 1, "rounds": 0}).path))
    assert other[0] != whole[0], "negative control: not every search ends so"
