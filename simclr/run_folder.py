"""The folder of a run: one name for all ranks, never a folder that is taken, nothing left where a run did not begin."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from simclr import __version__, distributed
from simclr.checkpoint import LAST, STARTING_ENCODER
from simclr.data.module import LEFT_OUT, SKIPPED
from simclr.distributed import launched_rank
from simclr.files import hold, reason_of, remove_abandoned, write_atomically
from simclr.heartbeat import NOTE, WrittenElsewhere, be_the_writer
from simclr.nonfinite.dump import PREFIX
from simclr.paths import expanded

CONFIG = "config.yaml"  # the settings that a run began with
CONTINUATIONS = "continuations.json"  # a record of each time that it was continued, in their order
_BEGINNINGS = {CONFIG, CONTINUATIONS, SKIPPED, LEFT_OUT, LAST.parent.name}
_BEGINNINGS |= {"metrics.csv", "machine.csv", "views.png", "tensorboard", "wandb"}
_BEGINNINGS |= {NOTE, STARTING_ENCODER}
DECIDE = ("torch", "torchvision", "kornia", "pytorch-lightning")  # packages whose versions decide a run's bits
_WAIT_FOR_A_NAME = 1800.0  # seconds: rank 0 may come late, and until then its launcher watches it
_CHOSEN = "SIMCLR_RUN_DIR"  # "pid:folder", for the ranks that process pid launches


def launcher() -> int | None:
    """The process that has launched this one as a further rank of its run; None for a rank that was not."""
    process, _, folder = os.environ.get(_CHOSEN, "").partition(":")
    further = os.environ.get("LOCAL_RANK", "0") not in ("", "0")
    return int(process) if folder and process.isdigit() and further else None


class RunFolder:
    """Chooses and reserves the folder of a run on its first process; the others take the same.

    Attributes:
        path: the folder; None before `choose`.
        first: whether this is the run's first process, the one that writes. It holds the folder while it lives.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        launcher, _, chosen = os.environ.get(_CHOSEN, "").partition(":")
        # The launcher's pid, because a shell that was started within a run, say, inherits the variable too.
        self._chosen = Path(chosen) if launcher == str(os.getppid()) else None
        self.first = self._chosen is None and launched_rank() == 0
        self._made: list[Path] = []
        self._empty = False  # whether it was, before this run
        self._let_go: Callable[[], object] = tuple
        self._silence: Callable[[], object] = tuple

    def choose(self, config: Namespace, resumed: Path | None, again: bool = False) -> Path:
        """The folder asked for, the one continued, or a free name below runs/. On the first process it is made.

        Args:
            config: the settings of the run.
            resumed: the folder of the run to continue.
            again: whether the run starts anew where it was killed before its first checkpoint.
        Raises:
            ValueError: if the folder asked for is a file or taken by another run.
        """
        if self._chosen is not None:
            self.path = self._chosen
            return self.path
        job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
        if asked := config.run_dir or resumed:
            self.path = expanded(asked)
        elif job and job != "none":  # ranks launched from outside must agree on a name without talking
            self.path = Path("runs") / f"{run_name(config)}-{job}"
        if self.first and self.path is not None:
            if self.path.is_file():
                raise ValueError(f"run_dir={self.path} is a file. Choose a new folder.")
            try:
                self._make(self.path)
            except OSError as error:
                raise OSError(f"run_dir={self.path} cannot be made: {reason_of(error)}. Choose another.") from error
            self._refuse_taken(self.path, resumed, again)
        elif self.first:
            name, number = run_name(config), 1
            while self.path is None:
                free = Path("runs") / (name if number == 1 else f"{name}-{number}")
                try:  # making it is what reserves it: runs started side by side choose different names
                    self._make(free)
                    self.path, self._empty, self._let_go = free, True, hold(free)
                    self._silence = be_the_writer(free, _lost)
                except FileExistsError:
                    number += 1
        if self.path is None and distributed.launcher_has_store():
            self.path = Path(distributed.open_store(_WAIT_FOR_A_NAME).get(_name_key()).decode())
        if self.path is None:
            raise ValueError("several machines or launchers cannot agree on a name by themselves. Give --run_dir.")
        if self.first:
            os.environ[_CHOSEN] = f"{os.getpid()}:{self.path}"
            if distributed.launcher_has_store() and (store := distributed.open_store()) is not None:
                store.set(_name_key(), str(self.path))
        return self.path

    def _refuse_taken(self, path: Path, resumed: Path | None, again: bool) -> None:
        """Hold the folder for this process, unless another does or has filled it."""
        try:
            self._let_go = hold(path)
            free = path.resolve() == (resumed and resumed.resolve()) or _is_free(path)
            if free or (path / NOTE).exists():  # another's folder is not even touched
                self._silence = be_the_writer(path, _lost)
        except BlockingIOError as error:
            where = error.args[0] if isinstance(error, WrittenElsewhere) else "in another process"
            raise ValueError(
                f"run_dir={path} belongs to a run that still goes on, {where}. Wait for its end, or "
                "choose another --run_dir."
            ) from None
        if resumed is not None and path.resolve() == resumed.resolve():
            for folder in (path, path / LAST.parent):
                remove_abandoned(folder)
            return
        remove_abandoned(path)
        if all(entry.name == NOTE for entry in path.iterdir()):
            self._empty = True
            return
        if _ended_before_its_first_checkpoint(path):
            if not again:
                raise ValueError(
                    f"run_dir={path} is taken by a run that ended before its first checkpoint. Choose another, or "
                    "start it anew with --resume auto."
                )
            _empty(path)
            self._empty = True
            return
        hint = (
            f" or continue it with --ckpt_path {path / LAST}, or with the same command and --resume auto"
            if (path / LAST).exists()
            else ""
        )
        raise ValueError(f"run_dir={path} is taken. Choose another{hint}.")

    def _make(self, path: Path) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=self.path is not None)
        self._made = missing

    def let_go(self) -> None:
        """The run has ended: what this process launches from here on does not belong to it."""
        os.environ.pop(_CHOSEN, None)
        self._silence()
        self._let_go()
        self._let_go = tuple

    def discard(self) -> None:
        """Take back the folders that were made and all that is in the run's own: it ended before its first step."""
        if not (self.first and self._empty and self.path is not None and self.path.is_dir()):
            return
        _empty(self.path)
        self.remove_empty()

    def remove_empty(self) -> None:
        """Take back the folders that were made, as far as they are empty: the run did not begin."""
        self._silence()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                return


