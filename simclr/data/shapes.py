"""The built-in images: ten classes of shapes, drawn in the process.

Each image scatters five copies of one shape over a soft gray gradient, two or three of them amber and the others navy,
each with its own place, size and angle. What two crops of an image share, beyond what they both happen to show, is
therefore the class. Every image has the same colours: if each had its own, those would be the easiest thing that its
crops share, and the first to be learnt.

A linear classifier on raw pixels fails for a reason one can write down: amber lies as far above the ground as navy lies
below it, in every channel, and each copy is as often the one as the other. The mean image of every class is the ground.
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
_GROUND = torch.tensor((0.47, 0.48, 0.49))
_SLOPE = 0.06
_AMBER = torch.tensor((0.40, 0.27, 0.06))  # above the ground; navy is as far below it. 1.15 times it stays in [0, 1]
_REACH = 2.5  # the templates cover [-_REACH, _REACH] in units of the disc's radius
_TEMPLATE = 128  # pixels a side: 23 per unit, where a copy at 32 px has 3 to 5
# Images are drawn in whole blocks, so that an image's bits do not depend on which others are drawn with it (vectorised
# sine and cosine may differ in the last bit from those of the rest of a vector).
_BLOCK = 256


def _outline(name: str) -> Tensor:
    """(V, 2) float64 corners of a shape's outline, y upwards, any scale and place."""

    def arc(radius: float, start: float, stop: float, count: int) -> Tensor:
        t = torch.linspace(start, stop, count, dtype=torch.float64) * math.tau
        return torch.stack((radius * t.cos(), radius * t.sin()), dim=1)

    points: list[tuple[float, float]]
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
            horn = (1 - radius**2 + shift**2) / (2 * shift)
            outer, inner = math.acos(horn) / math.tau, math.acos((horn - shift) / radius) / math.tau
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
    """(10, T, T) float32 signed distances of the shapes, the disc with radius 1, each centred.

    Long and pointed shapes get less area than the disc and more reach: half way, geometrically, between equal area and
    an equal circumscribed circle (of radius 1.25), which at 32 px keeps both their strokes and their outlines visible.
    """
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
            corners = corners - centre
            scale = ((math.pi / area.abs()).sqrt() * 1.25 / corners.norm(dim=1).max()).sqrt()
            distances.append(_polygon_distance(points, corners * scale))
    return torch.stack(distances).float()


def _draw_block(first: int, size: int, part: int) -> Tensor:
    """Images first ... first + _BLOCK - 1 of a part: (_BLOCK, 3, size, size) uint8."""
    index = torch.arange(first, first + _BLOCK)
    numbers = uniforms(_SEED, epoch=part, index=index, view=0, count=8 + 5 * _COPIES)
    whole, each = numbers[:, :8], numbers[:, 8:].view(_BLOCK, _COPIES, 5)
    line = (torch.arange(size) + 0.5) / size - 0.5  # pixel centres, in sides of the image
    x, y = line[None, None, :], line[None, :, None]

    # The ground: a little lighter to a little darker, along a drawn direction, through an S-curve of drawn softness.
    turn = whole[:, 0] * math.tau
    ramp = x * turn.cos()[:, None, None] + y * turn.sin()[:, None, None] + (whole[:, 1, None, None] - 0.5) * 0.6
    ramp = torch.tanh(ramp * (1 + 4 * whole[:, 2, None, None]))[..., None]  # (n, S, S, 1)
    picture = _GROUND + _SLOPE * ramp  # (n, S, S, 3)

    # The copies: a centre and four corners, the whole turned and shifted, each copy jittered.
    spot = torch.tensor([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * 0.27
    turn = whole[:, 3] * math.tau
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    places = torch.stack((cos * spot[:, 0] - sin * spot[:, 1], sin * spot[:, 0] + cos * spot[:, 1]), dim=-1)
    places = places + 0.10 * (whole[:, None, 4:6] - 0.5) + 0.16 * (each[..., 0:2] - 0.5)  # (n, 5, 2)
    radius = 0.12 + 0.05 * each[..., 2]  # of the disc, in sides of the image

    # Pixel centres in each copy's own turned frame, looked up in the shape's distance template.
    dx, dy = x[:, None] - places[..., 0, None, None], y[:, None] - places[..., 1, None, None]  # (n, 5, S, S)
    turn = each[..., 3] * math.tau
    cos, sin = (turn.cos() / radius)[..., None, None], (turn.sin() / radius)[..., None, None]
    frame = torch.stack((cos * dx + sin * dy, cos * dy - sin * dx), dim=-1) / _REACH  # (n, 5, S, S, 2)
    shape = _templates()[index % len(CLASSES)][:, None]
    distance = F.grid_sample(shape, frame.flatten(1, 2), padding_mode="border", align_corners=False)
    distance = distance.view(_BLOCK, _COPIES, size, size) * (radius * size)[..., None, None]  # in pixels
    cover = (0.5 - distance).clamp(0, 1)[..., None]  # (n, 5, S, S, 1): antialiased over one pixel

    amber = torch.arange(_COPIES) % 2 == (whole[:, 6] < 0.5)[:, None]  # (n, 5)
    strength = torch.where(amber, 1.0, -1.0) * (0.85 + 0.3 * each[..., 4])
    colours = _GROUND + strength[..., None] * _AMBER  # (n, 5, 3)
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
