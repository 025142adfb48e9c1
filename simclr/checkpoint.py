"""What stands in a checkpoint, read strictly. The only file that knows a checkpoint's inside."""

import inspect
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from simclr.encoders import build_encoder

_ARCHITECTURE = (
    *("encoder", "image_size", "stem", "width", "shortcut", "norm"),
    *("head", "hidden_dim", "projection_dim", "head_layers", "head_batch_norm"),
)
_NEEDED = ("encoder", "image_size", "mean", "std", "seed")  # to build the encoder, feed it and begin it anew
# Decide which images a step trains on, and what they look like when they are cropped.
# Not the folders themselves: the same images may have moved.
_IMAGES = ("source", "load_size", "batch_size", "seed", "shapes_train")
LAST = Path("checkpoints") / "last.ckpt"  # where a run folder keeps the checkpoint to go on from


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a pretraining run, read.

    Attributes:
        path: the file.
        model: the settings of `SimCLR`, plain types.
        data: the settings of `simclr.data.ImageData`, plain types; empty if the run had another source of batches.
        state_dict: all weights of the module, by name, on the CPU.
        epoch: the last epoch begun, from 0.
        global_step: optimiser steps taken.
    """

    path: Path
    model: dict[str, Any]
    data: dict[str, Any]
    state_dict: dict[str, Tensor]
    epoch: int
    global_step: int

    @property
    def run_dir(self) -> Path:
        """The run folder the checkpoint belongs to: the one above `checkpoints`, else the file's own."""
        folder = self.path.parent
        return folder.parent if folder.name == LAST.parent.name else folder


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint file meant by a run folder or a file.

    Raises:
        FileNotFoundError: if there is none, saying what there is.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / LAST).is_file():
        return path / LAST
    if path.is_dir():
        # Not deeper: a folder given by mistake may be a whole home.
        found = sorted(str(p) for depth in ("", "*/", "*/*/") for p in path.glob(f"{depth}*.ckpt"))[:3]
        hint = f"Did you mean {' or '.join(found)}?" if found else "Give a run folder that training has filled."
        raise FileNotFoundError(f"no {LAST} in {path}. {hint}")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    raise FileNotFoundError(f"no checkpoint at {path}: {nearest} is as far as the path exists.")


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of a pretraining run, without running any code that it might carry.

    Args:
        path: a run folder (its last checkpoint) or a checkpoint file.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint of `SimCLR`.
    """
    path = find_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, of another program, or holds more than weights."
        ) from error
    needed = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in needed):
        raise ValueError(f"{path} is not a checkpoint of simclr: it has no {' and '.join(needed)}.")
    lacking = [name for name in _NEEDED if name not in content["hyper_parameters"]]
    if lacking:
        raise ValueError(f"{path} is a checkpoint of another program: its hyper_parameters lack {', '.join(lacking)}.")
    return Checkpoint(
        path=path,
        model=dict(content["hyper_parameters"]),
        data=dict(content.get("datamodule_hyper_parameters", {})),
        state_dict=content["state_dict"],
        epoch=content.get("epoch", 0),
        global_step=content.get("global_step", 0),
    )


def new_encoder(checkpoint: Checkpoint) -> nn.Module:
    """A freshly initialised encoder of a checkpoint's kind, in eval mode, with its attributes (see `load_encoder`)."""
    settings = checkpoint.model
    names = inspect.signature(build_encoder).parameters.keys() - {"name"}
    encoder = build_encoder(settings["encoder"], **{name: settings[name] for name in names if name in settings})
    encoder.image_size = settings["image_size"]
    encoder.mean, encoder.std = tuple(settings["mean"]), tuple(settings["std"])
    return encoder.eval().requires_grad_(False)


def load_encoder(path: str | os.PathLike) -> nn.Module:
    """The pretrained encoder of a run, ready to use.

    Args:
        path: a run folder (its last checkpoint) or a checkpoint file.
    Returns:
        A module: images (N, 3, H, W), normalised by its `.mean` and `.std`, -> representations (N, feature_dim). In
        eval mode, gradients off, on the CPU. It carries `.feature_dim`, `.image_size` (pixels), `.mean` and `.std`.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint of simclr or its weights do not match, by name.
    """
    checkpoint = read_checkpoint(path)
    encoder = new_encoder(checkpoint)
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint.state_dict.items() if k.startswith(prefix)}
    refuse_mismatch(weights, encoder.state_dict(), f"{checkpoint.path} does not fit its own {settings_of(checkpoint)}")
    encoder.load_state_dict(weights)
    return encoder


def refuse_mismatch(weights: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that names the weights which are missing, unexpected or of another shape."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is unexpected" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} where {tuple(value.shape)} is needed"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:4])
        raise ValueError(f"{what}: {shown}{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}.")


def settings_of(checkpoint: Checkpoint) -> str:
    """The settings that decide an encoder's weights, as a short text for messages."""
    return ", ".join(f"{name}={checkpoint.model[name]}" for name in _ARCHITECTURE if name in checkpoint.model)


def check_resume(checkpoint: Checkpoint, module: nn.Module, data: LightningDataModule | None = None) -> None:
    """Refuse to continue a run with other weights, another optimizer or other images than the checkpoint's.

    Args:
        checkpoint: where to go on from.
        module: the `SimCLR` to go on with.
        data: the images to go on with; not looked at if None, or if the checkpoint names no images.
    Raises:
        ValueError: naming the settings that differ, or else the weights.
    """
    changed = _differences("model", _ARCHITECTURE, module.hparams, checkpoint.model)
    reason = f" ({', '.join(changed)})" if changed else ""
    what = f"{checkpoint.path} is of another architecture{reason}"
    refuse_mismatch(checkpoint.state_dict, module.state_dict(), what)
    # The optimizer's state is of no use to another; of other images the order, and so the run, would be another.
    changed = _differences("model", ("optimizer",), module.hparams, checkpoint.model)
    if data is not None:
        changed += _differences("data", _IMAGES, *map(_sourced, (data.hparams, checkpoint.data)))
    if changed:
        # Linked on the command line, where there is no data.seed.
        changed = [line.replace("data.seed=", "data.seed (seed_everything)=") for line in changed]
        raise ValueError(
            f"{checkpoint.path} cannot be continued: {', '.join(changed)}. Restore the setting, or begin another run."
        )


def _differences(of: str, names: Iterable[str], given: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """The settings that both have and that differ, as text."""
    return [
        f"{of}.{name}={given[name]} but the checkpoint has {read[name]}"
        for name in names
        if name in given and name in read and given[name] != read[name]
    ]


def _sourced(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ImageData` with "auto" resolved as there; the number of built-in images only where they are used."""
    settings = dict(settings)
    if settings.get("source") == "auto":
        settings["source"] = "folder" if settings.get("train_dir") else "shapes"
    if settings.get("source") != "shapes":
        settings.pop("shapes_train", None)
    return settings


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def save_encoder(encoder: nn.Module, path: Path) -> None:
    """Write an encoder's weights as a plain state dict: torchvision's keys for torchvision's networks, no head."""
    buffer = io.BytesIO()
    torch.save({name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}, buffer)
    write_atomically(path, buffer.getvalue())
