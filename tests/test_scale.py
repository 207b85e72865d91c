"""One process at scale: mixed precision, batches in parts, torch.compile, and the curves it writes."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import DIGITS, TINY, everything, settings, start

torch = pytest.importorskip("torch")

from ticketkit import masks, models  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.search import logs  # noqa: E402
from ticketkit.search.find import find  # noqa: E402
from ticketkit.search.progress import Progress  # noqa: E402
from ticketkit.search.ranks import Machine, Ranks  # noqa: E402
from ticketkit.search.train import Training  # noqa: E402
from ticketkit.tasks import Batches, Crops, Data  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = float(np.finfo(np.float32).eps)


def half_pruned() -> dict[str, np.ndarray]:
    return masks.random(masks.full(everything(start())), 0.5, 0)


def trained(data: Data, machine: Machine, steps: int = 2, **changes: object) -> Training:
    training = Training(start(), half_pruned(), settings(steps=steps, **changes), round=0, ranks=Ranks(machine))
    training.run(Batches(data.train, Crops(DIGITS), 32), lambda now: None)
    return training


def test_mixed_precision_keeps_float32_weights_and_resumes_to_the_bit(data: Data) -> None:
    machine, states = Machine(accelerator="cpu", precision="bf16-mixed"), []
    whole = Training(start(), half_pruned(), settings(steps=2), round=0, ranks=Ranks(machine))
    dtypes: list[torch.dtype] = []
    whole.module.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    whole.run(Batches(data.train, Crops(DIGITS), 32), lambda now: states.append({k: v.copy() for k, v in now.state().items()}))
    assert set(dtypes) == {torch.bfloat16}, "convolutions run in it"
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in whole.module.parameters())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in whole.module.parameters() if p.ndim == 4)
    resumed = Training(start(), half_pruned(), settings(steps=2), round=0, ranks=Ranks(machine))
    resumed.load(states[0])
    resumed.run(Batches(data.train, Crops(DIGITS), 32), lambda now: None)
    assert all(np.array_equal(array, states[1][key]) for key, array in resumed.state().items())
    single = trained(data, Machine(accelerator="cpu"))
    assert not np.array_equal(single.state()["module/conv1.weight"], states[1]["module/conv1.weight"]), "it is another precision"


def gradients(data: Data, parts: int, training_mode: bool = False) -> dict[str, np.ndarray]:
    """Of one step on 32 images, batch norms with fixed statistics unless asked."""
    training = Training(start(), half_pruned(), settings(steps=1, accumulate=parts), round=0)
    if not training_mode:
        for part in training.module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()
    training.run(Batches(data.train, Crops(DIGITS), 32), lambda now: None)
    return {name: p.grad.double().numpy() for name, p in training.module.named_parameters()}


def test_gradients_of_parts_are_those_of_the_whole_batch(data: Data) -> None:
    """Each gradient is a mean over 32 images; summed in another order, 20 layers deep, it may differ by 2 x 20 x 32 roundings."""
    whole, parts = gradients(data, 1), gradients(data, 4)
    assert all(np.abs(parts[name] - whole[name]).max() <= 2 * 20 * 32 * EPS * np.abs(whole[name]).max() for name in whole)
    apart = gradients(data, 4, True)
    assert any(np.abs(apart[name] - whole[name]).max() > 0.05 * np.abs(whole[name]).max() for name in whole), "negative control"


def test_parts_must_divide_the_batch(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="--accumulate: expected a divisor of the batch of 32 images, got 5"):
        find("digits", out=tmp_path / "run", accumulate=5, **TINY)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_keeps_names_and_masks(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured by torch.compile as a user has it, but run without the minute that its code generator takes."""
    compiled: list[torch.nn.Module] = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or real(module, backend="aot_eager"))
    training, plain = trained(data, Machine(compile=True)), trained(data, Machine())
    assert len(compiled) >= 1
    after, expected = models.arrays(training.module), models.arrays(plain.module)
    assert after.keys() == expected.keys() == start().state_dict().keys()
    assert all((after[name][~mask] == 0).all() and (after[name][mask] != 0).all() for name, mask in half_pruned().items())
    assert abs(training.loss - plain.loss) < 0.05 * plain.loss


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_csv_curves_of_two_sittings_join_by_step(tmp_path: Path) -> None:
    options = {**TINY, "steps": 30, "rounds": 0}

    class Stop(Progress):
        count = 0

        def step(self, round: int, sparsity: float, loss: float, accuracy: float) -> None:
            self.count += 1
            if self.count == 22:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("digits", out=tmp_path / "run", checkpoint_seconds=0, log="csv", progress=Stop(), **options)
    row = find("digits", out=tmp_path / "run", log="csv", **options).rows[0]
    first, second = (curve(tmp_path / "run" / "logs" / f"version_{sitting}") for sitting in (0, 1))
    steps = [int(line["step"]) for line in (*first, *second) if line["loss"]]
    assert steps == [10, 20, 30], "written at once, and none twice"
    assert all(0 <= float(line["train_accuracy"]) <= 1 and float(line["lr"]) > 0 for line in (*first, second[0]))
    assert float(second[-1]["round_metric"]) == pytest.approx(row["metric"]) and second[-1]["step"] == "30"


def test_unknown_log_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="--log: expected one of csv, tensorboard, got 'papyrus'"):
        find("digits", out=tmp_path / "run", log="papyrus", **TINY)


def test_tensorboard_where_it_is_not_installed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(TicketError, match=r"pip install 'ticketkit\[log\]'; or take --log csv") as caught:
        find("digits", out=tmp_path / "run", log="tensorboard", **TINY)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.skipif(not (importlib.util.find_spec("tensorboardX") or importlib.util.find_spec("tensorboard")), reason="no tensorboardX")
def test_tensorboard_events(tmp_path: Path) -> None:
    find("digits", out=tmp_path / "run", log="tensorboard", **{**TINY, "rounds": 0})
    (events,) = (tmp_path / "run" / "logs" / "version_0").glob("events.out.tfevents.*")
    assert b"round_metric" in events.read_bytes()
