"""Handwritten digits (UCI "Optical Recognition", 1,797 images), the embedded default: scikit-learn carries the data.

The 8x8 images are doubled to 16x16, so that the stages of a small ResNet see 16, 8 and 4 pixels. Every fifth image is a
test image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from ticketkit.tasks._data import Augmentation, Data, Split, Task, split
from ticketkit.tasks._recipes import Recipe

MEAN, STD = 0.3053, 0.3760  # of all pixels


def load(folder: Path | None = None) -> Data:
    """The digits; `folder` is not needed."""
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    images = np.repeat(small.repeat(2, axis=1).repeat(2, axis=2)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return split(images[~test], labels[~test], Split(images[test], labels[test]), tuple("0123456789"))


TASK = Task(
    name="digits",
    load=load,
    size=16,
    mean=(MEAN,) * 3,
    std=(STD,) * 3,
    model="resnet20",
    recipe=Recipe(epochs=8, batch_size=64, lr=0.1, schedule="cosine", weight_decay=2e-4, name="digits"),
    augmentation=Augmentation(pad=2),
)
