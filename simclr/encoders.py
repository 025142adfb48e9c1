"""Encoders f by name: images -> representations h. The only place that chooses a stem, a ResNet's first layers."""

import inspect
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from simclr.efficientnet import EFFICIENTNETS, SCALED, build_scaled, refuse_multipliers, take_strides_out
from simclr.image_sizes import build_for_size, warn_of_unsuitable_stem
from simclr.model_zoo import build_timm, build_torchvision, timm_knows, torchvision_names, unknown_encoder
from simclr.resnet import DEPTHS, Norm, ResNet, Shortcut, guard_projections

Stem = Literal["auto", "small", "small_stride2", "imagenet"]

RESNETS = {f"resnet{depth}": depth for depth in sorted(DEPTHS)}

# ResNets of the ImageNet family were published for 224 px; everyone who trains them at 32 px (CIFAR) or 64 px
# (Tiny ImageNet) takes the 7 x 7 stem and the max-pool out, which would leave 1 x 1 or 2 x 2 pixels to the last stage.
LARGEST_SMALL_IMAGE = 64


def build_encoder(
    name: str,
    *,
    stem: Stem = "auto",
    image_size: int | None = None,
    width: float = 1.0,
    depth: float = 1.0,
    phi: int | None = None,
    shortcut: Shortcut = "B",
    zero_init: bool = True,
    norm: Norm = "batch",
    channels: int = 3,
) -> nn.Module:
    """An encoder with random weights, images (N, C, H, W) -> h (N, F). Nothing is ever downloaded.

    Args:
        name: "resnet18" ... "resnet152" (state_dict keys of torchvision, minus `fc`), "resnet8" ... "resnet110" (the
            CIFAR networks), "efficientnet" (torchvision's keys too), scaled by width and depth or by phi, any other
            classification model of torchvision, or any model of timm if it is installed; the first that knows the name
            builds it. The classifier is taken off.
        stem: "small" (3 x 3 convolution), "small_stride2" (with stride 2), "imagenet" (7 x 7, stride 2, max-pool), or
            "auto": small for images up to 64 px, ImageNet's above, as published where image_size is None. Of an
            EfficientNet "small" has two halvings of the image fewer; by torchvision's names "auto" is as published.
        image_size: side of the images in pixels. Decides "auto", and sizes models that are made for one size
            (vision transformers); None leaves those at the size they were published with.
        width: multiplies the channels of every stage: SimCLR's ResNet-50 (2x) and (4x) are resnet50 with width 2, 4.
            Of an EfficientNet they are rounded to multiples of 8.
        depth: multiplies the blocks of every stage, rounded up, of a ResNet or EfficientNet.
        phi: of "efficientnet": 0 to 7 for the width and depth of B0 to B7 (Tan & Le 2019), whose images grow with them,
            from 224 to 600 px: what `simclr.efficientnet.PHI` says, and image_size decides.
        shortcut: "A", "B", "C" of He et al. 2015, or "none" for a plain network. The CIFAR networks were published
            with "A", those for ImageNet with "B".
        zero_init: start every residual branch at zero, as google-research/simclr does.
        norm: "batch", or "none" for convolutions with a bias and no BN; like the two before it for the ResNets named
            above.
        channels: C, of the images: the first convolution has so many inputs.
    Returns:
        The module, on the default device, in training mode; its attribute `feature_dim` is F.
    Raises:
        ValueError: for a name that nobody knows, an option that the model does not have, a value out of its range, or
            images of a size that the model cannot take.
    Warns:
        UserWarning: if an explicit stem does not suit image_size.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1 pixel.")
    if channels < 1:
        raise ValueError(f"channels={channels} must be at least 1.")
    multipliers = dict[str, Any](width=width, depth=depth, phi=phi)
    options = dict[str, Any](shortcut=shortcut, zero_init=zero_init, norm=norm)
    if name in RESNETS:
        refuse_unheard(name, {"phi": phi})
        if stem != "auto" and image_size is not None:
            warn_of_unsuitable_stem(stem, image_size)
        options |= {"stem": choose_stem(name, stem, image_size), "width": width, "deeper": depth}
        return ResNet(RESNETS[name], **options, image_channels=channels)

    build: Any = build_torchvision if name in torchvision_names() else build_timm if timm_knows(name) else None
    scales = name == SCALED or name in EFFICIENTNETS
    others = {"stem": "auto" if scales and stem in ("small", "imagenet") else stem}
    if name == SCALED:
        refuse_unheard(name, others | options)
        refuse_multipliers(**multipliers)
        build = partial(build_scaled, **multipliers)
    elif build is None:
        raise ValueError(unknown_encoder(name, encoder_names()))
    else:
        refuse_unheard(name, others | multipliers | options)
    small = scales and choose_stem(name, stem, image_size) == "small"
    build = partial(build, channels=channels)
    encoder = build(name, None) if image_size is None else build_for_size(build, name, image_size, channels)
    return guard_projections(take_strides_out(encoder) if small else encoder)  # CPUs: see there


def encoder_names() -> list[str]:
    """The names that build_encoder knows without timm: the ResNets by depth, the scaled EfficientNet, then
    torchvision's other models."""
    return [*RESNETS, SCALED, *(name for name in torchvision_names() if name not in RESNETS)]


def choose_stem(name: str, stem: str, image_size: int | None) -> str:
    """What a stem means for an encoder: `auto` is decided for a ResNet and for the scaled EfficientNet."""
    if stem != "auto" or name not in (*RESNETS, SCALED):
        return stem
    if image_size is None:  # 4 stages: the ImageNet family; 3: CIFAR's
        return "small" if name in RESNETS and len(DEPTHS[RESNETS[name]][1]) == 3 else "imagenet"
    return "small" if image_size <= LARGEST_SMALL_IMAGE else "imagenet"


def default_encoder(stem: Stem, image_size: int, accelerated: bool | None = None) -> tuple[str, Stem]:
    """The name and the stem that `encoder=auto` means: what a GPU trains, or a CPU.

    Args:
        stem: as asked for; only `auto` is decided here.
        image_size: side of the images, in pixels.
        accelerated: whether there is a GPU; None to look.
    """
    if torch.accelerator.is_available() if accelerated is None else accelerated:
        return "resnet18", stem
    return "resnet8", "small_stride2" if stem == "auto" and image_size <= LARGEST_SMALL_IMAGE else stem


def refuse_unheard(name: str, options: dict[str, object]) -> None:
    """Raise a ValueError for options of other networks that were given for this one."""
    # A default may simply not have been touched, so only other values are a wish that goes unheard.
    parameters = inspect.signature(build_encoder).parameters
    unheard = {option: value for option, value in options.items() if value != parameters[option].default}
    if not unheard:
        return
    given = ", ".join(f"{option}={value!r}" for option, value in unheard.items())
    if name in EFFICIENTNETS and unheard.keys() <= {"width", "depth", "phi"}:
        raise ValueError(f"{name} has no {given}: its name says how it is scaled. Give encoder={SCALED} with {given}.")
    owners = [SCALED] if unheard.keys() <= {"phi"} else RESNETS
    raise ValueError(f"{name} has no {given}. These options are for {', '.join(owners)}.")
