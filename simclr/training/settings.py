"""Settings that methods share: refused where they cannot be meant, completed and plain, as a checkpoint keeps them."""

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any, get_args

from torch import nn

from simclr.augment import SimCLRAugmentation
from simclr.checks import out_of_range, refuse
from simclr.contrast.agree import SMALLEST_TEMPERATURE
from simclr.image_sizes import why_not
from simclr.optim import LrScaling, OptimizerName
from simclr.training.network import CompileMode, replays_graphs
from simclr.training.objective import LOSSES, Pairs

_POSITIVE = ("temperature", "margin", "base_lr", "batch_size", "micro_batch_size")
_NOT_NEGATIVE = ("weight_decay", "warmup_epochs")
_CHOICES = {"loss": tuple(LOSSES), "optimizer": get_args(OptimizerName), "lr_scaling": get_args(LrScaling)}
_CHOICES["pairs"] = get_args(Pairs)


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
    refuse([*problems, *_of_the_loss(given, with_labels), *_of_small_crops(given), *_of_the_steps(given)])


def refuse_sizes(encoder: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for views of another size than image_size that an encoder cannot take.

    Args:
        encoder: of the method, which takes images of its image_size.
        settings: of the method, complete.
    """
    for name in ("start_size", "small_crop_size"):
        size = settings.get(name)
        if size is not None and (reason := why_not(encoder, size, settings["channels"])):
            of = settings["encoder"]
            raise ValueError(f"{name}={size}: encoder {of} cannot take images of that size: {reason}.")


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


def _of_small_crops(given: Mapping[str, Any]) -> list[str]:
    count, size, scale = given.get("small_crops", 0), given.get("small_crop_size"), given.get("small_crop_scale")
    if count < 0:
        return [f"small_crops={count} is not 0 or more"]
    if count == 0:
        left = [name for name in ("small_crop_size", "small_crop_scale") if name in given]
        left += ["pairs"] if given.get("pairs", "all") != "all" else []
        return [f"{name}={given[name]} is of small crops, and there are none: give small_crops" for name in left]
    problems, loss = [], given.get("loss", "nt_xent")
    if loss != "nt_xent":
        problems.append(f"small_crops={count} works with loss=nt_xent only, not with {loss}")
    if size is not None and not 1 <= size <= given["image_size"]:
        problems.append(f"small_crop_size={size} is not from 1 to image_size={given['image_size']}")
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        problems.append(f"small_crop_scale={scale} is not a range of area: use 0 < low <= high <= 1")
    if given.get("start_size") is not None:
        problems.append(f"small_crops={count} with start_size: views that grow would begin smaller than small crops")
    if replays_graphs(given):
        graphs = f"compile_encoder={given['compile_encoder']} replays CUDA graphs, of one size of views"
        problems.append(f"small_crops={count}: {graphs}. Use true or max-autotune-no-cudagraphs")
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
