"""What a run folder holds for its page: metrics, evaluations, settings, and where its images are."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import yaml

from simclr.checkpoint import Checkpoint
from simclr.data import ImageData
from simclr.data.module import folders_shown, images_of_run
from simclr.eval.evaluation import RESULT


def read_metrics(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """What `metrics.csv` of a run holds, for drawing: name -> [(epochs done, value)], in the order of time.

    Whatever was logged stands where its step does: the loss, learning rate, contrastive top-1 and cosines of single
    steps inside an epoch, `train_loss_epoch` and `knn_top1` at its end. Empty without the file, or without an epoch.

    Raises:
        ValueError: if the file is not a run's metrics.
    """
    rows, per_epoch = _rows_and_steps(folder)
    try:
        found: dict[str, dict[float, float]] = {}
        for row in rows if per_epoch else ():
            time = (int(row["step"]) + 1) / per_epoch
            for name in row.keys() - {"step", "epoch"}:
                if row[name]:
                    found.setdefault(name, {})[time] = float(row[name])  # a continued run writes some steps again
    except (KeyError, TypeError, ValueError) as error:
        raise _not_metrics(folder, error) from error
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
        # An epoch that was cut short has fewer steps than the others.
        ends = [(int(row["step"]) + 1) / (int(row["epoch"]) + 1) for row in rows if row["train_loss_epoch"]]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise _not_metrics(folder, error) from error
    return rows, max(ends, default=0.0)


def _not_metrics(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder / 'metrics.csv'} cannot be read as metrics of a run: {error!r}.")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The linear evaluations of a run, the newest first.

    Raises:
        ValueError: naming a file that is not one.
    """
    stem = RESULT.removesuffix(".json")
    numbers = [int(m[1]) for p in folder.glob(f"{stem}.*.json") if (m := re.fullmatch(rf"{stem}\.(\d+)\.json", p.name))]
    paths = [folder / RESULT, *(folder / f"{stem}.{number}.json" for number in sorted(numbers, reverse=True))]
    results = []
    for path in filter(Path.exists, paths):
        try:
            record = json.loads(path.read_text())
            missing = [k for k in ("linear_top1", "ci95", "random_encoder_top1", "raw_pixels_top1") if k not in record]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        if missing:
            raise ValueError(f"{path} is not a linear evaluation: it has no {' and no '.join(missing)}.")
        results.append(record)
    return results


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
