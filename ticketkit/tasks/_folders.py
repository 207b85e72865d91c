"""Photographs in one folder a class, as torchvision's ImageFolder lays them out.

Each image is scaled so that its shorter side has 256 pixels, and its centre of 256x256 is kept in memory (192 KiB an image).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ticketkit.errors import DataError
from ticketkit.tasks._data import Data, Images, Split, split

SIDE = 256


def read(train: Path, test: Path, expected: str, classes: tuple[str, ...] | None = None) -> Data:
    """Every image below TRAIN/CLASS and TEST/CLASS.

    Args:
        train, test: folders with one folder for each class, the same in both.
        expected: what --data needs, in words.
        classes: the folders' names; None: TRAIN's folders in alphabetical order.

    Returns:
        Images uint8 [N, 256, 256, 3].

    Raises:
        DataError: no class, other classes, no image, or a file that is not a whole image.
    """
    classes = classes or _classes(train, expected)
    for folder in (train, test):
        there = _classes(folder, expected)
        if there != classes:
            raise DataError(f"{folder}: expected the class folders {', '.join(classes)}, got {', '.join(there)}")
    known = _read(train, classes)
    return split(known.images, known.labels, _read(test, classes), classes)


def _classes(folder: Path, expected: str) -> tuple[str, ...]:
    found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    if not found:
        raise DataError(f"{folder}: expected a folder of images for each class; --data DIR needs {expected}")
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
    images = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
    for i, (path, _) in enumerate(files):
        images[i] = _image(path)
    return Split(images, np.array([label for _, label in files], np.int64))


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
