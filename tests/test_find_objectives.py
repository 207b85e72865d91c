"""`find --objective`: what a self-supervised search keeps, refuses and gives to those who use its tickets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from ticketkit import models, pretrain  # noqa: E402
from ticketkit.cli import main  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.exporters import export  # noqa: E402
from ticketkit.search.find import find, load_round  # noqa: E402
from ticketkit.search.rundir import RunDir  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT: dict[str, Any] = {"rounds": 1, "steps": 2, "batch_size": 16, "threads": 1}
OPTIONS: dict[str, dict[str, Any]] = {"simclr": {"temperature": 0.3}, "moco": {"temperature": 0.1, "queue": 48, "key_momentum": 0.9}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished search for each self-supervised objective."""
    place = tmp_path_factory.mktemp("runs")
    return {name: find("digits", objective=name, out=place / name, **options, **SHORT).path for name, options in OPTIONS.items()}


def test_every_objective_has_its_search() -> None:
    assert set(pretrain.names()) == {*OPTIONS, "supervised"}


@pytest.mark.parametrize("name", OPTIONS)
def test_run_json_and_ticket_name_the_objective_and_its_options(runs: dict[str, Path], name: str) -> None:
    config = RunDir(runs[name]).config()
    assert config["objective"] == name and config["objective_options"].items() >= OPTIONS[name].items()
    _, _, ticket = load_round(runs[name])
    assert (ticket.meta["objective"], ticket.meta["objective_options"]) == (name, config["objective_options"])
    rows = RunDir(runs[name]).rows()
    assert {row["metric_name"] for row in rows} == {"retrieval accuracy"} and all(0 <= row["metric"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("name", "change"),
    [("simclr", {"temperature": 0.2}), ("moco", {"temperature": 0.2}), ("moco", {"queue": 47}), ("moco", {"key_momentum": 0.8})],
)
def test_another_option_in_the_same_directory_is_refused(runs: dict[str, Path], name: str, change: dict[str, float]) -> None:
    own = {"objective": name, **OPTIONS[name], **SHORT}
    with pytest.raises(TicketError, match=r"holds a different run \(objective_options is") as caught:
        find("digits", out=runs[name], **{**own, **change})
    assert "\n" not in str(caught.value)
    assert len(find("digits", out=runs[name], **own).rows) == 2, "with its own it is at home"


def test_another_objective_in_the_same_directory_is_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(TicketError, match=r'objective is "moco" there, "simclr" here'):
        find("digits", out=runs["moco"], objective="simclr", **SHORT)


def test_rounds_load_and_export(runs: dict[str, Path], tmp_path: Path) -> None:
    """The head is a projection to 128 numbers, whatever the classes."""
    assert load_round(runs["simclr"])[0](torch.randn(1, 3, 16, 16)).shape == (1, 128)
    module, config, _ = load_round(runs["moco"])
    images = torch.randn(2, *config["input_shape"])
    with torch.no_grad():
        expected = module(images).numpy()
    assert expected.shape == (2, 128)
    export(runs["moco"], tmp_path / "net.onnx", format="onnx-dense")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_backbone_has_the_names_and_masks_of_the_supervised_network(runs: dict[str, Path], name: str) -> None:
    module, _, ticket = load_round(runs[name])
    plain = models.build("resnet20", 10, 16)
    ours, theirs = ({key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (module, plain))
    head = {key for key in ours if key.startswith("linear.")}
    assert head == {"linear.0.weight", "linear.0.bias", "linear.2.weight", "linear.2.bias"}
    backbone = {key: shape for key, shape in ours.items() if key not in head}
    assert backbone == {key: shape for key, shape in theirs.items() if not key.startswith("linear.")}
    assert set(ticket.masks) == set(models.prunable("resnet20", plain))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.5}, "--temperature: objective supervised has no such option"),
        ({"objective": "simclr", "queue": 16}, "--queue: objective simclr has no such option"),
        ({"objective": "simclr", "key_momentum": 0.5}, "--key-momentum: objective simclr has no such option"),
        ({"objective": "simclr", "temperature": 0.0}, "temperature: expected a number above 0, got 0"),
        ({"objective": "simclr", "accumulate": 2}, "--accumulate: simclr compares the images of a whole batch; expected 1, got 2"),
        ({"objective": "moco", "queue": 0}, "queue: expected at least 1, got 0"),
        ({"objective": "byol"}, "unknown objective 'byol'; expected one of moco, simclr, supervised"),
    ],
)
def test_options_of_another_objective_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        find("digits", out=tmp_path / "run", **options, **SHORT)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_command_line_has_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("find", "digits", "--objective", "simclr", "--rounds=0", "--steps=1", "--batch-size=8", "--threads=1", "--out", str(tmp_path))

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main((*words, *more))
        return int(stop.value.code or 0)

    assert run("--temperature", "0.2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric_name"] == "retrieval accuracy"
    assert json.loads((tmp_path / "run.json").read_text())["objective_options"]["temperature"] == 0.2
    for more, expected in (
        (("--temperature", "0.3"), "objective_options is"),
        (("--queue", "8"), "--queue: objective simclr has no such option; leave it out or choose another --objective"),
    ):
        assert run(*more) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("ticketkit: error: ") and expected in err
