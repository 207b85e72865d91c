"""`bench --device qemu` of a whole model: what is compared and counted, with this machine's shell and a fake runner for the emulator."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join

import pytest
from boards import Board
from test_bench import save_model

from ticketkit.bench import device as on
from ticketkit.bench import timing
from ticketkit.bench.devices import _emulate, _run, _trace, qemu
from ticketkit.errors import DeviceError, TicketkitError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "net.onnx")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Board:
    """No emulator: programs run as they are, and 10 or 4 million instructions are counted."""
    made = Board(tmp_path, monkeypatch)
    made.runners(model)
    monkeypatch.setattr(qemu, "available", lambda: (True, ""))
    monkeypatch.setattr(qemu, "make_root", lambda root: None)
    monkeypatch.setattr(qemu.Qemu, "program", lambda self, words: join(words))
    monkeypatch.setattr(_trace, "follow", counts({}))
    return made


def counts(failing):
    def follow(words, directory, silence, take):
        assert words[words.index("--rounds") + 1] == "2" and "--check-only" not in words
        (engine,) = [word.partition("=")[0] for word, before in zip(words[1:], words, strict=False) if before == "--engine"]
        if engine in failing:
            raise failing[engine]
        for i, since in enumerate((99, 10_000_000 if engine == "onnxruntime" else 4_000_000)):
            take({"event": "round", "engine": engine, "round": i, "ms": [1.0]}, since)

    return follow


def measure(model, **settings):
    return _emulate.measure(_run.Target("qemu"), model, timeout=20, **settings)


def test_instructions_of_whole_models(board, model, capsys, tmp_path):
    report = measure(model, instructions=True)
    assert [(row.engine, row.instructions) for row in report.rows] == [("onnxruntime", 10**7), ("ticketkit", 4 * 10**6)]
    assert not report.stopped and not report.failures and not report.notes
    on.bench(on.Target("qemu"), model, protocol=timing.Protocol(timeout=20), instructions=True, json_to=str(tmp_path / "rows.jsonl"))
    printed = capsys.readouterr().out
    assert "no times" in printed and "2.50" in printed and "4,000,000" in printed
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["instructions"] for row in rows] == [10**7, 4 * 10**6]
    assert not [name for row in rows for name in row if name.endswith("_ms")]
    assert board.left() == []


def test_answers_alone(board, model):
    assert [row.instructions for row in measure(model).rows] == [None, None]


@pytest.mark.parametrize("error", [DeviceError("the emulator's log ends"), KeyboardInterrupt()], ids=["broken", "interrupted"])
def test_a_count_that_breaks_off_keeps_the_rows(error, board, model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_trace, "follow", counts({"ticketkit": error}))
    report = measure(model, instructions=True)
    assert [row.instructions for row in report.rows] == [10**7, None]
    assert report.interrupted == isinstance(error, KeyboardInterrupt)
    with pytest.raises((TicketkitError, KeyboardInterrupt)) as caught:
        on.bench(on.Target("qemu"), model, protocol=timing.Protocol(timeout=20), instructions=True, json_to=str(tmp_path / "rows.jsonl"))
    assert report.interrupted or "the emulator's log ends; the rows have the counts before that" in str(caught.value)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert "not all counts" in capsys.readouterr().out
    assert board.left() == []


def test_a_wrong_answer_under_emulation(board, model):
    board.do("wrong")
    report = measure(model, instructions=True)
    assert [row.engine for row in report.rows] == ["onnxruntime"] and "a wrong answer has no speed" in report.failures["ticketkit"]
