"""A linear evaluation where its run is watched: its numbers and its confusion matrix in TensorBoard and on W&B."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

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
    run_dir, steps = expanded(run_dir), int(record["global_step"])
    figures = {f"{_PREFIX}{name}": record[name] for name in NAMES if record.get(name) is not None}
    shown = Shown(pictures={_MATRIX: confusion(record)})
    step = max(0, steps - 1)
    if (run_dir / TENSORBOARD).is_dir():
        events = EventFiles(str(run_dir), name=TENSORBOARD, version="", default_hp_metric=False)
        events.log_metrics(figures, step)
        show([events], shown, step)
        events.finalize("evaluated")
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(rejoined(run_dir, steps, "linear-eval"))
        if run is not None:
            run.log_metrics(figures, step)
            show([run], shown, step)
            run.attempt(_summarise, run, record, figures)


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
