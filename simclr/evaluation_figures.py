"""Evaluations where their run is watched: numbers, and a confusion matrix, in TensorBoard and on W&B."""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from simclr.eval.tables import shown_results, top1_of, yardsticks_of
from simclr.loggers import TENSORBOARD, EventFiles, Shown, show
from simclr.paths import expanded
from simclr.report.pictures import MOST_NAMES, as_picture, confusion_picture, draw_confusion
from simclr.wandb_run import WandbRun, rejoined

NAMES = (
    *("linear_top1", "linear_top5", "knn_top1", "random_encoder_top1", "starting_weights_top1", "raw_pixels_top1"),
    "supervised_top1",
)
_PREFIX = "linear_eval/"
_MATRIX = f"{_PREFIX}confusion_matrix"


def show_evaluation(record: Mapping[str, Any], run_dir: Path) -> None:
    """Add a linear evaluation to the dashboards that its run has.

    The numbers stand at the step of the run's last row. What cannot be written is said; the record is a file anyway.

    Args:
        record: as `simclr.eval.evaluation.linear_evaluation` gives it.
        run_dir: the run folder.
    """
    figures = {f"{_PREFIX}{name}": record[name] for name in NAMES if record.get(name) is not None}
    shown = Shown(pictures={_MATRIX: confusion(record)})
    _show(
        run_dir, int(record["global_step"]), "linear-eval", figures, shown, lambda run: _summarise(run, record, figures)
    )


def show_protocols(record: Mapping[str, Any], run_dir: Path) -> None:
    """Add an evaluation by several protocols to the dashboards that its run has, likewise.

    Each number has its protocol, and which of its results it is, in its name: `eval/knn/k_20/top1`. W&B's table of runs
    has interval and id beside it.

    Args:
        record: as `simclr.eval.suite.evaluate` gives it.
        run_dir: the run folder.
    """
    figures, about = figures_of(record)
    _show(run_dir, int(record["global_step"]), "eval", figures, Shown(), lambda run: _tell(run, {**figures, **about}))


def figures_of(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Of an evaluation by several protocols: its accuracies by name, and what says of what each is.

    Args:
        record: as `simclr.eval.suite.evaluate` gives it; of results that differ in their draw only the mean is told.
    """
    figures: dict[str, float] = {}
    about: dict[str, Any] = {}
    for result in shown_results(record):
        parts = ("eval", result["protocol"], result["variant"])
        place = "/".join(re.sub(r"[^\w/.-]+", "_", part) for part in parts if part)
        figures[f"{place}/top1"] = top1_of(result)
        figures[f"{place}/mean_per_class"] = result.get("mean_per_class", result.get("mean_per_class_mean"))
        figures |= {f"{place}/{name}_top1": value for name, value in yardsticks_of(result).items()}
        about[f"{place}/id"] = result["id"]
        spread = {name: result[name] for name in ("ci95", "top1_std") if result.get(name) is not None}
        about |= {f"{place}/{name}": value for name, value in spread.items()}
    return figures, about


def _tell(run: WandbRun, summary: Mapping[str, Any]) -> None:
    run.experiment.summary.update(dict(summary))


def _show(
    run_dir: Path,
    steps: int,
    kind: str,
    figures: Mapping[str, float],
    shown: Shown,
    summarise: Callable[[WandbRun], None],
) -> None:
    """Numbers and pictures at the step of the run's last row, for the dashboards that are there."""
    run_dir, step = expanded(run_dir), max(0, steps - 1)
    if (run_dir / TENSORBOARD).is_dir():
        events = EventFiles(str(run_dir), name=TENSORBOARD, version="", default_hp_metric=False)
        events.log_metrics(figures, step)
        show([events], shown, step)
        events.finalize("evaluated")
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(rejoined(run_dir, steps, kind))
        if run is not None:
            run.log_metrics(figures, step)
            show([run], shown, step)
            run.attempt(summarise, run)


def _summarise(run: WandbRun, record: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """The numbers in the table of runs, and the matrix as W&B draws it, which can be sorted and joined."""
    import wandb

    run.experiment.summary.update({**figures, f"{_PREFIX}ci95": record["ci95"]})
    matrix, classes = record["confusion_matrix"], _classes(record)
    if len(classes) <= MOST_NAMES:
        cells = [[a, b, matrix[i][j]] for i, a in enumerate(classes) for j, b in enumerate(classes)]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells)
        fields: dict[str, Any] = {str(name): name for name in table.columns}
        chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "confusion matrix"})
        run.log_metrics({f"{_MATRIX}_chart": chart}, max(0, int(record["global_step"]) - 1))


def confusion(record: Mapping[str, Any]) -> Image.Image:
    """The confusion matrix of a record as a picture: with names and numbers, as long as these can be read."""
    matrix, classes = record["confusion_matrix"], _classes(record)
    if len(classes) <= MOST_NAMES:
        return as_picture(draw_confusion(matrix, classes))
    pixels = confusion_picture(matrix, [max(1, sum(row)) for row in matrix])
    side = max(1, 600 // len(matrix)) * len(matrix)
    page = Image.new("RGBA", pixels.size, "white")
    page.alpha_composite(pixels)
    return page.convert("RGB").resize((side, side), Image.Resampling.NEAREST)


def _classes(record: Mapping[str, Any]) -> list[str]:
    named = record.get("data", {}).get("classes")
    return named or [str(number) for number in range(len(record["confusion_matrix"]))]
