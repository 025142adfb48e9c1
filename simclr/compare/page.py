"""A comparison as one page that needs nothing beside it."""

import base64
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from simclr.compare.rows import Comparison
from simclr.compare.text import as_csv
from simclr.files import write_atomically
from simclr.report.pictures import CLASS_COLOURS, GRID, INK, MUTED, save_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 12  # rows that a legend can name; the table has the colours of all
_MOST_POINTS = 400  # of a curve: more than a screen shows
_PANELS = {
    "train_loss_epoch": "loss",
    "train_loss": "loss of single steps",
    "heldout_loss": "held-out loss",
    "knn_top1": "online kNN, %",
    "probe_top1": "online linear probe, %",
    "retrieval_top1": "retrieval, %",
    "rankme": "effective rank",
    "contrast_top1": "contrastive top-1, %",
}


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page, and its charts beside it as PNGs, NAME.png and NAME-*.png.

    Args:
        found: what to show.
        path: the page.
    """
    colours = row_colours(len(found.rows))
    name = path.stem
    drawn = {f"learning curves against {axis}": draw_curves(found, colours, axis) for axis in time_axes(found)}
    drawn["settings against results"] = draw_settings(found, colours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a browser has the fonts for every name
        charts = {
            title.split()[-1]: save_chart(
                figure, name if not number else f"{name}-{title.split()[-1]}", path.parent, title
            )
            for number, (title, figure) in enumerate(drawn.items())
            if figure
        }
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("simclr.compare"), PackageLoader("simclr.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("compare.html").render(
        found=found,
        colours=colours,
        scatter=charts.pop("results", None),
        charts=charts,
        name=name,
        csv=base64.b64encode(as_csv(found).encode()).decode(),
    )
    write_atomically(path, page.encode())
    return path


def row_colours(rows: int) -> list[str]:
    """A colour for each row."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if rows <= len(CLASS_COLOURS):
        return CLASS_COLOURS[:rows]
    return [to_hex(colormaps["hsv"](i / rows)) for i in range(rows)]


def time_axes(found: Comparison) -> list[str]:
    """Against what curves are drawn: epochs, and what else puts them in another place."""
    others = ("steps", "images")
    different = [
        axis for axis in others if len({run.per_epoch[axis] for run in found.runs if axis in run.per_epoch}) > 1
    ]
    return ["epochs", *different]


def draw_curves(found: Comparison, colours: list[str], axis_of_time: str = "epochs") -> "Figure | None":
    """All runs over each other, a panel for each metric that any has; None where none has any.

    Args:
        found: the runs.
        colours: of its rows; seeds of the same settings share one.
        axis_of_time: one of `time_axes`; a run that does not record it is left out.
    """
    from matplotlib.figure import Figure

    panels = [name for name in _PANELS if any(run.history.get(name) for run in found.runs)]
    # A curve takes some epochs; of fewer, single steps say more.
    few = all(len(run.history.get("train_loss_epoch", [])) < 3 for run in found.runs)
    panels = [
        name for name in panels if name != ("train_loss_epoch" if few and "train_loss" in panels else "train_loss")
    ]
    if not panels:
        return None
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 0.3 + 2.9 * height), layout="constrained")
    axes = figure.subplots(height, 2 if len(panels) > 1 else 1, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, panels, strict=False):
        _style(axis, _PANELS[name], axis_of_time)
        scale = 100 if _PANELS[name].endswith("%") else 1
        for number, (row, colour) in enumerate(zip(found.rows, colours, strict=True)):
            for place, run in enumerate(row.runs):
                points = _thinned(run.history.get(name, []))
                if not points or axis_of_time not in run.per_epoch:
                    continue
                times, values = zip(*points, strict=True)
                dots = {"marker": "o", "ms": 3} if len(points) < 25 else {}
                [line] = axis.plot(
                    [run.per_epoch[axis_of_time] * t for t in times],
                    [scale * v for v in values],
                    color=colour,
                    lw=1.6,
                    alpha=0.9,
                    **dots,
                )
                line.set_gid(f"row-{number}-{name}-{place}")
        axis.set_xlim(0, None)
    _name_rows(figure, found, colours)
    return figure


def draw_settings(found: Comparison, colours: list[str]) -> "Figure | None":
    """Each setting that is a number and has three values or more, against the first figure; None where there is none.

    Args:
        found: the runs.
        colours: of its rows.
    """
    from matplotlib.figure import Figure

    values = {name: [row.runs[0].settings.get(name) for row in found.rows] for name in found.differing}
    numbers = {name: own for name, own in values.items() if len({v for v in own if _is_number(v)}) >= 3}
    if not numbers or not found.columns:
        return None
    # Of the figures in their order the first that most rows have.
    column = max(found.columns, key=lambda c: (sum(c in row.figures for row in found.rows), -c.place))
    scale = 100 if column.percent else 1
    names = list(numbers)[:6]
    height, wide = -(-len(names) // 3), min(3, len(names))
    figure = Figure(figsize=(10, 0.3 + 2.7 * height), layout="constrained")
    axes = figure.subplots(height, wide, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        _style(axis, f"{column.title}{', %' if column.percent else ''}" if axis is axes[0] else "", name)
        for row, value, colour in zip(found.rows, numbers[name], colours, strict=True):
            if not _is_number(value) or column not in row.figures:
                continue
            result = row.figures[column]
            low, high = result.interval or (result.value - (result.sd or 0), result.value + (result.sd or 0))
            axis.plot([value, value], [scale * low, scale * high], color=colour, lw=1.2, alpha=0.6)
            axis.plot([value], [scale * result.value], color=colour, marker="o", ms=6)
        own = [float(value) for value in numbers[name] if value is not None and _is_number(value)]
        if min(own) > 0 and max(own) >= 20 * min(own):  # learning rates, batch sizes
            axis.set_xscale("log")
    return figure


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name_rows(figure: "Figure", found: Comparison, colours: list[str]) -> None:
    """A legend below the chart, which stands alone as a PNG."""
    from matplotlib.lines import Line2D

    if len(found.rows) > _MOST_NAMES:
        return
    lines = [Line2D([], [], color=colour, lw=2.5) for colour in colours]
    # Matplotlib leaves out what begins with an underscore.
    names = [f" {row.name}" for row in found.rows]
    legend = figure.legend(lines, names, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set(parse_math=False, color=MUTED)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many, evenly, and always the last."""
    every = -(-len(points) // _MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _style(axis: "Axes", title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, color=INK)
    axis.set_xlabel(below, color=MUTED, fontsize=9)
    axis.patch.set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)
    for side, spine in axis.spines.items():
        spine.set(visible=side == "bottom", color=GRID)
