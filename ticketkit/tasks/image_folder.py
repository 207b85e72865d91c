"""Your own photographs: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val/ in place of test/), as torchvision's ImageFolder.

Each image is scaled so that its shorter side has 256 pixels, and its centre of 256x256 is kept in memory (192 KiB an image);
training takes random 224x224 crops of it, mirrored by chance, and testing the centre.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ticketkit.errors import DataError
from ticketkit.tasks._data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Data, Images, Recipe, Split, Task, need, split

EXPECTED = "train/CLASS/*.jpg and test/CLASS/*.jpg (or val/CLASS/*.jpg)"
SIDE = 256


def load(folder: Path | None) -> Data:
    """Every image below FOLDER/train and FOLDER/test; the classes are train's folders in alphabetical order."""
    folder = need(folder, "image-folder", EXPECTED)
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    classes = _classes(folder / "train")
    if _classes(test) != classes:
        raise DataError(f"{test}: expected the class folders of {folder / 'train'}, got {', '.join(_classes(test))}")
    train = _read(folder / "train", classes)
    return split(train.images, train.labels, _read(test, classes), classes)


def _classes(folder: Path) -> tuple[str, ...]:
    found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    if not found:
        raise DataError(f"{folder}: expected a folder of images for each class; --data DIR needs {EXPECTED}")
    return found


def _read(folder: Path, classes: tuple[str, ...]) -> Split:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    if not files:
        raise DataError(f"{folder}: no image below it (of {', '.join(IMG_EXTENSIONS)})")
    return Split(np.stack([_image(path) for path, _ in files]), np.array([label for _, label in files], np.int64))


def _image(path: Path) -> Images:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a whole image ({error}); remove or replace it") from None
    width, height = (max(SIDE, round(side * SIDE / min(image.size))) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.uint8)


TASK = Task(
    name="image-folder",
    load=load,
    size=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model="resnet50",
    # P1, Table 1: VisDA2017, its set of photographs
    recipe=Recipe(epochs=20, batch_size=128, lr=1e-3, schedule="multistep", weight_decay=5e-4, milestones=(0.5,)),
    augmentation=Augmentation(flip=True),
)
