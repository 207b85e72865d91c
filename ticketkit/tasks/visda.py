"""VisDA2017, classification (Peng et al. 2017): trained on 152,397 rendered images, tested on 55,388 photographs, 12 classes;
settings of P1, Table 1.

The photographs are the challenge's validation set, whose labels are public. All of it in memory are 38 GiB, twice that while it is
read. Crops as in `image_folder`.
"""

from __future__ import annotations

from pathlib import Path

from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Task, need
from ticketkit.tasks._folders import read
from ticketkit.tasks._recipes import RECIPES

CLASSES = ("aeroplane", "bicycle", "bus", "car", "horse", "knife", "motorcycle", "person", "plant", "skateboard", "train", "truck")
EXPECTED = "train/CLASS/* and validation/CLASS/* (VisDA2017's two archives, unpacked)"


def load(folder: Path | None) -> Data:
    """Every image below FOLDER/train and FOLDER/validation."""
    folder = need(folder, "visda", EXPECTED)
    return read(folder / "train", folder / "validation", EXPECTED, CLASSES)


TASK = Task(
    name="visda",
    load=load,
    size=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet50",
    recipe=RECIPES["paper-visda"],
    augmentation=Augmentation(flip=True),
)
