"""What differs between runs, what each reached, and seeds of the same settings as one row."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr.checks import listed
from simclr.compare.paired import Pair, meaning_of, paired
from simclr.compare.runs import Run, find_runs, names_of, read_run
from simclr.eval import wilson_interval
from simclr.eval.tables import shown_results, top1_of

NOT_RECORDED = "\u2013"


@dataclass(frozen=True, order=True)
class Column:
    """A figure: where it stands, its title, and how it is written: a share in percent, or a number of digits.

    Numbers of two meanings never share one: `of` is another where settings or images are that the title does not name.
    """

    place: int
    title: str
    percent: bool = False
    digits: int = 1
    of: str = ""

    def text(self, value: float) -> str:
        """A value for people, without its unit."""
        return f"{100 * value if self.percent else value:,.{self.digits}f}"


@dataclass(frozen=True)
class Figure:
    """A value of one run with its 95 % interval, or the mean of n seeds with their standard deviation.

    Attributes:
        value: a fraction where the column is in percent.
        n: runs; of a single run's result, draws of labelled images.
        interval: over test images, of a single run; None if not known.
        sd: over seeds or draws, with n - 1; None for a single run that was measured once.
    """

    value: float
    n: int = 1
    interval: tuple[float, float] | None = None
    sd: float | None = None

    def text(self, column: Column) -> str:
        """For people: `83.1 % (81.4 to 84.7)` or `83.1 ± 0.4 %, n 3`."""
        unit = " %" if column.percent else ""
        if self.sd is not None:
            return f"{column.text(self.value)} ± {column.text(self.sd)}{unit}, n {self.n}"
        if self.interval is None:
            return f"{column.text(self.value)}{unit}"
        low, high = map(column.text, self.interval)
        return f"{column.text(self.value)}{unit} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """A run, or runs that differ in their seed alone."""

    runs: list[Run]
    figures: dict[Column, Figure]

    @property
    def name(self) -> str:
        """The run's, or the first one's and how many follow."""
        more = len(self.runs) - 1
        return self.runs[0].name + (f" and {more} more" if more else "")

    @property
    def seeds(self) -> str:
        """As recorded, in order."""
        return ", ".join(NOT_RECORDED if run.seed is None else str(run.seed) for run in self.runs)

    @property
    def stands(self) -> str:
        """How far its runs have come."""
        return "; ".join(dict.fromkeys(run.stands for run in self.runs))

    def setting(self, name: str) -> str:
        """A setting for people."""
        settings = self.runs[0].settings
        return _text(settings[name]) if name in settings else NOT_RECORDED


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        rows: in the order in which the runs were given.
        differing: dotted names of the settings that differ.
        same: those in which all agree.
        columns: the figures that any run has.
        pairs: runs compared image by image.
        notes: what a reader must know beside the numbers.
        left_out: (path, why) of what is no run or cannot be read.
    """

    rows: list[Row]
    differing: list[str]
    same: dict[str, str]
    columns: list[Column]
    pairs: list[Pair]
    notes: list[str]
    left_out: list[tuple[str, str]]

    @property
    def runs(self) -> list[Run]:
        """All runs, row by row."""
        return [run for row in self.rows for run in row.runs]


def compare_runs(paths: Iterable[str | Path]) -> Comparison:
    """Compare runs, whatever state they are in.

    Args:
        paths: run folders, or folders that hold some.
    Raises:
        ValueError: if there are not two runs to compare, with what each path is.
    """
    folders, left_out = find_runs(paths)
    runs: list[Run] = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            left_out.append((str(folder), str(error)))
    if len(runs) < 2:
        found = f"one ({runs[0].path})" if runs else "none"
        reasons = "".join(f"; {path}: {why}" for path, why in left_out)
        raise ValueError(f"to compare it takes two runs or more, and there is {found}{reasons}.")
    differing = _differing(runs)
    groups = _groups(runs)
    rows = [Row(group, _joined([figures_of(run) for run in group])) for group in groups]
    pairs, unpaired = paired(runs)
    known = [run.settings for run in runs]
    same = {name: _text(value) for name, value in known[0].items() if all(name in s for s in known)}
    return Comparison(
        rows=rows,
        differing=differing,
        same={name: text for name, text in same.items() if name not in differing},
        columns=sorted({column for row in rows for column in row.figures}),
        pairs=pairs,
        notes=_notes(runs, differing, unpaired),
        left_out=left_out,
    )


def _differing(runs: list[Run]) -> list[str]:
    """Settings with two recorded values; one that a run of another version lacks is not known to differ."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(_key(value))
    return [name for name, found in values.items() if len(found) > 1]


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Complete runs of the same settings and different seeds together; any other run by itself."""
    groups: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        key = json.dumps([_key(run.settings), run.stands])
        alone = not run.complete or run.seed is None or any(run.seed == other.seed for other in groups.get(key, ()))
        groups.setdefault(f"{number}" if alone else key, []).append(run)
    return list(groups.values())


def _key(value: Any) -> str:
    """Equal for equal settings: 1 and 1.0 are, and so are a tuple and a list."""
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if value is None or isinstance(value, dict | list | tuple | bool) else str(value)


