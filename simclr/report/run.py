"""What a run folder holds for its page: metrics, evaluations, settings, and where its images are."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from simclr.checkpoint import Checkpoint
from simclr.data import ImageData
from simclr.data.module import folders_shown, images_of_run
from simclr.eval.evaluation import RESULT
from simclr.eval.suite import EVAL, SCHEMA
from simclr.eval.tables import as_markdown
from simclr.files import hold
from simclr.heartbeat import is_written


def read_metrics(folder: Path, per_epoch: float | None = None) -> dict[str, list[tuple[float, float]]]:
    """What `metrics.csv` of a run holds, for drawing: name -> [(epochs done, value)], in the order of time.

    Whatever was logged stands where its step does: the loss, learning rate, contrastive top-1 and cosines of single
    steps inside an epoch, `train_loss_epoch` and `knn_top1` at its end. Empty without the file, or without an epoch.

    Args:
        folder: of the run.
        per_epoch: optimiser steps of an epoch, as its checkpoint knows them: by the file alone a run that ended inside
            its first epoch cannot be told from one that had so short an epoch.
    Raises:
        ValueError: if the file is not a run's metrics.
    """
    rows, by_file = _rows_and_steps(folder)
    per_epoch = per_epoch or by_file
    found: dict[str, dict[float, float]] = {}
    for number, row in enumerate(rows if per_epoch else (), start=2):
        try:
            time = (int(row["step"]) + 1) / per_epoch
            for name in row.keys() - {"step", "epoch"}:
                if row[name]:
                    found.setdefault(name, {})[time] = float(row[name])  # a continued run writes some steps again
        except (TypeError, ValueError) as error:
            raise _not_metrics(folder, error, number) from error
    return {name: sorted(values.items()) for name, values in found.items()}


def steps_per_epoch(folder: Path) -> float | None:
    """How many optimiser steps an epoch of a run has, by its `metrics.csv`; None before its first epoch has ended.

    Raises:
        ValueError: if the file is not a run's metrics.
    """
    return _rows_and_steps(folder)[1] or None


def _rows_and_steps(folder: Path) -> tuple[list[dict[str, str]], float]:
    """The whole rows of `metrics.csv`, and the steps of an epoch; 0 if none has ended."""
    path = folder / "metrics.csv"
    if not path.exists():
        return [], 0.0
    try:
        text = path.read_bytes().decode()
        # A row is there when its line ends: of a run that goes on, or of a copy, the last may not be whole.
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_metrics(folder, error) from error
    ends = [0.0]
    for number, row in enumerate(rows, start=2):
        try:
            step = int(row["step"])
            if row.get("train_loss_epoch"):  # of which there is no column before the first epoch has ended
                ends.append((step + 1) / (int(row["epoch"]) + 1))
        except (KeyError, TypeError, ValueError) as error:
            raise _not_metrics(folder, error, number) from error
    return rows, max(ends)  # an epoch that was cut short has fewer steps than the others


def _not_metrics(folder: Path, error: Exception, line: int | None = None) -> ValueError:
    where = "" if line is None else f" in line {line}"
    return ValueError(f"{folder / 'metrics.csv'} cannot be read as metrics of a run{where}: {_why(error)}.")


def _why(error: Exception) -> str:
    """Why a file cannot be read, for people."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, TypeError | AttributeError):
        return "its values are of other kinds than a run writes"
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The linear evaluations of a run, the newest first.

    Raises:
        ValueError: naming a file that is not one.
    """
    results = []
    for path in _kept(folder, RESULT):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {_why(error)}.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} is not a linear evaluation.")
        missing = [k for k in ("linear_top1", "ci95", "random_encoder_top1", "raw_pixels_top1") if k not in record]
        if missing:
            raise ValueError(f"{path} is not a linear evaluation: it has no {' and no '.join(missing)}.")
        if strange := [name for name in record if not _is_usual(name, record[name])]:
            name = strange[0]
            raise ValueError(f"{path} is not a linear evaluation: its {name} is {json.dumps(record[name])[:60]}.")
        results.append(record)
    return results


def _is_usual(name: str, value: Any) -> bool:
    """Whether a value of a linear evaluation is of the kind that pages and tables show under this name."""
    if name == "ci95":
        return _are_numbers(value) and len(value) == 2
    if value is None:
        return name != "linear_top1"
    if name == "confusion_matrix":
        return isinstance(value, list) and all(_are_numbers(row) and len(row) == len(value) for row in value)
    if name == "data":
        return isinstance(value, dict) and _are_numbers([value.get(of, 0) for of in ("test_images", "train_images")])
    if name in ("predictions", "versions", "starting_weights"):
        return isinstance(value, dict)
    return not name.endswith(("_top1", "_top5")) or _are_numbers([value])


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The records of `simclr eval` of a run, the newest first.

    Raises:
        ValueError: naming a file that is not one.
    """
    records = []
    for path in _kept(folder, EVAL):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {_why(error)}.") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not an evaluation that this version reads: its schema is not {SCHEMA}.")
        try:
            as_markdown(record)  # which asks for all that is shown of it
            if not (record["results"] and record["labels"]):
                raise KeyError("results" if record["labels"] else "labels")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not a whole evaluation: {_why(error)}.") from error
        records.append(record)
    return records


