"""EfficientNets by their multipliers (Tan & Le 2019, arXiv:1905.11946): depth, width and resolution scaled together.

The networks are torchvision's, parameter names included; what torchvision has names for are B0 to B7 only.
"""

from typing import Any, Literal

from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

# Table 1, B0: expansion, kernel, stride, channels in and out, layers of each stage.
B0 = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
# phi: width and depth multiplier, image size in pixels, dropout of the classifier, as published with the weights.
PHI = {
    0: (1.0, 1.0, 224, 0.2),
    1: (1.0, 1.1, 240, 0.2),
    2: (1.1, 1.2, 260, 0.3),
    3: (1.2, 1.4, 300, 0.3),
    4: (1.4, 1.8, 380, 0.4),
    5: (1.6, 2.2, 456, 0.4),
    6: (1.8, 2.6, 528, 0.5),
    7: (2.0, 3.1, 600, 0.5),
}
EFFICIENTNETS = tuple(f"efficientnet_b{phi}" for phi in PHI)  # torchvision's names


def scaled_efficientnet(
    *, width: float = 1.0, depth: float = 1.0, stem: Literal["imagenet", "small"] = "imagenet", dropout: float = 0.2
) -> nn.Module:
    """B0 with its channels and layers multiplied, its classifier of 1 000 classes included.

    Args:
        width: multiplies channels, rounded to multiples of 8 as published.
        depth: multiplies the layers of each stage, rounded up.
        stem: "imagenet", five halvings of the image; "small" takes the first two of them out, so that 32 pixels end in
            a map of 4 x 4 where the original leaves 1 x 1. Names and shapes of weights are the same.
        dropout: before the classifier.
    Raises:
        ValueError: if a multiplier is not positive, or the stem is another.
    """
    if not (width > 0 and depth > 0):
        raise ValueError(f"width={width}, depth={depth}: both multiply, and must be positive.")
    if stem not in ("imagenet", "small"):
        raise ValueError(f"stem={stem!r} is not one of imagenet, small.")
    stages = []
    for expansion, kernel, stride, channels_in, channels_out, layers in B0:
        stages.append(MBConvConfig(expansion, kernel, stride, channels_in, channels_out, layers, width, depth))
    network = EfficientNet(stages, dropout=dropout)
    return take_strides_out(network) if stem == "small" else network


def take_strides_out(network: Any) -> nn.Module:
    """An EfficientNet of torchvision whose first two halvings of the image are taken out, in place."""
    first = next(m for m in network.features[2].modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
    network.features[0][0].stride = first.stride = (1, 1)
    return network
