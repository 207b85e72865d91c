"""SVHN, cropped digits (Netzer et al. 2011); settings of P1, Table 1.

Never mirrored: a mirrored digit is another sign. Normalised by ImageNet's statistics, as the networks it is reached from.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import SVHN

from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Images, Labels, Split, Task, need, split
from ticketkit.tasks._recipes import RECIPES
from ticketkit.tasks._torchvision import read

EXPECTED = "train_32x32.mat and test_32x32.mat (the official cropped digits)"


class Digits(SVHN):  # type: ignore[misc]
    """torchvision's SVHN with the interface of its CIFAR10: `train`, `targets` and images [N, H, W, 3]. The file's label 10 is 0."""

    classes = tuple("0123456789")
    data: Images
    targets: Labels

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        super().__init__(root, split="train" if train else "test", download=download)
        self.data, self.targets = self.data.transpose(0, 2, 3, 1), self.labels


def load(folder: Path | None) -> Data:
    """73,257 training and 26,032 test images of 32x32 pixels from FOLDER."""
    folder = need(folder, "svhn", EXPECTED)
    images, labels, classes = read(Digits, folder, True, EXPECTED)
    test_images, test_labels, _ = read(Digits, folder, False, EXPECTED)
    return split(images, labels, Split(test_images, test_labels), classes)


TASK = Task(
    name="svhn",
    load=load,
    size=32,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet20",
    recipe=RECIPES["paper-svhn"],
    augmentation=Augmentation(pad=4),
)
