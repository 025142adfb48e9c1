"""Where a run's metrics go: metrics.csv, machine.csv and TensorBoard always; see `simclr.wandb_run` for the rest."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from simclr.checkpoint import Checkpoint
from simclr.files import say_unwritten, write_atomically
from simclr.paths import expanded
from simclr.step_figures import CHANCE, MACHINE

TENSORBOARD = "tensorboard"  # the folder in the run folder
# What runs are compared by in TensorBoard's HParams tab, as far as they have it.
RESULTS = ("train_loss_epoch", "heldout_loss", "heldout_top1", "retrieval_top1", "knn_top1", "linear_eval/linear_top1")
# Charts of several curves, in its tab of custom scalars.
_CHARTS = {
    "loss": ["train_loss", "train_loss_epoch", "heldout_loss", CHANCE],
    "contrastive top-1": ["contrast_top1", "heldout_top1"],
    "cosines": ["positive_cosine", "negative_cosine"],
    "norms": ["gradient_norm", "encoder_gradient_norm", "head_gradient_norm"],
    "without labels": ["retrieval_top1", "retrieval_top1_before"],
}


class MetricsCSV(Logger):
    """`metrics.csv` in the run folder: a row for each step that is logged, and one for each epoch.

    A row is in the file as soon as it is logged. A kill leaves whole rows, and the file of a run that is continued is
    replaced in one step. Rows that find no room wait, and are said to.

    It holds what the run decides and nothing that the machine does (`simclr.step_figures.MACHINE`), so that a run that
    was killed and continued ends in the same file, bit for bit. The rest is in `machine.csv`, see `MachineCSV`.

    Args:
        run_dir: the run folder.
        resumed: continue from this checkpoint: earlier rows stay, rows of later steps are written again, and so is what
            stands for an epoch that was not whole.
    """

    name, version = "", ""
    file = "metrics.csv"

    def __init__(self, run_dir: Path, resumed: Checkpoint | None = None):
        super().__init__()
        self.path = expanded(run_dir) / self.file
        self._waiting: list[dict[str, Any]] = []
        if resumed is not None:
            self._waiting = [row for row in _whole_rows(self.path) if _is_before(row, resumed)]
        self._columns: list[str] = []  # of the file; none until this run has written it
        self._last = b""
        self._full = False  # whether the last write found no room

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: they stand in config.yaml beside the metrics."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; the one that was added last is not added again."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row = {name: value for name, value in row.items() if self.holds(name)}
        if not row.keys() - {"epoch"}:
            return
        row |= {"step": step}
        line = _as_csv(sorted(row), [row])
        if line != self._last:
            self._waiting.append(row)
            self._last = line

    def holds(self, name: str) -> bool:
        """Whether numbers of this name belong into the file."""
        return name not in MACHINE

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait."""
        if not self._waiting:
            return
        try:
            self._write()
        except OSError as error:
            if not self._full:
                say_unwritten(self.path, error, "its rows wait for room, and the run goes on")
            self._full = True
        else:
            self._full, self._waiting = False, []

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = sorted(set(self._columns).union(*self._waiting))
        if columns != self._columns:
            rows = [*(_whole_rows(self.path) if self._columns else []), *self._waiting]
            write_atomically(self.path, _as_csv(columns, rows, header=True))
            self._columns = columns
            return
        before = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(_as_csv(columns, self._waiting))
        except OSError:
            os.truncate(self.path, before)  # no part of a row
            raise

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run has ended."""
        self.save()


class MachineCSV(MetricsCSV):
    """`machine.csv`, likewise: seconds, images per second and memory, which differ each time that a run is repeated."""

    file = "machine.csv"

    def holds(self, name: str) -> bool:
        """Whether numbers of this name belong into the file."""
        return name in MACHINE or name == "epoch"


def _as_csv(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, without empty cells; a row that was not written to its end is none."""
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{key: value for key, value in row.items() if value} for row in rows if None not in row.values()]


