"""CIFAR-100 (Krizhevsky 2009), fine labels; settings of P1, Table 1.

Reads the official layout, or one `cifar100.npz` with x_train, y_train, x_test, y_test and classes (uint8 [N, 32, 32, 3], labels
0..99), the form in which subsets travel; the data's hash in run.json tells them apart.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

from ticketkit.errors import DataError
from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Split, Task, need, split
from ticketkit.tasks._recipes import RECIPES
from ticketkit.tasks._torchvision import read

EXPECTED = "cifar-100-python/ (the official python version of CIFAR-100) or cifar100.npz"


def load(folder: Path | None) -> Data:
    """From FOLDER/cifar-100-python, or FOLDER/cifar100.npz where that is missing."""
    folder = need(folder, "cifar100", EXPECTED)
    if (folder / "cifar100.npz").is_file() and not (folder / "cifar-100-python").is_dir():
        return _load_npz(folder / "cifar100.npz")
    images, labels, classes = read(CIFAR100, folder, True, EXPECTED)
    test_images, test_labels, _ = read(CIFAR100, folder, False, EXPECTED)
    return split(images, labels, Split(test_images, test_labels), classes)


def _load_npz(path: Path) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
            classes = tuple(str(name) for name in file["classes"])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected arrays x_train, y_train, x_test, y_test, classes ({error}); copy it again") from None
    return split(x_train, y_train.astype(np.int64), Split(x_test, y_test.astype(np.int64)), classes)


TASK = Task(
    name="cifar100",
    load=load,
    size=32,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet32",
    recipe=RECIPES["paper-cifar100"],
    augmentation=Augmentation(pad=4, flip=True),
)
