"""The operations of the augmentation: Kornia's interface around the kernels.

Each reads its columns of the one table of parameters that `SimCLRAugmentation.draw` gives, and works only on the images
that were chosen for it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from torch import Tensor

from simclr.seeding import stream_uniforms
from simclr.views.kernels import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    crop_resize,
    placed_like,
    sobel,
    solarize,
    to_gray,
)


class _Described:
    flags: dict[str, Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.flags.items())})"


class ResizedCrop(_Described, GeometricAugmentationBase2D):
    """Crop, resize and mirror every image: takes uint8 or floating point, returns float32 in [0, 1]."""

    columns = ("box", "flip")

    def __init__(self, size: int):
        super().__init__(p=1.0)
        self.flags = {"size": size}

    def transform_tensor(self, input, **_):
        return input  # Kornia's own would refuse uint8.

    def apply_func(self, in_tensor, params, flags=None):
        scale = 1 / 255 if in_tensor.dtype == torch.uint8 else 1.0
        return crop_resize(in_tensor, params["box"], params["flip"], flags["size"]).mul_(scale)


def change_rows(x: Tensor, rows: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the images x[rows] in place: rows (n,) ascend and, like the parameters (N, ...), are on the CPU."""
    if len(rows) == 0:
        return
    first, last, chosen = int(rows[0]), int(rows[-1]), [parameter[rows] for parameter in parameters]
    if last - first == len(rows) - 1:  # next to each other, as often in the small parts of large images: no copy
        x[first : last + 1] = change(x[first : last + 1], *chosen)
    else:
        on_device = placed_like(rows, x)
        x.index_copy_(0, on_device, change(x.index_select(0, on_device), *chosen))


class OnChosenImages(_Described, IntensityAugmentationBase2D):
    """A Kornia operation that changes, in place, the images for which the first of its columns is true.

    Kornia's own gate (its `p`) stays open, because it computes every image and then blends. The rows are looked up in
    the table on the CPU, so no device is waited for.
    """

    columns: tuple[str, ...]  # of the table: whether, then what `change` takes after x, one entry an image

    def __init__(self, **flags: float | tuple[float, ...]):
        super().__init__(p=1.0)
        self.flags = flags

    def apply_transform(self, input, params, flags, transform=None):
        rows = params[self.columns[0]].nonzero().flatten()
        change_rows(input, rows, self.change, *(params[name] for name in self.columns[1:]))
        return input

    def change(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (n, C, H, W) and the chosen images' entries of the other columns -> (n, C, H, W); each has its own."""
        raise NotImplementedError


class Rotate(OnChosenImages):
    """Turns by 0, 1, 2 or 3 quarters, counter-clockwise."""

    columns = ("rotation", "quarter_turns")

    def change(self, x, quarter_turns):
        for turns in (1, 2, 3):
            rows = placed_like((quarter_turns == turns).nonzero().flatten(), x)
            x[rows] = x[rows].rot90(turns, (2, 3))
        return x


class ColorJitter(OnChosenImages):
    """Brightness, contrast, saturation and hue, in an order drawn for each image; the last two of colours alone."""

    columns = ("jitter", "order", "brightness", "contrast", "saturation", "hue")

    def apply_transform(self, input, params, flags, transform=None):
        chosen, order, *factors = (params[name] for name in self.columns)
        adjustments: list[Callable[..., Tensor]] = [adjust_brightness, adjust_contrast]
        adjustments += [adjust_saturation, adjust_hue] if input.shape[1] == 3 else []
        for step in range(4):
            for which, adjust in enumerate(adjustments):
                rows = (chosen & (order[:, step] == which)).nonzero().flatten()
                change_rows(input, rows, partial(self.change, adjust), factors[which])
        return input

    def change(self, adjust, x, factor):
        return adjust(x, placed_like(factor, x).view(-1, 1, 1, 1))


class Grayscale(OnChosenImages):
    """Luma in all three channels."""

    columns = ("gray",)

    def change(self, x):
        return to_gray(x).expand_as(x)


class GaussianBlur(OnChosenImages):
    """Gaussian blur with a standard deviation drawn for each image."""

    columns = ("blur", "sigma")

    def change(self, x, sigma):
        return blur(x, placed_like(sigma, x), self.flags["kernel_size"])


class Solarize(OnChosenImages):
    """Inverts the bright values."""

    columns = ("solarize",)

    def change(self, x):
        return solarize(x, self.flags["threshold"])


class Sobel(OnChosenImages):
    """The magnitude of each channel's gradient."""

    columns = ("sobel",)

    def change(self, x):
        return sobel(x)


class GaussianNoise(OnChosenImages):
    """Independent normal noise on every channel of every pixel."""

    columns = ("noise", "noise_stream")

    def change(self, x, noise_stream):
        u = stream_uniforms(placed_like(noise_stream, x), 2 * x[0].numel()).view(len(x), 2, *x.shape[1:])
        normal = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * math.pi * u[:, 1]).cos()  # Box-Muller
        return (x + self.flags["std"] * normal).clamp_(0, 1)


class Cutout(OnChosenImages):
    """A square filled with the mean color."""

    columns = ("cutout", "hole")

    def change(self, x, hole):
        top, left, bottom, right = placed_like(hole, x).T[..., None]  # (n, 1) each
        y, x_ = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        inside = ((y >= top) & (y < bottom))[:, None, :, None] & ((x_ >= left) & (x_ < right))[:, None, None, :]
        return torch.where(inside, placed_like(torch.tensor(self.flags["fill"]), x).view(-1, 1, 1), x)