class EventFiles(TensorBoardLogger):
    """Lightning's TensorBoard logger, without which a run goes on where there is no room for its files.

    Its HParams tab has the run from its first step, beside whatever `RESULTS` it gets.

    Attributes:
        settings: all of the run's, nested, for that tab; the method's and the data's if empty.
    """

    broken = False
    settings: Mapping[str, Any] = {}  # never written to

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers."""
        if rank_zero_only.rank == 0:
            self.attempt(self._add_row, metrics, step)

    def _add_row(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """All of a row as one event, where Lightning writes one for each number."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self.experiment.file_writer.add_summary(Summary(value=values), step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Add settings."""
        self.attempt(super().log_hyperparams, *args, **kwargs)
        if rank_zero_only.rank == 0:
            self.attempt(self._begin_tab)
            self.attempt(super().save)  # hparams.yaml, for which Lightning looks with every row

    def _begin_tab(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = _for_tab(dict(self.settings or self.hparams))
        experiment, begin, _ = hparams(settings, dict.fromkeys(RESULTS, 0.0))
        for part in (experiment, begin):
            self.experiment.file_writer.add_summary(part, 0)
        self.experiment.add_custom_scalars({"run": {name: ["Multiline", tags] for name, tags in _CHARTS.items()}})

    def _end_tab(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        _, _, end = hparams({}, {})
        self.experiment.file_writer.add_summary(end, 0)

    def save(self) -> None:
        """Write what waits."""
        if rank_zero_only.rank == 0:
            self.attempt(self.experiment.flush)

    def finalize(self, status: str) -> None:
        """The run has ended."""
        if status == "success" and rank_zero_only.rank == 0:
            self.attempt(self._end_tab)
        self.attempt(super().finalize, status)

    def attempt(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Do something that writes, as long as there was room; the first time that there is none is said."""
        if self.broken:
            return
        try:
            work(*args, **kwargs)
        except OSError as error:
            self.broken = True
            say_unwritten(self.log_dir, error, "the run goes on without TensorBoard")


def _for_tab(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings under their full names, in the types that the tab knows; without those that are not set."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _for_tab(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _is_before(row: dict[str, str], resumed: Checkpoint) -> bool:
    of_step = "train_loss" in row or "step_seconds" in row or int(row.get("epoch", 0)) < resumed.epochs
    return of_step and int(row["step"]) < resumed.global_step


def build_loggers(run_dir: Path, resumed: Checkpoint | None = None) -> list[Logger]:
    """The loggers that every run has, all writing below its folder.

    Args:
        run_dir: the run folder.
        resumed: see `MetricsCSV`.
    """
    run_dir = expanded(run_dir)
    return [
        MetricsCSV(run_dir, resumed),
        MachineCSV(run_dir, resumed),
        EventFiles(
            str(run_dir),
            name=TENSORBOARD,
            version="",
            default_hp_metric=False,  # a curve of -1, of nothing
            purge_step=resumed.global_step if resumed else None,  # what was logged after it is logged again
        ),
    ]


class Shown(NamedTuple):
    """What a dashboard shows beside numbers, at one step, each by its name.

    Attributes:
        pictures: RGB.
        histograms: (bins,) counts and their (bins + 1,) edges, ascending.
        points: images as points of a space to walk through.
    """

    pictures: dict[str, Image.Image] = {}  # noqa: RUF012  # never written to
    histograms: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012
    points: dict[str, "Points"] = {}  # noqa: RUF012


class Points(NamedTuple):
    """Images as points, for TensorBoard's projector.

    Attributes:
        places: (N, D) float.
        names: of each, for people.
        thumbnails: (N, 3, S, S) float in [0, 1].
    """

    places: Tensor
    names: list[str]
    thumbnails: Tensor


def can_show(trainer: Trainer) -> bool:
    """Whether a run has a dashboard that takes more than numbers; the same on every rank."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger) for logger in trainer.loggers)


@rank_zero_only
def show(loggers: Iterable[Logger], shown: Shown, step: int) -> None:
    """Hand pictures and histograms to every dashboard among some loggers, ours and Lightning's own.

    A dashboard that fails costs the run nothing: see `EventFiles` and `simclr.wandb_run.WandbRun`.

    Args:
        loggers: of the run.
        shown: what.
        step: the x-axis, as of the numbers beside it.
    """
    for logger in loggers:
        attempt = getattr(logger, "attempt", _plainly)
        if isinstance(logger, TensorBoardLogger):
            attempt(_to_tensorboard, logger, shown, step)
        elif isinstance(logger, WandbLogger):
            attempt(_to_wandb, logger, shown, step)


def _plainly(work: Callable[..., Any], *args: Any) -> None:
    work(*args)


def _to_tensorboard(logger: TensorBoardLogger, shown: Shown, step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer = logger.experiment
    for name, picture in shown.pictures.items():
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG", compress_level=1)  # a fourth of the time of the writer's own
        width, height = picture.size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=file.getvalue())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    for name, (counts, edges) in shown.histograms.items():
        middles, n = (edges[1:] + edges[:-1]).double() / 2, counts.double()
        used = counts.nonzero().flatten()
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, len(counts))
        writer.add_histogram_raw(
            name,
            min=float(edges[low]),
            max=float(edges[high]),
            num=int(counts.sum()),
            sum=float((n * middles).sum()),
            sum_squares=float((n * middles.square()).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
    for name, points in shown.points.items():
        if not (Path(logger.log_dir) / f"{step:05d}" / name).exists():  # of a run that ends here for the second time
            writer.add_embedding(points.places, points.names, points.thumbnails, step, name)


def _to_wandb(logger: WandbLogger, shown: Shown, step: int) -> None:
    import wandb

    row: dict[str, Any] = {name: wandb.Image(picture) for name, picture in shown.pictures.items()}
    for name, (counts, edges) in shown.histograms.items():
        row[name] = wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy()))
    if row:
        logger.log_metrics(row, step)
