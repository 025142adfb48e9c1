"""What stands in a checkpoint, read strictly. Beside `intact.py` the only file that knows a checkpoint's inside."""

import hashlib
import inspect
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from simclr import __version__
from simclr.data.decode import DEEPEST
from simclr.data.module import default_load_size
from simclr.encoders import build_encoder, choose_stem
from simclr.export.card import CARD, read_card
from simclr.export.reading import exported_file, load_graph, runs_by_itself
from simclr.files import write_atomically
from simclr.inputs import attach_transform, transform_of
from simclr.intact import load, not_finite, refuse_ruined, unfit_to_continue, wrong_parts
from simclr.paths import expanded
from simclr.pyramid import FeaturePyramid
from simclr.training.internals import count_last_batch
from simclr.training.objective import Objective, objective_of

Features = Literal["mean", "pyramid"]
NetworkName = Literal["online", "target"]
_OPTIONS = tuple(name for name in inspect.signature(build_encoder).parameters if name != "name")
_NEEDED = ("encoder", "image_size", "mean", "std", "seed")  # to build the encoder, feed it and begin it anew
LAST = Path("checkpoints") / "last.ckpt"  # where a run folder keeps the checkpoint to go on from
ENCODER = "encoder.pt"  # in a run folder: the weights alone, and beside them, as .safetensors, with their settings
STARTING_ENCODER = "starting_encoder.safetensors"  # of a run that began with given weights: the encoder as it began
_SETTINGS = "simclr"  # the key of a safetensors file's metadata that holds them, as JSON
_SHA256 = "simclr_sha256"  # and the one of a hash of both


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a pretraining run, read.

    Attributes:
        path: the file.
        model: the settings of its method, plain types.
        data: the settings of `simclr.data.ImageData`, plain types; empty if the run had another source of batches.
        state_dict: all weights of the module, by name, on the CPU.
        epoch: the last epoch begun, from 0.
        global_step: optimiser steps taken.
        run: where the run stands, how long it is, and what of its Trainer decides its bits (see
            `simclr.training.run.PretrainingRun.save`), plain types; empty if another tool wrote the checkpoint.
        images: what `ImageData.fingerprint` gave; empty for images that are not in files.
        about: of the method, see `simclr.training.method.record_of`; empty if an earlier version wrote the checkpoint.
        unfit: why no run can go on from it, a few words each; empty if one can.
    """

    path: Path
    model: dict[str, Any]
    data: dict[str, Any]
    state_dict: dict[str, Tensor]
    epoch: int
    global_step: int
    run: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The name of the method that was trained."""
        return self.about.get("name", "simclr")

    @property
    def objective(self) -> Objective:
        """What was minimised."""
        if "objective" in self.about:
            return Objective(**self.about["objective"])
        return objective_of(self.model)

    @property
    def epochs(self) -> int:
        """Whole epochs trained."""
        return self.run.get("epochs", self.epoch + 1)

    @property
    def finished(self) -> bool | None:
        """Whether the run had taken all of its steps; None if the checkpoint does not tell."""
        total = self.run.get("total_steps")
        return None if total is None else self.global_step >= total

    @property
    def stands(self) -> str:
        """How far the run had come, for people: "epoch 25", or what was missing."""
        total = self.run.get("total_steps")
        if self.finished is not False:
            return f"epoch {self.epochs}" if not self.run.get("steps_inside") else f"step {self.global_step} of {total}"
        return f"step {self.global_step} of {total}, the run not finished"

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
    path = expanded(path)
    if path.is_file():
        return path
    if (path / LAST).is_file():
        return path / LAST
    saved = list((path / LAST.parent).glob("*.ckpt"))
    if len(saved) == 1:  # as Lightning leaves it by default, in lightning_logs/version_0
        return saved[0]
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
    content = None if path.suffix == ".safetensors" else _read(path)
    if content is None or _weights_alone(content):
        raise ValueError(f"{path} holds an encoder alone. Give the run's folder, or its {LAST}.")
    return _checkpoint(path, content)


def _weights_alone(content: Any) -> bool:
    """Whether this is a plain state dict."""
    return isinstance(content, dict) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _read(path: Path) -> Any:
    try:
        return load(path)
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        known = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged{known}, of another program, or holds more than "
            f"weights.{_another(path)}"
        ) from error


