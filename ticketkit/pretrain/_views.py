"""Two random views of each image, as SimCLR and MoCo v2 train on (Chen et al. 2020, A and B.9; Chen et al. 2020b, section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ticketkit.tasks import Params, Task

AREA = (0.2, 1.0)  # of the image; MoCo's range, for SimCLR too, whose own begins at 0.08
RATIO = (3 / 4, 4 / 3)  # width to height
JITTERED, GREYED, BLURRED = 0.8, 0.2, 0.5  # probabilities
SIGMA = (0.1, 2.0)  # of the blur, pixels
BLUR_FROM = 64  # height in pixels of the smallest images that are blurred; SimCLR leaves CIFAR's sharp (B.9)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, rounded as in torchvision
AT_ONCE = 64 * 32 * 32  # pixels of each view rendered together, so that what is between stays in the cache


class TwoViews:
    """Two views of each image, drawn alike and apart: a crop resized to the network's size, mirrored or not, its colours changed.

    In this order: crop of a random area and ratio, bilinear without anti-aliasing; flip, where the task's images may be flipped;
    brightness, contrast, saturation and hue together for 80 % of the views, always in this order (the papers shuffle the four);
    grey for 20 %; Gaussian blur for half of the views of images from 64 pixels on. Crops come out of the stored image, which is
    taken to be square; those that would stick out are drawn again.

    A draw holds, float32 [count, 2] where not said otherwise:
        height, width   of the crop, fractions of the image's
        top, left       of the crop, fractions in [0, 1) of the room that it leaves
        flip, grey      bool
        brightness, contrast, saturation    factors, 1 for no change
        hue             turns of the colour circle, 0 for no change
        sigma           of the blur, pixels, 0 for none
    """

    def __init__(self, task: Task, strength: float = 0.5) -> None:
        """`strength`: s of SimCLR's colour distortion, which reaches 0.8 s (hue: 0.2 s); 0.5 on CIFAR and in MoCo v2."""
        self.task, self.strength = task, strength
        self.turns = math.ceil(6 * 0.2 * strength)

    def draw(self, count: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Everything random about the two views of `count` images."""
        shape = (count, 2)
        jittered = generator.random(shape) < JITTERED

        def around(centre: float, reach: float, least: float) -> NDArray[Any]:
            values = generator.uniform(max(centre - reach, least), centre + reach, shape)
            return np.where(jittered, values, centre).astype(np.float32)

        height, width = _crops(shape, generator)
        top, left = generator.random((2, *shape), np.float32)
        colours = {name: around(1.0, 0.8 * self.strength, 0.0) for name in ("brightness", "contrast", "saturation")}
        flip, grey, blurred = (generator.random((3, *shape)).T < (0.5, GREYED, BLURRED)).T
        sigma = generator.uniform(*SIGMA, shape).astype(np.float32)
        return {
            "height": height,
            "width": width,
            "top": top,
            "left": left,
            "flip": flip & self.task.augmentation.flip,
            **colours,
            "hue": around(0.0, 0.2 * self.strength, -0.5),
            "grey": grey,
            "sigma": np.where(blurred & (self.task.size >= BLUR_FROM), sigma, np.float32(0)),
        }

    def render(self, images: NDArray[np.uint8], params: Params) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, H, W, 3] and their B rows of a draw -> both views, each as `ticketkit.tasks.Views` says."""
        size, mean, std = self.task.size, torch.tensor(self.task.mean), torch.tensor(self.task.std)
        both = torch.empty((2, len(images), size, size, 3))
        step = max(1, AT_ONCE // size**2)
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            rows = {name: torch.from_numpy(np.ascontiguousarray(values[part])) for name, values in params.items()}
            seen = _cropped(torch.from_numpy(np.ascontiguousarray(images[part])), rows, size)
            _jitter(seen, rows, self.turns)
            _grey(seen, rows["grey"])
            _blur(seen, rows["sigma"])
            seen.sub_(mean.view(3, 1, 1, 1)).div_(std.view(3, 1, 1, 1))
            both[:, part] = seen.permute(2, 0, 3, 4, 1)
        first, second = both.permute(0, 1, 4, 2, 3)
        return first, second


def _crops(shape: tuple[int, int], generator: np.random.Generator) -> NDArray[np.float32]:
    """Heights and widths [2, *shape] of crops within a unit square: area uniform, ratio uniform in its logarithm."""
    sides = np.full((2, *shape), np.inf)
    while (outside := sides.max(axis=0) > 1).any():
        count = np.count_nonzero(outside)
        area = generator.uniform(*AREA, count)
        ratio = np.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1]), count))
        sides[:, outside] = np.sqrt([area / ratio, area * ratio])
    return sides.astype(np.float32)


