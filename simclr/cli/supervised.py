"""`simclr supervised`: the same training with labels, what a pretraining run is measured against."""

import inspect
import sys
from pathlib import Path
from typing import Any

import yaml

from simclr.ablate.cells import as_flag
from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import LAST, read_checkpoint
from simclr.cli.messages import guarded
from simclr.cli.parsing import values_of
from simclr.cli.ranks import before_ranks_meet
from simclr.cli.train import train
from simclr.eval.supervised import METHOD
from simclr.paths import expanded
from simclr.run_folder import flat, latest_config
from simclr.supervised import Supervised

_GROUPS = ("data", "trainer", "quality", "dashboard", "checkpoint")  # taken over as they are
_OF_THE_RUN = ("trainer.callbacks", "trainer.logger", "trainer.profiler", "trainer.default_root_dir")
_SUFFIX = "-supervised"


def supervised(argv: list[str] | None = None) -> None:
    """Train with labels. See `simclr supervised --help`."""
    args = list(sys.argv[1:] if argv is None else argv)
    with before_ranks_meet():
        taken, rest = guarded(lambda: _taken_from_run(args))
    run = _run_in(args)[0]
    train([f"--method={METHOD}", *taken, *rest], command="supervised", typed=args, counterpart=run)


def _taken_from_run(args: list[str]) -> tuple[list[str], list[str]]:
    """The settings of the run that the arguments name, as flags, and the other arguments; none if they name none."""
    run, rest = _run_in(args)
    if run is None:
        return [], args
    read = read_checkpoint(run)
    if read.method == METHOD:
        raise ValueError(f"{run} was trained with labels itself. To go on with it: --ckpt_path {run}.")
    config = latest_config(read.run_dir)
    if config is None:
        raise ValueError(f"{read.run_dir} has no config.yaml to train by. Give its settings: --config FILE.")
    settings = flat(yaml.safe_load(config.read_text()))
    known = {*inspect.signature(Supervised).parameters, *inspect.signature(SimCLRAugmentation).parameters}
    known -= {"batch_size", "seed", "num_classes", "augmentation"}
    taken: dict[str, Any] = {"seed_everything": settings.get("seed_everything", 0)}
    for name, value in settings.items():
        group, _, own = name.partition(".")
        if (group == "model" and own in known) or (group in _GROUPS and name not in _OF_THE_RUN):
            taken[name] = value
    if not values_of(args, "--run_dir"):
        folder = Path(read.run_dir)
        taken["run_dir"] = str(folder.with_name(f"{folder.resolve().name}{_SUFFIX}"))
    return [f"--{name}={as_flag(value)}" for name, value in taken.items()], rest


def _run_in(args: list[str]) -> tuple[str | None, list[str]]:
    """The run that stands by itself or after `--checkpoint`, and the arguments without it."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == "--checkpoint" and equals:
            return value, args[:i] + args[i + 1 :]
        if name == "--checkpoint" and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
        path = expanded(arg)
        alone = not arg.startswith("-") and (i == 0 or not args[i - 1].startswith("-") or "=" in args[i - 1])
        if alone and (path.suffix == ".ckpt" or (path / LAST).is_file()):
            return arg, args[:i] + args[i + 1 :]
    return None, args
