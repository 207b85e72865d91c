"""The ticket file: golden bytes, every flipped bit and every truncation refused, readers for other people's pruned weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from ticketkit.errors import TicketError
from ticketkit.ticket import KEY, Ticket, split_pruned, write_atomic

# in C order 1 0 1 1 1 0 0 1 | 0: bytes 0x9d 0x00, least significant bit first
MASK = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
GOLDEN = (
    b"\xc0\x01\x00\x00\x00\x00\x00\x00"  # length of the header
    rb"""{"__metadata__":{"ticketkit.ticket":"{\"format\":1,\"meta\":{\"model\":\"toy\",\"rate\":0.2,\"round\":2,\"seed\":0},"""
    rb"""\"sha256\":\"3cd4d9328349122b6c563b47b7727013e19ce00220f603e6cd99c4cb28e1b39b\",\"shapes\":{\"conv.weight\":[3,3]}}"},"""
    rb""""bn.num_batches_tracked":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"""
    rb""""conv.weight":{"dtype":"F32","shape":[3,3],"data_offsets":[8,44]},"""
    rb""""conv.weight.mask":{"dtype":"U8","shape":[2],"data_offsets":[44,46]}}      """
    + np.array(7, "<i8").tobytes()
    + np.arange(9, dtype="<f4").tobytes()
    + b"\x9d\x00"
)


def ticket(**changes: object) -> Ticket:
    parts = {
        "masks": {"conv.weight": MASK},
        "weights": {"conv.weight": np.arange(9, dtype=np.float32).reshape(3, 3), "bn.num_batches_tracked": np.array(7)},
        "meta": {"model": "toy", "round": 2, "seed": 0, "rate": 0.2},
    }
    return Ticket(**{**parts, **changes})  # type: ignore[arg-type]


def test_golden_bytes(tmp_path: Path) -> None:
    """The format does not change by accident: these are the bytes of version 1."""
    written = ticket().save(tmp_path / "t.safetensors").read_bytes()
    assert written == GOLDEN


def test_round_trip(tmp_path: Path) -> None:
    path = ticket().save(tmp_path / "t.safetensors")
    loaded = Ticket.load(path)
    assert loaded == ticket() and hash(loaded) == hash(ticket())
    np.testing.assert_array_equal(loaded.masks["conv.weight"], MASK)
    np.testing.assert_array_equal(loaded.weights["conv.weight"], ticket().weights["conv.weight"])
    assert loaded.meta == ticket().meta
    assert loaded.sparsity == pytest.approx(4 / 9)
    assert "44.44% sparse" in str(loaded) and "model toy" in str(loaded)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 64, 65])
def test_masks_of_every_length_round_trip(tmp_path: Path, size: int) -> None:
    mask = np.random.default_rng(size).random(size) < 0.5
    loaded = Ticket.load(Ticket({"w": mask}).save(tmp_path / "t"))
    np.testing.assert_array_equal(loaded.masks["w"], mask)
    assert not loaded.weights


@pytest.mark.parametrize(
    "other",
    [
        {"meta": {"model": "toy", "round": 3, "seed": 0, "rate": 0.2}},
        {"masks": {"conv.weight": ~MASK}},
        {"weights": {}},
    ],
)
def test_tickets_that_differ_are_unequal(other: dict[str, object]) -> None:
    assert ticket(**other) != ticket()


def test_mask_hash_ignores_weights_and_provenance() -> None:
    assert ticket(weights={}, meta={}).mask_sha256 == ticket().mask_sha256
    assert ticket(masks={"conv.weight": ~MASK}).mask_sha256 != ticket().mask_sha256


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    whole = ticket().save(tmp_path / "t").read_bytes()
    damaged = tmp_path / "damaged"
    for position in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        with pytest.raises(TicketError) as caught:
            Ticket.load(damaged)
        assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = ticket().save(tmp_path / "t").read_bytes()
    damaged = tmp_path / "damaged"
    for length in range(len(whole)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(TicketError):
            Ticket.load(damaged)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"masks": {}}, "at least one mask"),
        ({"masks": {"conv.weight": MASK.astype(np.uint8)}}, "dtype bool"),
        ({"masks": {"conv.weight": MASK[:2]}}, "shape"),
        ({"weights": {"conv.weight": np.full((3, 3), np.nan, np.float32)}}, "conv.weight: weights hold NaN"),
        ({"weights": {"conv.weight.mask": np.zeros(2, np.float32)}}, "name of a mask"),
    ],
)
def test_malformed_tickets_are_refused(parts: dict[str, object], words: str) -> None:
    with pytest.raises(TicketError, match=words):
        ticket(**parts)


