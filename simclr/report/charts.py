"""Curves as data of a page, which `templates/charts.js` draws."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

AXES = ("epochs", "steps", "images", "minutes")
_MOST_POINTS = 300_000  # of all curves of a page, in 3 MB at most
_FEWEST_POINTS = 200  # of a curve
_CLOCK = 200  # points of a run's clock

Points = Sequence[tuple[float, float]]  # (epochs done, value), in the order of time


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for people.
        points: where it goes; at least one.
        colour: a hexadecimal one, or a name of the style sheet.
        faint: whether it stands behind the others.
        run: its place among the runs.
        row: what shows and hides it.
    """

    name: str
    points: Points
    colour: str = "accent"
    faint: bool = False
    run: int = 0
    row: int = 0


@dataclass(frozen=True)
class Panel:
    """Curves over each other.

    Attributes:
        title: with the unit.
        series: the curves.
        levels: (value, name) of what they are seen beside.
        zero: whether the vertical axis begins at 0, until one zooms.
        scale: what values are multiplied by.
    """

    title: str
    series: list[Series]
    levels: list[tuple[float, str]] = field(default_factory=list)
    zero: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Times:
    """What turns the epochs of a run into another axis.

    Attributes:
        name: of the run.
        steps, images: of an epoch; None if not known.
        clock: (epochs done, minutes of training), rising; None if not recorded.
    """

    name: str
    steps: float | None = None
    images: float | None = None
    clock: Points | None = None


def chart_data(panels: list[Panel], runs: list[Times], *, legend: bool) -> dict[str, Any]:
    """What the script draws, in plain types: numbers are float32, little-endian, base64; equal arrays stand there once.

    A curve of very many points is thinned to the first, lowest, highest and last of each stretch, so that no spike is
    lost.

    Args:
        panels: those with curves.
        runs: by which the curves are placed in time.
        legend: whether each panel names its curves.
    """
    arrays: dict[str, int] = {}

    def place_of(values: Sequence[float] | np.ndarray) -> int:
        text = base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
        return arrays.setdefault(text, len(arrays))

    curves = sum(len(panel.series) for panel in panels)
    most = max(_FEWEST_POINTS, _MOST_POINTS // max(1, curves))
    shown = []
    for panel in panels:
        series = []
        for curve in panel.series:
            points = thinned(np.asarray(curve.points, dtype=float), most)
            series.append(
                {
                    "name": curve.name,
                    "colour": curve.colour,
                    "faint": curve.faint,
                    "run": curve.run,
                    "row": curve.row,
                    "x": place_of(points[:, 0]),
                    "y": place_of(panel.scale * points[:, 1]),
                }
            )
        levels = [{"value": panel.scale * value, "name": name} for value, name in panel.levels]
        shown.append({"title": panel.title, "zero": panel.zero, "levels": levels, "series": series})
    of_runs = []
    for run in runs:
        clock = None
        if run.clock:
            epochs, minutes = thinned(np.asarray(run.clock, dtype=float), _CLOCK).T
            clock = [place_of(epochs), place_of(minutes)]
        of_runs.append({"name": run.name, "steps": run.steps, "images": run.images, "clock": clock})
    known = {
        "steps": any(r.steps for r in runs),
        "images": any(r.images for r in runs),
        "minutes": any(r.clock for r in runs),
    }
    axes = [name for name in AXES if known.get(name, True)]
    return {"axes": axes, "legend": legend, "panels": shown, "runs": of_runs, "arrays": list(arrays)}


def thinned(points: np.ndarray, most: int) -> np.ndarray:
    """About `most` of N points, in their order: of each stretch the first, the lowest, the highest, and the very last.

    Args:
        points: (N, 2), time and value.
        most: at least 8.
    """
    if len(points) <= most:
        return points
    bounds = np.linspace(0, len(points), max(2, most // 3) + 1).astype(int)
    kept = {len(points) - 1}
    for start, stop in pairwise(bounds.tolist()):
        values = points[start:stop, 1]
        kept |= {start, start + int(values.argmin()), start + int(values.argmax())}
    return points[sorted(kept)]
