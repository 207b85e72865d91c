"""What a task is made of: images in memory, the split, the augmentation, and the order of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ticketkit.errors import DataError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HELD_OUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: SGD with momentum, and a schedule over the steps of one round.

    `milestones` are fractions of the round, and each multiplies the learning rate by 0.1 (schedule "multistep"; the others are
    "cosine", down to 0 at the end, and "constant").
    """

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    weight_decay: float
    momentum: float = 0.9
    milestones: tuple[float, ...] = (91 / 182, 136 / 182)


# P1, Table 1: CIFAR-10, CIFAR-100, SVHN, Fashion-MNIST
SMALL_IMAGES = Recipe(epochs=182, batch_size=256, lr=0.1, schedule="multistep", weight_decay=2e-4)


@dataclass(frozen=True)
class Augmentation:
    """Random crops out of the stored image padded by `pad` pixels of the mean colour, and mirroring.

    The stored image may be larger than the network's (then a crop needs no padding); without augmentation the centre is taken.
    """

    pad: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, 3] and labels int64 [N]."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Split:
        """The images at `index`, copied."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """Training, held-out and test images; `classes` are the names by label."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash over all images and labels: two runs on one hash saw the same data."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(split.images.tobytes())
            digest.update(split.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        name: as on the command line.
        load: folder (None if not given) -> data; DataError if it is not what the task expects.
        size: height and width of the network's images, pixels.
        mean, std: per channel, of images scaled to [0, 1].
        model: default network.
        recipe: default training.
        augmentation: of training images.
        metric: name of what is measured on the test images.
    """

    name: str
    load: Callable[[Path | None], Data]
    size: int
    mean: Triple
    std: Triple
    model: str
    recipe: Recipe
    augmentation: Augmentation
    metric: str = "accuracy"


def split(images: Images, labels: Labels, test: Split, classes: tuple[str, ...]) -> Data:
    """Hold out a tenth of the training images, at least one; the same ones for every seed."""
    check(images, labels, len(classes))
    check(test.images, test.labels, len(classes))
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    held = max(1, round(HELD_OUT * len(labels)))
    whole = Split(images, labels)
    return Data(whole.take(np.sort(order[held:])), whole.take(np.sort(order[:held])), test, classes)


def check(images: Images, labels: Labels, classes: int) -> None:
    """Raise DataError unless these are images and labels that belong together."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"expected uint8 images [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or len(labels) < 2:
        raise DataError(f"expected one label for each of at least 2 images, got {len(labels)} for {len(images)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"expected labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}")


def need(folder: Path | None, task: str, expected: str) -> Path:
    """The data folder, or a DataError that says what should be in it."""
    if folder is None:
        raise DataError(f"task {task} needs --data DIR with {expected}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; task {task} needs --data DIR with {expected}")
    return folder


class Batches:
    """Training batches of one task, a pure function of (seed, round, epoch): nothing to save, nothing that leaks into a rewind.

    Each epoch is a new order of all images; an incomplete last batch is left out. Images come as float32 [B, 3, size, size],
    normalised, in channels_last memory, augmented all at once.
    """

    def __init__(self, task: Task, data: Split, batch_size: int) -> None:
        self.task, self.batch_size = task, min(batch_size, len(data))
        pad = task.augmentation.pad
        grey = np.rint(np.asarray(task.mean) * 255).astype(np.uint8)
        self.images = np.empty((len(data), *(side + 2 * pad for side in data.images.shape[1:3]), 3), np.uint8)
        self.images[...] = grey
        self.images[:, pad : pad + data.images.shape[1], pad : pad + data.images.shape[2]] = data.images
        self.labels = data.labels
        self.steps_per_epoch = len(data) // self.batch_size
        self._windows = np.lib.stride_tricks.sliding_window_view(self.images, (task.size, task.size), axis=(1, 2))

    def epoch(self, seed: int, round: int, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from batch number `first` on."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, round, epoch))))
        order = generator.permutation(len(self.labels))
        top = generator.integers(self._windows.shape[1], size=len(order))
        left = generator.integers(self._windows.shape[2], size=len(order))
        flip = generator.random(len(order)) < 0.5 if self.task.augmentation.flip else np.zeros(len(order), np.bool_)
        for start in range(first * self.batch_size, self.steps_per_epoch * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            crops = self._windows[order[part], top[part], left[part]].transpose(0, 2, 3, 1)  # [B, 3, H, W] -> [B, H, W, 3]
            crops[flip[part]] = crops[flip[part], :, ::-1]
            yield to_input(crops, self.task), torch.from_numpy(self.labels[order[part]])


def evaluation_batches(task: Task, data: Split, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, the centre of each, normalised."""
    top, left = ((side - task.size) // 2 for side in data.images.shape[1:3])
    for start in range(0, len(data), batch_size):
        part = slice(start, start + batch_size)
        centre = data.images[part, top : top + task.size, left : left + task.size]
        yield to_input(centre, task), torch.from_numpy(data.labels[part])


def to_input(images: Images, task: Task) -> Tensor:
    """uint8 [N, H, W, 3] -> normalised float32 [N, 3, H, W] in channels_last memory."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32).div_(255.0)
    return scaled.sub_(torch.tensor(task.mean)).div_(torch.tensor(task.std)).permute(0, 3, 1, 2)
