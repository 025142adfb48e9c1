"""Which image sizes a network takes, found out by its shapes alone, and what to say of one that does not suit."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn


def warn_of_unsuitable_stem(stem: str, image_size: int) -> None:
    """Warn where an explicit stem throws away most of an image, or keeps more than it can use."""
    # Both stems are in honest use from 64 to 127 px (Tiny ImageNet, STL-10).
    if stem == "imagenet" and image_size < 64:
        effect = f"leaves {-(-image_size // 4)} of {image_size} px to the first block; 'small' keeps them all"
    elif stem == "small" and image_size >= 128:
        effect = f"runs the first blocks on all {image_size} px, 16 times the work of 'imagenet'"
    else:
        return
    warnings.warn(f"stem={stem!r} at image_size={image_size} {effect}.", UserWarning, stacklevel=3)


def build_for_size(
    build: Callable[[str, int | None], nn.Module], name: str, image_size: int, channels: int = 3
) -> nn.Module:
    """A model of torchvision or timm, seen to take images of this size and so many channels.

    Raises:
        ValueError: if it does not take them, with the size that it needs.
    """
    try:
        encoder = build(name, image_size)
        reason = why_not(encoder, image_size, channels)
    except _REFUSALS as error:
        reason = first_line_of(error)
    if reason is None:
        return encoder
    least = least_size(build, name, image_size, channels)
    needs = f"It needs at least {least}: choose that size" if least else "Choose another size"
    raise ValueError(f"encoder {name} cannot take images of {image_size} px: {reason}. {needs}, or another encoder.")


_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def why_not(encoder: nn.Module, image_size: int, channels: int = 3) -> str | None:
    """What a model says to images of a size that it cannot take; None if it takes them. By their shape if possible."""
    images = torch.empty(2, channels, image_size, image_size, device="meta")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            on_meta(encoder).train()(images)
        except Exception:
            # Some networks cannot run on shapes alone: what two images make of it decides.
            if any(parameter.is_meta for parameter in encoder.parameters()):
                return None
            try:
                copy.deepcopy(encoder).train()(torch.zeros(images.shape))
            except _REFUSALS as error:
                return first_line_of(error)
    return None


def first_line_of(error: Exception) -> str:
    """The first line of an error's text without its full stop, or the name of its class where it has none."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of a network on the meta device: shapes without numbers, for which no weight is copied."""
    empty: dict[int, torch.Tensor] = {}
    empty |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    empty |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    return copy.deepcopy(network, empty)  # which takes for copied what it is given


def least_size(
    build: Callable[[str, int | None], nn.Module], name: str, image_size: int, channels: int = 3
) -> int | None:
    """The smallest side above image_size that a model takes, by shapes alone; None if none is found."""

    def takes(side: int) -> bool:
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                build(name, side)(torch.empty(2, channels, side, side))
        except Exception:  # whatever a model says to a size that it cannot take
            return False
        return True

    below = image_size
    for side in (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 512):
        if side > image_size and takes(side):
            break
        below = max(below, side)
    else:
        return None
    while side - below > 1:
        middle = (below + side) // 2
        below, side = (below, middle) if takes(middle) else (middle, side)
    return side
