"""Your own photographs: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val/ in place of test/), as torchvision's ImageFolder.

Training takes random 224x224 crops of the 256x256 pixels kept of each, mirrored by chance, and testing the centre.
"""

from __future__ import annotations

from pathlib import Path

from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Task, need
from ticketkit.tasks._folders import read
from ticketkit.tasks._recipes import RECIPES

EXPECTED = "train/CLASS/*.jpg and test/CLASS/*.jpg (or val/CLASS/*.jpg)"


def load(folder: Path | None) -> Data:
    """Every image below FOLDER/train and FOLDER/test; the classes are train's folders in alphabetical order."""
    folder = need(folder, "image-folder", EXPECTED)
    return read(folder / "train", folder / "test" if (folder / "test").is_dir() else folder / "val", EXPECTED)


TASK = Task(
    name="image-folder",
    load=load,
    size=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet50",
    recipe=RECIPES["paper-visda"],  # P1's set of photographs
    augmentation=Augmentation(flip=True),
)