def figures_of(run: Run) -> dict[Column, Figure]:
    """The final figures of a run; what was not measured is left out.

    An accuracy carries its protocol in its column: numbers of two protocols never stand in one.
    """
    found = _of_evaluation(run.result) if run.result else {}
    if run.evaluation:
        found |= _of_protocols(run.evaluation)
    last = {name: values[-1][1] for name, values in run.history.items() if values}
    if (loss := last.get("train_loss_epoch", last.get("train_loss"))) is not None:
        found[Column(50, "loss", digits=3)] = Figure(loss)
    if "heldout_loss" in last:
        found[Column(51, "held-out loss", digits=3)] = Figure(last["heldout_loss"])
    if "knn_top1" in last:
        found[Column(20, "online kNN", percent=True)] = Figure(last["knn_top1"])
    if "retrieval_top1" in last:
        value, images = last["retrieval_top1"], _retrieved(run)
        interval = wilson_interval(round(value * images), images) if images else None
        found[Column(30, "retrieval", percent=True)] = Figure(value, interval=interval)
    if "rankme" in last:
        found[Column(40, "effective rank")] = Figure(last["rankme"])
    if run.images_per_second is not None:
        found[Column(60, "images/s", digits=0)] = Figure(run.images_per_second)
    if run.minutes is not None:
        found[Column(70, "minutes")] = Figure(run.minutes)
    return found


def _of_evaluation(result: dict[str, Any]) -> dict[Column, Figure]:
    data = result.get("data") or {}
    test = f", {data['test_images']:,} of {data.get('test')}" if data.get("test_images") else ""
    low, high = result["ci95"]
    title = f"linear ({result.get('protocol', 'unknown protocol')}{test})"
    found = {Column(0, title, percent=True): Figure(result["linear_top1"], interval=(low, high))}
    if result.get("starting_weights_top1") is not None:
        found[Column(5, f"starting weights{test}", percent=True)] = Figure(result["starting_weights_top1"])
    if result.get("supervised_top1") is not None:
        found[Column(6, f"supervised{test}", percent=True)] = Figure(result["supervised_top1"])
    if result.get("knn_top1") is not None:
        images = data.get("test_images")
        interval = wilson_interval(round(result["knn_top1"] * images), images) if images else None
        title = f"kNN (k {result.get('knn_k', '?')}{test})"
        found[Column(10, title, percent=True)] = Figure(result["knn_top1"], interval=interval)
    return found


def _of_protocols(record: dict[str, Any]) -> dict[Column, Figure]:
    """What `simclr eval` came to; of results that differ in their draw only the mean."""
    found = {}
    for result in shown_results(record):
        title, of = meaning_of(record, result)
        interval, draws = result.get("ci95"), result.get("draws")
        figure = Figure(top1_of(result), draws or 1, interval and tuple(interval), result.get("top1_std"))
        found[Column(12, title, percent=True, of=of)] = figure
    return found


def _retrieved(run: Run) -> int | None:
    """On how many images retrieval was measured: known where the evaluation had the run's own test images."""
    data = (run.result or {}).get("data") or {}
    evaluated, images = data.get("settings") or {}, run.settings.get("quality.images")
    same = ("source", "train_dir", "test_dir", "data_dir", "shapes_test", "holdout")
    if not images or data.get("note") or not data.get("test_images"):
        return None
    if any(evaluated.get(name) != run.settings.get(f"data.{name}") for name in same):
        return None
    return min(images, data["test_images"])


def _joined(figures: list[dict[Column, Figure]]) -> dict[Column, Figure]:
    joined = {}
    for column in {column for of_run in figures for column in of_run}:
        own = [of_run[column] for of_run in figures if column in of_run]
        values = [figure.value for figure in own]
        if len(own) > 1:
            joined[column] = Figure(statistics.fmean(values), len(own), sd=statistics.stdev(values))
        else:
            joined[column] = own[0]
    return joined


def _method(run: Run) -> str:
    """A run's, of which an early version recorded none: there was one."""
    return str(run.settings.get("method", "simclr"))


def _notes(runs: list[Run], differing: list[str], unpaired: list[str]) -> list[str]:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [f"{run.name}: not finished, stands at {run.stands}" for run in runs if not run.complete]
    seen: dict[str, str] = {}
    for run in runs:
        key = _key([run.settings, run.seed, run.stands])
        if key in seen:
            notes.append(f"{run.name}: the same settings and seed as {seen[key]}, so not another sample")
        seen.setdefault(key, run.name)
    for run in runs:
        # A run of another method has other settings of its model.
        every = {
            name
            for other in runs
            for name in other.settings
            if not name.startswith("model.") or _method(other) == _method(run)
        }
        if run.configured and (lacking := sorted(every - run.settings.keys())):
            notes.append(f"{run.name}: of another version, it does not record {listed(lacking, 5)}")
    levels = ("loss", "temperature", "views", "small_crops", "pairs")
    decides = [n for n in differing if n in ("method", "data.batch_size", *(f"model.{level}" for level in levels))]
    if decides:
        notes.append(f"losses do not compare: the runs differ in {', '.join(decides)}, on which their level depends")
    if len({column.title for run in runs for column in figures_of(run) if column.place == 0}) > 1:
        notes.append("linear evaluations of different protocols or test images stand in columns of their own")
    titles = [c.title for c in {c for run in runs for c in figures_of(run)}]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        notes.append(f"{listed(twice)} stands there more than once: training or test images are not the same")
    if len(unpaired) > 1:
        notes.append(
            f"no paired test for {', '.join(unpaired)}: their predictions of single images are not on disk, or of "
            "other images. Their intervals are unpaired, and wider than a difference on the same images would be; "
            "simclr linear-eval RUN and simclr eval RUN measure again and keep them"
        )
    return notes
