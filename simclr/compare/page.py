"""A comparison as one page that needs nothing beside it."""

import base64
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from simclr.compare.rows import Column, Comparison
from simclr.compare.text import as_csv
from simclr.files import write_atomically
from simclr.report.charts import Panel, Series, Times, chart_data, thinned
from simclr.report.pictures import GRID, INK, MUTED, class_colours, save_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 12  # rows that a legend can name; the table has the colours of all
_MEASURED = {0: "linear classifier", 10: "", 12: ""}  # places of accuracies on test images, and what their pairs are by
_LEAST = 0.0005  # by which one row is above another, in points with one digit
_SURE = 0.05  # p from which on the order of two runs is not sure
_MOST_POINTS = 400  # of a curve in a file: more than it shows
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


def write_page(found: Comparison, path: Path, beside: dict[str, Any] | None = None) -> Path:
    """Write the page, and its charts beside it as PNGs, NAME.png and NAME-results.png.

    Args:
        found: what to show.
        path: the page.
        beside: what `neighbours_beside` gave.
    """
    colours = row_colours(len(found.rows))
    name = path.stem
    drawn = {name: draw_curves(found, colours), f"{name}-results": draw_settings(found, colours)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a browser has the fonts for every name
        for stem, figure in drawn.items():
            if figure:
                save_chart(figure, path.parent / f"{stem}.png")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("simclr.compare"), PackageLoader("simclr.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    page = environment.get_template("compare.html").render(
        found=found,
        colours=colours,
        curves=curve_data(found, colours),
        scatter=scatter_data(found, colours),
        lead=lead_of(found),
        beside=beside,
        name=name,
        csv=base64.b64encode(as_csv(found).encode()).decode(),
    )
    write_atomically(path, page.encode())
    return path


def curve_data(found: Comparison, colours: list[str]) -> dict[str, Any] | None:
    """What the script draws: a panel for each metric that any run has; None where none has any."""
    panels = []
    for metric in _panels_of(found):
        percent = _PANELS[metric].endswith("%")
        series = [
            Series(run.name, run.history[metric], colour, run=found.runs.index(run), row=number)
            for number, (row, colour) in enumerate(zip(found.rows, colours, strict=True))
            for run in row.runs
            if run.history.get(metric)
        ]
        panels.append(Panel(_PANELS[metric], series, scale=100 if percent else 1))
    times = [
        Times(run.name, run.per_epoch.get("steps"), run.per_epoch.get("images"), run.clock or None)
        for run in found.runs
    ]
    return chart_data(panels, times, legend=False) if panels else None


def lead_of(found: Comparison) -> dict[str, str] | None:
    """What the page says first: which row is the best by the first accuracy on test images, and by how much.

    None where no two rows have one by the same protocol on the same images, or where the best two are equal.
    """
    measured = [(c, [row for row in found.rows if c in row.figures]) for c in found.columns if c.place in _MEASURED]
    column, rows = next(((column, rows) for column, rows in measured if len(rows) > 1), (None, []))
    if column is None:
        return None
    best, other = sorted(rows, key=lambda row: -row.figures[column].value)[:2]
    alone = len(best.runs) == len(other.runs) == 1
    runs = {best.runs[0].name, other.runs[0].name}
    by = _MEASURED[column.place] or column.title
    pair = next((pair for pair in found.pairs if alone and pair.by == by and {pair.best, pair.other} == runs), None)
    ahead = pair.difference if pair else best.figures[column].value - other.figures[column].value
    if ahead < _LEAST:
        return None
    value, _, spread = best.figures[column].text(column).partition(" %")
    chance = f", a lead that these test images cannot tell from chance (p {pair.p:.2g})" if pair else ""
    return {
        "best": best.name,
        "other": other.name,
        "value": value,
        "spread": spread,
        "ahead": f"{100 * ahead:.1f}",
        "surety": chance if pair and pair.p >= _SURE else "",
        "by": column.title,
    }


def scatter_data(found: Comparison, colours: list[str]) -> dict[str, Any] | None:
    """Settings that differ and the figures of each row, for one to be seen against the other; None without either.

    A figure is in percent where its column is, with its interval, or a standard deviation to either side.
    """
    if not found.differing or not found.columns:
        return None
    rows = []
    for row, colour in zip(found.rows, colours, strict=True):
        figures = {}
        for column, figure in row.figures.items():
            scale = 100 if column.percent else 1
            spread = figure.sd or 0.0
            low, high = figure.interval or (figure.value - spread, figure.value + spread)
            numbers = [scale * value for value in (figure.value, low, high)]
            figures[column.title] = {"numbers": numbers, "text": figure.text(column)}
        own = row.runs[0].settings
        values = {name: own.get(name) if _is_number(own.get(name)) else row.setting(name) for name in found.differing}
        rows.append({"name": row.name, "colour": colour, "settings": values, "figures": figures})
    units = {column.title: column.title + (", %" if column.percent else "") for column in found.columns}
    return {"settings": found.differing, "figures": units, "rows": rows, "first": _first_column(found).title}


def _first_column(found: Comparison) -> Column:
    """Of the figures in their order the first that most rows have."""
    return max(found.columns, key=lambda c: (sum(c in row.figures for row in found.rows), -c.place))


def _panels_of(found: Comparison) -> list[str]:
    """The metrics that any run has. A curve takes some epochs; of fewer, single steps say more."""
    few = all(len(run.history.get("train_loss_epoch", [])) < 3 for run in found.runs)
    panels = [name for name in _PANELS if any(run.history.get(name) for run in found.runs)]
    left_out = "train_loss_epoch" if few and "train_loss" in panels else None
    return [name for name in panels if name != left_out]


def row_colours(rows: int) -> list[str]:
    """A colour for each row."""
    return class_colours(rows)


def draw_curves(found: Comparison, colours: list[str]) -> "Figure | None":
    """All runs over each other against epochs, a panel for each metric that any has; None where none has any.

    Args:
        found: the runs.
        colours: of its rows; seeds of the same settings share one.
    """
    from matplotlib.figure import Figure

    panels = _panels_of(found)
    if not panels:
        return None
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 0.3 + 2.9 * height), layout="constrained")
    axes = figure.subplots(height, 2 if len(panels) > 1 else 1, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, panels, strict=False):
        _style(axis, _PANELS[name], "epochs")
        scale = 100 if _PANELS[name].endswith("%") else 1
        for row, colour in zip(found.rows, colours, strict=True):
            for run in row.runs:
                if not run.history.get(name):
                    continue
                times, values = thinned(np.asarray(run.history[name], dtype=float), _MOST_POINTS).T
                dots = {"marker": "o", "ms": 3} if len(times) < 25 else {}
                axis.plot(times, scale * values, color=colour, lw=1.6, alpha=0.9, **dots)
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
    column = _first_column(found)
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


def _style(axis: "Axes", title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, color=INK)
    axis.set_xlabel(below, color=MUTED, fontsize=9)
    axis.patch.set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)
    for side, spine in axis.spines.items():
        spine.set(visible=side == "bottom", color=GRID)
