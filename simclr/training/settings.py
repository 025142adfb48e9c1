"""Settings that methods share: refused where they cannot be meant, completed and plain, as a checkpoint keeps them."""

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any, get_args

from simclr.augment import SimCLRAugmentation
from simclr.checks import out_of_range, refuse
from simclr.contrast.agree import SMALLEST_TEMPERATURE
from simclr.optim import LrScaling, OptimizerName
from simclr.training.network import CompileMode
from simclr.training.objective import LOSSES

_POSITIVE = ("temperature", "margin", "base_lr", "batch_size", "micro_batch_size")
_NOT_NEGATIVE = ("weight_decay", "warmup_epochs")
_CHOICES = {"loss": tuple(LOSSES), "optimizer": get_args(OptimizerName), "lr_scaling": get_args(LrScaling)}


def refuse_bad_settings(settings: Mapping[str, Any]) -> None:
    """Raise one ValueError that names every setting which is out of its range; a setting that is absent is none.

    Args:
        settings: those of a method, None for what is left open.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    problems = out_of_range(given, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, choices=_CHOICES)
    if "weights_prefix" in given and "weights" not in given:
        problems.append(f"weights_prefix={given['weights_prefix']} needs weights, whose names begin so")
    with_labels = "num_classes" in settings
    refuse([*problems, *_of_the_loss(given, with_labels), *_of_the_steps(given)])


def _of_the_loss(given: Mapping[str, Any], with_labels: bool) -> list[str]:
    problems, loss, views = [], given.get("loss", "nt_xent"), given.get("views", 2)
    temperature = given.get("temperature", 1.0)
    if 0 < temperature < SMALLEST_TEMPERATURE:
        least = SMALLEST_TEMPERATURE
        problems.append(f"temperature={temperature} is below {least}, where logits overflow; try 0.05")
    if given.get("semi_hard") and loss in LOSSES and not LOSSES[loss].semi_hard:
        problems.append(f"semi_hard=True is for loss=nt_logistic and margin_triplet, not for {loss}")
    if with_labels and views < 1:
        problems.append(f"views={views} is not 1 or more")
    if views < 2 and not with_labels:
        problems.append(f"views={views} leaves an image without a positive: use 2 or more")
    if views > 2 and loss != "nt_xent":
        problems.append(f"views={views} works with loss=nt_xent only, not with {loss}: use 2")
    return problems


def _of_the_steps(given: Mapping[str, Any]) -> list[str]:
    problems = []
    if not 0 <= given.get("momentum", 0) < 1:
        problems.append(f"momentum={given['momentum']} is not in [0, 1)")
    if given.get("compile_encoder", False) not in (True, False, *get_args(CompileMode)):
        modes = ", ".join(get_args(CompileMode))
        problems.append(f"compile_encoder={given['compile_encoder']} is none of true, false, {modes}")
    start, epochs, size = given.get("start_size"), given.get("grow_epochs", 0), given["image_size"]
    if start is not None and not (1 <= start <= size and epochs > 0):
        grows = f"start_size={start} with grow_epochs={epochs}"
        problems.append(f"{grows}: use a size up to image_size={size} and 1 epoch or more")
    if start is None and epochs:
        problems.append(f"grow_epochs={epochs} needs a start_size to grow from")
    return problems


def complete(hparams: MutableMapping[str, Any], augment: SimCLRAugmentation, **chosen: Any) -> None:
    """Let hyper-parameters state every setting, also those left at their defaults, in types that any tool can read.

    Args:
        hparams: of a method; changed in place.
        augment: its augmentation, which knows what was left to it.
        **chosen: what the method itself has decided.
    """
    names = inspect.signature(SimCLRAugmentation).parameters.values()
    hparams.update({p.name: hparams.get(p.name, p.default) for p in names})
    hparams.update(strength=augment.strength, crop_scale=augment.crop_scale, blur_prob=augment.blur_prob)
    hparams.update(gray_prob=augment.gray_prob, mean=augment.mean, std=augment.std)
    hparams.update(chosen)
    hparams.update({name: list(value) for name, value in hparams.items() if isinstance(value, tuple)})
