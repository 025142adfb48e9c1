"""The pictures of a report: learning curves, neighbours, a map of the features."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 20  # classes that a chart can name

# Colours of the light page. A chart in the page refers to them by name, so that it follows the reader's dark mode.
INK, MUTED, GRID, PAPER, ACCENT, WRONG = "#1b1f24", "#667080", "#e4e7eb", "#fefefe", "#2460c8", "#d4541a"
COLOUR_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", ACCENT: "accent", WRONG: "wrong"}
# Tableau 10: apart from each other on white and on black.
CLASS_COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"]
CLASS_COLOURS += ["#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"]


def neighbour_picture(
    queries: Tensor, neighbours: Tensor, wrong: Tensor | None = None, *, cell: int = 96
) -> Image.Image:
    """A picture with a row for each query: the query, then its neighbours, the wrong ones in a coloured frame.

    Args:
        queries: (n, 3, S, S) uint8, on any device, as the others.
        neighbours: (n, k, 3, S, S) uint8.
        wrong: (n, k) bool, or None.
        cell: side of an image in the picture, in pixels; small images grow to a whole multiple of theirs.
    """
    k, side = neighbours.shape[1], queries.shape[-1]
    cell = max(1, round(cell / side)) * side if side <= cell else cell
    pad, gap, top = 4, 18, 26
    step = cell + 2 * pad
    picture = Image.new("RGB", (step * (k + 1) + gap, top + step * len(queries)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    draw.text((pad, top / 2), "query", INK, font, anchor="lm")
    draw.text((step + gap + pad, top / 2), "nearest training images", INK, font, anchor="lm")
    for row, (query, others) in enumerate(zip(queries, neighbours, strict=True)):
        for column, pixels in enumerate((query, *others)):
            x, y = column * step + (gap if column else 0), top + row * step
            if column and wrong is not None and wrong[row, column - 1]:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=WRONG)
            method = Image.Resampling.NEAREST if cell > side else Image.Resampling.LANCZOS
            picture.paste(to_picture(pixels).resize((cell, cell), method), (x + pad, y + pad))
    return picture


def tsne(features: Tensor, *, perplexity: float = 30.0, iterations: int = 500) -> Tensor:
    """A map of features in two dimensions (van der Maaten & Hinton 2008, exact), by cosine distance.

    Starts from the two principal components, so that it is the same every time. Near images are near on the map;
    distances between groups, and their sizes, say little.

    Args:
        features: (N, F), N >= 4; time and memory grow with N squared.
        perplexity: about how many neighbours each image keeps near; at most (N - 1) / 3.
        iterations: steps of gradient descent.
    Returns:
        (N, 2) float32, centred.
    """
    count = len(features)
    x = F.normalize(features.float(), dim=1)
    p = _affinities((2 - 2 * x @ x.T).clamp_(min=0), min(perplexity, (count - 1) / 3))
    centred = x - x.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    y = centred @ (axes * axes.sum(0).sign())  # an eigenvector's sign is arbitrary
    y = y / y.std(0).clamp(min=1e-12)[0] * 1e-4
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    early, rate = 12.0, max(count / 12 / 4, 50.0)  # as scikit-learn's "auto"
    for step in range(iterations):
        exaggerated = step < iterations // 4
        affinity = 1 / (1 + torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square_())
        affinity.fill_diagonal_(0)
        force = (p * (early if exaggerated else 1.0) - affinity / affinity.sum()) * affinity
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_(min=0.01)
        velocity = (0.5 if exaggerated else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
    return y - y.mean(0)


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric joint probabilities whose rows have the perplexity asked for, by bisection: (N, N) -> (N, N)."""
    squared = squared.clone().fill_diagonal_(math.inf)
    low, high = torch.zeros(len(squared), 1), torch.full((len(squared), 1), math.inf)
    beta = torch.ones(len(squared), 1)
    for _ in range(50):
        p = torch.softmax(-squared * beta, dim=1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return (p + p.T) / (2 * len(p))


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
    place = {"xy": (0, height), "xycoords": ("axes fraction", "data"), "xytext": (4, -3), "textcoords": "offset points"}
    axis.annotate(name, **place, ha="left", va="top", size=8.5, color=MUTED)


def _end_label(axis: "Axes", x: float, y: float, text: str) -> None:
    place = {"xy": (x, y), "xytext": (-2, 8), "textcoords": "offset points"}
    axis.annotate(text, **place, ha="right", va="bottom", size=10, color=ACCENT, weight="bold")


def draw_map(places: Tensor, labels: Tensor | None, classes: list[str] | None) -> "Figure":
    """Images as points, coloured by class and named where they lie densest, as long as there are few classes.

    Args:
        places: (N, 2).
        labels: (N,) int64, or None.
        classes: names, or None.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 6.2), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    if labels is None:
        axis.scatter(*places.T.numpy(), s=11, color=ACCENT, alpha=0.55, lw=0)
        return figure
    present = labels.unique().tolist()
    colours = CLASS_COLOURS
    if len(present) > len(colours):
        colours = [to_hex(colormaps["hsv"](i / len(present))) for i in range(len(present))]
    for number, label in enumerate(present):
        own = places[labels == label]
        axis.scatter(*own.T.numpy(), s=13, color=colours[number], alpha=0.75, lw=0)
    if classes is None or len(present) > MOST_NAMES:
        return figure
    for number, label in enumerate(present):
        own = places[labels == label]
        reach = torch.cdist(own, own).kthvalue(min(len(own), max(2, len(own) // 4)), dim=1).values
        box = {"boxstyle": "round,pad=0.28", "facecolor": PAPER, "edgecolor": colours[number], "alpha": 0.88}
        place = own[reach.argmin()].tolist()
        axis.annotate(classes[label], place, ha="center", va="center", size=10, color=INK, bbox=box, parse_math=False)
    return figure


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) uint8, on any device, as a picture."""
    return Image.fromarray(pixels.cpu().permute(1, 2, 0).contiguous().numpy())