def test_metadata_must_be_json(tmp_path: Path) -> None:
    for value in (float("nan"), np.float32(1.0), {1, 2}):
        with pytest.raises(TicketError, match="plain JSON"):
            ticket(meta={"value": value}).save(tmp_path / "t")


def test_files_that_are_no_ticket(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(save({"w": np.zeros(3, np.float32)}))
    (tmp_path / "listed.safetensors").write_bytes(save({"w": np.zeros(3, np.float32)}, {KEY: "[1]"}))
    for path, words in ((plain, "no ticket"), (tmp_path / "listed.safetensors", "damaged"), (tmp_path, "no such file")):
        with pytest.raises(TicketError, match=words):
            Ticket.load(path)


def test_apply_and_merge() -> None:
    weights = {"conv.weight": np.full((3, 3), -np.inf, np.float32), "fc.bias": np.ones(2, np.float32)}
    masked = ticket().apply(weights)
    assert masked["conv.weight"].dtype == np.float32
    assert (masked["conv.weight"] == np.where(MASK, -np.inf, 0.0)).all()
    assert not np.signbit(masked["conv.weight"][~MASK]).any(), "pruned weights are +0.0"
    assert masked["fc.bias"] is weights["fc.bias"] and np.isinf(weights["conv.weight"]).all()
    assert (ticket().merge()["conv.weight"] == np.arange(9).reshape(3, 3) * MASK).all()
    for state, words in (({}, "another model"), ({"conv.weight": np.zeros((1, 3, 3))}, "shape")):
        with pytest.raises(TicketError, match=words):
            ticket().apply(state)
    with pytest.raises(TicketError, match="no weights"):
        ticket(weights={}).merge()


def test_reads_torch_prune_checkpoints() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(5, 3))
    prune.global_unstructured([(module[0], "weight"), (module[1], "weight")], prune.L1Unstructured, amount=0.5)
    read = Ticket.from_state_dict({name: tensor.numpy() for name, tensor in module.state_dict().items()})
    assert set(read.masks) == {"0.weight", "1.weight"} and set(read.weights) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert read.sparsity == pytest.approx(0.5, abs=0.01)
    for layer in ("0", "1"):
        np.testing.assert_array_equal(read.merge()[f"{layer}.weight"], module[int(layer)].weight.detach().numpy())


def test_reads_dense_with_zeros() -> None:
    state = {"conv.weight": np.arange(9, dtype=np.float32).reshape(3, 3) * MASK, "fc.weight": np.ones((2, 2), np.float32)}
    state["bn.bias"] = np.zeros(3, np.float32)
    found = Ticket.from_state_dict(state)
    assert set(found.masks) == {"conv.weight"}, "no zeros, or not a matrix: not pruned"
    named = Ticket.from_state_dict(state, names=["conv.weight", "fc.weight"])
    assert named.layer_sparsity["fc.weight"] == 0.0 and named.sparsity < found.sparsity


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"w": np.ones((2, 2), np.float32)}, "no pruned weight"),
        ({"a.weight_orig": np.ones((2, 2), np.float32), "a.weight_mask": np.full((2, 2), 0.5, np.float32)}, "zeros and ones"),
        ({"a.weight_mask": np.ones((2, 2), np.float32)}, "half of"),
        ({"a.weight_orig": np.ones((2, 2), np.float32)}, "half of"),
    ],
)
def test_unusable_pruned_state_dicts(state: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(TicketError, match=words):
        Ticket.from_state_dict(state)


def test_key_names_are_matched_whole() -> None:
    """Substring surgery on names broke others: a parameter may well be called mask_token or original."""
    state = {"mask_token": np.ones(3, np.float32), "head_mask": np.ones(3, np.float32), "x_original": np.ones(3, np.float32)}
    weights, masks = split_pruned(state)
    assert weights.keys() == state.keys() and not masks


@pytest.mark.parametrize("place", ["file/below", "missing/folder"])
def test_unwritable_place_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TicketError, match="cannot write") as caught:
        ticket().save(tmp_path / place / "t.safetensors")
    assert "\n" not in str(caught.value)


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "t", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TicketError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["t"]
