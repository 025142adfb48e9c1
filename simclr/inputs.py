"""How an image becomes what an encoder takes: the one statement of preprocessing, in evaluation and ever after."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from simclr.data.channels import as_held
from simclr.data.decode import DEEPEST, ReadingRules, pixels_of, read_images, to_square
from simclr.data.module import default_load_size


def to_unit_range(images: Tensor, channels: int | None = 3) -> Tensor:
    """Images as float32 in [0, 1].

    Args:
        images: (n, C, H, W) uint8, uint16 with 65 535 for white, or float in [0, 1].
        channels: C; None for any.
    Returns:
        (n, C, H, W) float32.
    Raises:
        ValueError: if the shape or dtype is another, or a float is NaN or outside [0, 1].
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != (channels or images.shape[1]):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images are {got}: needed a tensor (n, {channels or 'C'}, H, W).")
    if images.dtype in (torch.uint8, torch.uint16):
        return images.float().div_(255 if images.dtype == torch.uint8 else DEEPEST)
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: needed uint8, or float in [0, 1].")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        advice = (
            "divide them by 255"
            if low >= 0 and 2 < high <= 255
            else "do not normalise them, the encoder's mean and std are applied here"
        )
        raise ValueError(f"float images reach from {low:.4g} to {high:.4g}: needed [0, 1]; {advice}.")
    return images.float()


