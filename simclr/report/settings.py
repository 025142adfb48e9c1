"""The settings of a run for people: those that are other than the defaults, and in words those one asks for first."""

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from simclr.callbacks import OnlineKNN
from simclr.checkpoint import Checkpoint
from simclr.data import ImageData
from simclr.data.rules import DEEPEST
from simclr.efficientnet import encoder_in_words
from simclr.online_quality import OnlineQuality
from simclr.training.method import find_method

Content = dict[str, Any]

_DATA_SHOWN = ("source", "train_dir", "test_dir", "data_dir", "shapes_train", "shapes_test")
# What the command line gives to Lightning's Trainer in place of its own default, or nobody reads as a setting.
_TRAINER_LEFT_OUT = {
    "use_distributed_sampler",
    "sync_batchnorm",
    "num_sanity_val_steps",
    "enable_model_summary",
    "logger",
}
_TRAINER_LEFT_OUT |= {
    "callbacks",
    "enable_progress_bar",
    "default_root_dir",
    "plugins",
    "enable_checkpointing",
    "max_epochs",
}


def settings(checkpoint: Checkpoint, encoder: nn.Module, config: Content) -> Content:
    """What stands in the section of settings.

    Args:
        checkpoint: of the run.
        encoder: loaded from it.
        config: the run's config.yaml, or {}.
    """
    rows = {name: value for name, value in _in_words(checkpoint, encoder, config).items() if value}
    differ = differing(checkpoint, config)
    return {
        "rows": rows,
        "differ": [row for row in differ if row["default"] is not None],
        "left_open": [row for row in differ if row["default"] is None],
        "has_config": bool(config),
    }


def differing(checkpoint: Checkpoint, config: Content) -> list[Content]:
    """Settings whose value is not that of their signature: name, value and default, for people.

    A default that leaves the choice to the run (None, auto) is None: the record does not tell who chose.

    Args:
        checkpoint: of the run, which knows model and data where there is no config.
        config: the run's config.yaml, or {}.
    """
    known: dict[str, Callable[..., Any]] = {"data": ImageData, "knn": OnlineKNN, "quality": OnlineQuality}
    known["trainer"] = Trainer
    with suppress(ValueError):  # a method of another program, which is not at hand
        known["model"] = find_method(checkpoint.method)
    given = {"model": checkpoint.model, "data": checkpoint.data, **config}
    found = []
    for group in ("model", "data", "trainer", "knn", "quality"):
        own = given.get(group)
        if not isinstance(own, dict) or group not in known:
            continue
        defaults = {name: p.default for name, p in inspect.signature(known[group]).parameters.items()}
        for name, value in own.items():
            default = defaults.get(name, inspect.Parameter.empty)
            if default is inspect.Parameter.empty or value is None or _same(value, default):
                continue
            if group == "trainer" and name in _TRAINER_LEFT_OUT:
                continue
            if name in ("seed", "batch_size", "image_size") and group != ("data" if name == "batch_size" else "model"):
                continue  # one of a pair that is always the same
            left_open = default is None or default == "auto"
            row = {"name": f"{group}.{name}", "value": _text(value), "default": None if left_open else _text(default)}
            found.append(row)
    return found


def _same(value: Any, default: Any) -> bool:
    """Whether two settings are equal: 1 and 1.0 are, and so are a tuple and a list."""
    return _plain(value) == _plain(default)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_text, value)) if len(value) == 2 else ", ".join(map(_text, value))
    return json.dumps(value) if value is None or isinstance(value, dict | bool) else str(value)


def _in_words(checkpoint: Checkpoint, encoder: nn.Module, config: Content) -> dict[str, str]:
    model, data = checkpoint.model, checkpoint.data
    trainer = config.get("trainer") or {}
    million = sum(p.numel() for p in encoder.parameters()) / 1e6
    of_a_folder = data.get("train_dir") is not None or data.get("source", "auto") not in ("auto", "shapes")
    named = [name for name in _DATA_SHOWN if not (of_a_folder and name.startswith("shapes_"))]
    used = [name for name in ("rotation", "cutout", "noise", "sobel") if model.get(f"{name}_prob")]
    return {
        "encoder": f"{encoder_in_words(model)}, stem {model.get('stem')}; "
        f"{million:.2f} M parameters, h of {encoder.feature_dim}",
        "projection head": f"{model['head']}, z of {model.get('projection_dim')}" if model.get("head") else "",
        "loss": checkpoint.objective.text,
        "batch and length": f"{model.get('batch_size')} images; {checkpoint.epochs} epochs, "
        f"{checkpoint.global_step:,} steps",
        "optimiser": f"{model.get('optimizer')}, base learning rate {_number(model.get('base_lr'))} "
        f"({model.get('lr_scaling')} scaling), weight decay {_number(model.get('weight_decay'))}, "
        f"warm-up {_number(model.get('warmup_epochs'))} epochs",
        "views": f"{_view_size(model)}, crop {' to '.join(f'{v:g}' for v in model.get('crop_scale', ()))} of the "
        f"area, colour strength {model.get('strength'):g}, grey {model.get('gray_prob'):g}, "
        f"blur {model.get('blur_prob'):g}, flip {model.get('flip_prob'):g}"
        + "".join(f", {name} {model[f'{name}_prob']:g}" for name in used),
        "data": " ".join(f"{k}={v}" for k, v in data.items() if k in named and v not in (None, "auto"))
        or data.get("source", "not recorded"),
        "images": _images(model, data),
        "seed": str(model.get("seed")),
        "machine": f"precision {trainer.get('precision') or '32-true'}, devices {trainer.get('devices')}"
        if trainer
        else "",
    }


def _images(model: Content, data: Content) -> str:
    """What images are that are not 8-bit RGB; empty for those."""
    channels, bits = model.get("channels", 3), data.get("bits") or 8
    if channels == 3 and bits == 8:
        return ""
    white = f", {data.get('sixteen_bit_max', DEEPEST)} white" if bits == 16 else ""
    return f"{'1 channel' if channels == 1 else f'{channels} channels'}, {bits} bits{white}"


def _number(value: float | None) -> str:
    """A setting for people; one that was left open when the checkpoint was written is the default's."""
    return "default" if value is None else f"{value:g}"


def _view_size(model: Content) -> str:
    size = f"{model['image_size']} px"
    grows = model.get("start_size") is not None
    if small := model.get("small_crops"):
        low, high = model["small_crop_scale"]
        crops = (
            f"{small} small crop{'s' * (small > 1)} of {model['small_crop_size']} px, {low:g} to {high:g} of the area"
        )
        return f"{size} and {crops}"
    return f"{model['start_size']} px, growing to {size} over {model['grow_epochs']} epochs" if grows else size
