"""Where a run's metrics go: metrics.csv and TensorBoard always, Weights & Biases on request."""

import csv
import io
import netrc
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from simclr.checkpoint import Checkpoint
from simclr.files import say_unwritten, write_atomically
from simclr.paths import expanded

WandbMode = Literal["auto", "online", "offline", "disabled"]


class MetricsCSV(Logger):
    """`metrics.csv` in the run folder: a row for each step that is logged, and one for each epoch.

    A row is in the file as soon as it is logged. A kill leaves whole rows, and the file of a run that is continued is
    replaced in one step. Rows that find no room wait, and are said to.

    Args:
        run_dir: the run folder.
        resumed: continue from this checkpoint: earlier rows stay, rows of later steps are written again, and so is what
            stands for an epoch that was not whole.
    """

    name, version = "", ""

    def __init__(self, run_dir: Path, resumed: Checkpoint | None = None):
        super().__init__()
        self.path = expanded(run_dir) / "metrics.csv"
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
        row |= {"step": step}
        line = _as_csv(sorted(row), [row])
        if line != self._last:
            self._waiting.append(row)
            self._last = line

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
    """Lightning's TensorBoard logger, without which a run goes on where there is no room for its files."""

    broken = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Add settings."""
        self._try(super().log_hyperparams, *args, **kwargs)

    def save(self) -> None:
        """Write what waits."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """The run has ended."""
        self._try(super().finalize, status)

    def _try(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.broken:
            return
        try:
            work(*args, **kwargs)
        except OSError as error:
            self.broken = True
            say_unwritten(self.log_dir, error, "the run goes on without TensorBoard")


def _is_before(row: dict[str, str], resumed: Checkpoint) -> bool:
    of_step = "train_loss" in row or int(row.get("epoch", 0)) < resumed.epochs
    return of_step and int(row["step"]) < resumed.global_step


def build_loggers(run_dir: Path, wandb: WandbMode, project: str, resumed: Checkpoint | None = None) -> list[Logger]:
    """The loggers of a run, all writing below its folder.

    Args:
        run_dir: the run folder; its name is the run's name on W&B.
        wandb: see `wandb_mode`.
        project: the W&B project.
        resumed: see `MetricsCSV`.
    """
    run_dir = expanded(run_dir)
    loggers: list[Logger] = [
        MetricsCSV(run_dir, resumed),
        EventFiles(
            str(run_dir),
            name="tensorboard",
            version="",
            default_hp_metric=False,  # a curve of -1, of nothing
            purge_step=resumed.global_step if resumed else None,  # what was logged after it is logged again
        ),
    ]
    mode = wandb_mode(wandb)
    if mode != "disabled":
        from pytorch_lightning.loggers import WandbLogger

        offline = mode == "offline"
        loggers.append(WandbLogger(run_dir.name, str(run_dir), offline=offline, mode=mode, project=project))
    return loggers


def wandb_mode(wanted: WandbMode) -> Literal["online", "offline", "disabled"]:
    """What W&B can do here and now; `auto` is online with a key and a network, else offline, and says so in one line.

    Raises:
        ValueError: for `online` without a key.
    """
    if wanted in ("offline", "disabled"):
        return wanted
    from wandb import Settings

    host = urlsplit(os.environ.get("WANDB_BASE_URL") or Settings().base_url)  # Settings alone reads no environment
    if not _has_key(host.hostname or ""):
        if wanted == "online":
            raise ValueError("wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use --wandb offline.")
        print("wandb: no key found, logging offline into the run folder (`wandb login`, then `wandb sync` uploads it)")
        return "offline"
    if wanted == "auto":
        # Without a network the stock logger waits 100 s before it gives up.
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
        except OSError:
            print(
                f"wandb: {host.hostname} cannot be reached, logging offline into the run folder (later: `wandb sync`)"
            )
            return "offline"
    return "online"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
