"""What is kept of a step whose numbers are not finite: enough to compute it again, without the images' files.

One file of tensors and plain types, in the format of `torch.save`, whose reading runs no code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from simclr import __version__
from simclr.checkpoint import write_checkpoint
from simclr.continuation import trainer_settings
from simclr.data import TrainLoader
from simclr.data.decode import RULES, ReadingRules, read_images
from simclr.intact import load
from simclr.paths import expanded
from simclr.training.method import record_of

PREFIX = "nonfinite_step_"  # of a dump's name in the run folder
MOST_BYTES = 2**30  # of pixels in one; of larger batches it keeps the files' names alone
_FORMAT = 1
_PACKAGES = ("torch", "pytorch-lightning", "kornia", "torchvision")
_NEEDED = {
    "method": str,
    "settings": dict,
    "weights": dict,
    "step": int,
    "epoch": int,
    "trainer": dict,
    "batches": list,
    "found": dict,
}
_OF_A_BATCH = {"number": int, "index": Tensor, "names": list, "share": int, "side": int}


@dataclass
class Batch:
    """A batch of the step, of all ranks where one of them knows it.

    Attributes:
        number: its place in the epoch, from 0.
        index: (n,) int64, the images' numbers in the data set, rank after rank.
        pixels: (n, C, H, W) as they went into the views, uint8 mostly; None where they would be too many.
        names: n files; empty where images are not from files.
        share: images of one rank.
        side: of the images, in pixels.
        loss: as it was computed; None if it was not.
        labels: (n,) int64, of a method that learns from them; else None.
    """

    number: int
    index: Tensor
    pixels: Tensor | None
    names: list[str]
    share: int
    side: int
    loss: float | None = None
    labels: Tensor | None = None

    def name(self, place: int) -> str:
        """An image of the batch, for people: its file, else its number in the data set."""
        return self.names[place] if self.names else f"image {int(self.index[place])}"

    def images(self, rules: ReadingRules = RULES) -> Tensor:
        """The pixels, read anew from their files if they are not here.

        Args:
            rules: how files are read; see `Dump.rules`.
        Raises:
            ValueError: if neither pixels nor files are there, or one cannot be read.
        """
        if self.pixels is not None:
            return self.pixels
        if not self.names:
            raise ValueError("the dump has no pixels, because they were too many, and names no files.")
        return read_images(self.names, self.side, threads=1, rules=rules)


@dataclass
class Dump:
    """A step whose numbers were not finite.

    Attributes:
        method: by which `simclr.training.method.find_method` finds it.
        settings: of the method.
        weights: the module's state before the step, on the CPU.
        step: optimiser steps taken before it.
        epoch: from 0.
        rank: whose projections or loss were not finite; None for all ranks', or where it is not known.
        trainer: see `simclr.continuation.trainer_settings`.
        data: settings of `ImageData`; empty if the images had another source.
        batches: those of the step, more than one where gradients are accumulated.
        scale: by which fp16 multiplied the loss; None without.
        found: `loss` and `gradients`, the sum of absolute values by parameter's name, as the run saw them; `reason`.
        versions: of the packages that decide the bits.
        path: the file; None for one that was not read.
    """

    method: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    step: int
    epoch: int
    rank: int | None
    trainer: dict[str, Any]
    data: dict[str, Any]
    batches: list[Batch]
    scale: float | None
    found: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def rules(self) -> ReadingRules:
        """How the run read its files."""
        given = {"channels": self.data.get("channels"), "bits": self.data.get("bits")}
        given |= {"sixteen_bit_max": self.data.get("sixteen_bit_max")}
        return ReadingRules(max_pixels=None, **{name: value for name, value in given.items() if value is not None})


def write_dump(path: Path, dump: Dump) -> None:
    """Write a dump so that it is there whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    content = {name: getattr(dump, name) for name in dump.__dataclass_fields__ if name not in ("batches", "path")}
    batches = [{name: getattr(batch, name) for name in batch.__dataclass_fields__} for batch in dump.batches]
    versions = {"simclr": __version__, **{name: version(name) for name in _PACKAGES}}
    write_checkpoint(path, {"nonfinite": _FORMAT, **content, "batches": batches, "versions": versions})


