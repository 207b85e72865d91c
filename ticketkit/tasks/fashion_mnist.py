"""Fashion-MNIST (Xiao et al. 2017), grey images repeated over three channels; settings of P1, Table 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from ticketkit.tasks._data import Augmentation, Data, Split, Task, need, split
from ticketkit.tasks._recipes import RECIPES
from ticketkit.tasks._torchvision import read

EXPECTED = "FashionMNIST/raw/ (the four official idx files, unpacked)"
MEAN, STD = 0.2860, 0.3530  # of the training pixels


def load(folder: Path | None) -> Data:
    """60,000 training and 10,000 test images of 28x28 pixels from FOLDER/FashionMNIST/raw."""
    folder = need(folder, "fashion-mnist", EXPECTED)
    images, labels, classes = read(FashionMNIST, folder, True, EXPECTED)
    test_images, test_labels, _ = read(FashionMNIST, folder, False, EXPECTED)
    colour = [np.repeat(grey[..., None], 3, axis=3) for grey in (images, test_images)]
    return split(colour[0], labels, Split(colour[1], test_labels), classes)


TASK = Task(
    name="fashion-mnist",
    load=load,
    size=28,
    mean=(MEAN,) * 3,
    std=(STD,) * 3,
    model="resnet20",
    recipe=RECIPES["paper-fashion-mnist"],
    augmentation=Augmentation(pad=2, flip=True),
)
