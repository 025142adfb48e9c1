"""The built-in images: ten classes of shapes, drawn in the process.

Each image scatters five copies of one shape over a soft two-colour gradient, some lighter than the ground and some
darker, each with its own place, size and angle. The class is therefore the one thing that any two crops of an image
share: colour, polarity, size and angle all vary within the image, so that telling images apart by them does not pay.
And pixels do not give the class to a linear classifier: all shapes have the same area, and light and dark cancel.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.seeding import uniforms

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "bar", "arrow")
_SEED = 20200213  # the data set's own (the day SimCLR went to arXiv): runs with other seeds train on the same images
_COPIES = 5
_REACH = 2.75  # the templates cover [-_REACH, _REACH] in units of the radius of the disc of equal area
_TEMPLATE = 128  # pixels a side: 23 per unit, where a copy at 32 px has 3 to 5
# Images are drawn in whole blocks, so that an image's bits do not depend on which others are drawn with it (vectorised
# sine and cosine may differ in the last bit from those of the rest of a vector).
_BLOCK = 256


def _outline(name: str) -> Tensor:
    """(V, 2) float64 corners of a shape's outline, y upwards, any scale and place."""

    def arc(radius: float, start: float, stop: float, count: int) -> Tensor:
        t = torch.linspace(start, stop, count, dtype=torch.float64) * math.tau
        return torch.stack((radius * t.cos(), radius * t.sin()), dim=1)

    match name:
        case "square":
            points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "bar":
            points = [(-1, -4), (1, -4), (1, 4), (-1, 4)]
        case "triangle":
            return arc(1, 0.25, 1.25, 4)[:-1]
        case "star":
            tips, notches = arc(1, 0.25, 1.25, 6)[:-1], arc(0.42, 0.35, 1.35, 6)[:-1]
            return torch.stack((tips, notches), dim=1).flatten(0, 1)
        case "cross":
            points = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
            points += [(-x, -y) for x, y in points]
        case "arrow":
            points = [(0, 5), (4, 0.5), (1.4, 0.5), (1.4, -5), (-1.4, -5), (-1.4, 0.5), (-4, 0.5)]
        case "heart":  # a well-known curve of four harmonics
            t = torch.linspace(0, math.tau, 65, dtype=torch.float64)[:-1]
            x = 16 * t.sin() ** 3
            y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
            return torch.stack((x, y), dim=1)
        case "crescent":  # a disc less another one, a little smaller, .5 to its right: the horns are where they meet
            radius, shift = 0.84, 0.5
            x = (1 - radius**2 + shift**2) / (2 * shift)
            outer, inner = math.acos(x) / math.tau, math.acos((x - shift) / radius) / math.tau
            bite = arc(radius, 1 - inner, inner, 33)[1:-1]
            bite[:, 0] += shift
            return torch.cat((arc(1, outer, 1 - outer, 49), bite))
    return torch.tensor(points, dtype=torch.float64)