def sound_beside(path: Path) -> tuple[Path, int] | None:
    """The newest sound checkpoint beside one that is damaged or gone, and its step; None if there is none."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path and path.suffix == ".ckpt"]
    for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
        try:
            # A tensor would take a word for its index.
            return other, dict(load(other))["global_step"]
        except Exception:  # damaged too, or of another program
            continue
    return None


def _another(path: Path) -> str:
    """Which sound checkpoint lies beside a damaged one, for people; empty if none does."""
    found = sound_beside(path)
    return f" An earlier one beside it is sound: {found[0]}, of step {found[1]}." if found else ""


def _checkpoint(path: Path, content: Any) -> Checkpoint:
    needed = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in needed):
        raise ValueError(f"{path} is not a checkpoint of simclr: it has no {' and '.join(needed)}.")
    lacking = [name for name in _NEEDED if name not in content["hyper_parameters"]]
    if lacking:
        raise ValueError(f"{path} is a checkpoint of another program: its hyper_parameters lack {', '.join(lacking)}.")
    if wrong := wrong_parts(content):
        raise ValueError(f"{path} is damaged: {some(wrong)}.{_another(path)}")
    return Checkpoint(
        path=path,
        model=dict(content["hyper_parameters"]),
        data=dict(content.get("datamodule_hyper_parameters", {})),
        state_dict=content["state_dict"],
        epoch=content.get("epoch", 0),
        global_step=content.get("global_step", 0),
        run=dict(content.get("run", {})),
        images=dict(content.get("ImageData", {})),
        about=dict(content.get("method", {})),
        unfit=unfit_to_continue(content),
    )


def some(problems: list[str]) -> str:
    """Problems for people, in one line: the first few, and how many more."""
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return "; ".join(problems[:4]) + more


def refuse_unfit(unfit: list[str], path: Path) -> None:
    """Refuse to continue from a checkpoint that would not come to where its run would have.

    Args:
        unfit: why not, see `Checkpoint.unfit`.
        path: the file.
    Raises:
        ValueError: naming what is missing or wrong, and an earlier checkpoint that is sound.
    """
    if unfit:
        raise ValueError(f"{path} cannot be continued from, it is damaged: {some(unfit)}.{_another(path)}")


def new_encoder(checkpoint: Checkpoint) -> nn.Module:
    """A freshly initialised encoder of a checkpoint's kind, in eval mode, with its attributes (see `load_encoder`)."""
    return _build(_settings_of_checkpoint(checkpoint), checkpoint.path)


def load_encoder(path: str | os.PathLike, features: Features = "mean", network: NetworkName = "online") -> nn.Module:
    """The pretrained encoder of a run, ready to use.

        encoder = load_encoder("runs/photos_resnet18")
        h = encoder(encoder.transform("photo.jpg"))  # (1, encoder.feature_dim)

    Args:
        path: a run folder (its last checkpoint); a checkpoint file, Lightning's own too; `encoder.safetensors`, which
            needs nothing beside it; `encoder.pt`, which holds no settings: they are read from the safetensors file
            beside it, or from the run's last checkpoint; or what `simclr export` has written, the folder or its file.
        features: what comes out. mean: representations. pyramid: the maps of the stages, for detection and segmentation
            (`simclr.pyramid.FeaturePyramid`).
        network: of a run or checkpoint of BYOL, which has two: online, the one that was trained, or target, its moving
            average.
    Returns:
        A module: images (N, C, S, S), normalised, -> representations (N, feature_dim). In eval mode, gradients off, on
        the CPU. Its `.transform` makes such a batch of PIL images, files, tensors or arrays of any size
        (`simclr.inputs.InputTransform`). It carries `.feature_dim`, `.image_size` (pixels), `.mean` and `.std`.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is none of the above, if settings are missing, or if the weights do not match, by name.
    """
    if features not in get_args(Features):
        raise ValueError(f"features={features} is none of {', '.join(get_args(Features))}.")
    if network not in get_args(NetworkName):
        raise ValueError(f"network={network} is none of {', '.join(get_args(NetworkName))}.")
    if runs_by_itself(path := exported_file(expanded(path))):
        if features == "pyramid":
            raise ValueError(f"{path} gives representations alone. Take the pyramid of the run, or of its safetensors.")
        return load_graph(path)
    path, weights, settings = read_encoder(path, network)
    encoder = _build(settings, path)
    kind = ", ".join(f"{name}={settings[name]}" for name in ("encoder", *_OPTIONS) if name in settings)
    refuse_mismatch(weights, encoder.state_dict(), f"{path} does not fit its own {kind}")
    encoder.load_state_dict(weights)
    return encoder if features == "mean" else FeaturePyramid(encoder)


