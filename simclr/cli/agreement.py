"""Whether all ranks are of one run: the same code, settings, images, and checkpoint to go on from."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import simclr
from simclr import distributed
from simclr.run_folder import DECIDE

if TYPE_CHECKING:
    from simclr.cli.train import TrainCLI

# What may differ from machine to machine: where things lie (images are compared by content), and how they are read.
_OF_A_MACHINE = {
    *("config", "run_dir", "ckpt_path", "resume", "wandb", "trainer.default_root_dir", "trainer.logger"),
    "probe.train_dir",
    "model.weights",  # by their content
    *(
        f"data.{name}"
        for name in ("train_dir", "test_dir", "data_dir", "cache_dir", "workers", "memory_limit_gb", "leave_out")
    ),
    *("data.download", "model.seed", "data.seed", "model.batch_size", "data.image_size"),
}


def facts(cli: "TrainCLI") -> dict[str, str]:
    """What the ranks of one run have in common: name of a fact -> what it is on this rank."""
    found = {"the version of simclr": simclr.__version__, "the code of simclr": code_of(Path(simclr.__file__).parent)}
    found |= {f"the version of {name}": version(name) for name in DECIDE}
    settings: dict[str, Any] = dict(vars(cli.config.as_flat()))
    settings |= {f"model.{name}": value for name, value in cli.model.hparams.items()}  # as settled
    settings |= {"trainer.precision": cli.trainer.precision, "data.batch_size": cli.datamodule.batch_size}
    settings["data.held_out"] = cli.datamodule.held_out  # as settled too
    found |= {name: str(value) for name, value in settings.items() if name not in _OF_A_MACHINE}
    if (starting := cli.model.run.starting) is not None:
        found["the weights to begin with"] = starting.sha256[:12]
    step = f"step {cli.resumed.global_step}" if cli.resumed else "none"
    return {**found, "the checkpoint to go on from": step, "the training images": cli.datamodule.digest()}


def code_of(package: Path) -> str:
    """A hash of a package's sources."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def refuse_strangers(everyone: Sequence[Mapping[str, str]]) -> None:
    """Refuse ranks that are not of one run.

    Args:
        everyone: `facts` of each rank.
    Raises:
        ValueError: in one line, naming what differs, and on which rank.
    """
    differ = []
    for name in dict.fromkeys(name for known in everyone for name in known):
        ranks: dict[str | None, list[int]] = {}
        for rank, known in enumerate(everyone):
            ranks.setdefault(known.get(name), []).append(rank)
        if len(ranks) > 1:
            shown = (f"{_shown(name, value)} on {_ranks(numbers)}" for value, numbers in ranks.items())
            equals = "=" if "." in name or (name.islower() and " " not in name) else ": "
            differ.append(f"{name}{equals}{', '.join(shown)}")
    if differ:
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(f"the ranks are not of one run: {'; '.join(differ[:4])}{more}. Give all of them the same.")


def agree(cli: "TrainCLI") -> None:
    """On every rank: refuse to train where the ranks are not of one run.

    Raises:
        ValueError: the same on all ranks.
    """
    refuse_strangers(distributed.exchange_objects(facts(cli)))


def _shown(name: str, value: str | None) -> str:
    return "not there" if value is None else value


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    listed = ", ".join(map(str, numbers[:8]))
    return f"ranks {listed}{' ...' if len(numbers) > 8 else ''}"
