"""What a task is made of: images in memory, the split, the augmentation, and the order of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ticketkit.errors import DataError
from ticketkit.tasks._recipes import Recipe

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Triple = tuple[float, float, float]
Params = Mapping[str, NDArray[Any]]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HELD_OUT = 0.1


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
            for array in (split.images, split.labels):
                digest.update(np.ascontiguousarray(array).data)  # no copy of what is contiguous: VisDA has 38 GiB
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


class Views(Protocol):
    """Augmentation in two steps, so that a rank can render its own rows of what was drawn for the whole batch."""

    def draw(self, count: int, generator: np.random.Generator) -> Params:
        """The random parameters of `count` images, arrays [count, ...]."""

    def render(self, images: Images, params: Params) -> tuple[Tensor, ...]:
        """Images uint8 [B, H, W, 3] -> one tensor a view, normalised float32 [B, 3, size, size] in channels_last memory."""


class Crops:
    """Supervised views: one random crop out of each image, padded by the mean colour, and mirrored by chance; all images at once."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def draw(self, count: int, generator: np.random.Generator) -> Params:
        """Where the crops lie, as fractions of the room there is, and which are mirrored; arrays [count]."""
        top, left = generator.random(count), generator.random(count)
        flip = generator.random(count) < 0.5 if self.task.augmentation.flip else np.zeros(count, np.bool_)
        return {"top": top, "left": left, "flip": flip}

    def render(self, images: Images, params: Params) -> tuple[Tensor]:
        """uint8 [B, H, W, 3] -> float32 [B, 3, size, size], normalised."""
        pad, size = self.task.augmentation.pad, self.task.size
        grey = np.rint(np.asarray(self.task.mean) * 255).astype(np.uint8)
        padded = np.empty((len(images), *(side + 2 * pad for side in images.shape[1:3]), 3), np.uint8)
        padded[...] = grey
        padded[:, pad : pad + images.shape[1], pad : pad + images.shape[2]] = images
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        top, left = ((params[key] * count).astype(np.intp) for key, count in zip(("top", "left"), windows.shape[1:3], strict=True))
        crops = windows[np.arange(len(images)), top, left].transpose(0, 2, 3, 1)  # [B, 3, H, W] -> [B, H, W, 3]
        crops[params["flip"]] = crops[params["flip"], :, ::-1]
        return (to_input(crops, self.task),)


class Batches:
    """Training batches of one split, a pure function of (seed, round, epoch): nothing to save, nothing that leaks into a rewind.

    Each epoch is a new order of all images; an incomplete last batch is left out. With several ranks each renders its rows of the
    same global batches.

    Args:
        data: the images.
        views: how they are augmented.
        batch_size: images of a global batch.
        rank, ranks: which equal part of each batch is yielded.

    Raises:
        DataError: a batch cannot be divided among the ranks.
    """

    def __init__(self, data: Split, views: Views, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.data, self.views, self.batch_size = data, views, min(batch_size, len(data))
        if self.batch_size % ranks:
            raise DataError(f"batch size: expected a multiple of {ranks}, the number of processes, got {self.batch_size}")
        self.steps_per_epoch = len(data) // self.batch_size
        self._rows = np.arange(rank * (self.batch_size // ranks), (rank + 1) * (self.batch_size // ranks))

    def epoch(self, seed: int, round: int, epoch: int, first: int = 0) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """(views, labels int64) of the batches of one epoch, from batch number `first` on."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, round, epoch))))
        order = generator.permutation(len(self.data))
        params = self.views.draw(len(order), generator)
        for batch in range(first, self.steps_per_epoch):
            rows = batch * self.batch_size + self._rows
            views = self.views.render(self.data.images[order[rows]], {key: drawn[rows] for key, drawn in params.items()})
            yield views, torch.from_numpy(self.data.labels[order[rows]])


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