def read_dump(path: str | Path) -> Dump:
    """Read a dump, without running any code that it might carry.

    Args:
        path: the file, or a run folder that holds one.
    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, or of another kind.
    """
    path = _find(expanded(path))
    try:
        content = load(path)
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        known = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(f"{path} cannot be read: it is damaged{known}, or no dump of a step.") from error
    if not isinstance(content, Mapping) or "nonfinite" not in content:
        raise ValueError(f"{path} is no dump of a step. A run writes them as RUN/{PREFIX}N.pt.")
    if content["nonfinite"] != _FORMAT:
        raise ValueError(f"{path} is of another version of simclr: format {content['nonfinite']}, not {_FORMAT}.")
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(content.get(name), kind)]
    batches = content["batches"] if "batches" not in wrong else []
    for batch in batches:
        fits = isinstance(batch, Mapping) and all(isinstance(batch.get(n), kind) for n, kind in _OF_A_BATCH.items())
        wrong += [] if fits and _sized(batch) else ["a batch"]
    wrong += [] if batches or wrong else ["batches"]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} is missing or of another type.")
    own: dict[str, Any] = {
        name: content.get(name) for name in Dump.__dataclass_fields__ if name not in ("batches", "path")
    }
    parts: list[dict[str, Any]] = [{name: batch.get(name) for name in Batch.__dataclass_fields__} for batch in batches]
    return Dump(**own, batches=[Batch(**part) for part in parts], path=path)


def _sized(batch: Mapping[str, Any]) -> bool:
    count, pixels = len(batch["index"]), batch.get("pixels")
    labels = batch.get("labels")
    sized = pixels is None or (isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels) == count)
    sized &= labels is None or (isinstance(labels, Tensor) and labels.shape == batch["index"].shape)
    return sized and batch["index"].dim() == 1 and count > 0 and len(batch["names"]) in (0, count)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists() and path.with_name(path.name + ".pt").is_file():
        return path.with_name(path.name + ".pt")
    found = dumps_in(path) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(
            f"{path} holds {len(found)} dumps. Give one of them: {', '.join(map(str, found[-3:]))}."
        )
    raise FileNotFoundError(f"no dump of a step at {path}. A run that met numbers not finite has RUN/{PREFIX}N.pt.")


def dumps_in(run_dir: Path) -> list[Path]:
    """The dumps in a run folder, in the order of their steps."""
    found = {path: re.fullmatch(rf"{PREFIX}(\d+)\.pt", path.name) for path in run_dir.glob(f"{PREFIX}*.pt")}
    return sorted((path for path, name in found.items() if name), key=lambda path: int(found[path][1]))  # type: ignore[index]


def whole_batch(trainer: Trainer, number: int, index: Tensor, images: Tensor | None) -> Batch:
    """A batch of this epoch, that of all ranks where the loader tells it, with its pixels.

    Args:
        trainer: in `fit`.
        number: the batch's place in the epoch.
        index: (n,), this rank's share.
        images: this rank's, of a loader that cannot give them again.
    """
    loader, share = trainer.train_dataloader, len(index)
    if not isinstance(loader, TrainLoader):
        pixels = None if images is None else images.detach().cpu()
        side = 0 if pixels is None else pixels.shape[-1]
        return Batch(number, index.cpu(), pixels, [], share, side)
    everyone = loader.sampler.global_batches(trainer.current_epoch, number + 1)[number]
    source = loader.source
    names = [source.paths[i] for i in everyone.tolist()] if source.paths is not None else []
    batch = Batch(number, everyone, None, names, share, source.side)
    return batch


def add_pixels(trainer: Trainer, batches: list[Batch]) -> None:
    """Give batches of our loader their pixels, if all of them are not too many."""
    loader = trainer.train_dataloader
    if not isinstance(loader, TrainLoader):
        return
    rules = getattr(getattr(trainer, "datamodule", None), "rules", RULES)
    if sum(len(batch.index) * rules.pixel_bytes * batch.side**2 for batch in batches) > MOST_BYTES:
        return
    for batch in batches:
        try:
            batch.pixels = loader.source.images(batch.index).cpu()
        except ValueError:  # a file that has gone or changed since: its name says as much
            return


def new_dump(
    trainer: Trainer,
    module: LightningModule,
    weights: Mapping[str, Tensor],
    batches: list[Batch],
    *,
    step: int,
    epoch: int,
    rank: int | None,
    found: dict[str, Any],
    scale: float | None,
) -> Dump:
    """A dump of a step of a training.

    Args:
        trainer: in `fit`.
        module: the method that trains.
        weights: its state before the step.
        batches, step, epoch, rank, found, scale: see `Dump`.
    """
    data = getattr(trainer, "datamodule", None)
    if (labels_of := getattr(module, "labels_of", None)) is not None:
        for batch in batches:
            batch.labels = labels_of(batch.index)
    about = record_of(module, module.hparams)
    return Dump(
        method=about["name"],
        settings=_plain(dict(module.hparams)),
        weights={name: value.detach().cpu().clone() for name, value in weights.items()},
        step=step,
        epoch=epoch,
        rank=rank,
        trainer=_plain(trainer_settings(trainer, module)),
        data=_plain(dict(data.hparams)) if data is not None else {},
        batches=batches,
        scale=scale,
        found=_plain(found),
    )


def _plain(value: Any) -> Any:
    """In types that `torch.load` reads without running code."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
