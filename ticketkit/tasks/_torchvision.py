"""Data sets that torchvision reads, in its official layout, with its errors turned into one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit.errors import DataError
from ticketkit.tasks._data import Images, Labels


def read(dataset: type[Any], folder: Path, train: bool, expected: str) -> tuple[Images, Labels, tuple[str, ...]]:
    """Images uint8 [N, H, W] or [N, H, W, C], labels int64 [N], class names.

    Raises:
        DataError: files missing, truncated or altered.
    """
    try:
        loaded = dataset(root=folder, train=train, download=False)
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0].split(". You can")[0] or type(error).__name__
        raise DataError(f"{folder}: expected {expected}, complete and unaltered ({reason}); download it again") from None
    classes = tuple(str(name) for name in loaded.classes)
    return np.ascontiguousarray(loaded.data, np.uint8), np.asarray(loaded.targets, np.int64), classes
