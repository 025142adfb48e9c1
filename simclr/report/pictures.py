"""The pictures of a report: learning curves, neighbours, a map of the features as files; and how a page holds some."""

import base64
import colorsys
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simclr.files import write_atomically
from simclr.inputs import for_display

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 20  # classes that a chart can name

# Colours of the light page.
INK, MUTED, GRID, PAPER, ACCENT, WRONG = "#1b1f24", "#667080", "#e4e7eb", "#fefefe", "#2460c8", "#bf4711"
# Tableau 10: apart from each other on white and on black.
CLASS_COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"]
CLASS_COLOURS += ["#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"]


def neighbour_picture(
    queries: Tensor,
    neighbours: Tensor,
    wrong: Tensor | None = None,
    *,
    cell: int = 96,
    title: str = "nearest training images",
) -> Image.Image:
    """A picture with a row for each query: the query, then its neighbours, the wrong ones in a coloured frame.

    Args:
        queries: (n, C, S, S) uint8 or uint16, on any device, as the others.
        neighbours: (n, k, C, S, S).
        wrong: (n, k) bool, or None.
        cell: side of an image in the picture, in pixels; small images grow to a whole multiple of theirs.
        title: above the neighbours.
    """
    k, side = neighbours.shape[1], queries.shape[-1]
    cell = max(1, round(cell / side)) * side if side <= cell else cell
    pad, gap, top = 4, 18, 26
    step = cell + 2 * pad
    picture = Image.new("RGB", (step * (k + 1) + gap, top + step * len(queries)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    draw.text((pad, top / 2), "query", INK, font, anchor="lm")
    draw.text((step + gap + pad, top / 2), title, INK, font, anchor="lm")
    for row, (query, others) in enumerate(zip(queries, neighbours, strict=True)):
        for column, pixels in enumerate((query, *others)):
            x, y = column * step + (gap if column else 0), top + row * step
            if column and wrong is not None and wrong[row, column - 1]:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=WRONG)
            method = Image.Resampling.NEAREST if cell > side else Image.Resampling.LANCZOS
            picture.paste(to_picture(pixels).resize((cell, cell), method), (x + pad, y + pad))
    return picture


def draw_curves(
    history: dict[str, list[tuple[float, float]]], loss: str, chance: float | None, classes: int | None
) -> "Figure":
    """Loss, online kNN where measured, and a small learning rate, against epochs.

    Args:
        history: as `read_metrics` gives it.
        loss: its name.
        chance: the loss where no image is told from another; None if there is no such level.
        classes: how many there are, for the rate of guessing; None if not known.
    """
    from matplotlib.figure import Figure

    panels = [name for name in ("train_loss_epoch", "knn_top1", "lr") if history.get(name)]
    widths = [1.3 if name == "lr" else 3 for name in panels]
    figure = Figure(figsize=(8.8, 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=True):
        times, values = zip(*history[name], strict=True)
        if name == "train_loss_epoch":
            _style(axis, f"{loss} loss")
            axis.plot(
                *zip(*history.get("train_loss", [(math.nan, math.nan)]), strict=True), color=ACCENT, alpha=0.3, lw=1
            )
            if chance is not None and max(values) > 0.85 * chance:
                _level(axis, chance, "chance")
            axis.plot(times, values, color=ACCENT, lw=2.2, marker="o", ms=4 if len(times) < 25 else 0)
            _end_label(axis, times[-1], values[-1], f"{values[-1]:.2f}")
        elif name == "knn_top1":
            _style(axis, "online kNN accuracy, %")
            if classes:
                _level(axis, 100 / classes, "guessing")
            percent = [100 * value for value in values]
            axis.plot(times, percent, color=ACCENT, lw=2.2, marker="o", ms=4 if len(times) < 25 else 0)
            axis.set_ylim(0, min(105, max(20, 1.25 * max(percent))))
            _end_label(axis, times[-1], percent[-1], f"{percent[-1]:.1f} %")
        else:
            _style(axis, "learning rate")
            axis.plot(times, values, color=MUTED, lw=1.6)
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlim(0, max(times[-1], 1))
    return figure


def _style(axis: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, loc="left", fontsize=10.5, color=INK, pad=10)
    axis.set_xlabel("epoch", color=MUTED, fontsize=9)
    axis.patch.set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for side, spine in axis.spines.items():
        spine.set(visible=side == "bottom", color=GRID)


def _level(axis: "Axes", height: float, name: str) -> None:
    axis.axhline(height, color=MUTED, lw=1, ls=(0, (3, 3)))
    place: dict[str, Any] = {
        "xy": (0, height),
        "xycoords": ("axes fraction", "data"),
        "xytext": (4, -3),
        "textcoords": "offset points",
    }
    axis.annotate(name, **place, ha="left", va="top", size=8.5, color=MUTED)


def _end_label(axis: "Axes", x: float, y: float, text: str) -> None:
    place: dict[str, Any] = {"xy": (x, y), "xytext": (-2, 8), "textcoords": "offset points"}
    axis.annotate(text, **place, ha="right", va="bottom", size=10, color=ACCENT, weight="bold")


def draw_map(places: Tensor, labels: Tensor | None, classes: list[str] | None) -> "Figure":
    """Images as points, coloured by class and named where they lie densest, as long as there are few classes.

    Args:
        places: (N, 2).
        labels: (N,) int64, or None.
        classes: names, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 6.2), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    if labels is None:
        x, y = places.T.numpy()
        axis.scatter(x, y, s=11, color=ACCENT, alpha=0.55, lw=0)
        return figure
    present = labels.unique().tolist()
    colours = class_colours(len(present))
    for number, label in enumerate(present):
        own = places[labels == label]
        x, y = own.T.numpy()
        axis.scatter(x, y, s=13, color=colours[number], alpha=0.75, lw=0)
    if classes is None or len(present) > MOST_NAMES:
        return figure
    for number, label in enumerate(present):
        own = places[labels == label]
        reach = torch.cdist(own, own).kthvalue(min(len(own), max(2, len(own) // 4)), dim=1).values
        box = {"boxstyle": "round,pad=0.28", "facecolor": PAPER, "edgecolor": colours[number], "alpha": 0.88}
        place = tuple(own[reach.argmin()].tolist())
        axis.annotate(classes[label], place, ha="center", va="center", size=10, color=INK, bbox=box, parse_math=False)
    return figure


def draw_spectrum(spectra: dict[str, Tensor]) -> "Figure":
    """The eigenvalues of features' covariance, each set's as shares of its largest, on axes of powers of ten.

    A line that falls off a cliff is of features that vary in few dimensions: they have collapsed.

    Args:
        spectra: name -> (F,) in falling order; the last is the one that counts.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    _style(axis, "spectrum of the features")
    axis.set_xlabel("dimension", color=MUTED, fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):  # powers as typeset formulas, and marks between them, take twice the time
        side.set_major_formatter("{x:g}")
        side.set_minor_locator(NullLocator())
    for number, (name, values) in enumerate(spectra.items(), 1):
        share = (values / values[0].clamp_min(1e-30)).clamp_min(1e-9).tolist()
        colour, width = (ACCENT, 2.2) if number == len(spectra) else (MUTED, 1.4)
        axis.plot(range(1, 1 + len(share)), share, color=colour, lw=width, label=name)
    axis.set_ylim(1e-6, 1.5)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    axis.set_ylabel("share of the largest", color=MUTED, fontsize=9)
    return figure


def draw_confusion(matrix: list[list[int]], classes: list[str]) -> "Figure":
    """Which class (row) is taken for which (column), in percent of the row, for as many classes as can be named.

    Args:
        matrix: (C, C), images.
        classes: C names.
    """
    from matplotlib.figure import Figure

    share = torch.tensor(matrix).double()
    share = 100 * share / share.sum(1, keepdim=True).clamp_min(1)
    side = 2.2 + 0.42 * len(classes)
    figure = Figure(figsize=(side + 0.4, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(confusion_picture(matrix, [max(1, sum(row)) for row in matrix]))
    for row, column in share.nonzero().tolist():
        value = float(share[row, column])
        colour = "white" if value > (55 if row == column else 11) else INK
        axis.text(column, row, f"{value:.0f}" if value >= 0.5 else "", ha="center", va="center", size=8.5, color=colour)
    places = range(len(classes))
    names = [name if len(name) <= 18 else f"{name[:17]}…" for name in classes]
    axis.set_xticks(places, names, rotation=45, ha="left", rotation_mode="anchor", parse_math=False)
    axis.set_yticks(places, names, parse_math=False)
    axis.xaxis.tick_top()
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.set_xlabel("taken for, % of the row's images", color=MUTED, fontsize=9)
    for spine in axis.spines.values():
        spine.set(color=GRID)
    return figure


def as_picture(figure: "Figure") -> Image.Image:
    """A chart as a picture on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set(dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def to_picture(pixels: Tensor) -> Image.Image:
    """(C, H, W) uint8 or uint16, on any device, as a picture; see `simclr.inputs.for_display`."""
    return Image.fromarray(for_display(pixels.cpu()).permute(1, 2, 0).contiguous().numpy())


def confusion_picture(matrix: list[list[int]], sizes: list[int]) -> Image.Image:
    """A matrix of many classes: one pixel a cell, the diagonal in the accent colour, mistakes in the other.

    Args:
        matrix: (C, C), how many images of a class (row) are taken for another (column).
        sizes: (C,), of the classes, at least 1.
    """
    share = torch.tensor(matrix).float() / torch.tensor(sizes)[:, None]
    own = torch.eye(len(matrix), dtype=torch.bool)
    alpha = torch.where(own, share, 5 * share).clamp(max=1)
    rgb = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (WRONG, ACCENT)])[own.long()]  # (C, C, 3)
    pixels = torch.cat((rgb, (255 * alpha)[..., None].long()), dim=-1).byte().numpy()
    return Image.fromarray(pixels, "RGBA")


def save_chart(figure: "Figure", path: Path) -> None:
    """Write a chart as a PNG, for use elsewhere."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=180, facecolor="white")
    write_atomically(path, png.getvalue())


def class_colours(count: int) -> list[str]:
    """A colour for each class, as unlike those beside it as there are many."""
    if count <= len(CLASS_COLOURS):
        return CLASS_COLOURS[:count]
    colours = []
    for i in range(count):
        hue, light = i * 0.618034 % 1, (0.52, 0.66, 0.42)[i % 3]  # by the golden ratio, neighbours are far apart
        colours.append("#" + "".join(f"{round(255 * v):02x}" for v in colorsys.hls_to_rgb(hue, light, 0.62)))
    return colours


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as a PNG file, as small as can be."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: Image.Image, kind: str = "png") -> str:
    """A picture as an address that holds it: without loss as `png`, or as `jpeg`, which is smaller for photos."""
    if kind == "png":
        return data_uri_of(png_bytes(picture))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return data_uri_of(buffer.getvalue(), "jpeg")


def data_uri_of(file: bytes, kind: str = "png") -> str:
    """A picture file as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
