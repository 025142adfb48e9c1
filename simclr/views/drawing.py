"""Which part of an image a crop shows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop


def crop_boxes(u: Tensor, height: int, width: int, scale: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Crop boxes as torchvision's RandomResizedCrop draws them: the first of ten tries that fits.

    Args:
        u: (22, N) float64 in [0, 1): for each try an area, for each try a ratio, and where the box lies.
        height, width: of the images, in pixels.
        scale: smallest and largest part of the image's area.
        ratios: smallest and largest ratio of width to height.
    Returns:
        (N, 4) int64: top, left, height, width in pixels.
    """
    area, log_ratio, place = u.split((CROP_TRIES, CROP_TRIES, 2))
    (small, large), (narrow, wide) = scale, ratios
    area = height * width * (small + (large - small) * area)
    ratio = (math.log(narrow) + (math.log(wide) - math.log(narrow)) * log_ratio).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()  # (10, N)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)

    # If none fits: the largest central box with a permitted ratio.
    ratio = min(max(width / height, narrow), wide)
    central = min(height, round(width / ratio)), min(width, round(height * ratio))
    first = torch.where(fits, torch.arange(CROP_TRIES)[:, None], CROP_TRIES).amin(0)  # (N,)
    found = first < CROP_TRIES
    first = first.clamp(max=CROP_TRIES - 1)[None]
    h = torch.where(found, h.gather(0, first)[0], central[0]).long()
    w = torch.where(found, w.gather(0, first)[0], central[1]).long()
    top = torch.where(found, place[0] * (height - h + 1), (height - h) // 2).long()
    left = torch.where(found, place[1] * (width - w + 1), (width - w) // 2).long()
    return torch.stack((top, left, h, w), dim=1)
