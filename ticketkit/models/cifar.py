"""ResNets for 32x32 images (He et al. 2016, section 4.2): ResNet-20, 32, 44 and 56, about 0.27 to 0.85 million parameters.

Names and arithmetic are exactly those of akamaster/pytorch_resnet_cifar10, so its checkpoints load unchanged: shortcut option A,
which takes every second pixel and pads the channels with zeros and so has no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
NAMES = tuple(BLOCKS)
STEM = ("conv1",)
HEAD = ("linear",)
WEIGHTS = "random"
SIDE = 32


class Shortcut(nn.Module):  # type: ignore[misc]
    """Option A: [N, C, H, W] -> [N, 2C, ceil(H/2), ceil(W/2)], the new channels zero, half before and half after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.padding = channels // 4

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class Block(nn.Module):  # type: ignore[misc]
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = Shortcut(channels) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):  # type: ignore[misc]
    """[N, 3, H, W] -> logits [N, num_classes]; three stages of 16, 32 and 64 channels, the last two halve the image."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def build(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network; it takes images of any size, so `image_size` changes nothing."""
    return ResNet(BLOCKS[name], num_classes)


def _stage(before: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(before, channels, stride), *rest)
