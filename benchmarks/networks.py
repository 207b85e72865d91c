"""The networks of the table of `zoo.py`: names, random weights, pruning, and their way to ONNX by torch's exporters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ticketkit import masks
from ticketkit.errors import DataError
from ticketkit.quickstart import weights

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPORTERS = {"dynamo": 18, "torchscript": 17}  # of torch.onnx.export -> opset
TASKS: dict[str, tuple[str, ...]] = {
    "classification": (
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t"),
        *("mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
        *("shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2"),
        *("timm/coatnet_nano_rw_224", "timm/cspresnet50", "timm/deit_tiny_patch16_224", "timm/dla34", "timm/edgenext_xx_small"),
        *("timm/ese_vovnet19b_dw", "timm/ghostnet_100", "timm/hrnet_w18_small", "timm/levit_128s", "timm/mixer_s16_224"),
        *("timm/mobilevit_xxs", "timm/poolformer_s12", "timm/repvgg_a0", "timm/res2net50_26w_4s", "timm/resmlp_12_224", "timm/rexnet_100"),
        *("timm/swin_tiny_patch4_window7_224", "timm/tf_efficientnet_b0", "timm/xception41"),
    ),
    "detection": (
        *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16"),
        "ssdlite320_mobilenet_v3_large",
    ),
    "segmentation": ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
}
SIDES = {"inception_v3": 299, "detection": 320, "ssd300_vgg16": 300}  # pixels of an image, where not 224 or what timm says


def build(network: str, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, randomly initialised, taking a batch of images and giving tensors."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = _make(network)
        for weight in weights(module).values():
            # as in ticketkit.quickstart: the largest weights of a layer carry most of its energy
            nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low, high in ((part.weight, 0.5, 1.0), (part.running_var, 0.5, 1.5), (part.running_mean, -0.2, 0.2)):
                    if tensor is not None:
                        tensor.uniform_(low, high)
            if hasattr(part, "score_thresh"):
                part.score_thresh = 0.0  # or else an untrained detector finds nothing, and nothing is compared
    return _flat(module, task_of(network)).eval()


def prune(module: nn.Module, sparsity: float) -> int:
    """Sets the weights of least magnitude to zero, of all layers but the first and the last together; their number before."""
    arrays = {name: weight.numpy() for name, weight in list(weights(module).items())[1:-1]}  # of the same memory
    for name, mask in masks.global_magnitude(arrays, masks.full(arrays), sparsity).items():
        arrays[name][~mask] = 0
    return sum(array.size for array in arrays.values())


def export_torch(module: nn.Module, exporter: str, image: int, task: str, path: Path) -> None:
    """Write the module as ONNX by one of torch's exporters, free batch but for detection."""
    import torch

    free = task != "detection"
    example = torch.zeros(2 if free else 1, 3, image, image)
    arguments: dict[str, object] = {"dynamo": False, "dynamic_axes": {"images": {0: "batch"}} if free else None}
    if exporter == "dynamo":
        arguments = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},) if free else None}
    torch.backends.mha.set_fastpath_enabled(False)  # an operator that ONNX has not
    with torch.no_grad():
        torch.onnx.export(module, (example,), str(path), input_names=["images"], opset_version=EXPORTERS[exporter], **arguments)


def task_of(network: str) -> str:
    """The task a network of the table is for; DataError for another."""
    for task, networks in TASKS.items():
        if network in networks:
            return task
    raise DataError(f"--network {network}: not in the table; expected one of {', '.join(sum(TASKS.values(), ()))}")


def side(network: str) -> int:
    """Height and width of an image."""
    return SIDES.get(network) or SIDES.get(task_of(network), 224)


def _make(network: str) -> nn.Module:
    if network.startswith("timm/"):
        import timm

        return timm.create_model(network.removeprefix("timm/"), pretrained=False)
    from torchvision import models as zoo

    backbone = {} if task_of(network) == "classification" else {"weights_backbone": None}
    extra = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}  # minutes of truncated normal numbers
    return zoo.get_model(network, weights=None, **backbone, **extra)


def _flat(module: nn.Module, task: str) -> nn.Module:
    """A module of one tensor in, a tuple of tensors out; torchvision's detectors take a list of images and give a list of dictionaries."""
    from torch import nn

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
            found = self.network([images[0]] if task == "detection" else images)
            found = found[0] if task == "detection" else found
            return tuple(found.values()) if isinstance(found, dict) else found

    return Flat()