def _kept(folder: Path, name: str) -> list[Path]:
    """A file of a run folder and those that it has taken the place of, the newest first."""
    stem = name.removesuffix(".json")
    numbers = [int(m[1]) for p in folder.glob(f"{stem}.*.json") if (m := re.fullmatch(rf"{stem}\.(\d+)\.json", p.name))]
    paths = [folder / name, *(folder / f"{stem}.{number}.json" for number in sorted(numbers, reverse=True))]
    return [path for path in paths if path.exists()]


def is_going_on(folder: Path) -> bool:
    """Whether a process holds a run folder, on this host or, by its heartbeat, on another."""
    try:
        hold(folder)()
    except BlockingIOError:
        return True
    except OSError:  # a folder of someone else
        return False
    return is_written(folder)


def read_clock(folder: Path, per_epoch: float) -> list[tuple[float, float]]:
    """When a run was where, by the clock in TensorBoard's files: (epochs done, minutes of training), both rising.

    The time between the processes of a continued run does not count. Empty if nothing was logged twice.

    Args:
        folder: of the run.
        per_epoch: optimiser steps of an epoch.
    """
    clock: list[tuple[float, float]] = []
    before = 0.0
    for times, steps in clocks(folder):
        began = times[0]
        for time, step in steps:
            epochs, minutes = (step + 1) / per_epoch, (before + time - began) / 60
            if not clock and epochs > 0:
                clock.append((0.0, 0.0))
            if epochs > clock[-1][0] and minutes > clock[-1][1]:
                clock.append((epochs, minutes))
        before += times[-1] - began
    return clock if len(clock) > 1 else []


def clocks(folder: Path) -> Iterator[tuple[list[float], list[tuple[float, int]]]]:
    """Of each TensorBoard file of a run the times of its entries, sorted, and (time, step) of the logged steps."""
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        try:
            times, steps = _clock(path)
        except Exception:  # a damaged file raises what it likes, and the clock is not needed
            continue
        if times:
            yield sorted(times), steps


def _clock(path: Path) -> tuple[list[float], list[tuple[float, int]]]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    times, steps = [], []
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        times.append(event.wall_time)
        if any(value.tag == "train_loss" for value in event.summary.value):
            steps.append((event.wall_time, event.step))
    return times, steps


def data_of(checkpoint: Checkpoint) -> ImageData:
    """The images a run was trained on, read from where they were.

    Raises:
        ValueError: if the run does not say.
    """
    if not checkpoint.data:
        raise ValueError("the run was not trained on an ImageData, so its images are not known.")
    # Nothing is decoded ahead, and no cache is built anew: a report shows a few of the images.
    ahead = {"memory_limit_gb": 0.0, "cache_dir": None}
    return images_of_run(folders_shown(checkpoint.data), image_size=checkpoint.model["image_size"], **ahead)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in `config.yaml`, all that the command line knew; empty without the file.

    Raises:
        ValueError: if the file cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    return config if isinstance(config, dict) else {}