def _polygon_distance(points: Tensor, corners: Tensor) -> Tensor:
    """Signed distance (negative inside) of points (..., 2) to a polygon (V, 2): even-odd rule and nearest edge."""
    distance = torch.full(points.shape[:-1], math.inf, dtype=points.dtype)
    inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for a, b in zip(corners, corners.roll(-1, 0), strict=True):
        along = ((points - a) @ (b - a) / (b - a).dot(b - a)).clamp(0, 1)
        distance = torch.minimum(distance, (points - a - along[..., None] * (b - a)).norm(dim=-1))
        if a[1] != b[1]:
            crosses = (points[..., 1] < a[1]) != (points[..., 1] < b[1])
            where = a[0] + (points[..., 1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
            inside ^= crosses & (points[..., 0] < where)
    return torch.where(inside, -distance, distance)


@cache
def _templates() -> Tensor:
    """(10, T, T) float32 signed distances of the shapes, each centred and scaled to the area of the unit disc."""
    line = ((torch.arange(_TEMPLATE, dtype=torch.float64) + 0.5) / _TEMPLATE * 2 - 1) * _REACH
    points = torch.stack(torch.meshgrid(line, -line, indexing="xy"), dim=-1)  # (T, T, 2), y upwards
    radius = points.norm(dim=-1)
    distances = []
    for name in CLASSES:
        if name == "disc":
            distances.append(radius - 1)
        elif name == "ring":  # inner radius .6 of the outer: pi (R^2 - .36 R^2) = pi
            outer = 1 / math.sqrt(0.64)
            distances.append((radius - 0.8 * outer).abs() - 0.2 * outer)
        else:
            corners = _outline(name)
            x, y = corners.unbind(1)
            nx, ny = corners.roll(-1, 0).unbind(1)
            twice = x * ny - nx * y  # the shoelace formula: area and centroid
            area = twice.sum() / 2
            centre = torch.stack((((x + nx) * twice).sum(), ((y + ny) * twice).sum())) / (6 * area)
            distances.append(_polygon_distance(points, (corners - centre) * (math.pi / area.abs()).sqrt()))
    return torch.stack(distances).float()


def _colour(luma: Tensor, hue: Tensor, chroma: Tensor) -> Tensor:
    """(..., 3) RGB of a given luma (Rec. 601): hue and chroma move in the plane of colours that keep it."""
    cb, cr = chroma * (hue * math.tau).cos(), chroma * (hue * math.tau).sin()
    return torch.stack((luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb), dim=-1)


def _draw_block(first: int, size: int, part: int) -> Tensor:
    """Images first ... first + _BLOCK - 1 of a part: (_BLOCK, 3, size, size) uint8."""
    index = torch.arange(first, first + _BLOCK)
    numbers = uniforms(_SEED, epoch=part, index=index, view=0, count=14 + 8 * _COPIES)
    whole, each = numbers[:, :14], numbers[:, 14:].view(_BLOCK, _COPIES, 8)
    line = (torch.arange(size) + 0.5) / size - 0.5  # pixel centres, in sides of the image
    x, y = line[None, None, :], line[None, :, None]

    # The ground: from one colour to another, along a drawn direction, through an S-curve of drawn softness.
    turn = whole[:, 0] * math.tau
    ramp = x * turn.cos()[:, None, None] + y * turn.sin()[:, None, None] + (whole[:, 1, None, None] - 0.5) * 0.6
    ramp = torch.sigmoid(ramp * (2 + 8 * whole[:, 2, None, None]))[..., None]  # (n, S, S, 1)
    luma = 0.40 + 0.20 * whole[:, 3]
    tilt = 0.16 * (whole[:, 4] - 0.5)
    start = _colour(luma + tilt, whole[:, 5], 0.06 + 0.16 * whole[:, 6])
    stop = _colour(luma - tilt, whole[:, 7], 0.06 + 0.16 * whole[:, 8])
    picture = start[:, None, None] * (1 - ramp) + stop[:, None, None] * ramp  # (n, S, S, 3)

    # The copies: a centre and four corners, the whole turned and shifted, each copy jittered.
    spot = torch.tensor([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * 0.27
    turn = whole[:, 9] * math.tau
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    places = torch.stack((cos * spot[:, 0] - sin * spot[:, 1], sin * spot[:, 0] + cos * spot[:, 1]), dim=-1)
    places = places + 0.10 * (whole[:, None, 10:12] - 0.5) + 0.12 * (each[..., 0:2] - 0.5)  # (n, 5, 2)
    radius = 0.105 + 0.05 * each[..., 2]  # of the disc of equal area, in sides of the image

    # Pixel centres in each copy's own turned frame, looked up in the shape's distance template.
    dx, dy = x[:, None] - places[..., 0, None, None], y[:, None] - places[..., 1, None, None]  # (n, 5, S, S)
    turn = each[..., 3] * math.tau
    cos, sin = (turn.cos() / radius)[..., None, None], (turn.sin() / radius)[..., None, None]
    frame = torch.stack((cos * dx + sin * dy, cos * dy - sin * dx), dim=-1) / _REACH  # (n, 5, S, S, 2)
    shape = _templates()[index % len(CLASSES)][:, None]
    distance = F.grid_sample(shape, frame.flatten(1, 2), padding_mode="border", align_corners=False)
    distance = distance.view(_BLOCK, _COPIES, size, size) * (radius * size)[..., None, None]  # in pixels
    cover = (0.5 - distance).clamp(0, 1)[..., None]  # (n, 5, S, S, 1): antialiased over one pixel

    # Two tones, one lighter and one darker than the ground; two or three copies have each.
    light = torch.arange(_COPIES) % 2 == (whole[:, 12] < 0.5)[:, None]  # (n, 5)
    tone = torch.where(light, 1.0, -1.0) * (0.27 + 0.10 * each[..., 4])
    hue = torch.where(light, whole[:, 13, None], whole[:, 13, None] + 0.35) + 0.15 * each[..., 5]
    colours = _colour(luma[:, None] + tone, hue, 0.05 + 0.17 * each[..., 6])  # (n, 5, 3)
    for copy in range(_COPIES):
        picture = picture + cover[:, copy] * (colours[:, copy, None, None] - picture)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def draw_shapes(count: int, size: int, part: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the first images of a part of the built-in set: a pure function of (part, number of the image, size).

    Args:
        count: how many images.
        size: their side in pixels; made for 32 and more.
        part: which part: 0 the training images, 1 the test images, in [0, 2^32); no two share an image.
    Returns:
        images (count, 3, size, size) uint8, and labels (count,) int64 into CLASSES: image i shows class i mod 10.
    """
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for first in range(0, count, _BLOCK):
        images[first : first + _BLOCK] = _draw_block(first, size, part)[: count - first]
    return images, torch.arange(count) % len(CLASSES)
