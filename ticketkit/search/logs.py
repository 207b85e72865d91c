"""Curves of a search beside its rows: CSV files or TensorBoard events, written by Lightning Fabric's loggers to RUN/logs.

Each sitting of a run writes a new version_N; the step counts over all rounds, so that they join.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ticketkit.errors import TicketError
from ticketkit.quiet import quiet

if TYPE_CHECKING:
    from lightning_fabric.loggers import Logger

    from ticketkit.search.train import Training

LOGS = ("csv", "tensorboard")
EVERY = 10  # steps between two points of a curve


class Log:
    """Writes nothing where `kind` is None."""

    def __init__(self, kind: str | None, folder: Path) -> None:
        self._logger = None if kind is None else _logger(kind, folder)

    def step(self, now: Training) -> None:
        """Loss, training accuracy and learning rate of every tenth step."""
        if self._logger is not None and now.step % EVERY == 0:
            numbers = {"loss": now.loss, "train_accuracy": now.accuracy, "lr": now.settings.lr_at(now.step - 1)}
            self._logger.log_metrics(numbers, now.round * now.settings.steps + now.step)

    def round(self, row: dict[str, Any], step: int) -> None:
        """What a finished round measured; `step` is its last, counted over all rounds."""
        if self._logger is not None:
            numbers = {key: row[key] for key in ("sparsity", "metric", "val_metric", "loss")}
            self._logger.log_metrics({f"round_{key}": value for key, value in numbers.items()}, step)

    def close(self) -> None:
        """Write what is still on its way to the disk."""
        if self._logger is not None:
            self._logger.finalize("success")


def check(kind: str | None) -> None:
    """Refuse an unknown kind of log, or one whose package is missing."""
    if kind is not None and kind not in LOGS:
        raise TicketError(f"--log: expected one of {', '.join(LOGS)}, got {kind!r}")
    if kind == "tensorboard" and not (find_spec("tensorboardX") or find_spec("tensorboard")):
        raise TicketError("--log tensorboard needs a package that is not installed: pip install 'ticketkit[log]'; or take --log csv")


def _logger(kind: str, folder: Path) -> Logger:
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

    with quiet():
        if kind == "tensorboard":
            return TensorBoardLogger(folder, name="logs")  # type: ignore[no-any-return]
        return CSVLogger(folder, name="logs", flush_logs_every_n_steps=1)  # type: ignore[no-any-return]  # so that kill -9 leaves a curve
