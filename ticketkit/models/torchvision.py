"""Every ResNet of torchvision, Wide ResNets and ResNeXts too, under torchvision's own names.

Images below 64 pixels get the usual small-image stem, a 3x3 convolution of stride 1 and no max-pooling, so that the last stage
still sees more than one pixel. The published 7x7 stem is then dropped from a checkpoint, and said so.

The grouped convolutions of ResNeXt are pruned like any other; the sparse kernels take no groups, so those layers stay dense ONNX.
"""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

from torch import nn
from torchvision import models as zoo
from torchvision.models.resnet import ResNet

from ticketkit.errors import ModelError

NAMES = tuple(name for name in zoo.list_models(module=zoo) if "resne" in name)
STEM = ("conv1",)
HEAD = ("fc",)
WEIGHTS = "IMAGENET1K_V1"  # the papers' weights; torchvision's DEFAULT (V2) was trained by another recipe
SIDE = 224
SMALL = 64


def build(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with torchvision's initialisation; images below 64 pixels get the small-image stem."""
    module: ResNet = zoo.get_model(name, weights=None, num_classes=num_classes)
    if image_size is not None and image_size < SMALL:
        module.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
        module.maxpool = nn.Identity()
    return module


def published(name: str, weights: str) -> dict[str, Any]:
    """torchvision's own weights, downloaded once into torch's cache and checked by hash.

    Raises:
        ModelError: no such weight name, or the download fails.
    """
    known = {entry.name: entry for entry in zoo.get_model_weights(name)}
    if weights not in known:
        raise ModelError(f"{name} has no weights {weights!r}; expected a file, random, or one of {', '.join(known)}")
    try:
        state: dict[str, Any] = known[weights].get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot download {weights} of {name} ({error}); fetch {known[weights].url} elsewhere and pass the file to --weights"
        ) from None
    return state
