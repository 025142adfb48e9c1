"""Images to views: the SimCLR augmentation as a Kornia pipeline whose parameters are drawn by a pure function.

Read it in the order it runs: `SimCLRAugmentation.draw` draws what happens to each image, a table on the CPU that
depends on (seed, epoch, image index, view number) alone; `SimCLRAugmentation.view` injects that table into a Kornia
`AugmentationSequential` through Kornia's own `params=` replay. The operations are Kornia operations with kernels that
do their work on the chosen images only, and follow torchvision's float semantics. On CUDA, and elsewhere on request,
compiled functions (`simclr/fused.py`) make the same views from the same table.
"""

import ctypes
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from kornia.augmentation import (
    AugmentationSequential,
    GeometricAugmentationBase2D,
    IntensityAugmentationBase2D,
    Normalize,
)
from kornia.augmentation.container.params import ParamItem
from torch import Tensor, nn

from simclr import fused
from simclr.precision import rounding
from simclr.seeding import stream_uniforms, uniforms, view_stream

_CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
_CHUNK_VALUES = 2**19  # A CPU makes views in parts of about 2 MB: what one operation leaves is in cache for the next.
_WITHOUT_FLOAT64 = ("mps",)  # kinds of device: Apple's GPUs
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4): of brightness, contrast, saturation, hue


# The kernels. Images x are (n, 3, H, W) float32 in [0, 1], one factor per image.


