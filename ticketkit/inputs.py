"""Inputs of a network from files: numpy arrays and photographs. Pillow is needed for photographs only."""

from __future__ import annotations

import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from ticketkit.errors import DataError, TicketError
from ticketkit.formats import Array
from ticketkit.ticket import write_atomic

IMAGE_KEY = "ticketkit.image"  # metadata of an exported run: its normalisation and class names, as JSON
ASSUMED_SIDE = 224
CROP = 224 / 256  # of the shorter side, the usual evaluation transform of ImageNet models


@dataclass(frozen=True)
class ImageRule:
    """How photographs become inputs: mean and standard deviation per channel of pixels in [0, 1], and what the classes are called."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    classes: tuple[str, ...] = ()
    resize: int | None = None

    @classmethod
    def stated(cls, metadata: Mapping[str, str]) -> ImageRule:
        """The rule a model file states, else that of ImageNet; DataError for a damaged one."""
        if IMAGE_KEY not in metadata:
            return cls()
        try:
            rule = json.loads(metadata[IMAGE_KEY])
            return cls(tuple(rule["mean"]), tuple(rule["std"]), tuple(rule["classes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"metadata {IMAGE_KEY}: expected mean, std and classes as JSON, got {error}; export the run again") from None

    def changed(self, mean: Sequence[float] | None, std: Sequence[float] | None, resize: int | None) -> ImageRule:
        """The rule with what the user gave instead; DataError for a standard deviation that is not positive."""
        rule = replace(self, mean=tuple(mean or self.mean), std=tuple(std or self.std), resize=resize or self.resize)
        if min(rule.std) <= 0:
            raise DataError(f"--std: expected positive numbers, got {list(rule.std)}")
        return rule


def gather(files: Sequence[str], declared: Sequence[Any], rule: ImageRule, batch: int = 1, seed: int = 0) -> dict[str, Array]:
    """An array for every input of a model.

    Args:
        files: `FILE` for the first input or `NAME=FILE`; several for one input are stacked along the batch. Inputs without a file
            get standard normal numbers (zeros where they are not floats).
        declared: `session.get_inputs()`.
        rule: for photographs.
        batch: of random inputs, where the model leaves it free.

    Raises:
        DataError: a file that is missing or unreadable, or an unknown input name.
    """
    known = {info.name: info for info in declared}
    given: dict[str, list[Array]] = defaultdict(list)
    for text in files:
        name, _, file = text.partition("=") if "=" in text and not Path(text).exists() else (next(iter(known)), "", text)
        if name not in known:
            raise DataError(f"--input {text}: the model has no input {name!r}; expected one of {', '.join(known)}")
        given[name].append(read_input(Path(file), known[name].shape, rule))
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, info in known.items():
        if name in given:
            feeds[name] = _stacked(name, given[name])
            continue
        shape = [d if isinstance(d, int) else batch if i == 0 else ASSUMED_SIDE if i > 1 else 1 for i, d in enumerate(info.shape)]
        kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}.get(info.type)
        whole = {"tensor(int32)": np.int32, "tensor(bool)": np.bool_}.get(info.type, np.int64)
        feeds[name] = rng.standard_normal(shape).astype(kind) if kind else np.zeros(shape, whole)
    return feeds


def read_input(path: Path, shape: Sequence[int | str | None], rule: ImageRule) -> Array:
    """One .npy array as it is, or a photograph as f32 [1, C, H, W] for a model input of that declared shape.

    Raises:
        DataError: missing, unreadable, or of a kind the input does not take.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a .npy array or an image")
    if path.suffix == ".npy":
        try:
            with path.open("rb") as file:  # not np.load, which takes an archive of arrays too
                array: Array = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, OSError, EOFError, MemoryError, OverflowError, SyntaxError, TokenError) as error:  # also of the header
            raise DataError(f"{path}: not a .npy array ({' '.join(str(error).split())})") from None
        return array
    if len(shape) != 4 or shape[1] not in (1, 3, "channels", None):
        raise DataError(f"{path}: an image needs an input [N, 3, H, W] or [N, 1, H, W], the model has {list(shape)}; give a .npy file")
    return _photograph(path, shape, rule)


def _photograph(path: Path, shape: Sequence[int | str | None], rule: ImageRule) -> Array:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"{path}: images need Pillow; pip install pillow, or give a .npy file") from None
    height, width = (d if isinstance(d, int) else ASSUMED_SIDE for d in shape[2:])
    channels = 1 if shape[1] == 1 else 3
    if not len(rule.mean) == len(rule.std) == 3:
        raise DataError(f"--mean, --std: expected 3 numbers each, got {list(rule.mean)} and {list(rule.std)}")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from None
    if image.size != (width, height):
        shorter = rule.resize or round(max(height, width) / CROP)
        scale = shorter / min(image.size)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    mean, std = (np.array(v, np.float32) if channels == 3 else np.array(v, np.float32).mean(keepdims=True) for v in (rule.mean, rule.std))
    normal: Array = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])
    return normal


def _stacked(name: str, arrays: list[Array]) -> Array:
    if len(arrays) > 1 and any(a.shape[1:] != arrays[0].shape[1:] or not a.ndim for a in arrays):
        raise DataError(f"input {name!r}: files of different shapes cannot form one batch: {[list(a.shape) for a in arrays]}")
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def save(path: str, outputs: Mapping[str, Array]) -> None:
    """Write outputs as one .npz file; DataError where that is impossible."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not np.savez: an output may be called "file", which is its own argument
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    try:
        write_atomic(path, buffer.getvalue())
    except TicketError as error:
        raise DataError(str(error)) from None


def describe(outputs: Mapping[str, Array], files: Sequence[str], rule: ImageRule) -> list[str]:
    """Lines to print: the likeliest classes of each image if the first output is a row of scores per image, else statistics."""
    first = next(iter(outputs.values()))
    images = [file for file in files if not file.endswith(".npy")]
    if images and first.ndim == 2 and len(first) == len(images):
        lines = []
        for file, row in zip(images, first, strict=True):
            lines.append(file)
            lines += [f"  {odds:6.2%}  {rule.classes[i] if i < len(rule.classes) else f'class {i}'}" for i, odds in top(row)]
        return lines
    return [f"{name}: {_statistics(array)}" for name, array in outputs.items()]


def _statistics(array: Array) -> str:
    text = f"{array.dtype} {list(array.shape)}"
    if not array.size or array.dtype.kind not in "fiu":
        return text
    return f"{text}, min {array.min():.6g}, max {array.max():.6g}, mean {array.mean():.6g}, std {array.std():.6g}"


def top(logits: Array, count: int = 5) -> list[tuple[int, float]]:
    """The `count` largest entries of logits [K] as (class index, softmax probability), best first."""
    best = np.argsort(-logits, kind="stable")[:count]
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return [(int(i), float(odds[i] / odds.sum())) for i in best]
