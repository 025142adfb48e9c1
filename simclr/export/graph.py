"""An encoder with its preprocessing inside: bytes of any size -> h, in operations that every runtime has."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from simclr.data.module import default_load_size
from simclr.inputs import InputTransform


class WithPreprocessing(nn.Module):
    """images (N, C, H, W) uint8, any H and W -> h (N, feature_dim), as `encoder(encoder.transform(images))`.

    The crops and resizes of `InputTransform` as matrix products, whose matrices follow from H and W: a graph of it
    takes every size, and needs no operation for antialiased resizing, which few runtimes have.

    Args:
        encoder: normalised images (N, C, S, S) -> (N, feature_dim).
        transform: what it must be fed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, transform: InputTransform):
        super().__init__()
        self.encoder, self.image_size = encoder, transform.image_size
        self.load_size = cast(int, transform.load_size)
        for name, values in (("mean", transform.mean), ("std", transform.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> (N, feature_dim)."""
        # Numbers of the graph, not of Python: which side is the smaller is not known while it is traced.
        sides = [torch.scalar_tensor(size) for size in images.shape[-2:]]
        square = torch.minimum(*sides)
        down, across = (
            _in_15_bits(resampling(size, self.load_size, square, ((side - square) / 2).round(), triangle))
            for size, side in zip(images.shape[-2:], sides, strict=True)
        )
        # Bytes in between, rows first, as the resizing of bytes does.
        held = _as_bytes(down @ _as_bytes(images.float() @ across.T)) / 255  # (N, C, load_size, load_size)
        return self.encoder((self._crop(held) - self.mean) / self.std)

    def _crop(self, held: Tensor) -> Tensor:
        """The evaluation crop, `simclr.inputs.fit_to_size`, of a square."""
        if self.load_size == self.image_size:
            return held
        side = default_load_size(self.image_size)
        if side != self.load_size:
            whole, zero = torch.scalar_tensor(self.load_size), torch.scalar_tensor(0)
            matrix = resampling(self.load_size, side, whole, zero, cubic)
            held = (matrix @ held @ matrix.T).clamp(0, 1)
        first = round((side - self.image_size) / 2)
        return held[..., first : first + self.image_size, first : first + self.image_size]


def resampling(size: int, out: int, part: Tensor, first: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix (out, size) that resizes `part` pixels from `first` on, of `size`, to `out`, antialiased.

    As torch's interpolate(antialias=True), and Pillow: the kernel is as wide as a pixel of the larger grid.

    Args:
        size: pixels of a row.
        out: pixels wanted.
        part, first: scalars: how many pixels of the row are resized, and which is the first.
        kernel: distance (in pixels of the larger grid) -> weight.
    """
    scale = part / out
    place = torch.arange(size, dtype=torch.float32) - first + 0.5  # of each pixel's centre, in the part
    centre = (torch.arange(out, dtype=torch.float32)[:, None] + 0.5) * scale
    weight = kernel((place - centre).abs() / scale.clamp(min=1.0))  # (out, size)
    weight = weight * ((place > 0) & (place < part))
    return weight / weight.sum(1, keepdim=True)


def triangle(distance: Tensor) -> Tensor:
    """Of bilinear resizing."""
    return (1 - distance).clamp(min=0)


def cubic(distance: Tensor) -> Tensor:
    """Of bicubic resizing, a = -0.5 (Keys 1981), as Pillow and torch's antialiased one."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def _in_15_bits(weight: Tensor) -> Tensor:
    """Weights as the resizing of bytes has them: 16-bit integers below a common power of two.

    With these a product with bytes is exact in float32, and rounds to the byte that torch's and Pillow's rounds to. The
    power is the largest, up to 22, with which the greatest weight stays below 2^15.
    """
    unit = ((2.0**15 - 0.5) / weight.max()).log2().floor().clamp(max=22.0).exp2()
    return (weight * unit + 0.5).floor() / unit


def _as_bytes(values: Tensor) -> Tensor:
    """Rounded and in [0, 255], still float32."""
    return (values + 0.5).floor().clamp(0, 255)