def crop_resize(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop, resize and mirror each image: torchvision's `resized_crop` (bilinear, antialias) and `hflip`.

    Args:
        images: (N, 3, H, W), uint8 or floating point, on any device.
        box: (N, 4) integer on the CPU: top, left, height, width.
        flip: (N,) bool on the CPU: mirror left and right.
        size: side of the square result, in pixels.
    Returns:
        (N, 3, size, size) float32, in the images' range.
    """
    # Antialiasing widens the filter only where a box shrinks; all others are plain bilinear sampling, which is faster.
    shrinks = (box[:, 2:] > size).any(1)
    box, flip = _to(box, images), _to(flip, images)
    if not shrinks.any():
        return _sample(images, box, flip, size)
    views = images.new_empty(len(images), 3, size, size, dtype=torch.float32)
    for resample, chosen in ((_sample, ~shrinks), (_resize_by_matrices, shrinks)):
        rows = _to(chosen.nonzero().flatten(), images)
        views[rows] = resample(images[rows], box[rows], flip[rows], size)
    return views


def _sample(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Bilinear samples at the box's pixel centres, clamped to the box: what resizing does when nothing shrinks."""

    def centres(start: Tensor, length: Tensor, source: int) -> Tensor:
        at = _centres(length, size) - 0.5  # (n, size), in pixels from the box's first
        at = at.clamp(min=0).minimum(length[:, None] - 1.0) + start[:, None]
        # grid_sample's coordinates: -1 is the first pixel's centre, 1 the last's.
        return at * (2 / max(source - 1, 1)) - 1

    top, left, height, width = box.unbind(1)
    y, x = centres(top, height, images.shape[2]), centres(left, width, images.shape[3])
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (n, size, size, 2)
    return F.grid_sample(images.float(), grid.float(), align_corners=True, padding_mode="border")


def _resize_by_matrices(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resizing as two matrix products: rows @ image @ columns."""

    def matrix(start: Tensor, length: Tensor, source: int) -> Tensor:
        reach = (length / size).clamp(min=1)[:, None, None]  # half the triangle filter's base, in source pixels
        pixel = torch.arange(source, device=images.device) - start[:, None]  # (n, source), from the box's first
        distance = (pixel[:, None] + 0.5 - _centres(length, size)[..., None]).abs()  # (n, size, source)
        inside = (pixel >= 0) & (pixel < length[:, None])
        weight = (1 - distance / reach).clamp(min=0) * inside[:, None]
        return weight / weight.sum(2, keepdim=True)

    top, left, height, width = box.unbind(1)
    rows = matrix(top, height, images.shape[2])
    columns = matrix(left, width, images.shape[3])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows.float()[:, None] @ (images.float() @ columns.float()[:, None].mT)


def _centres(length: Tensor, size: int) -> Tensor:
    """Centres of `size` output pixels over boxes of the given lengths, in box pixels from the edge: (n, size).

    In float64, or in float32 on Apple's GPUs, which have no other: at 512 pixels a centre is then off by up to 1e-4.
    """
    # On the device, not on the CPU: so many numbers from unpinned memory would wait for all queued work.
    dtype = torch.float32 if length.device.type in _WITHOUT_FLOAT64 else torch.float64
    return (torch.arange(size, device=length.device, dtype=dtype) + 0.5) * (length[:, None] / size)


def to_gray(x: Tensor) -> Tensor:
    """Luma (ITU-R 601, rounded as in torchvision), (n, 1, H, W)."""
    red, green, blue = x.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the channels: torchvision's `adjust_brightness`, one factor an image."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image: torchvision's `adjust_contrast`."""
    # Row by row: the sum over one large image alone would be split over threads, and rounded by their number.
    mean = to_gray(x).mean(3, keepdim=True).mean(2, keepdim=True)  # (n, 1, 1, 1)
    return (x * factor).add_((1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel: torchvision's `adjust_saturation`."""
    return (x * factor).add_((1 - factor) * to_gray(x)).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue by a part of a full turn: HSV without a branch, a gather or a mask, which cost a CPU most.

    Let V, m and C be a pixel's largest channel, its smallest and their difference. Its hue is
    1 + (green + blue - red - m) / C sixths of a turn away from red, towards green if green > blue. A hue's channels are
    V - C * clamp(2 - |k - 2|, 0, 1) with k = (n + hue) mod 6 in sixths and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)  # (n, H, W)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = largest - smallest
    sixth = (1 / 6) / spread.clamp(min=1e-12)  # A gray pixel has no spread: any hue gives it back.
    hue = (green + blue).sub_(red).sub_(smallest).mul_(sixth).add_(1 / 6).copysign_(green - blue)  # in turns
    start = (5 - 2 * torch.arange(3, device=x.device)).view(3, 1, 1) / 6
    k = hue[:, None] + (turn + start)  # (n, 3, H, W)
    k.sub_(k.floor()).sub_(2 / 6).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return k.mul_(spread[:, None]).neg_().add_(largest[:, None])


def blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur of the mirrored image with one sigma (n,) per image, as two matrix products like the resizing."""

    def matrix(size: int) -> Tensor:
        offset = torch.arange(kernel_size, device=x.device) - kernel_size // 2
        weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)  # (n, kernel_size)
        # Far taps of a narrow kernel are denormal: a CPU is ten times slower on them.
        weight = weight * (weight > 1e-12)
        source = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # (size, kernel_size)
        source = (size - 1) - (size - 1 - source).abs()  # mirrored at the first and at the last pixel
        matrix = x.new_zeros(len(x), size, size)
        return matrix.scatter_add_(2, source.expand(len(x), -1, -1), weight[:, None].expand(-1, size, -1))

    rows = matrix(x.shape[2])
    columns = rows if x.shape[2] == x.shape[3] else matrix(x.shape[3])
    return rows[:, None] @ (x @ columns[:, None].mT)


def sobel(x: Tensor) -> Tensor:
    """Magnitude of the gradient by Sobel's filter, edges repeated, as Kornia's `sobel`.

    Kornia copies the filter from the CPU at every call, for which a device is waited for.
    """
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return ((across / 8) ** 2 + (down / 8) ** 2 + 1e-6).sqrt()


@contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Numbers and matrix products in float32, whatever autocast, default dtype and rounding the training has chosen.

    Half precision would shift a crop by parts of a pixel and bend the colors; products in TF32 or bf16 cost up to 0.05.
    """
    before = torch.get_default_dtype()  # Lightning sets it to that of bf16-true and the like
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device_type, enabled=False), rounding():
            yield
    finally:
        torch.set_default_dtype(before)


# The operations: Kornia's interface around the kernels. Each reads its columns of the one table of parameters.


def _to(parameter: Tensor, x: Tensor) -> Tensor:
    """A CPU parameter on the images' device, without waiting for it: a blocking copy would wait for all queued work."""
    # Only from page-locked memory does CUDA copy without waiting.
    if x.device.type == "cuda":
        parameter = parameter.pin_memory()
    # Apple's GPUs may read the memory of a non-blocking copy after it was reused (pytorch issue 83015).
    return parameter.to(x.device, non_blocking=x.device.type != "mps")


@cache
def _keep_freed_memory() -> None:
    """Once a process: freed memory stays with it, for the next part of the views and for the next training step.

    glibc gives large blocks back to the system as they are freed, and a page taken anew costs more than the arithmetic
    on it: up to a quarter of a step on a CPU. So a process keeps as much as it needed at its peak.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)


class _Described:
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.flags.items())})"


class ResizedCrop(_Described, GeometricAugmentationBase2D):
    """Crop, resize and mirror every image: takes uint8 or floating point, returns float32 in [0, 1]."""

    reads = ("box", "flip")

    def __init__(self, size: int):
        super().__init__(p=1.0)
        self.flags = {"size": size}

    def transform_tensor(self, input, **_):
        return input  # Kornia's own would refuse uint8.

    def apply_func(self, input, params, flags):
        scale = 1 / 255 if input.dtype == torch.uint8 else 1.0
        return crop_resize(input, params["box"], params["flip"], flags["size"]).mul_(scale)


def _change(x: Tensor, rows: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the images x[rows] in place: rows (n,) ascend and, like the parameters (N, ...), are on the CPU."""
    if len(rows) == 0:
        return
    first, last, chosen = int(rows[0]), int(rows[-1]), [parameter[rows] for parameter in parameters]
    if last - first == len(rows) - 1:  # next to each other, as often in the small parts of large images: no copy
        x[first : last + 1] = change(x[first : last + 1], *chosen)
    else:
        on_device = _to(rows, x)
        x.index_copy_(0, on_device, change(x.index_select(0, on_device), *chosen))


class _OnChosen(_Described, IntensityAugmentationBase2D):
    """A Kornia operation that changes, in place, the images for which the first parameter it `reads` is true.

    Kornia's own gate (its `p`) stays open, because it computes every image and then blends. The rows are looked up in
    the table on the CPU, so no device is waited for.
    """

    reads: tuple[str, ...]  # the gate, then the parameters that `change` takes after x, one entry per image

    def __init__(self, **flags: float | tuple[float, ...]):
        super().__init__(p=1.0)
        self.flags = flags

    def apply_transform(self, input, params, flags, transform=None):
        rows = params[self.reads[0]].nonzero().flatten()
        _change(input, rows, self.change, *(params[name] for name in self.reads[1:]))
        return input

    def change(self, x: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError


class Rotate(_OnChosen):
    """Turns by 0, 1, 2 or 3 quarters, counter-clockwise."""

    reads = ("rotation", "quarter_turns")

    def change(self, x, quarter_turns):
        for turns in (1, 2, 3):
            rows = _to((quarter_turns == turns).nonzero().flatten(), x)
            x[rows] = x[rows].rot90(turns, (2, 3))
        return x


class ColorJitter(_OnChosen):
    """Brightness, contrast, saturation and hue, in an order drawn for each image."""

    reads = ("jitter", "order", "brightness", "contrast", "saturation", "hue")

    def apply_transform(self, input, params, flags, transform=None):
        chosen, order, *factors = (params[name] for name in self.reads)
        adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        for step in range(4):
            for which, adjust in enumerate(adjustments):
                rows = (chosen & (order[:, step] == which)).nonzero().flatten()
                _change(input, rows, partial(self.change, adjust), factors[which])
        return input

    def change(self, adjust, x, factor):
        return adjust(x, _to(factor, x).view(-1, 1, 1, 1))


class Grayscale(_OnChosen):
    """Luma in all three channels."""

    reads = ("gray",)

    def change(self, x):
        return to_gray(x).expand_as(x)


class GaussianBlur(_OnChosen):
    """Gaussian blur with a standard deviation drawn for each image."""

    reads = ("blur", "sigma")

    def change(self, x, sigma):
        return blur(x, _to(sigma, x), self.flags["kernel_size"])


class Sobel(_OnChosen):
    """The magnitude of each channel's gradient."""

    reads = ("sobel",)

    def change(self, x):
        return sobel(x)


class GaussianNoise(_OnChosen):
    """Independent normal noise on every channel of every pixel."""

    reads = ("noise", "noise_stream")

    def change(self, x, noise_stream):
        u = stream_uniforms(_to(noise_stream, x), 2 * x[0].numel()).view(len(x), 2, *x.shape[1:])
        normal = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * math.pi * u[:, 1]).cos()  # Box-Muller
        return (x + self.flags["std"] * normal).clamp_(0, 1)


class Cutout(_OnChosen):
    """A square filled with the mean color."""

    reads = ("cutout", "hole")

    def change(self, x, hole):
        top, left, bottom, right = _to(hole, x).T[..., None]  # (n, 1) each
        y, x_ = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        inside = ((y >= top) & (y < bottom))[:, None, :, None] & ((x_ >= left) & (x_ < right))[:, None, None, :]
        return torch.where(inside, _to(torch.tensor(self.flags["fill"]), x).view(3, 1, 1), x)


_AFTER_COLOR = (Rotate, GaussianBlur, Sobel, GaussianNoise, Cutout)


LARGEST_SMALL_VIEW = 64  # pixels
# What is done to views where nothing is said: up to LARGEST_SMALL_VIEW, and above.
BY_SIZE = (
    {"strength": 0.5, "crop_scale": (0.2, 1.0), "blur_prob": 0.0},
    {"strength": 1.0, "crop_scale": (0.08, 1.0), "blur_prob": 0.5},
)


class SimCLRAugmentation(nn.Module):
    """Two random views of each image: the augmentation of SimCLR (Chen et al. 2020, appendix A) on the images' device.

    A view is a pure function of (seed, epoch, image index, view number): it does not depend on the batch around the
    image, on the number of devices or workers, or on any random number drawn elsewhere. On a CPU that holds to the last
    bit, for either way of `compile_views`; on other devices the parameters are the same bits (they are drawn on the
    CPU) and the pixels agree to rounding.

    The operations run in this order: crop and resize, flip, rotation, color jitter, gray, blur, Sobel, noise, cutout,
    normalisation. Each is applied to an image with its own probability; 0 leaves it out. An image's random numbers
    are the same whatever is switched on, so two configurations differ in nothing but what they say.

    Resizing is bilinear (antialiased where a crop shrinks), where the paper's code, google-research/simclr, is bicubic.

    Keep `index` on the CPU where a device must never be waited for; elsewhere it is copied there, once a view. Once
    views were made on a CPU, the process keeps the memory that it frees: it stays as large as it ever was.

    Args:
        image_size: side of the views, in pixels.
        strength: of the color jitter, s in the paper: brightness, contrast and saturation are changed by up to 0.8 s,
            the hue by up to 0.2 s of a full turn, in an order drawn for each image. If not given: 0.5 up to 64 px, 1
            above, the paper's for CIFAR-10 (appendix B.9) and ImageNet.
        crop_scale: smallest and largest part of the image's area that a crop takes. If not given: 0.2 to 1 up to 64 px,
            0.08 to 1, the paper's, above.
        crop_ratio: smallest and largest ratio of a crop's width to its height, drawn evenly in its logarithm.
        flip_prob: probability of mirroring left and right.
        jitter_prob: probability of color jitter.
        gray_prob: probability of dropping the color.
        blur_prob: probability of Gaussian blur, with a kernel of a tenth of `image_size`. If not given: 0 up to 64 px,
            0.5 above, as the paper.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels.
        rotation_prob: probability of rotation, by 0, 90, 180 or 270 degrees with equal chances.
        cutout_prob: probability of covering a square with the mean color (DeVries & Taylor 2017). Its centre is
            anywhere in the view, so that part of it may lie outside.
        cutout_size: side of that square, as a part of `image_size`.
        noise_prob: probability of adding Gaussian noise to every pixel.
        noise_std: standard deviation of that noise, for pixels in [0, 1].
        sobel_prob: probability of replacing each channel by its gradient's magnitude (Sobel filter).
        augment_second_view: False leaves every view but the first at crop and resize, as in Figure 5 of the paper.
        mean: of each channel, for pixels in [0, 1]; subtracted from the views.
        std: of each channel, for pixels in [0, 1]; divides the views.
        compile_views: make the views by functions that torch.compile builds at the first batch, in about a minute,
            in place of Kornia's operations: the same views up to rounding, several times as fast. None: on CUDA only.
            A CPU needs a C++ compiler. Where compiling fails for a size of images or views, a warning says so and
            Kornia's operations make these.
    Raises:
        ValueError: if an argument is out of its range, with every such argument listed.
    """

    # Of this process: the settings and shapes for which compiling failed, where it would fail again, and what was said.
    _uncompiled: ClassVar[set[tuple]] = set()
    _said: ClassVar[set[str]] = set()

    def __init__(
        self,
        image_size: int,
        *,
        strength: float | None = None,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_prob: float | None = None,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        rotation_prob: float = 0.0,
        cutout_prob: float = 0.0,
        cutout_size: float = 0.5,
        noise_prob: float = 0.0,
        noise_std: float = 0.1,
        sobel_prob: float = 0.0,
        augment_second_view: bool = True,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        compile_views: bool | None = None,
    ):
        super().__init__()
        usual = BY_SIZE[image_size > LARGEST_SMALL_VIEW]
        strength = usual["strength"] if strength is None else strength
        crop_scale = usual["crop_scale"] if crop_scale is None else crop_scale
        blur_prob = usual["blur_prob"] if blur_prob is None else blur_prob
        self.image_size, self.strength = image_size, strength
        self.crop_scale, self.crop_ratio, self.blur_sigma = tuple(crop_scale), tuple(crop_ratio), tuple(blur_sigma)
        self.probs = {
            "flip": flip_prob,
            "rotation": rotation_prob,
            "jitter": jitter_prob,
            "gray": gray_prob,
            "blur": blur_prob,
            "sobel": sobel_prob,
            "noise": noise_prob,
            "cutout": cutout_prob,
        }
        self.cutout_size, self.noise_std = cutout_size, noise_std
        self.augment_second_view = augment_second_view
        self.mean, self.std = tuple(mean), tuple(std)
        self.compile_views = compile_views
        self._refuse_bad_arguments()

        # The paper's kernel is a tenth of the side, made odd: 23 at 224 pixels, 3 at 32.
        kernel_size = max(3, 2 * (image_size // 20) + 1)
        operations = {
            "rotation": Rotate(),
            "jitter": ColorJitter(strength=strength),
            "gray": Grayscale(),
            "blur": GaussianBlur(kernel_size=kernel_size, sigma=self.blur_sigma),
            "sobel": Sobel(),
            "noise": GaussianNoise(std=noise_std),
            "cutout": Cutout(size=cutout_size, fill=self.mean),
        }
        self.pipeline = AugmentationSequential(
            ResizedCrop(image_size),
            *(operations[name] for name in operations if self.probs[name] > 0 and (name, strength) != ("jitter", 0)),
            Normalize(self.mean, self.std),
            data_keys=["input"],
        )

    def forward(self, images: Tensor, index: Tensor, epoch: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Views 0 and 1 of each image; see `view`."""
        return self.view(images, index, epoch, seed, 0), self.view(images, index, epoch, seed, 1)

    @torch.no_grad()
    def view(self, images: Tensor, index: Tensor, epoch: int = 0, seed: int = 0, view: int = 0) -> Tensor:
        """One view of each image.

        Args:
            images: (N, 3, H, W), uint8, or floating point in [0, 1], on any device.
            index: (N,) integer, the images' numbers in the data set, each >= 0.
            epoch: the epoch, in [0, 2^32).
            seed: the run's seed, in [0, 2^64).
            view: the view's number, in [0, 2^16).
        Returns:
            (N, 3, image_size, image_size) float32, normalised, whatever the autocast or the module's own dtype.
        Raises:
            ValueError: if the images or the index are not of these shapes and types, or a number is out of its range.
        """
        _refuse_bad_batch(images, index)
        if images.device.type == "cpu":
            _keep_freed_memory()
        with in_float32(images.device.type):
            table = self.draw(index, images.shape[2], images.shape[3], epoch, seed, view)
            if len(images) and self._compiles(images):
                try:
                    return self._compiled_view(images, table)
                except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                    self._do_without_compiler(images, error)
            return self._kornia_view(images, table)

    def _kornia_view(self, images: Tensor, table: dict[str, Tensor]) -> Tensor:
        count, size = len(images), self.image_size
        part = max(1, _CHUNK_VALUES // (3 * size**2) if images.device.type == "cpu" else count)
        views = images.new_empty(count, 3, size, size, dtype=torch.float32)
        for start in range(0, count, part):
            rows = slice(start, start + part)
            views[rows] = self._replay(images[rows], {name: values[rows] for name, values in table.items()})
        return views

    def _replay(self, images: Tensor, table: dict[str, Tensor]) -> Tensor:
        """The Kornia pipeline with the parameters of the table."""
        steps = self.pipeline.named_children()
        params = [ParamItem(name, {c: table[c] for c in getattr(step, "reads", ())}) for name, step in steps]
        return self.pipeline(images, params=params)

    def _compiles(self, images: Tensor) -> bool:
        wanted = images.device.type == "cuda" if self.compile_views is None else self.compile_views
        return wanted and self._compiled_for(images) not in self._uncompiled

    def _compiled_for(self, images: Tensor) -> tuple:
        """What a compilation is made for: a failure says nothing about others."""
        count = 0 if images.device.type == "cpu" else len(images)  # a CPU's parts have one size
        return images.device.type, images.dtype, count, *images.shape[2:], self.image_size, self.probs["blur"] > 0

    def _do_without_compiler(self, images: Tensor, error: Exception) -> None:
        self._uncompiled.add(self._compiled_for(images))
        what = f"views of {self.image_size} px of images of {images.shape[2]} x {images.shape[3]}"
        if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
            reason = f"this process has compiled {fused.SHAPES} others"
            why = f"{reason}. Those go on as they are; images of one size need one."
        else:
            reason = str(error).strip().replace("\n", " ")[:300]
            why = f"torch.compile failed: {reason} ... On a CPU it needs a C++ compiler. "
            why += "Pass compile_views=False to do without."
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"Kornia's operations make {what}, which is slower: {why}", stacklevel=3)

    def _compiled_view(self, images: Tensor, table: dict[str, Tensor]) -> Tensor:
        """The same view up to rounding, by compiled functions and by the operations that they leave out."""
        count, size = len(images), self.image_size
        # One shape on a CPU, whatever the batch: compiled once, and always rounding alike.
        part = _power_of_two(_CHUNK_VALUES / (3 * size**2)) if images.device.type == "cpu" else count
        whole = -(-count // part) * part  # The last part is filled up with the last image.
        if whole > count:
            filled = torch.arange(whole).clamp(max=count - 1)
            table = {name: values[filled] for name, values in table.items()}
        draws = _to(fused.pack(table, part), images)
        later = [step for step in self.pipeline.children() if type(step) in _AFTER_COLOR]
        blur = next((step for step in later if isinstance(step, GaussianBlur)), None)
        weights = fused.blur_weights(draws, blur.flags["kernel_size"]) if blur else None
        # The blur leaves constants as they are and may follow the normalisation, which then is no pass of its own.
        at_once = later in ([], [blur])
        norm = _to(torch.tensor([self.mean, [1 / std for std in self.std]]), images)
        no_norm = _to(torch.tensor([[0.0] * 3, [1.0] * 3]), images)

        views = images.new_empty(whole, 3, size, size, dtype=torch.float32)
        for start in range(0, whole, part):
            rows = slice(start, start + part)
            drawn, x = {name: values[rows] for name, values in table.items()}, views[rows]
            some = images[rows] if start + part <= count else images[filled[rows]]
            fused.crop_and_color(some, draws[rows], norm if at_once else no_norm, x)
            for step in later:
                if step is blur:
                    fused.blur(x, draws[rows], weights[rows], int(drawn["blur"].sum()))
                else:  # Turning by quarters commutes with the colors, which come before it here.
                    x = step.apply_transform(x, drawn, step.flags)
            if not at_once:
                torch.mul(x.sub_(norm[0].view(3, 1, 1)), norm[1].view(3, 1, 1), out=views[rows])
        return views if whole == count else views[:count].clone()  # without the memory of the rest

    def extra_repr(self) -> str:
        shown = {"image_size": self.image_size, "strength": self.strength, "crop_scale": self.crop_scale}
        shown |= {f"{name}_prob": prob for name, prob in self.probs.items() if prob}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def draw(
        self, index: Tensor, height: int, width: int, epoch: int = 0, seed: int = 0, view: int = 0
    ) -> dict[str, Tensor]:
        """What happens to each image in one view: a pure function, drawn on the CPU so that every device agrees.

        Args:
            index: (N,) integer, the images' numbers in the data set.
            height, width: of the images, in pixels.
            epoch, seed, view: as for `view`.
        Returns:
            One row per image, on the CPU. Whether: "flip", "rotation", "jitter", "gray", "blur", "sobel", "noise",
            "cutout" (N,) bool. How: "box" (N, 4) top, left, height, width in source pixels; "quarter_turns" (N,)
            counter-clockwise; "order" (N, 4), a permutation of brightness 0, contrast 1, saturation 2, hue 3;
            "brightness", "contrast", "saturation" (N,) factors; "hue" (N,) in turns; "sigma" (N,) in pixels;
            "noise_stream" (N, 2); "hole" (N, 4) top, left, bottom, right in view pixels.
        """
        index = index.cpu()
        if (index < 0).any():
            raise ValueError(
                f"index={index.min().item()} is negative. Pass the images' numbers in the data set, from 0."
            )
        # One column of numbers per use, at a fixed place, in double so that no rounding decides between two boxes.
        u = uniforms(seed, epoch, index, view, 2 * _CROP_TRIES + 19).double().T.contiguous()  # (39, N)
        gates, values = u[2 * _CROP_TRIES + 2 :][:8], u[2 * _CROP_TRIES + 10 :]  # (8, N), (9, N)
        augmented = view == 0 or self.augment_second_view
        table = {name: (gate < prob) & augmented for gate, (name, prob) in zip(gates, self.probs.items(), strict=True)}

        change = 0.8 * self.strength
        low, high = max(0.0, 1 - change), 1 + change
        side = round(self.cutout_size * self.image_size)
        hole_start = (values[7:9] * self.image_size).long() - side // 2  # (2, N): top, left
        table |= {
            "box": self._boxes(u, height, width),
            "order": _ORDERS[(values[0] * len(_ORDERS)).long()],
            "brightness": (low + (high - low) * values[1]).float(),
            "contrast": (low + (high - low) * values[2]).float(),
            "saturation": (low + (high - low) * values[3]).float(),
            "hue": (0.2 * self.strength * (2 * values[4] - 1)).float(),
            "sigma": (self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * values[5]).float(),
            "quarter_turns": (4 * values[6]).long(),
            "hole": torch.cat((hole_start, hole_start + side)).T,
            "noise_stream": view_stream(seed, epoch, index, view),
        }
        return table

    def _boxes(self, u: Tensor, height: int, width: int) -> Tensor:
        """Crop boxes (N, 4) as torchvision's RandomResizedCrop draws them: the first of ten tries that fits."""
        area, log_ratio, place = u.split((_CROP_TRIES, _CROP_TRIES, 2, len(u) - 2 * _CROP_TRIES - 2))[:3]
        (small, large), (narrow, wide) = self.crop_scale, self.crop_ratio
        area = height * width * (small + (large - small) * area)
        ratio = (math.log(narrow) + (math.log(wide) - math.log(narrow)) * log_ratio).exp()
        h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()  # (10, N)
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)

        # If none fits: the largest central box with a permitted ratio.
        ratio = min(max(width / height, narrow), wide)
        central = min(height, round(width / ratio)), min(width, round(height * ratio))
        first = torch.where(fits, torch.arange(_CROP_TRIES)[:, None], _CROP_TRIES).amin(0)  # (N,)
        found = first < _CROP_TRIES
        first = first.clamp(max=_CROP_TRIES - 1)[None]
        h = torch.where(found, h.gather(0, first)[0], central[0]).long()
        w = torch.where(found, w.gather(0, first)[0], central[1]).long()
        top = torch.where(found, place[0] * (height - h + 1), (height - h) // 2).long()
        left = torch.where(found, place[1] * (width - w + 1), (width - w) // 2).long()
        return torch.stack((top, left, h, w), dim=1)

    def _refuse_bad_arguments(self) -> None:
        problems = [
            f"{name}_prob={prob} is not a probability. Use a number from 0 to 1."
            for name, prob in self.probs.items()
            if not 0 <= prob <= 1
        ]
        for fine, problem in (
            (self.image_size >= 1, f"image_size={self.image_size} is not a size in pixels. Use 1 or more."),
            (
                self.image_size != 1 or not self.probs["blur"],
                "image_size=1 leaves nothing to blur. Set blur_prob=0.",
            ),
            (
                0 <= self.strength <= 2.5,
                f"strength={self.strength} is not from 0 to 2.5, where the hue has turned by half.",
            ),
            (
                _is_range(self.crop_scale, 1),
                f"crop_scale={self.crop_scale} is not a range of area. Use 0 < low <= high <= 1.",
            ),
            (
                _is_range(self.crop_ratio),
                f"crop_ratio={self.crop_ratio} is not a range of ratios. Use 0 < low <= high.",
            ),
            (
                _is_range(self.blur_sigma),
                f"blur_sigma={self.blur_sigma} is not a range of pixels. Use 0 < low <= high.",
            ),
            (
                0 < self.cutout_size <= 1,
                f"cutout_size={self.cutout_size} is not a part of the side. Use 0 < size <= 1.",
            ),
            (self.noise_std >= 0, f"noise_std={self.noise_std} is negative. Use 0 or more."),
            (len(self.mean) == 3, f"mean={self.mean} does not have one number for each of 3 channels."),
            (
                len(self.std) == 3 and min(self.std) > 0,
                f"std={self.std} does not have one positive number for each of 3 channels.",
            ),
        ):
            if not fine:
                problems.append(problem)
        if problems:
            raise ValueError("SimCLRAugmentation: " + " ".join(problems))


def _power_of_two(number: float) -> int:
    """The nearest one, by ratio; 1 for numbers below."""
    return 1 << max(0, round(math.log2(number)))


def _is_range(ends: tuple[float, ...], largest: float = math.inf) -> bool:
    return len(ends) == 2 and 0 < ends[0] <= ends[1] <= largest and ends[1] < math.inf


def _refuse_bad_batch(images: Tensor, index: Tensor) -> None:
    # Values are not looked at: on a GPU that would wait for the images.
    problems = []
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        problems.append(f"images of shape {tuple(images.shape)} are not (N, 3, H, W).")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        problems.append(f"images are {images.dtype}. Pass uint8, or floating point in [0, 1].")
    if index.shape != images.shape[:1]:
        problems.append(f"index of shape {tuple(index.shape)} does not number {len(images)} images. Pass one each.")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        problems.append(f"index is {index.dtype}. Pass the images' numbers in the data set as integers.")
    if problems:
        raise ValueError("SimCLRAugmentation: " + " ".join(problems))
