"""A run on Weights & Biases: asked for, found again when the run goes on, and never the end of a training.

What wandb itself knows stays its own: `WANDB_*` variables are honoured wherever no option says otherwise.
"""

import json
import netrc
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from simclr.files import say_unwritten, write_atomically
from simclr.paths import expanded

WandbMode = Literal["auto", "online", "offline", "disabled"]
_KNOWN = Path("wandb") / "run.json"  # in the run folder: which run on W&B it is
FLUSH = "x_transaction_log_flush_interval"  # wandb's setting, of its releases that have it
_STEP = "trainer/global_step"  # Lightning's x-axis
_FLUSH_SECONDS = 0.5  # of rows that a kill may cost: wandb's own 15 are many steps
_INIT_SECONDS, _FINISH_SECONDS = 30, 120  # of waiting for the server, before training and after
_NEXT = "next_row"  # in that file: a number that no row of the runs so far has
_ROWS = 8  # on W&B for an optimiser step, at the very most: of the step, its epoch, pictures


@dataclass(frozen=True)
class WandbOptions:
    """How a run is filed on W&B; what is None is left to the `WANDB_*` variables, and then to wandb.

    Attributes:
        project: WANDB_PROJECT, else `simclr`.
        entity: user or team; WANDB_ENTITY.
        group: runs that belong together; WANDB_RUN_GROUP.
        tags: WANDB_TAGS.
        notes: a sentence for people; WANDB_NOTES.
        id: of the run, unique in the project: that of the run folder, if it has one, else WANDB_RUN_ID.
        log_artifact: whether the encoder, and the report, are uploaded too.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    id: str | None = None
    log_artifact: bool = False


class WandbRun(WandbLogger):
    """Lightning's logger of W&B, which costs a training nothing: once it fails it is said, and there is no more of it.

    wandb writes a run to its file in blocks, and what a block holds every half second: a SIGKILL of all processes loses
    the rows of the last half second, which metrics.csv and TensorBoard have.

    Args:
        run_dir: the run folder.
        run: what `wandb.init` gave.
        first_row: the number of the first row, for a run that goes on without a server that knows the last one.
        log_artifact: see `WandbOptions`.
    """

    broken = False

    def __init__(self, run_dir: Path, run: Any, first_row: int | None = None, log_artifact: bool = False):
        super().__init__(save_dir=str(run_dir), experiment=run)
        self.run_dir, self.log_artifact = run_dir, log_artifact
        self._first_row = first_row
        self._next_row = first_row  # its number, as far as it is known here; kept for whoever opens the run again
        self.attempt(run.define_metric, _STEP)
        self.attempt(run.define_metric, "*", step_metric=_STEP, step_sync=True)

    def attempt(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Do something with W&B, as long as it works; the first failure is said."""
        if self.broken:
            return
        try:
            work(*args, **kwargs)
        except Exception as error:  # its process may be gone, its pipe broken, its disk full: none is worth a training
            self.broken = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: wandb has failed ({reason}): the run goes on without it", flush=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row, number = {**metrics, _STEP: step}, self._first_row
        self._first_row = None
        if self._next_row is not None:
            self._next_row += 1
        self.attempt(lambda: self.experiment.log(row, step=number, commit=True))

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the whole configuration is there since the run was opened."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing: the encoder and the evaluation are still to come. See `end`."""

    def log_files(self, name: str, kind: str, files: list[Path], aliases: list[str], about: Mapping[str, Any]) -> None:
        """Log files as an artifact `NAME-ID`, if that was asked for.

        Args:
            name: what they are: "encoder".
            kind: W&B's type: "model".
            files: that are there.
            aliases: of this version.
            about: metadata.
        """
        if self.log_artifact:
            self.attempt(self._log_files, name, kind, files, aliases, about)

    def _log_files(self, name: str, kind: str, files: list[Path], aliases: list[str], about: Mapping[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", type=kind, metadata=dict(about))
        for file in files:
            artifact.add_file(str(file))
        self.experiment.log_artifact(artifact, aliases=aliases)

    def end(self, code: int = 0) -> None:
        """Let the server have the rest, for two minutes at most, and close the run.

        Args:
            code: the exit code that W&B shows.
        """
        self.attempt(self.experiment.finish, exit_code=code)
        known = known_run(self.run_dir)
        if self._next_row is not None and known is not None:
            _remember(self.run_dir, {**known, _NEXT: self._next_row})


def start_wandb(
    run_dir: Path,
    mode: Literal["online", "offline"],
    options: WandbOptions,
    config: Mapping[str, Any],
    step: int = 0,
    kind: str = "pretrain",
) -> WandbRun | None:
    """Open a run on W&B, or the one that the folder has; without a server offline, and None if that fails too.

    Args:
        run_dir: the run folder; its name is the run's.
        mode: see `wandb_mode`.
        options: see there.
        config: all that is to be known of the run, nested.
        step: optimiser steps taken, of a run that goes on.
        kind: W&B's job type.
    """
    import wandb

    run_dir = expanded(run_dir)
    known = known_run(run_dir) or {}
    environment = os.environ
    init: dict[str, Any] = {
        "id": options.id or known.get("id") or environment.get("WANDB_RUN_ID") or secrets.token_hex(4),
        "project": options.project or known.get("project") or environment.get("WANDB_PROJECT") or "simclr",
        "entity": options.entity or known.get("entity"),
        "name": known.get("name") or (None if environment.get("WANDB_NAME") else run_dir.resolve().name),
        "group": options.group,
        "tags": options.tags,
        "notes": options.notes,
        "dir": environment.get("WANDB_DIR") or str(run_dir),
        "config": dict(config),
        "job_type": None if environment.get("WANDB_JOB_TYPE") else kind,
        "resume": "allow",
    }
    wanted: dict[str, Any] = {"init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS}
    wanted[FLUSH] = _FLUSH_SECONDS
    if not environment.get("WANDB_SILENT"):
        wanted["silent"] = True  # or its words stand between those of the run
    settings = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    run = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        run = wandb.init(**init, mode=mode, settings=wandb.Settings(**settings))
    except Exception as error:  # a key that is refused, a network that is none, a disk that is full
        reason = " ".join(str(error).split()) or type(error).__name__
        if mode == "offline":
            print(f"warning: wandb cannot log ({reason}): the run goes on without it", flush=True)
            return None
    if run is None:
        print(f"wandb: no run online ({reason}), logging offline into the run folder (later: `wandb sync`)", flush=True)
        return start_wandb(run_dir, "offline", options, config, step, kind)
    if mode == "online":
        print(f"wandb: {run.url}", flush=True)
    found = {"id": run.id, "project": run.project or init["project"], "entity": run.entity, "name": run.name}
    found |= {_NEXT: known[_NEXT]} if _NEXT in known else {}
    _remember(run_dir, {**found, "mode": mode, "log_artifact": options.log_artifact})
    # Rows are numbered apart from steps, and the server drops those of numbers that it has had. One that nobody can ask
    # gets a number that no row before can have had: not of a training that was killed, nor of an evaluation.
    first_row = max(_ROWS * (step + 2), known.get(_NEXT, 0)) if mode == "offline" and known and step else None
    return WandbRun(run_dir, run, first_row, options.log_artifact)


def known_run(run_dir: Path) -> dict[str, Any] | None:
    """Which run on W&B a folder is: id, project, entity, name, mode, log_artifact; None if it is none."""
    try:
        found = json.loads((expanded(run_dir) / _KNOWN).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("id"), str) else None


def _remember(run_dir: Path, found: dict[str, Any]) -> None:
    path = run_dir / _KNOWN
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
    except OSError as error:
        say_unwritten(path, error, "a continued run will be another one on W&B")


@contextmanager
def rejoined(run_dir: Path, step: int, kind: str) -> Iterator[WandbRun | None]:
    """The run on W&B that a folder is, opened again for what comes after the training; None if it has none.

    Args:
        run_dir: the run folder.
        step: optimiser steps that the run has taken.
        kind: W&B's job type.
    """
    known = known_run(run_dir)
    if known is None:
        yield None
        return
    mode: WandbMode = "offline"
    if known.get("mode") == "online":
        mode = wandb_mode("auto")
    if mode == "disabled":
        yield None
        return
    assert mode != "auto"
    options = WandbOptions(log_artifact=bool(known.get("log_artifact")))
    run = start_wandb(run_dir, mode, options, {}, step, kind)
    try:
        yield run
    finally:
        if run is not None:
            run.end()


def wandb_mode(wanted: WandbMode) -> Literal["online", "offline", "disabled"]:
    """What W&B can do here and now; `auto` is online with a key and a network, else offline, and says so in one line.

    `auto` heeds WANDB_MODE first.

    Raises:
        ValueError: for `online` without a key.
    """
    if wanted in ("offline", "disabled"):
        return wanted
    told = os.environ.get("WANDB_MODE") if wanted == "auto" else None
    if told in ("offline", "dryrun"):
        return "offline"
    if told == "disabled":
        return "disabled"
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
