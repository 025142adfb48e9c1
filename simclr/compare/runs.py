"""A run as a comparison sees it: what can be read of it is read, what cannot is said."""

import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from simclr.checkpoint import LAST, Checkpoint, read_checkpoint
from simclr.paths import expanded
from simclr.report.run import (
    clocks,
    is_going_on,
    read_clock,
    read_evaluations,
    read_metrics,
    read_results,
    steps_per_epoch,
)
from simclr.run_folder import CONFIG, flat, latest_config

SEEDS = ("seed_everything", "model.seed", "data.seed")
# Where a run writes, how it was started and what it shows: two runs that differ in nothing else are the same.
_ABOUT_THE_FOLDER = {"config", "run_dir", "ckpt_path", "resume", "wandb", "wandb_project", "check_memory"}
_ABOUT_THE_FOLDER |= {"trainer.enable_progress_bar", "data.workers", "data.cache_dir", "data.download"}


@dataclass(frozen=True, eq=False)
class Run:
    """A run, read.

    Attributes:
        path: its folder.
        name: of the folder, or more of the path where two have one name.
        settings: by dotted name, without seeds and what is about the folder alone.
        configured: whether they are those of its config.yaml: all of them, as far as its version had them.
        seed: None if not recorded.
        history: as `read_metrics` gives it.
        per_epoch: how many steps and images an epoch has, as far as known.
        clock: (epochs done, minutes of training), see `read_clock`; empty if not recorded.
        result: the newest linear evaluation; None without.
        evaluation: the newest record of `simclr eval`; None without.
        complete: whether it has taken all of its steps, and nothing says otherwise.
        stands: how far it has come, for people.
        minutes: between the first and the last entry of its logs, over all continuations; None if not known.
        images_per_second: median over the logged steps; None if not known.
        notes: what a reader must know beside its numbers.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    configured: bool
    seed: Any
    history: dict[str, list[tuple[float, float]]]
    per_epoch: dict[str, float]
    clock: list[tuple[float, float]]
    result: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    complete: bool
    stands: str
    minutes: float | None = None
    images_per_second: float | None = None
    notes: list[str] = field(default_factory=list)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run."""
    named = any((folder / name).is_file() for name in (CONFIG, "metrics.csv"))
    return named or any((folder / LAST.parent).glob("*.ckpt"))


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The run folders meant by some paths: runs, checkpoints in them, or folders of runs.

    Returns:
        The folders, each once, in the order given; and (path, why) of each path that leads to none.
    """
    found: dict[Path, Path] = {}
    left_out = []
    for path in map(expanded, paths):
        folder = path.parent if path.is_file() else path
        if path.is_file() and folder.name == LAST.parent.name:
            folder = folder.parent
        runs = [folder] if is_run(folder) else []
        if not runs and path.is_dir():
            runs = sorted(inner for inner in path.iterdir() if inner.is_dir() and is_run(inner))
        if not runs:
            there = "is not a run, and holds none" if path.exists() else "is not there"
            left_out.append((str(path), there))
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values()), left_out


def names_of(folders: list[Path]) -> list[str]:
    """A name for each folder, as short as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    names = ["/".join(part[-1:]) for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        same = {name for name in names if names.count(name) > 1}
        names = ["/".join(part[-depth:]) if name in same else name for name, part in zip(names, parts, strict=True)]
    return names


def read_run(folder: Path, name: str) -> Run:
    """Read a run, finished or not; a part that is damaged is left out, and its note says why.

    Raises:
        ValueError: if nothing of it can be read, with the reasons.
    """
    notes: list[str] = []
    config = _tried(lambda: _config(folder), notes) or {}
    checkpoint, written = None, any((folder / LAST.parent).glob("*.ckpt"))
    if written:
        checkpoint = _tried(lambda: read_checkpoint(folder), notes)
    known = checkpoint.run.get("steps_per_epoch") if checkpoint else None
    history = _tried(lambda: read_metrics(folder, known), notes)
    if history == {}:
        there = "its metrics.csv has no whole epoch" if (folder / "metrics.csv").exists() else "it has no metrics.csv"
        notes.append(f"no curves: {there}")
    history = history or {}
    results = _tried(lambda: read_results(folder), notes) or []
    if not (config or history or checkpoint):
        raise ValueError("; ".join(notes) or "it is empty: no settings, no metrics, no checkpoint")
    settings = config or flat({"model": checkpoint.model, "data": checkpoint.data} if checkpoint else {})
    if not config:
        known_settings = "only the settings in its checkpoint are known, not those of a config.yaml"
        notes.append(known_settings if settings else "no settings")
    going_on = is_going_on(folder)
    result = results[0] if results else None
    evaluations = _tried(lambda: read_evaluations(folder), notes) or []
    for record in filter(None, (result, *evaluations[:1])):
        if checkpoint and record.get("global_step", checkpoint.global_step) != checkpoint.global_step:
            notes.append(
                f"evaluated at step {record['global_step']}, before it went on to step {checkpoint.global_step}"
            )
    images = _images_per_step(settings)
    minutes, speed = _pace(folder, images)
    steps = known or (steps_per_epoch(folder) if history else None)
    if not known and steps is not None and steps == config.get("trainer.max_steps"):
        notes.append(
            f"it ended by trainer.max_steps={steps:.0f} within its first epoch, of unknown length: drawn as a whole one"
        )
    per_epoch = {"steps": steps or 0.0, "images": (steps or 0.0) * images}
    return Run(
        path=folder,
        name=name,
        settings={k: v for k, v in settings.items() if k not in _ABOUT_THE_FOLDER and k not in SEEDS},
        configured=bool(config),
        seed=next((settings[name] for name in SEEDS if settings.get(name) is not None), None),
        history=history,
        per_epoch={name: number for name, number in per_epoch.items() if number},
        clock=read_clock(folder, steps) if steps else [],
        result=result,
        evaluation=evaluations[0] if evaluations else None,
        complete=checkpoint is not None and checkpoint.finished is not False and not going_on,
        stands=_stands(checkpoint, "no readable checkpoint" if written else "no checkpoint", history, going_on),
        minutes=minutes,
        images_per_second=speed,
        notes=notes,
    )


def _tried(read: Callable[[], Any], notes: list[str]) -> Any:
    try:
        return read()
    except (ValueError, OSError, csv.Error) as error:
        notes.append(" ".join(str(error).split()).rstrip("."))
        return None


def _config(folder: Path) -> dict[str, Any]:
    path = latest_config(folder)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not the config of a run: it has no model")
    return flat(content)


def _stands(checkpoint: Checkpoint | None, without: str, history: dict[str, Any], going_on: bool) -> str:
    if checkpoint is None:
        done = max((values[-1][0] for values in history.values()), default=0)
        stands = f"epoch {done:.0f}, {without}" if done else f"{without}, no whole epoch"
    else:
        stands = checkpoint.stands.replace(", the run not finished", "")
    return f"{stands}, still going on" if going_on else stands


def _images_per_step(settings: dict[str, Any]) -> int:
    """Of an optimiser step, over all devices; 0 if not recorded."""
    batch = settings.get("data.batch_size") or settings.get("model.batch_size")
    parts = settings.get("trainer.accumulate_grad_batches") or 1
    return batch * parts if isinstance(batch, int) and isinstance(parts, int) else 0


def _pace(folder: Path, images: int) -> tuple[float | None, float | None]:
    """Minutes and images per second, from the clock in TensorBoard's files; None where there is none."""
    seconds, steps_per_second = 0.0, []
    for times, steps in clocks(folder):
        seconds += times[-1] - times[0]
        for (then, before), (now, after) in pairwise(steps):
            if now > then and after > before:
                steps_per_second.append((after - before) / (now - then))
    speed = statistics.median(steps_per_second) * images if steps_per_second and images else None
    return seconds / 60 or None, speed