def fit_to_size(images: Tensor, image_size: int) -> Tensor:
    """The evaluation crop: images of any size brought to (image_size, image_size), unless they have it already.

    Above 64 px the shorter side is resized to image_size / 0.875 and the centre is cut out, so that the central 87.5 %
    are seen (google-research/simclr); up to 64 px the shorter side is resized to image_size, and only what makes the
    image longer than wide is cut. Bicubic with antialias, as in google-research/simclr; overshoot is clamped. (Crops of
    training are bilinear.)

    Args:
        images: (n, C, H, W) float in [0, 1].
        image_size: the side wanted, in pixels.
    Returns:
        (n, C, image_size, image_size) float in [0, 1].
    """
    if tuple(images.shape[-2:]) == (image_size, image_size):
        return images
    side = default_load_size(image_size)
    if min(images.shape[-2:]) != side:
        images = tvf.resize(images, [side], tvf.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return tvf.center_crop(images, [image_size, image_size])


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, channel by channel: (n, C, H, W) float in [0, 1] -> the same shape."""
    of_channels = (torch.as_tensor(v, dtype=images.dtype, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    centre, scale = of_channels
    return (images - centre).div_(scale)


def for_display(images: Tensor) -> Tensor:
    """Images of any channels as 8-bit RGB, to be looked at: gray; two as red and green; of more the first three.

    Args:
        images: (..., C, H, W) uint8, uint16 with 65 535 for white, or float in [0, 1], on any device.
    Returns:
        (..., 3, H, W) uint8.
    """
    if images.dtype == torch.uint16:
        images = (images.float() / 257).round().to(torch.uint8)
    elif images.is_floating_point():
        images = (images * 255).round().byte()
    channels = images.shape[-3]
    if channels == 1:
        return images.expand(*images.shape[:-3], 3, -1, -1)
    if channels == 2:
        return torch.cat((images, torch.zeros_like(images[..., :1, :, :])), dim=-3)
    return images[..., :3, :, :]


@dataclass(frozen=True, repr=False)
class InputTransform:
    """Images of any size -> the normalised batch that an encoder takes, exactly as evaluation prepares it.

    What it does to an image: the central square of it, upright, at `load_size` pixels, as `simclr.data.ImageData` holds
    it; of that the evaluation crop (`fit_to_size`); values in [0, 1]; minus `mean`, divided by `std`. An image that has
    load_size x load_size pixels is not resized.

        h = encoder(encoder.transform("photo.jpg"))                     # (1, encoder.feature_dim)
        h = encoder(encoder.transform([Image.open(p) for p in paths]))  # (len(paths), encoder.feature_dim)
        ImageFolder("photos", loader=encoder.transform.single)          # for a DataLoader, which makes the batches

    It is a plain value: compares by its settings, can be pickled and sent to the workers of a DataLoader.

    Args:
        image_size: the side in pixels, S, of what comes out.
        mean, std: a number for each channel, for values in [0, 1]: 3 of RGB; others say what channels images have.
        load_size: the side in pixels at which an image is held before the crop. If not given, as in `ImageData` for a
            folder: image_size up to 64, 8/7 of it above.
        sixteen_bit_max: which value of 16-bit images is white, as in `ImageData`.
        bits: that images are held in before the crop, 8 or 16, as in `ImageData`.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load_size: int | None = None
    sixteen_bit_max: int = DEEPEST
    bits: int = 8

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "load_size", self.load_size or default_load_size(self.image_size))

    @property
    def channels(self) -> int:
        """C, of the images."""
        return len(self.mean)

    @property
    def rules(self) -> ReadingRules:
        """How files are read."""
        return ReadingRules(sixteen_bit_max=self.sixteen_bit_max, channels=self.channels, bits=self.bits)

    def __call__(self, images: Any) -> Tensor:
        """Always a batch, also of one image; see `single` for data sets.

        Args:
            images: a PIL image of any mode; the path of an image file; a tensor (C, H, W) or (N, C, H, W), uint8,
                uint16 or float in [0, 1]; a NumPy array (H, W, C) or (N, H, W, C) of the same; or a list of any of
                these. Of gray also (H, W) and (N, H, W); of channels that are not RGB also arrays that have them first.
        Returns:
            (N, C, S, S) float32, on the CPU or where the tensors are. From a file, the bits that evaluation of the file
            computes with. From a PIL image too, save that a JPEG at least eight times as large as load_size is read at
            reduced size from a file, and in full by Pillow: half a level of 255 apart on average.
        Raises:
            ValueError: for anything else, saying what is needed, and for files that cannot be read.
        """
        items = images if isinstance(images, list | tuple) else [images]
        if not items:
            raise ValueError("an empty list: needed one image or more.")
        held = torch.cat([self._hold(item) for item in items])  # (N, C, load_size, load_size)
        return normalize(fit_to_size(held, self.image_size), self.mean, self.std)

    def of_held(self, images: Tensor) -> Tensor:
        """Images that were read by `rules`, as squares: (N, C, load_size, load_size) -> (N, C, S, S) float32."""
        return normalize(fit_to_size(to_unit_range(images, self.channels), self.image_size), self.mean, self.std)

    def single(self, image: Any) -> Tensor:
        """One image as (C, S, S), without a dimension for the batch, which a DataLoader adds.

        The `transform` of torchvision's data sets; of an ImageFolder better the `loader`, which is given the path, so
        that files are read as evaluation reads them.
        """
        batch = self(image)
        if len(batch) != 1:
            raise ValueError(f"{len(batch)} images where one is needed: call the transform itself for a batch.")
        return batch[0]

    def __repr__(self) -> str:
        side = default_load_size(self.image_size)  # of what fit_to_size cuts the centre out
        crop, interpolation = "central square", f"bilinear to {self.load_size} px"
        if self.load_size != self.image_size:
            crop += f", of {side} px the central {self.image_size}" if side != self.image_size else ""
            interpolation += f", then bicubic to {side}" if side != self.load_size else ""
        return (
            f"{type(self).__name__}(image_size={self.image_size}, load_size={self.load_size}, crop={crop!r}, "
            f"interpolation={f'{interpolation}, antialiased'!r}, mean={self.mean}, std={self.std}"
            f"{f', sixteen_bit_max={self.sixteen_bit_max}' if self.sixteen_bit_max != DEEPEST else ''}"
            f"{f', bits={self.bits}' if self.bits != 8 else ''})"
        )

    def _hold(self, item: Any) -> Tensor:
        """(n, C, load_size, load_size) float32 in [0, 1] of one item, resized in whole numbers where it comes so."""
        assert self.load_size is not None  # from __post_init__ on
        if isinstance(item, str | os.PathLike):
            return to_unit_range(read_images([item], self.load_size, rules=self.rules), self.channels)
        images = _batch_of(item, self.rules)
        if images.dtype in (torch.uint8, torch.uint16):
            return to_unit_range(to_square(images, self.load_size), self.channels)
        return to_square(to_unit_range(images, self.channels), self.load_size).clamp(0, 1)


def transform_of(settings: Mapping[str, Any], kind: type[InputTransform] = InputTransform) -> InputTransform:
    """The preprocessing that an encoder's settings state.

    Args:
        settings: as a file of weights or a graph holds them.
        kind: of preprocessing.
    """
    names = ("image_size", "mean", "std", "load_size", "sixteen_bit_max", "bits")
    return kind(**{name: settings[name] for name in names if settings.get(name) is not None})


