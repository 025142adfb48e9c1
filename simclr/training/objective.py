"""A loss by the settings of SimCLR, and what people are told of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from simclr import losses
from simclr.contrast.engine import ContrastStats
from simclr.training.step_log import DIVERGED, StepLog

LossName = Literal["nt_xent", "dcl", "nt_logistic", "margin_triplet", "nt_xent_unnormalized"]
Pairs = Literal["all", "large"]  # of views that are compared: all, or those with a large one as the candidate


class Objective(NamedTuple):
    """What a method minimises, for people.

    Attributes:
        title: "NT-Xent".
        text: the title with the settings that matter: "NT-Xent, temperature 0.2".
        chance: about its value before anything is learned; None if it has no such value.
    """

    title: str
    text: str
    chance: float | None


class Loss(NamedTuple):
    """A loss that SimCLR can be trained by.

    Attributes:
        function: of `simclr.losses`.
        title: its name in a text.
        scale: the setting that is its third argument.
        chance: (candidates for an anchor's partner, margin) -> its value where all cosines are the same, so that no
            image is told from another; None where it depends on what that cosine is.
        semi_hard: whether it can compare with the nearest of the farther negatives instead of all.
    """

    function: Callable[..., Any]
    title: str
    scale: str
    chance: Callable[[int, float], float] | None
    semi_hard: bool = False


LOSSES: dict[LossName, Loss] = {
    "nt_xent": Loss(losses.nt_xent, "NT-Xent", "temperature", lambda candidates, margin: math.log(candidates)),
    "dcl": Loss(losses.dcl, "DCL", "temperature", lambda candidates, margin: math.log(candidates - 1)),
    "nt_logistic": Loss(losses.nt_logistic, "NT-Logistic", "temperature", None, semi_hard=True),
    "margin_triplet": Loss(
        losses.margin_triplet, "margin triplet", "margin", lambda candidates, margin: margin, semi_hard=True
    ),
    "nt_xent_unnormalized": Loss(losses.nt_xent_unnormalized, "NT-Xent without l2 norm", "temperature", None),
}


def loss_of(
    settings: Mapping[str, Any],
    views: Sequence[Tensor],
    step: int = 0,
    *,
    gather: bool = True,
    log: StepLog | None = None,
) -> tuple[Tensor, ContrastStats]:
    """The loss of projections, as a SimCLR of these settings computes it.

    Args:
        settings: SimCLR's.
        views: projections of each view, (n, D) each.
        step: of the optimiser, for an error's text.
        gather: among those of all ranks.
        log: of the method that trains. If it is `watched`, a loss of CPU projections that are not finite is NaN, its
            gradient too, as on other devices.
    Raises:
        FloatingPointError: if CPU projections are not finite and nobody watches.
    """
    loss = LOSSES[settings["loss"]]
    options: dict[str, Any] = {"semi_hard": settings["semi_hard"]} if loss.semi_hard else {}
    try:
        if len(views) > 2:
            options = {"gather": gather, "return_stats": True}
            large = settings.get("views", 2)
            if len(views) > large and settings.get("pairs") == "large":
                result = losses.nt_xent_to_large(views[:large], views[large:], settings["temperature"], **options)
            else:
                result = losses.sup_con(views, settings["temperature"], **options)
            assert isinstance(result, tuple)  # with return_stats
            return result
        return loss.function(*views, settings[loss.scale], gather=gather, return_stats=True, **options)
    except FloatingPointError as error:
        if log is not None and log.watched:  # the ranks have agreed that all of them are here
            log.reason = str(error)
            nan = torch.stack([view.float().sum() for view in views]).sum() * torch.nan
            return nan, ContrastStats(*[nan.detach()] * len(ContrastStats._fields))
        raise FloatingPointError(f"the loss is nan at step {step}: {error} {DIVERGED}") from error


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """What a SimCLR of these settings minimises; an unknown loss by its name as it stands.

    Args:
        settings: SimCLR's; the chance level needs `batch_size`, the global batch, among them.
    """
    name = settings.get("loss", "nt_xent")
    if name not in LOSSES:
        return Objective(str(name), str(name), None)
    loss, views, small = LOSSES[name], settings.get("views", 2), settings.get("small_crops") or 0
    to_large = small > 0 and settings.get("pairs") == "large"
    parts = [loss.title, *(["semi-hard"] if settings.get("semi_hard") else [])]
    parts += [f"{loss.scale} {settings[loss.scale]:g}"] if loss.scale in settings else []
    parts += [f"{views} views"] if views > 2 else []
    parts += [f"{small} small crop{'s' if small > 1 else ''}"] if small else []
    parts += ["each view against the large ones"] if to_large else []
    batch, margin = settings.get("batch_size") or 0, settings.get("margin", 0.0)
    candidates = (views if to_large else views + small) * batch - 1
    known = loss.chance if candidates >= 2 else None
    chance = known(candidates, margin) if known is not None else None
    if chance is not None and known is not None and to_large:  # a small crop is compared with one more: not with itself
        chance = (views * chance + small * known(candidates + 1, margin)) / (views + small)
    return Objective(loss.title, ", ".join(parts), chance)