def _is_free(path: Path) -> bool:
    """Whether a folder holds nothing, or the beginnings of a run of which there is nothing to lose."""
    names = {entry.name for entry in path.iterdir() if not entry.name.endswith(".partial")}
    return names <= {NOTE} or _ended_before_its_first_checkpoint(path)


def _lost(writer: str) -> None:
    print(f"error: {writer} has taken over this run, whose process had stood still", file=sys.stderr, flush=True)
    os._exit(1)  # nothing more is written


def _name_key() -> str:
    return f"{distributed.attempt()}/run_dir"


def _ended_before_its_first_checkpoint(folder: Path) -> bool:
    """Whether all that a folder holds are the beginnings of a run, of which there is nothing to lose."""
    others = [
        entry for entry in folder.iterdir() if entry.name not in _BEGINNINGS and not entry.name.startswith(PREFIX)
    ]
    if not (folder / CONFIG).is_file() or others:
        return False
    return not any((folder / LAST.parent).glob("*.ckpt"))


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == NOTE:  # of this process
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def run_name(config: Namespace) -> str:
    """A run's name: that of its config file, else of its data and encoder."""
    if config.config:
        path = Path(str(config.config[-1]))
        return path.resolve().parent.name if path.stem.split(".")[0] == "config" else path.stem
    folder = config.data.train_dir or config.data.data_dir
    data = (
        expanded(folder).resolve().name
        if folder
        else ("shapes" if config.data.source == "auto" else config.data.source)
    )
    return f"{data}_{config.model.encoder}"


def latest_config(run_dir: Path) -> Path | None:
    """The settings that a run went on with last: `config.yaml`, or what a continuation with others left beside it."""
    continued = [run_dir / f"config.continued-{number}.yaml" for number in range(len(_continuations(run_dir)), 0, -1)]
    return next((path for path in (*continued, run_dir / CONFIG) if path.is_file()), None)


def record_continuation(run_dir: Path, begun: Path, settings: str, record: dict[str, Any]) -> None:
    """Leave a run's `config.yaml` as it is, and add what it goes on with beside it.

    Args:
        run_dir: the run folder.
        begun: the folder of the run that is continued, mostly the same.
        settings: those it goes on with, as YAML; written as `config.continued-N.yaml` if they differ from the last.
        record: what else there is to know; added to `continuations.json` with versions, the settings that differ and
            those that the run was begun without, by a version that did not have them: they are no change of it.
    """
    before, given = latest_config(begun), yaml.safe_load(settings)
    changed, added = {}, {}
    if before is not None:
        was, now = (flat(content) for content in (yaml.safe_load(before.read_text()), given))
        changed = {
            name: {"was": was[name], "is": value} for name, value in now.items() if was.get(name, value) != value
        }
        added = {name: value for name, value in now.items() if name not in was}
    records = _continuations(run_dir)
    if not (run_dir / CONFIG).exists():
        if before is None:
            write_atomically(run_dir / CONFIG, settings.encode())
        else:
            first = begun / CONFIG if (begun / CONFIG).is_file() else before
            write_atomically(run_dir / CONFIG, first.read_bytes())
    if changed or added:
        write_atomically(run_dir / f"config.continued-{len(records) + 1}.yaml", settings.encode())
    versions = {"simclr": __version__, **{name: version(name) for name in DECIDE}}
    changed = {**record["changed"], **changed}
    records.append({**record, "changed": changed, "settings_since": added, "versions": versions})
    write_atomically(run_dir / CONTINUATIONS, (json.dumps(records, indent=2) + "\n").encode())


def _continuations(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / CONTINUATIONS
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Move it away to go on without it.") from error


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 2}} -> {"model.width": 2}"""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