def attach_transform(encoder: nn.Module, transform: InputTransform) -> None:
    """Let an encoder carry its preprocessing: `.transform`, and its `.image_size`, `.mean` and `.std` by themselves."""
    carrier: Any = encoder  # a module takes any attribute
    carrier.transform = transform
    carrier.image_size, carrier.mean, carrier.std = transform.image_size, transform.mean, transform.std


def _batch_of(item: Any, rules: ReadingRules) -> Tensor:
    """A PIL image, tensor or array as (n, C, H, W), its whole numbers as they are held, others as they come."""
    if isinstance(item, Image.Image):
        return pixels_of(item, rules)[None]
    images = _batch_of_rgb(item) if rules.channels == 3 else _batch_of_channels(item, rules.channels)
    return as_held(images, rules) if images.dtype in (torch.uint8, torch.uint16) else images


def _batch_of_rgb(item: Any) -> Tensor:
    if isinstance(item, np.ndarray):
        if item.ndim not in (3, 4) or item.shape[-1] != 3 or 0 in item.shape:
            raise ValueError(f"an array is {item.shape}: needed (H, W, 3) or (N, H, W, 3), RGB.")
        item = torch.from_numpy(np.array(item, order="C")).movedim(-1, -3)  # a copy: torch refuses flipped views
    if not isinstance(item, Tensor):
        raise ValueError(
            f"an image is a {type(item).__name__}: needed a PIL image, a path, a tensor (3, H, W) or (N, 3, H, W), "
            "an array (H, W, 3), or a list of them."
        )
    if item.ndim not in (3, 4) or item.shape[-3] != 3 or 0 in item.shape:
        raise ValueError(f"a tensor is {tuple(item.shape)}: needed (3, H, W) or (N, 3, H, W), RGB.{_hint(item.shape)}")
    images = item.detach().as_subclass(Tensor)
    return images if images.ndim == 4 else images[None]


def _batch_of_channels(item: Any, channels: int) -> Tensor:
    """A tensor or array of images that are not RGB: their channels are looked for where they can be."""
    if not isinstance(item, np.ndarray | Tensor):
        raise ValueError(
            f"an image is a {type(item).__name__}: needed a PIL image, a path, a tensor ({channels}, H, W) or "
            f"(N, {channels}, H, W), an array of these or with the channels last, or a list of them."
        )
    kind, shape = "an array" if isinstance(item, np.ndarray) else "a tensor", tuple(item.shape)
    gray = " or, being gray, (H, W) or (N, H, W)" if channels == 1 else ""
    needed = f"{kind} is {shape}: needed ({channels}, H, W) or (N, {channels}, H, W){gray}"
    needed += "; an array may have its channels last." if isinstance(item, np.ndarray) else "."
    images = torch.from_numpy(np.array(item, order="C")) if isinstance(item, np.ndarray) else item.detach()
    images = images.as_subclass(Tensor)
    if 0 in shape or images.ndim not in (2, 3, 4) or (images.ndim == 2 and channels != 1):
        raise ValueError(needed)
    first = images.ndim > 2 and shape[-3] == channels
    last = images.ndim > 2 and shape[-1] == channels and isinstance(item, np.ndarray)
    if channels == 1 and images.ndim < 4 and not last:
        return images.reshape(-1, 1, *shape[-2:])
    if first == last:
        raise ValueError(f"{needed} Here both may be meant: make it a tensor, channels first." if first else needed)
    images = images.movedim(-1, -3) if last else images
    return images if images.ndim == 4 else images[None]


def _hint(shape: Sequence[int]) -> str:
    """How a tensor of this shape becomes RGB with its channels first, where that can be told."""
    if 0 in shape or len(shape) not in (2, 3, 4):
        return ""
    if len(shape) == 2:
        return " One of gray becomes it by .expand(3, -1, -1)."
    if shape[-1] == 3:
        return " Use .movedim(-1, -3)."
    if shape[-3] == 1:
        return f" One of gray becomes it by .expand({'3, -1, -1' if len(shape) == 3 else '-1, 3, -1, -1'})."
    return " Leave alpha out: [..., :3, :, :]." if shape[-3] == 4 else ""
