"""Parameters and multiply-adds of published networks, counted on shapes alone."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simclr.efficientnet import PHI, scaled_efficientnet
from simclr.encoders import RESNETS
from simclr.resnet import Bottleneck, ResNet


def count(
    encoder: str,
    *,
    image_size: int = 224,
    shortcut: str = "B",
    stem: str = "imagenet",
    classes: int = 1000,
    stride_first: bool = False,
    width: float = 1.0,
    depth: float = 1.0,
) -> dict[str, float]:
    """Parameters in millions and multiply-adds in billions of a network with its classifier.

    Multiply-adds are those of convolutions and matrix products, as the papers count them.

    Args:
        encoder: resnet8 ... resnet152, efficientnet_b0 ... b7, or efficientnet, by its multipliers.
        image_size: side of the image, in pixels.
        shortcut, stem: of a ResNet; of an EfficientNet, imagenet or small.
        classes: of the classifier.
        stride_first: a bottleneck's stride in its first 1 x 1 convolution, as He et al. have it.
        width, depth: multipliers of a ResNet or of `efficientnet`.
    Returns:
        "parameters" (M) and "multiply_adds" (G).
    Raises:
        ValueError: for another network.
    """
    with torch.device("meta"):
        if encoder in RESNETS:
            options: dict[str, Any] = {"shortcut": shortcut, "stem": stem, "width": width, "deeper": depth}
            body = ResNet(RESNETS[encoder], **options, zero_init=False, norm="batch")
            network: nn.Module = nn.Sequential(body, nn.Linear(body.feature_dim, classes))
        elif encoder == "efficientnet":
            network = scaled_efficientnet(width=width, depth=depth, stem="small" if stem == "small" else "imagenet")
        elif encoder.startswith("efficientnet_b") and encoder[14:].isdigit() and int(encoder[14:]) in PHI:
            phi = int(encoder.removeprefix("efficientnet_b"))
            network = scaled_efficientnet(phi=phi, stem="small" if stem == "small" else "imagenet")
        else:
            raise ValueError(f"encoder={encoder}: counts are for {', '.join(RESNETS)} and efficientnet_b0 to b7.")
        if stride_first:
            _move_strides(network)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network.eval()(torch.empty(1, 3, image_size, image_size))
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters / 1e6, "multiply_adds": counter.get_total_flops() / 2 / 1e9}


def _move_strides(network: nn.Module) -> None:
    for block in network.modules():
        if isinstance(block, Bottleneck) and block.conv2.stride != (1, 1):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
