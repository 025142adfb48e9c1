"""What an augmentation refuses, in words."""

import math
from typing import Any

import torch
from torch import Tensor


def refuse_bad_arguments(augmentation: Any) -> None:
    """Raise one ValueError that lists every argument of a `SimCLRAugmentation` which is out of its range."""
    problems = [
        f"{name}_prob={prob} is not a probability. Use a number from 0 to 1."
        for name, by_view in augmentation.probs.items()
        for prob in by_view
        if not 0 <= prob <= 1
    ]
    problems += [f"{name}_prob lists no view." for name, by_view in augmentation.probs.items() if not by_view]
    for fine, problem in (
        (augmentation.image_size >= 1, f"image_size={augmentation.image_size} is not a size in pixels. Use 1 or more."),
        (
            augmentation.image_size != 1 or not any(augmentation.probs["blur"]),
            "image_size=1 leaves nothing to blur. Set blur_prob=0.",
        ),
        (
            0 <= augmentation.strength <= 2.5,
            f"strength={augmentation.strength} is not from 0 to 2.5, where the hue has turned by half.",
        ),
        (
            _is_range(augmentation.crop_scale, 1),
            f"crop_scale={augmentation.crop_scale} is not a range of area. Use 0 < low <= high <= 1.",
        ),
        (
            _is_range(augmentation.crop_ratio),
            f"crop_ratio={augmentation.crop_ratio} is not a range of ratios. Use 0 < low <= high.",
        ),
        (
            _is_range(augmentation.blur_sigma),
            f"blur_sigma={augmentation.blur_sigma} is not a range of pixels. Use 0 < low <= high.",
        ),
        (
            0 < augmentation.cutout_size <= 1,
            f"cutout_size={augmentation.cutout_size} is not a part of the side. Use 0 < size <= 1.",
        ),
        (
            0 <= augmentation.solarize_threshold <= 1,
            f"solarize_threshold={augmentation.solarize_threshold} is not a pixel's value. Use 0 to 1.",
        ),
        (augmentation.noise_std >= 0, f"noise_std={augmentation.noise_std} is negative. Use 0 or more."),
        (augmentation.channels >= 1, f"channels={augmentation.channels} is not 1 or more."),
        (
            augmentation.channels in (1, 3) or not any(augmentation.probs["solarize"]),
            f"solarize_prob={augmentation.probs['solarize']} inverts bright values of gray and RGB; of "
            f"{augmentation.channels} channels it is not known what they mean. Leave it out.",
        ),
        (
            len(augmentation.mean) == max(0, augmentation.channels),
            f"mean={augmentation.mean} does not have one number for each of {_channels(augmentation)}.",
        ),
        (
            len(augmentation.std) == max(0, augmentation.channels) and min(augmentation.std, default=1) > 0,
            f"std={augmentation.std} does not have one positive number for each of {_channels(augmentation)}.",
        ),
    ):
        if not fine:
            problems.append(problem)
    if problems:
        raise ValueError("SimCLRAugmentation: " + " ".join(problems))


def _channels(augmentation: Any) -> str:
    return "1 channel" if augmentation.channels == 1 else f"{augmentation.channels} channels"


def _is_range(ends: tuple[float, ...], largest: float = math.inf) -> bool:
    return len(ends) == 2 and 0 < ends[0] <= ends[1] <= largest and ends[1] < math.inf


def refuse_bad_batch(images: Tensor, index: Tensor, channels: int) -> None:
    """Raise a ValueError for images or numbers of another shape or type than `SimCLRAugmentation.view` takes."""
    # Values are not looked at: on a GPU that would wait for the images.
    problems = []
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
        problems.append(f"images of shape {tuple(images.shape)} are not (N, {channels}, H, W).")
    if images.dtype not in (torch.uint8, torch.uint16) and not images.is_floating_point():
        problems.append(f"images are {images.dtype}. Pass uint8, uint16, or floating point in [0, 1].")
    if index.shape != images.shape[:1]:
        problems.append(f"index of shape {tuple(index.shape)} does not number {len(images)} images. Pass one each.")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        problems.append(f"index is {index.dtype}. Pass the images' numbers in the data set as integers.")
    if problems:
        raise ValueError("SimCLRAugmentation: " + " ".join(problems))
