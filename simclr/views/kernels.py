"""The arithmetic of the augmentation, in torchvision's float semantics.

Images x are (n, C, H, W) float32 in [0, 1], with one factor an image; what has to do with colours needs C = 3.
`simclr.views.compiled` has the same effects written once more: there a product and a sum become one instruction and a
chain of effects one pass, which rounds otherwise; here every effect is a few calls of whole tensors, in place where it
can be.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps",)  # kinds of device: Apple's GPUs


def placed_like(parameter: Tensor, x: Tensor) -> Tensor:
    """A CPU parameter on the images' device, without waiting for it: a blocking copy would wait for all queued work."""
    # Only from page-locked memory does CUDA copy without waiting.
    if x.device.type == "cuda":
        parameter = parameter.pin_memory()
    # Apple's GPUs may read the memory of a non-blocking copy after it was reused (pytorch issue 83015).
    return parameter.to(x.device, non_blocking=x.device.type != "mps")


def crop_resize(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop, resize and mirror each image: torchvision's `resized_crop` (bilinear, antialias) and `hflip`.

    Args:
        images: (N, C, H, W), uint8 or floating point, on any device.
        box: (N, 4) integer on the CPU: top, left, height, width.
        flip: (N,) bool on the CPU: mirror left and right.
        size: side of the square result, in pixels.
    Returns:
        (N, C, size, size) float32, in the images' range.
    """
    # Antialiasing widens the filter only where a box shrinks; all others are plain bilinear sampling, which is faster.
    shrinks = (box[:, 2:] > size).any(1)
    box, flip = placed_like(box, images), placed_like(flip, images)
    if not shrinks.any():
        return sample_bilinear(images, box, flip, size)
    views = images.new_empty(*images.shape[:2], size, size, dtype=torch.float32)
    for resample, chosen in ((sample_bilinear, ~shrinks), (resize_by_matrices, shrinks)):
        rows = placed_like(chosen.nonzero().flatten(), images)
        views[rows] = resample(images[rows], box[rows], flip[rows], size)
    return views


def sample_bilinear(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
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


def resize_by_matrices(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
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
    """Blend with the mean luma of the image, torchvision's `adjust_contrast`; without colours with the mean of all."""
    light = to_gray(x) if x.shape[1] == 3 else x.mean(1, keepdim=True)  # (n, 1, H, W)
    # Row by row: the sum over one large image alone would be split over threads, and rounded by their number.
    mean = light.mean(3, keepdim=True).mean(2, keepdim=True)  # (n, 1, 1, 1)
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


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Invert the values from the threshold on: torchvision's `solarize`."""
    return torch.where(x >= threshold, 1 - x, x)