def read_encoder(
    path: str | os.PathLike, network: NetworkName = "online"
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file meant, an encoder's weights, and the settings that build and feed it; see `load_encoder`."""
    path = exported_file(expanded(path))
    alone = (path / ENCODER).with_suffix(".safetensors")
    path = alone if alone.is_file() and not any((path / LAST.parent).glob("*.ckpt")) else find_checkpoint(path)
    content = None if path.suffix == ".safetensors" else _read(path)
    if network == "target" and (content is None or _weights_alone(content)):
        raise ValueError(f"{path} holds one encoder. The target network is in the run's checkpoint.")
    if content is None:
        return path, *_read_safetensors(path)
    if _weights_alone(content):
        return path, content, _settings_beside(path)
    checkpoint, prefix = _checkpoint(path, content), "encoder." if network == "online" else "target.encoder."
    if not any(name.startswith(prefix) for name in checkpoint.state_dict):
        raise ValueError(f"{path} has no {network} network: it is a run of {checkpoint.method}.")
    weights = {k.removeprefix(prefix): v for k, v in checkpoint.state_dict.items() if k.startswith(prefix)}
    return path, weights, _settings_of_checkpoint(checkpoint)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            settings = json.loads(metadata.get(_SETTINGS, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if settings is None and (card := path.parent / CARD).is_file():  # exported for another library
            settings = read_card(card)["encoder"]
        if metadata.get(_SHA256, (digest := sha256_of(weights, metadata.get(_SETTINGS, "")))) != digest:
            raise ValueError("its weights or settings are not those that were written")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: it is damaged, or no safetensors file ({error}).") from error
    lacking = [name for name in _NEEDED if name != "seed" and name not in (settings or {})]
    if lacking:
        raise ValueError(
            f"{path} is not of simclr: its metadata lack {', '.join(lacking)}. Of another program's weights make an "
            "encoder with simclr.build_encoder(name) and load_state_dict."
        )
    return weights, settings


def _settings_beside(weights: Path) -> dict[str, Any]:
    """The settings of the run that left a plain state dict."""
    described, last = weights.with_suffix(".safetensors"), weights.parent / LAST
    if described.is_file():
        return _read_safetensors(described)[1]
    if last.is_file():
        return _settings_of_checkpoint(read_checkpoint(last))
    if (card := weights.parent / CARD).is_file():
        return read_card(card)["encoder"]
    raise ValueError(
        f"{weights} holds weights alone, and neither {described.name} nor {LAST} beside it says of what network. "
        f"Give {described.name} or a checkpoint of the run; or build the network with simclr.build_encoder."
    )


def _settings_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    image_size, data = checkpoint.model["image_size"], checkpoint.data
    load_size = data.get("load_size") or default_load_size(image_size, data.get("source", "auto"))
    return _encoder_settings(checkpoint.model, load_size, data.get("sixteen_bit_max", DEEPEST), data.get("bits") or 8)


def _encoder_settings(model: Mapping[str, Any], load_size: int, sixteen_bit_max: int, bits: int) -> dict[str, Any]:
    """What builds an encoder and what it must be fed, out of the settings of `SimCLR`; plain types."""
    settings = {name: model[name] for name in ("encoder", *_OPTIONS) if name in model}
    if "stem" in settings:  # whatever auto will mean one day
        settings["stem"] = choose_stem(settings["encoder"], settings["stem"], settings["image_size"])
    if sixteen_bit_max != DEEPEST:
        settings["sixteen_bit_max"] = sixteen_bit_max
    if bits != 8:
        settings["bits"] = bits
    return settings | {"load_size": load_size, "mean": list(model["mean"]), "std": list(model["std"])}


def _build(settings: Mapping[str, Any], path: Path) -> nn.Module:
    """The network of an encoder's settings, in eval mode, gradients off, with its preprocessing."""
    try:
        encoder = build_encoder(settings["encoder"], **{name: settings[name] for name in _OPTIONS if name in settings})
    except TypeError as error:
        raise ValueError(f"the settings in {path} build no encoder: {error}.") from error
    attach_transform(encoder, transform_of(settings))
    return encoder.eval().requires_grad_(False)


def refuse_mismatch(weights: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError that names the weights which are missing, unexpected or of another shape."""
    if problems := mismatches(weights, expected):
        raise ValueError(f"{what}: {some(problems)}.")


def mismatches(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Which weights are missing, unexpected or of another shape, a few words each that begin with the name."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is unexpected" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} where {tuple(value.shape)} is needed"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    return problems


def settle_progress(fit_loop: dict[str, Any], batches: int) -> tuple[int, int]:
    """Let the counters that Lightning saves tell an epoch that was left in the middle from one that has ended.

    Lightning counts an epoch as processed in both cases, whatever has ended it (max_steps, `should_stop`): continued
    from that, the rest of the epoch would be left out. And an epoch that has ended it leaves half counted, which under
    max_steps it takes for one to be finished.

    Args:
        fit_loop: the state of Lightning's fit loop, as in a checkpoint; changed in place.
        batches: of a whole epoch.
    Returns:
        Whole epochs trained, and batches of the one after them.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    whole, inside = epoch["current"]["processed"], batch["current"]["processed"]
    begun, counted = epoch["current"]["started"] > whole, epoch["current"]["ready"] == whole
    if 0 < inside < batches and not batch["is_last_batch"]:
        whole -= counted
        for counter in epoch.values():
            counter["processed"] = counter["completed"] = whole
        return whole, inside
    if counted:
        for counter in epoch.values():
            counter["completed"] = whole
        batch["current"], batch["is_last_batch"] = dict.fromkeys(batch["current"], 0), False
    return whole + (begun and inside > 0), 0


def end_epoch(fit_loop: dict[str, Any]) -> None:
    """Let the counters of an epoch that was left in the middle say that it has ended.

    Args:
        fit_loop: as for `settle_progress`, which it has gone through.
    """
    for counter in fit_loop["epoch_progress"].values():
        counter.update(dict.fromkeys(counter, counter["ready"]))
    batch = fit_loop["epoch_loop.batch_progress"]
    if batch["total"]["completed"] < batch["total"]["processed"]:  # saved at the end of a step, before it was counted
        batch["total"]["completed"] = batch["total"]["processed"]
        count_last_batch(fit_loop)
    batch["current"] = dict.fromkeys(batch["current"], 0)


def as_state_dict_file(content: Any) -> memoryview:
    """The bytes of a file that `torch.load` reads."""
    buffer = io.BytesIO()  # not the file itself: what fails in the middle of torch's writer is no OSError
    torch.save(content, buffer)
    return buffer.getbuffer()


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that it is there whole or not at all.

    Args:
        path: the file; its folder is made.
        content: plain types and tensors.
    Raises:
        OSError: if it cannot be written; the one that stood there stands there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_state_dict_file(content))


def save_encoder(module: LightningModule, path: Path) -> None:
    """Write the encoder of a run, without the head, as two files that `load_encoder` opens.

    `path` is a plain state dict: torchvision's keys for torchvision's networks. Beside it, with the suffix
    .safetensors, the same weights with everything that is needed to build and feed the encoder in the metadata.

    Args:
        module: the `SimCLR` that was trained.
        path: the file of the state dict.
    Raises:
        FloatingPointError: if weights are not finite; what stood there stands there still.
    """
    _write_encoder(module.encoder, _settings_of_module(module), path)


def save_starting_encoder(module: LightningModule, path: Path) -> None:
    """Write the encoder that a run begins with as one file that `load_encoder` opens.

    Args:
        module: the method that is about to be trained.
        path: the file, a .safetensors.
    """
    write_atomically(path, as_encoder_file(_plain_weights(module.encoder), _settings_of_module(module)))


def _settings_of_module(module: LightningModule) -> dict[str, Any]:
    transform = module.encoder.transform
    settings = _encoder_settings(module.hparams, transform.load_size, transform.sixteen_bit_max, transform.bits)
    settings |= {"feature_dim": module.encoder.feature_dim, "simclr_version": __version__}
    return settings | {"epochs": module.current_epoch, "global_step": module.global_step}


def save_encoder_of(checkpoint: Checkpoint, path: Path) -> None:
    """Write the encoder of a run that has ended, as `save_encoder` does, out of its last checkpoint."""
    encoder = load_encoder(checkpoint.path)
    settings = _settings_of_checkpoint(checkpoint)
    settings |= {"feature_dim": encoder.feature_dim, "simclr_version": __version__}
    settings |= {"epochs": checkpoint.epochs, "global_step": checkpoint.global_step}
    _write_encoder(encoder, settings, path)


def _write_encoder(encoder: nn.Module, settings: dict[str, Any], path: Path) -> None:
    refuse_ruined(not_finite(encoder), settings["global_step"])
    weights = _plain_weights(encoder)
    write_atomically(path, as_state_dict_file(weights))
    write_atomically(path.with_suffix(".safetensors"), as_encoder_file(weights, settings))


def _plain_weights(encoder: nn.Module) -> dict[str, Tensor]:
    # Clones, because safetensors refuses two names for one memory.
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in encoder.state_dict().items()}


def as_encoder_file(weights: dict[str, Tensor], settings: dict[str, Any]) -> bytes:
    """A safetensors file that `load_encoder` opens: weights, and in its metadata the settings and a hash of both."""
    text = json.dumps(settings)
    return as_safetensors(weights, {"format": "pt", _SETTINGS: text, _SHA256: sha256_of(weights, text)})


def as_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: the library writes metadata in an order of chance."""
    written = save(tensors, metadata)
    end = 8 + int.from_bytes(written[:8], "little")
    header = {**json.loads(written[8:end]), "__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # where tensors begin, as the library has it
    return len(text).to_bytes(8, "little") + text + written[end:]


def sha256_of(weights: Mapping[str, Tensor], settings: str = "") -> str:
    """Of what an encoder's file holds: the format itself has no checksum. Files of earlier versions have none."""
    whole = hashlib.sha256(settings.encode())
    for name, value in sorted(weights.items()):
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
