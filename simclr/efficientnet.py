"""EfficientNets by their multipliers (Tan & Le 2019, arXiv:1905.11946): depth, width and resolution scaled together.

The networks are torchvision's, parameter names included; what torchvision has names for are B0 to B7 only.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

from simclr.model_zoo import remove_classifier, take_channels

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
SCALED = "efficientnet"  # the name of an encoder with multipliers of its own
_WEIGHTS_OF_TENSORFLOW = 5  # from B5 on torchvision normalises as the paper's program, whose weights it has


def scaled_efficientnet(
    *,
    width: float = 1.0,
    depth: float = 1.0,
    phi: int | None = None,
    stem: Literal["imagenet", "small"] = "imagenet",
    dropout: float = 0.2,
) -> nn.Module:
    """B0 with its channels and layers multiplied, its classifier of 1 000 classes included.

    Args:
        width: multiplies channels, rounded to multiples of 8 as published.
        depth: multiplies the layers of each stage, rounded up.
        phi: the compound coefficient: width, depth and dropout of B0 to B7, in their place.
        stem: "imagenet", five halvings of the image; "small" takes the first two of them out, so that 32 pixels end in
            a map of 4 x 4 where the original leaves 1 x 1. Names and shapes of weights are the same.
        dropout: before the classifier.
    Raises:
        ValueError: if a multiplier is not positive, phi is not from 0 to 7 or comes with multipliers, or the stem is
            another.
    """
    refuse_multipliers(width, depth, phi)
    if stem not in ("imagenet", "small"):
        raise ValueError(f"stem={stem!r} is not one of imagenet, small.")
    norm = None
    if phi is not None:
        width, depth, _, dropout = PHI[phi]
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01) if phi >= _WEIGHTS_OF_TENSORFLOW else None
    stages = [MBConvConfig(*stage, width_mult=width, depth_mult=depth) for stage in B0]
    network = EfficientNet(stages, dropout=dropout, norm_layer=norm)
    return take_strides_out(network) if stem == "small" else network


def refuse_multipliers(width: float, depth: float, phi: int | None) -> None:
    """Raise a ValueError for multipliers that are not positive, or that do not go with phi."""
    if not (width > 0 and depth > 0):
        raise ValueError(f"width={width}, depth={depth}: both multiply, and must be positive.")
    if phi is not None and phi not in PHI:
        raise ValueError(f"phi={phi} is not a whole number from 0 to {max(PHI)}, the EfficientNets B0 to B{max(PHI)}.")
    if phi is not None and (width, depth) != (1, 1):
        given = [f"{name}={value:g}" for name, value in (("width", width), ("depth", depth)) if value != 1]
        sets = f"width {PHI[phi][0]:g} and depth {PHI[phi][1]:g}"
        raise ValueError(f"phi={phi} means {sets}: leave {', '.join(given)} out, or phi.")


def build_scaled(
    name: str, image_size: int | None, channels: int = 3, *, width: float, depth: float, phi: int | None
) -> nn.Module:
    """A scaled EfficientNet without its classifier, for images of any size; see `simclr.encoders.build_encoder`."""
    encoder: Any = scaled_efficientnet(width=width, depth=depth, phi=phi)
    encoder.feature_dim = remove_classifier(encoder)
    if channels != 3:
        take_channels(encoder, channels)
    return encoder


def published_name(settings: Mapping[str, Any]) -> str:
    """What torchvision calls the network of an encoder's settings: `efficientnet_b3` for phi 3; else its own name."""
    name, phi = settings["encoder"], settings.get("phi")
    if name == SCALED and phi is None and (settings.get("width", 1), settings.get("depth", 1)) == (1, 1):
        phi = 0
    return name if name != SCALED or phi is None else f"{SCALED}_b{phi}"


def encoder_in_words(settings: Mapping[str, Any]) -> str:
    """An encoder's name and what scales it: "efficientnet, phi 3"; "resnet50, width 2, depth 1.5"."""
    scales = [(name, settings.get(name)) for name in ("phi", "width", "depth")]
    given = [f"{name} {value:g}" for name, value in scales if value is not None and (name == "phi" or value != 1)]
    return ", ".join([settings["encoder"], *given])


def remark(settings: Mapping[str, Any]) -> str | None:
    """For people: which image size goes with an EfficientNet, where the settings have another; None if nothing is odd.

    Args:
        settings: `encoder`, `image_size`, `stem` and `phi` of a method.
    """
    name, size, base = published_name(settings), settings["image_size"], PHI[0][2]
    if name not in EFFICIENTNETS:
        return None
    phi = int(name.removeprefix(f"{SCALED}_b"))
    published = PHI[phi][2]
    if settings["encoder"] != SCALED and settings.get("stem", "auto") in ("auto", "imagenet") and size <= 32:
        return f"{name} leaves a map of 1 x 1 of {size} px. With --model.stem small it is a map of 4 x 4."
    if phi == 0 or size == published:
        return None
    smaller = round(size * base / published)
    return (
        f"phi {phi} goes with images of {published} px, where phi 0 has {base}: a factor of {published / base:.2f}. "
        f"These have {size}, as if those of phi 0 had {smaller}. --model.image_size sets it."
    )


def take_strides_out(network: Any) -> nn.Module:
    """An EfficientNet of torchvision whose first two halvings of the image are taken out, in place."""
    first = next(m for m in network.features[2].modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
    network.features[0][0].stride = first.stride = (1, 1)
    return network
