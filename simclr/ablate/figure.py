"""The figure of an experiment, arranged as the paper's, with ours beside it."""

import io
import math
from typing import Any

from simclr.ablate.experiment import Experiment
from simclr.ablate.verdict import Results

_OURS, _BESIDE, _PAPERS = "#1f6fb2", "#a9c9e6", "#8a8a8a"
_SERIES = ("#1f6fb2", "#d1622b", "#3a8f4d", "#8a4fa3", "#b08a00", "#555555")


def figure_of(experiment: Experiment, results: Results) -> bytes:
    """The figure as a PNG: the paper's values on the left where there are any, ours on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = experiment.figure.get("metric") or next(iter(experiment.metrics))
    ours = {cell.name: _values(cell.name, metric, results) for cell in experiment.cells}
    kind = experiment.figure["kind"]
    tables = [t for t in experiment.paper if t.values and (t.metric in (None, metric) or kind == "curves")]
    tables = [t for t in tables if t.metric == metric] or tables[:1]
    of_paper = {name: [value] for table in tables for name, value in table.values.items()}
    tables = tables[:1]  # those of one metric stand in one panel
    figure = Figure(figsize=(5.2 * (1 + len(tables)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(tables), squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=False):
        if kind == "lines":
            _lines(axes, of_paper, experiment.figure)
        elif kind == "heatmap":
            _heatmap(axes, of_paper, experiment.figure)
        else:
            _bars(axes, {"": of_paper}, [_PAPERS])
        axes.set_title(_short(f"as published: {table.name}"), fontsize=9)
        (axes.set_ylabel if kind == "lines" else axes.set_xlabel)(table.unit, fontsize=8)
    axes = panels[-1]
    what = experiment.figure.get("y") if kind == "curves" else experiment.metrics.get(metric)
    axes.set_title(f"ours: {_short(what or metric)}", fontsize=9)
    if kind == "lines":
        _lines(axes, ours, experiment.figure)
    elif kind == "heatmap":
        _heatmap(axes, ours, experiment.figure)
    elif kind == "curves":
        _curves(axes, experiment, results)
    elif beside := experiment.figure.get("beside"):
        others = {cell.name: _values(cell.name, beside, results) for cell in experiment.cells}
        _bars(axes, {metric: ours, beside: others}, [_OURS, _BESIDE])
    else:
        _bars(axes, {metric: ours}, [_OURS])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _values(cell: str, metric: str, results: Results) -> list[float]:
    return [r.metrics[metric] for (name, _), r in results.items() if name == cell and metric in r.metrics]


def _bars(axes: Any, metrics: dict[str, dict[str, list[float]]], colours: list[str]) -> None:
    """A bar for each cell that has values, of several metrics beside each other; a point for each seed."""
    names = [name for name in next(iter(metrics.values())) if any(values.get(name) for values in metrics.values())]
    height = 0.65 / len(metrics)
    for number, ((metric, values), colour) in enumerate(zip(metrics.items(), colours, strict=True)):
        shown = [(place, values[name]) for place, name in enumerate(names) if values.get(name)]
        places = [place + (number - (len(metrics) - 1) / 2) * height for place, _ in shown]
        means = [math.fsum(found) / len(found) for _, found in shown]
        axes.barh(places, means, color=colour, height=0.92 * height, label=metric)
        for place, mean, (_, found) in zip(places, means, shown, strict=True):
            if len(found) > 1:
                axes.plot(found, [place] * len(found), ".", color="black", markersize=4)
            end = (max(mean, *found), place)
            axes.annotate(f"{mean:.3g}", end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if len(metrics) > 1:
        axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.05), ncols=len(metrics))
    _plain(axes)


def _lines(axes: Any, values: dict[str, list[float]], arrangement: dict[str, Any]) -> None:
    places: set[float] = set()
    for colour, (series, cells) in zip(_SERIES, arrangement["series"].items(), strict=False):
        points = [(float(x), values[str(cell)]) for x, cell in cells.items() if values.get(str(cell))]
        if not points:
            continue
        means = [math.fsum(found) / len(found) for _, found in points]
        places |= {x for x, _ in points}
        axes.plot([x for x, _ in points], means, "o-", color=colour, label=series, markersize=4)
        for x, found in points:
            axes.plot([x] * len(found), found, ".", color=colour, markersize=3)
    if arrangement.get("log"):
        axes.set_xscale("log")
        axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])  # 4 and 12, not 4 x 10^0
        axes.minorticks_off()
    axes.set_xlabel(arrangement.get("x", ""), fontsize=8)
    if len(arrangement["series"]) > 1:
        axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _heatmap(axes: Any, values: dict[str, list[float]], arrangement: dict[str, Any]) -> None:
    def at(a: str, b: str) -> float:
        return _mean(values.get(name) for name in (f"{a}+{b}" if a != b else a, f"{b}+{a}"))

    every = arrangement["names"]
    names = [a for a in every if any(not math.isnan(at(a, b)) for b in every)]  # those that were run
    found = [[at(a, b) for b in names] for a in names]
    if not names:
        return
    axes.imshow(found, cmap="viridis")
    known = [x for row in found for x in row if not math.isnan(x)]
    middle = (min(known) + max(known)) / 2 if known else 0
    for i, row in enumerate(found):
        for j, x in enumerate(row):
            if not math.isnan(x):
                axes.text(j, i, f"{x:.1f}", ha="center", va="center", fontsize=7, color="w" if x < middle else "k")
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=45)
    axes.set_yticks(range(len(names)), names, fontsize=7)


def _curves(axes: Any, experiment: Experiment, results: Results) -> None:
    name, first = experiment.figure["curve"], set[str]()
    cells = [cell.name for cell in experiment.cells]
    for (cell, _), result in results.items():
        if name not in result.curves:
            continue
        colour = _SERIES[cells.index(cell) % len(_SERIES)]
        x, y = zip(*result.curves[name], strict=True)
        label = None if cell in first else cell
        first.add(cell)
        axes.plot(x, y, color=colour, label=label, linewidth=1.3)
    if experiment.figure.get("log"):
        axes.set_yscale("log")
    axes.set_xlabel(experiment.figure.get("x", ""), fontsize=8)
    axes.set_ylabel(experiment.figure.get("y", name), fontsize=8)
    if first:
        axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _mean(candidates: Any) -> float:
    found = next((values for values in candidates if values), None)
    return math.fsum(found) / len(found) if found else math.nan


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _short(text: str) -> str:
    return text if len(text) < 60 else f"{text[:57]}..."
