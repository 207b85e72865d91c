"""Searches for tickets of whole blocks: masks, levels, and going on where they stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN
from small import TINY

pytest.importorskip("torch")

from ticketkit import masks
from ticketkit.errors import TicketError
from ticketkit.search.find import find, load_round
from ticketkit.search.progress import Progress
from ticketkit.ticket import read_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("granularity", ["4x1", "16x1", "1x16", "3x5"])
def test_blocks_are_pruned_whole(tmp_path: Path, granularity: str) -> None:
    """In every pruned layer; the levels hold to a block per layer; block ranks are those of the trained weights."""
    run = find("digits", out=tmp_path / "run", granularity=granularity, **{**TINY, "rounds": 2})
    r, c = map(int, granularity.split("x"))
    assert run.config["granularity"] == granularity
    before = masks.full(load_round(run.path, 0)[2].masks)
    for row in run.rows[1:]:
        ticket = load_round(run.path, row["round"])[2]
        assert ticket.meta["granularity"] == granularity
        for mask in ticket.masks.values():
            matrix = mask.reshape(len(mask), -1)
            blocks = [matrix[i : i + r, j : j + c] for i in range(0, len(matrix), r) for j in range(0, matrix.shape[1], c)]
            assert all(block.all() or not block.any() for block in blocks)
        total = sum(mask.size for mask in ticket.masks.values())
        assert abs(ticket.sparsity - (1 - 0.8 ** row["round"])) * total <= r * c * len(ticket.masks)
        trained, _ = read_safetensors(run.path / f"round_{row['round'] - 1:02d}" / "weights.safetensors")
        expected = masks.global_magnitude(trained, before, 0.2, (r, c))
        assert all(np.array_equal(ticket.masks[name], expected[name]) for name in expected)
        assert any(0 < sparsity < 1 for sparsity in ticket.layer_sparsity.values())
        before = ticket.masks


def test_a_search_for_blocks_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = {**TINY, "rounds": 2, "granularity": "4x1"}
    steps: list[int] = []

    class Stop(Progress):
        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            steps.append(round)
            if steps == [0, 0, 1, 1]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("digits", out=tmp_path / "stopped", checkpoint_seconds=0, progress=Stop(), **options)
    with pytest.raises(TicketError, match='granularity is "4x1" there, "8x1" here'):
        find("digits", out=tmp_path / "stopped", **{**options, "granularity": "8x1"})
    resumed = find("digits", out=tmp_path / "stopped", progress=Stop(), **options)
    assert steps == [0, 0, 1, 1, 1, 2, 2]
    whole = find("digits", out=tmp_path / "whole", **options)
    assert [row["mask_sha256"] for row in resumed.rows] == [row["mask_sha256"] for row in whole.rows]


def test_a_run_from_before_granularity_is_one_of_single_weights(small_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    config = json.loads((run / "run.json").read_text())
    assert config.pop("granularity") == "1x1"
    (run / "run.json").write_text(json.dumps(config))
    with pytest.raises(TicketError, match='granularity is "1x1" there, "4x1" here'):
        find("digits", out=run, granularity="4x1", **SMALL_RUN)
    assert len(find("digits", out=run, **SMALL_RUN).rows) == 3
