"""CIFAR-10 (Krizhevsky 2009) in its official layout; settings of P1, Table 1.

Normalised by ImageNet's statistics, as the published CIFAR ResNets and every ImageNet model were trained.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import CIFAR10

from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Split, Task, need, split
from ticketkit.tasks._recipes import RECIPES
from ticketkit.tasks._torchvision import read

EXPECTED = "cifar-10-batches-py/ (the official python version of CIFAR-10)"


def load(folder: Path | None) -> Data:
    """50,000 training and 10,000 test images from FOLDER/cifar-10-batches-py."""
    folder = need(folder, "cifar10", EXPECTED)
    images, labels, classes = read(CIFAR10, folder, True, EXPECTED)
    test_images, test_labels, _ = read(CIFAR10, folder, False, EXPECTED)
    return split(images, labels, Split(test_images, test_labels), classes)


TASK = Task(
    name="cifar10",
    load=load,
    size=32,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet20",
    recipe=RECIPES["paper-cifar10"],
    augmentation=Augmentation(pad=4, flip=True),
)
