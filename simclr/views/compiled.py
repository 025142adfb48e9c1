"""The augmentation as two compiled functions of fixed shapes: the fast path behind the same table of parameters.

Kornia's operations run one after the other on the images chosen for each. Here every image goes through one chain that
contains every order of the color jitter, and its numbers make all but its own steps the identity: nothing depends on
the drawn values but values, so that one compilation serves every batch and no device is waited for.

The order of brightness (b), saturation (s), contrast (c) and hue (h) is drawn for each image. Contrast needs the mean
of an image and hue is expensive, so the chain has one contrast and two hues:

    b/s b/s  h  b/s b/s   c   b/s b/s  h  b/s b/s

What an order puts before the contrast runs in the left half, the rest in the right one; what it puts before the hue
runs on that side of a hue; the first of b and s takes the first place of a pair, the other the second.

Images of other channels than RGB have b and c alone. The table says so: their saturations are 1 and their hues 0.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.views.internals import CompilingFailed, TooManyShapes, shapes_compiled
from simclr.views.kernels import placed_like
from simclr.views.operations import Cutout, GaussianBlur, GaussianNoise, Rotate, Sobel, Solarize

# One row an image: the parameters of `crop_and_color` and of `blur`, sent to a device in one copy.
_WIDTHS = {"box": 4, "flip": 1, "own": 8, "luma": 8, "turn": 2, "contrast": 1, "gray": 1, "sigma": 1, "rows": 1}
_IDENTITY_SIGMA = 1e-3  # pixels: every tap but the central one is 0 in float32
# What follows the colors and is not compiled but for the blur. Turning by quarters commutes with the colors.
_AFTER_COLOR = (Rotate, GaussianBlur, Solarize, Sobel, GaussianNoise, Cutout)
_BLOCKS = 4  # The chosen images are blurred in quarters of the batch: a fixed shape, and at most a quarter in vain.


def pack(table: dict[str, Tensor], part: int) -> Tensor:
    """The drawn parameters of `SimCLRAugmentation.draw` as one float32 tensor on the CPU, one row an image.

    Whole numbers stay exact: they are below 2^24.

    Args:
        table: of N images.
        part: how many images go through `crop_and_color` and `blur` at a time; divides N.
    Returns:
        (N, 27).
    """
    jitter, at = table["jitter"], table["order"].argsort(1)  # (N,), (N, 4): where each adjustment is in its order
    brightness, contrast, saturation, hue = at.unbind(1)
    factor, saturates = torch.ones(len(at), 8), torch.zeros(len(at), 8)
    for name, mine, other in (("brightness", brightness, saturation), ("saturation", saturation, brightness)):
        place = (4 * (mine > contrast) + 2 * (mine > hue) + (mine > other))[:, None]  # (N, 1)
        factor.scatter_(1, place, torch.where(jitter, table[name], 1.0)[:, None])
        saturates.scatter_(1, place, float(name == "saturation"))
    half = torch.stack((hue < contrast, hue > contrast), dim=1)  # (N, 2)
    last = (~table["blur"]).to(torch.uint8).view(-1, part)
    columns = {
        "box": table["box"],
        "flip": table["flip"],
        "own": factor,
        "luma": (1 - factor) * saturates,
        "turn": half * torch.where(jitter, table["hue"], 0.0)[:, None],
        "contrast": torch.where(jitter, table["contrast"], 1.0),
        "gray": table["gray"],
        "sigma": torch.where(table["blur"], table["sigma"], _IDENTITY_SIGMA),
        "rows": last.argsort(dim=1, stable=True),  # of a part: those to blur first
    }
    return torch.cat([columns[name].view(len(at), width).float() for name, width in _WIDTHS.items()], dim=1)


def _column(draws: Tensor, name: str) -> Tensor:
    names = list(_WIDTHS)
    start = sum(_WIDTHS[earlier] for earlier in names[: names.index(name)])
    return draws[:, start : start + _WIDTHS[name]]


# Views of a progressive resolution have one shape after the other, of which torch would compile eight.
SHAPES = 64


@cache
def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    # Boxes lie inside the images, so that no index needs a check, which would cost an eighth of the time. Products and
    # sums in one instruction are a seventh faster.
    options: dict[str, Any] = {"assert_indirect_indexing": False, "cpp.enable_floating_point_contract_flag": "fast"}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*arguments: Tensor | int) -> Any:
        with shapes_compiled(SHAPES):
            return compiled(*arguments)

    return call


# Of this process: what compiling failed for, where it would fail again, and what was said of it.
_uncompiled: set[tuple] = set()
_said: set[str] = set()


def compiled_views(
    images: Tensor,
    table: dict[str, Tensor],
    steps: Sequence[nn.Module],
    size: int,
    part: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor | None:
    """The views of the Kornia pipeline up to rounding; None where compiling fails, which a warning says once.

    Args:
        images: (N, C, H, W), uint8, or floating point in [0, 1], N > 0.
        table: of `SimCLRAugmentation.draw`.
        steps: the operations of the pipeline.
        size: side of the views, in pixels.
        part: how many images are made at a time; on a CPU rounded to a power of two.
        mean, std: of each channel.
    Returns:
        (N, C, size, size) float32, normalised.
    """
    blurs = any(isinstance(step, GaussianBlur) for step in steps)
    count = 0 if images.device.type == "cpu" else len(images)  # a CPU's parts have one size
    # What a compilation is made for: a failure says nothing about others.
    made_for = images.device.type, images.dtype, count, *images.shape[1:], size, blurs
    if made_for in _uncompiled:
        return None
    try:
        return _compiled_views(images, table, steps, size, part, mean, std)
    except (CompilingFailed, TooManyShapes) as error:
        _uncompiled.add(made_for)
        _say_once(f"views of {size} px of images of {images.shape[2]} x {images.shape[3]}", error)
        return None


def _say_once(what: str, error: Exception) -> None:
    if isinstance(error, TooManyShapes):
        reason = f"this process has compiled {SHAPES} others"
        why = f"{reason}. Those go on as they are; images of one size need one."
    else:
        reason = str(error).strip().replace("\n", " ")[:300]
        why = f"torch.compile failed: {reason} ... On a CPU it needs a C++ compiler. "
        why += "Pass compile_views=False to do without."
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"Kornia's operations make {what}, which is slower: {why}", stacklevel=4)


def _compiled_views(
    images: Tensor,
    table: dict[str, Tensor],
    steps: Sequence[nn.Module],
    size: int,
    part: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    count = len(images)
    # One shape on a CPU, whatever the batch: compiled once, and always rounding alike.
    part = _power_of_two(part) if images.device.type == "cpu" else count
    whole = -(-count // part) * part  # The last part is filled up with the last image.
    if whole > count:
        filled = torch.arange(whole).clamp(max=count - 1)
        table = {name: values[filled] for name, values in table.items()}
    draws = placed_like(pack(table, part), images)
    later: list[Any] = [step for step in steps if type(step) in _AFTER_COLOR]
    last_blur = next((step for step in later if isinstance(step, GaussianBlur)), None)
    weights = blur_weights(draws, last_blur.flags["kernel_size"]) if last_blur else None
    # The blur leaves constants as they are and may follow the normalisation, which then is no pass of its own.
    at_once = later in ([], [last_blur])
    norm = placed_like(torch.tensor([list(mean), [1 / s for s in std]]), images)
    no_norm = placed_like(torch.tensor([[0.0] * len(mean), [1.0] * len(mean)]), images)

    views = images.new_empty(whole, len(mean), size, size, dtype=torch.float32)
    for start in range(0, whole, part):
        rows = slice(start, start + part)
        drawn, x = {name: values[rows] for name, values in table.items()}, views[rows]
        some = images[rows] if start + part <= count else images[filled[rows]]
        crop_and_color(some, draws[rows], norm if at_once else no_norm, x)
        for step in later:
            if step is last_blur and weights is not None:
                blur(x, draws[rows], weights[rows], int(drawn["blur"].sum()))
            else:
                x = step.apply_transform(x, drawn, step.flags)
        if not at_once:
            torch.mul(x.sub_(norm[0].view(-1, 1, 1)), norm[1].view(-1, 1, 1), out=views[rows])
    return views if whole == count else views[:count].clone()  # without the memory of the rest


def _power_of_two(number: float) -> int:
    """The nearest one, by ratio; 1 for numbers below."""
    return 1 << max(0, round(math.log2(number)))


def crop_and_color(images: Tensor, draws: Tensor, norm: Tensor, out: Tensor) -> None:
    """Crop, resize, flip, color jitter, gray and normalisation of every image, compiled.

    Args:
        images: (N, C, H, W), uint8, or floating point in [0, 1].
        draws: (N, 27) from `pack`, on the images' device.
        norm: (2, C): of each channel the mean, and 1 / standard deviation.
        out: (N, C, size, size) float32, takes the views.
    """
    # In a function of their own: a CPU would work the taps out for every row anew.
    taps = compile_once(_taps_of_both)(draws, *images.shape[2:], out.shape[3])
    compile_once(_crop_and_color)(images, *taps, draws, norm, out)


def blur_weights(draws: Tensor, kernel_size: int) -> Tensor:
    """The Gaussian kernels of `blur`, each from its centre: (N, 27) to (N, kernel_size // 2 + 1)."""
    offset = torch.arange(kernel_size // 2 + 1, device=draws.device)
    weights = torch.exp(-0.5 * (offset / _column(draws, "sigma")) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
    # Far taps of a narrow kernel are denormal: a CPU is ten times slower on them.
    return weights * (weights > 1e-12)


def blur(x: Tensor, draws: Tensor, weights: Tensor, count: int) -> None:
    """Gaussian blur, in place, of the `count` images that are to be blurred.

    Args:
        x: (N, C, H, H).
        draws: (N, 27) from `pack`.
        weights: (N, r + 1) from `blur_weights`.
        count: of images to blur, at most N.
    """
    block = len(x) // _BLOCKS if len(x) % _BLOCKS == 0 else len(x)
    rows = _column(draws, "rows")[:, 0].long()
    radius = weights.shape[1] - 1
    for start in range(0, count, block):
        chosen = rows[start : start + block]
        # A CPU would not vectorise the padding, if it were compiled.
        padded = F.pad(x.index_select(0, chosen), (radius,) * 4, mode="reflect")
        compile_once(_convolve)(padded, weights, chosen, x)


def _convolve(padded: Tensor, weights: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Both passes of symmetric kernels: (n, C, H + 2r, W + 2r) into the chosen n of (N, C, H, W)."""
    radius = weights.shape[1] - 1
    weight = weights[chosen].T[..., None, None, None]
    height, width = padded.shape[2] - 2 * radius, padded.shape[3] - 2 * radius

    def pair(x: Tensor, offset: int, axis: int, length: int) -> Tensor:
        return x.narrow(axis, radius - offset, length) + x.narrow(axis, radius + offset, length)

    rows = padded.narrow(2, radius, height) * weight[0]
    rows = rows + sum(pair(padded, k, 2, height) * weight[k] for k in range(1, radius + 1))
    blurred = rows.narrow(3, radius, width) * weight[0]
    out.index_copy_(0, chosen, blurred + sum(pair(rows, k, 3, width) * weight[k] for k in range(1, radius + 1)))


def _crop_and_color(
    images: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    columns: Tensor,
    column_weights: Tensor,
    draws: Tensor,
    norm: Tensor,
    out: Tensor,
) -> None:
    planes = _crop(images, rows, row_weights, columns, column_weights)
    draws = draws[..., None, None]  # each number beside (N, height, width)
    own, luma = (_column(draws, name).unflatten(1, (2, 4)) for name in ("own", "luma"))
    turn, contrast = _column(draws, "turn"), _column(draws, "contrast")[:, 0]
    planes = _half(planes, own[:, 0], luma[:, 0], turn[:, 0])
    # Row by row: a sum that is split over threads would be rounded by their number.
    mean = _luma(planes).mean(2, keepdim=True).mean(1, keepdim=True)
    planes = [_clamp(x * contrast + (1 - contrast) * mean) for x in planes]
    planes = _half(planes, own[:, 1], luma[:, 1], turn[:, 1])
    if len(planes) == 3:
        gray, luma = _column(draws, "gray")[:, 0] > 0, _luma(planes)
        planes = [torch.where(gray, luma, x) for x in planes]
    planes = [(x - shift) * scale for x, shift, scale in zip(planes, *norm, strict=True)]
    out.copy_(torch.stack(planes, dim=1))


def _crop(images: Tensor, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor) -> list[Tensor]:
    """The crops' channels, (N, size, size) each: `resized_crop` (bilinear, antialias) and `hflip`."""
    size, width = rows.shape[2], images.shape[3]
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    planes = []
    for channel in images.unbind(1):
        lines = sum(  # (N, size, W)
            channel.gather(1, at[:, :, None].expand(-1, -1, width)).float() * weight[:, :, None]
            for at, weight in zip(rows, row_weights, strict=True)
        )
        plane = sum(  # (N, size, size)
            lines.gather(2, at[:, None].expand(-1, size, -1)) * weight[:, None]
            for at, weight in zip(columns, column_weights * scale, strict=True)
        )
        planes.append(plane)
    return planes


def _taps_of_both(draws: Tensor, height: int, width: int, size: int) -> tuple[Tensor, ...]:
    top, left, *lengths = _column(draws, "box").int().unbind(1)
    flip = _column(draws, "flip")[:, 0] > 0
    return *_taps(top, lengths[0], height, size, torch.zeros_like(flip)), *_taps(left, lengths[1], width, size, flip)


def _taps(start: Tensor, length: Tensor, source: int, size: int, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Which source pixels make each output pixel, integer, and how much, float: (taps, N, size) both.

    Counted in 1 / (2 * size) of a pixel, where all centres are whole numbers: no rounding decides which pixels.
    """
    length = length[:, None]
    reach = length.clamp(min=size)  # half the triangle filter's base: a pixel, and more where the box shrinks
    output = torch.arange(size, device=start.device, dtype=torch.int32)
    output = torch.where(flip[:, None], size - 1 - output, output)  # (N, size)
    centre = (2 * output + 1) * length
    first = torch.div(centre - 2 * reach + size, 2 * size, rounding_mode="floor")
    pixels = torch.stack([first + tap for tap in range(max(2, math.ceil(2 * source / size)))])
    inside = (pixels >= 0) & (pixels < length)
    weights = (2 * reach - ((2 * pixels + 1) * size - centre).abs()).clamp(min=0) * inside
    return (pixels.clamp(min=0).minimum(length - 1) + start[:, None]).long(), weights / weights.sum(0)


def _luma(planes: list[Tensor]) -> Tensor:
    """ITU-R 601, rounded as in torchvision; without colours the mean."""
    if len(planes) != 3:
        return sum(planes[1:], planes[0]) / len(planes)
    red, green, blue = planes
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _clamp(x: Tensor) -> Tensor:
    """`x.clamp(0, 1)` to the bit: above 1, x - (x - 1) is 1. A CPU's clamp looks for NaN, in twice the instructions."""
    return x.relu() - (x - 1).relu()


def _half(planes: list[Tensor], own: Tensor, luma: Tensor, turn: Tensor) -> list[Tensor]:
    """Two of brightness and saturation, the hue, two of brightness and saturation: own and luma are (N, 4).

    Without colours the brightness, which has one of the four places.
    """
    if len(planes) != 3:
        factor = own[:, 0] * own[:, 1] * own[:, 2] * own[:, 3]
        return [_clamp(x * factor) for x in planes]
    for place in (0, 1):
        planes = _blend(planes, own[:, place], luma[:, place])
    planes = [torch.where(turn == 0, x, turned) for x, turned in zip(planes, _hue(planes, turn), strict=True)]
    for place in (2, 3):
        planes = _blend(planes, own[:, place], luma[:, place])
    return planes


def _blend(planes: list[Tensor], own: Tensor, luma: Tensor) -> list[Tensor]:
    """So much of each channel and so much of the pixel's luma: brightness (luma = 0) or saturation (their sum = 1)."""
    other = _luma(planes) * luma
    return [_clamp(x * own + other) for x in planes]


def _hue(planes: list[Tensor], turn: Tensor) -> list[Tensor]:
    """As `kernels.adjust_hue`, whose docstring explains it, channel by channel."""
    red, green, blue = planes
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    spread = largest - smallest
    hue = (green + blue - red - smallest) * ((1 / 6) / (spread + 1e-12)) + 1 / 6
    hue = torch.where(green >= blue, hue, -hue) + turn
    turned = []
    for start in (5 / 6, 3 / 6, 1 / 6):
        k = hue + start
        k = k - k.floor()
        turned.append(largest - spread * _clamp((k - 2 / 6).abs() * -6 + 2))
    return turned
