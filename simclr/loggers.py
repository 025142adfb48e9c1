"""Where a run's metrics go: metrics.csv and TensorBoard always, Weights & Biases on request."""

import csv
import netrc
import os
import socket
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from simclr.checkpoint import Checkpoint
from simclr.paths import expanded

WandbMode = Literal["auto", "online", "offline", "disabled"]


class MetricsCSV(CSVLogger):
    """Lightning's CSV logger, writing `metrics.csv` into the run folder; a continued run keeps its earlier rows.

    Args:
        run_dir: the run folder.
        resumed: continue from this checkpoint: earlier rows stay, rows of later steps are written again, and so is what
            stands for an epoch that was not whole.
    """

    def __init__(self, run_dir: Path, resumed: Checkpoint | None = None):
        super().__init__(str(expanded(run_dir)), name="", version="", flush_logs_every_n_steps=50)
        self._earlier: list[dict[str, Any]] = []
        path = expanded(run_dir) / "metrics.csv"
        if resumed is not None and path.exists():
            with path.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
            self._earlier = [row for row in rows if _is_before(row, resumed)]

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: they stand in config.yaml beside the metrics."""

    @property
    def experiment(self) -> Any:
        """Lightning's writer, given the earlier rows when it is first asked for."""
        writer = super().experiment
        if self._earlier and hasattr(writer, "metrics"):
            writer.metrics, self._earlier = self._earlier, []
        return writer


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
        TensorBoardLogger(str(run_dir), name="tensorboard", version=""),
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