def _cropped(images: Tensor, rows: Mapping[str, Tensor], size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> both crops, in [0, 1], float32 [B, 3, 2, size, size]."""
    batch, height, width, _ = images.shape
    down = _places(rows["height"], rows["top"], height, size)
    across = _places(rows["width"], rows["left"], width, size)
    across = torch.where(rows["flip"][..., None], across.flip(-1), across)
    grid = torch.stack(torch.broadcast_tensors(across[:, :, None], down[..., None]), dim=-1)  # [B, 2, size, size, 2]
    planes = images.permute(0, 3, 1, 2).contiguous().float().div_(255.0)
    seen: Tensor = F.grid_sample(planes, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return seen.view(batch, 3, 2, size, size)


def _places(fraction: Tensor, offset: Tensor, side: int, size: int) -> Tensor:
    """Where `size` pixels of a crop lie along one side of its image, in grid_sample's units [-1, 1], [B, 2, size].

    The crop is of whole pixels and ends at them: what lies beyond its outermost pixels takes their colour.
    """
    length = (fraction * side).round_().clamp_(1, side)[..., None]
    start = (offset[..., None] * (side - length + 1)).floor_()
    inside = ((torch.arange(size) + 0.5) * (length / size) - 0.5).clamp_(min=0).minimum(length - 1)
    return (2 * (start + inside) + 1) / side - 1


def _luma(seen: Tensor) -> Tensor:
    """[B, 3, ...] -> brightness of each pixel, [B, 1, ...]."""
    red, green, blue = seen.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _jitter(seen: Tensor, rows: Mapping[str, Tensor], turns: int) -> None:
    """Change brightness, contrast, saturation and hue of [B, 3, 2, size, size] in place, as torchvision's functions do.

    The hue is turned in `turns` equal parts, none of which may be more than a sixth of the circle.
    """
    brightness, contrast, saturation, hue = (
        rows[name][:, None, :, None, None] for name in ("brightness", "contrast", "saturation", "hue")
    )
    seen.mul_(brightness).clamp_(0, 1)
    mean = _luma(seen).mean(dim=(-2, -1), keepdim=True)
    seen.mul_(contrast).add_(mean.mul_(1 - contrast)).clamp_(0, 1)
    colourless = _luma(seen)
    seen.mul_(saturation).add_(colourless.mul_(1 - saturation)).clamp_(0, 1)
    for _ in range(turns):
        _turn(seen, hue * (6 / turns))


def _turn(seen: Tensor, sixths: Tensor) -> None:
    """Turn the hue of [B, 3, ...] in HSV by `sixths` of the circle, from -1 to 1, in place.

    Over the hue circle a channel is highest for two sixths, lowest for two, and linear between. Moved by e >= 0 sixths it is
    therefore linear in the colours too, cut off at their highest and lowest: red' = red - green + (1 - e)(highest + lowest) +
    (2e - 1) blue, and so on around the circle; for e < 0 the other two change places. No hue is computed.
    """
    red, green, blue = seen.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    middle = (high + low).mul_(1 - sixths.abs())
    after, before = (2 * -sixths.clamp(max=0) - 1), (2 * sixths.clamp(min=0) - 1)  # factors of the next and the last channel
    turned = [
        (own + middle).addcmul_(after, following).addcmul_(before, last).clamp_(low, high)
        for own, following, last in ((red, green, blue), (green, blue, red), (blue, red, green))
    ]
    torch.cat(turned, dim=1, out=seen)


def _grey(seen: Tensor, grey: Tensor) -> None:
    """Take the colours out of those [B, 3, 2, size, size] whose `grey` [B, 2] is set, in place."""
    at = grey.nonzero(as_tuple=True)
    seen[at[0], :, at[1]] = _luma(seen[at[0], :, at[1]]).expand(-1, 3, -1, -1)


def _blur(seen: Tensor, sigma: Tensor) -> None:
    """Blur those [B, 3, 2, size, size] whose `sigma` [B, 2] is not 0, in place; the window is a tenth of the image, at least 3."""
    at = sigma.nonzero(as_tuple=True)
    if not len(at[0]):
        return
    sharp = seen[at[0], :, at[1]]
    radius = max(1, sharp.shape[-1] // 20)
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma[at][:, None]).square_())  # [n, taps]
    window = (window / window.sum(1, keepdim=True)).repeat_interleave(3, dim=0)[:, None, None]  # [3n, 1, 1, taps]
    wide = F.pad(sharp, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3n, ...]
    wide = F.conv2d(wide, window, groups=len(window))
    seen[at[0], :, at[1]] = F.conv2d(wide, window.transpose(2, 3), groups=len(window)).view(sharp.shape)
