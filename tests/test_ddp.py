"""`ticketkit find` in two processes, started as a user starts them: by itself and by torchrun; stopped, killed and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks import environment, free_port

pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from ticketkit.search.find import find
from ticketkit.search.progress import Progress
from ticketkit.search.rundir import RunDir
from ticketkit.ticket import Ticket

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"rounds": 1, "steps": 3, "batch_size": 32, "lr": 0.01, "threads": 1}
FIND = ["-m", "ticketkit.cli", "find", "digits", *(f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items())]
TWO = ["--devices", "2", "--strategy", "ddp", "--accelerator", "cpu"]
ALONE = {key: value for key, value in environment(0, 1, 0).items() if key in ("PYTHONPATH", "OMP_NUM_THREADS")}


def begin(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`find` in a process group of its own, as a shell starts it."""
    command = [sys.executable, *launcher, *FIND, *TWO, *words]
    return subprocess.Popen(command, env={**os.environ, **ALONE}, stdout=-1, stderr=-1, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, once every process of it has closed them: none is left behind."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def under_way(run: Path, process: subprocess.Popen[str]) -> None:
    """Wait for the first checkpoint."""
    deadline = time.monotonic() + 200
    while not (run / "state.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def second_of(process: subprocess.Popen[str]) -> int:
    """Process number of the one that Fabric's launcher started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished search in two processes: its run, stdout and stderr."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    code, out, err = ended(begin("--out", str(run), "--json", "--log", "csv"))
    assert code == 0, err
    return run, out, err


def test_two_processes_speak_with_one_voice(two: tuple[Path, str, str]) -> None:
    run, out, err = two
    assert out == (run / "rounds.jsonl").read_text() and out.count("\n") == 2
    assert [line.split()[0] for line in err.splitlines()] == ["training:", "round", "round"], err
    assert json.loads((run / "run.json").read_text())["devices"] == 2


def test_the_ticket_is_that_of_one_process_but_for_near_ties(two: tuple[Path, str, str], tmp_path: Path) -> None:
    """test_ranks.py has the bound; here that the whole way leads to it, and that another seed leads elsewhere."""
    tickets = [Ticket.load(two[0] / "round_01" / "ticket.safetensors")]
    tickets += [find("digits", out=tmp_path / str(seed), seed=seed, **SMALL).ticket for seed in (0, 1)]
    sizes = [sum(int((other.masks[n] != tickets[0].masks[n]).sum()) for n in other.masks) for other in tickets]
    total = sum(mask.size for mask in tickets[0].masks.values())
    assert sizes[0] == 0 and sizes[1] < 1e-3 * total and sizes[2] > 0.1 * total
    assert tickets[0].sparsity == tickets[1].sparsity


def test_torchrun_finds_the_same_ticket(two: tuple[Path, str, str], tmp_path: Path) -> None:
    port = str(free_port())
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    code, out, err = ended(begin("--out", str(tmp_path / "run"), "--json", launcher=launcher))
    assert code == 0 and out.count("\n") == 2, err
    for file in ("ticket.safetensors", "weights.safetensors"):
        assert (tmp_path / "run" / "round_01" / file).read_bytes() == (two[0] / "round_01" / file).read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the other process in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_one_ends_the_other_and_one_process_goes_on(tmp_path: Path, rank: int) -> None:
    run = RunDir(tmp_path / "run")
    process = begin("--out", str(run.path), "--checkpoint-seconds", "0", "--steps", "500")
    under_way(run.path, process)
    os.kill((process.pid, second_of(process))[rank], signal.SIGKILL)
    code, out, err = ended(process)
    assert code != 0 and out == "" and "Traceback" not in err
    if rank == 1 and code == 1:  # else Fabric's launcher was quicker
        assert err.splitlines()[-1].startswith("ticketkit: error: another process of this search ended; ")
    state = run.state(0)
    assert state is not None and 0 < state[0]["position"][1] < 500
    left: list[int] = []

    class Stop(Progress):
        def start(self, rounds: int, steps: int, training: str, remarks: tuple[str, ...]) -> None:
            left.append(steps)

        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("digits", out=run.path, progress=Stop(), **{**SMALL, "steps": 500})
    assert left == [1000 - state[0]["position"][1]], "one process goes on where two were"


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--nproc-per-node", "2")], ids=["find", "torchrun"])
def test_ctrl_c_stops_both_with_the_state_saved(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    run = RunDir(tmp_path / "run")
    process = begin("--out", str(run.path), "--checkpoint-seconds", "0", "--steps", "500", launcher=launcher)
    under_way(run.path, process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = ended(process)
    assert code == (1 if launcher else 130), err  # torchrun's own
    assert err.count("ticketkit: error: interrupted; what was finished is kept\n") == 1
    assert launcher or "Traceback" not in err
    assert run.state(0) is not None


def test_what_is_wrong_is_told_once(two: tuple[Path, str, str], tmp_path: Path) -> None:
    """Before the others are started, and after it: the run directory is another's, which the first process alone finds out."""
    code, out, err = ended(begin("--out", str(tmp_path / "run"), "--batch-size", "31"))
    assert (code, out, err) == (1, "", "ticketkit: error: --batch-size: expected a multiple of 2, for 2 processes, got 31\n")
    code, out, err = ended(begin("--out", str(two[0]), "--seed", "5"))
    assert (code, out, err.count("\n")) == (1, "", 1) and "holds a different run (seed is 0 there, 5 here)" in err
