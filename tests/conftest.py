"""Shared fixtures: the real data sets, where they are to be had, and one small finished search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ticketkit.tasks import Data

# Before torch is first imported: threads that wait do not spin, so that tests stay quick where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job and all it starts; but tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"
# Small enough for seconds, long enough to cross an epoch (5 steps) within each round.
SMALL_RUN = {"rounds": 2, "steps": 7, "batch_size": 256, "lr": 0.05, "seed": 0, "threads": 1}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """CIFAR-10, CIFAR-100, Fashion-MNIST and pretrained weights: $TICKETKIT_DATA, else unpacked once into the user's cache."""
    if "TICKETKIT_DATA" in os.environ:
        return Path(os.environ["TICKETKIT_DATA"])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ticketkit-test-data"
    if not cache.exists():
        if not UNPACK.exists():
            pytest.skip("no data: set TICKETKIT_DATA to a folder of CIFAR-10, CIFAR-100, FashionMNIST and weights/")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as temporary:  # renamed when whole, so no half-unpacked cache stays
            whole = Path(temporary) / "data"
            subprocess.run([sys.executable, str(UNPACK), str(whole)], check=True, stdout=subprocess.DEVNULL)
            if not cache.exists():
                whole.rename(cache)
    return cache


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted search on digits with the settings of SMALL_RUN."""
    find = pytest.importorskip("ticketkit.search.find").find
    return Path(find("digits", out=tmp_path_factory.mktemp("run") / "digits", **SMALL_RUN).path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; tests that compare bits use one."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def little_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task is that of `small.little`."""
    from small import little

    monkeypatch.setattr("ticketkit.tasks.get", little)


@pytest.fixture(scope="session")
def data() -> Data:
    """The images of `digits`."""
    from ticketkit import tasks

    return tasks.get("digits").load(None)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned network as anybody's ONNX file; not to be written to."""
    import onnx
    from graphs import conv_net

    path = tmp_path_factory.mktemp("source") / "net.onnx"
    onnx.save(conv_net(0.9, channels=64), path)
    return path
