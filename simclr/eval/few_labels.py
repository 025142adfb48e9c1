"""Few labels: logistic regression on the frozen features of a small, class-balanced part of the training images (Chen
et al. 2020, section 6 and SimCLRv2, whose parts have 1 % and 10 % of the labels)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simclr.eval.logreg import linear_probe
from simclr.eval.protocol import FrozenFeatures, Outcome
from simclr.seeding import epoch_order

_ALONE = 10.0  # lambda where a label of each class leaves nothing to choose it by; as of the online probe


def labelled_part(labels: Tensor, per_class: int, *, seed: int, draw: int) -> Tensor:
    """A class-balanced choice of images, a function of the arguments alone; more per class contain fewer.

    Args:
        labels: (N,) integer >= 0.
        per_class: images of each class; all of a class that has no more.
        seed, draw: of the choice.
    Returns:
        (n,) int64, rising.
    """
    order = epoch_order(seed, draw, len(labels))
    parts = [order[labels[order] == label][:per_class] for label in labels.unique().tolist()]
    return torch.cat(parts).sort().values


def labels_per_class(labels: Tensor, fraction: float) -> int:
    """How many labels of each class come to a fraction of them all; one at least.

    Args:
        labels: (N,) integer.
        fraction: in (0, 1].
    """
    return max(1, round(fraction * len(labels) / len(labels.unique())))


def semi(
    frozen: FrozenFeatures, *, fractions: Sequence[float] = (0.01, 0.1), draws: int = 3, seed: int = 0
) -> dict[str, Outcome]:
    """The protocol: logistic regression with some of the labels, the same number of each class, drawn several times.

    Args:
        frozen: the encoder and its features.
        fractions: of the training labels, each in (0, 1]; one label of each class at least.
        draws: choices of labels for each fraction, a result each.
        seed: of the choices.
    """
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions) or draws < 1:
        raise ValueError(f"fractions={list(fractions)}, draws={draws}: needed fractions in (0, 1] and 1 draw or more.")
    labels = frozen.train[1]
    return {
        f"labels={100 * fraction:g}%/draw={draw}": _with_few(
            frozen, labels_per_class(labels, fraction), seed=seed, draw=draw
        )
        for fraction in sorted(set(fractions))
        for draw in range(draws)
    }


def label_efficiency(
    frozen: FrozenFeatures, *, per_class: Sequence[int] = (1, 2, 5, 10, 20, 50, 100), draws: int = 3, seed: int = 0
) -> dict[str, Outcome]:
    """The protocol: accuracy over labels per class, logistic regression on each part; a part contains the smaller ones.

    Args:
        frozen: the encoder and its features.
        per_class: labels of each class; numbers beyond what the smallest class has are left out, but one.
        draws: choices of labels for each number, a result each.
        seed: of the choices.
    """
    if not per_class or min(per_class) < 1 or draws < 1:
        raise ValueError(f"per_class={list(per_class)}, draws={draws}: needed 1 label or more, and 1 draw or more.")
    sizes = frozen.train[1].bincount()
    smallest = int(sizes[sizes > 0].min())
    numbers = sorted(set(per_class))
    return {
        f"labels_per_class={number}/draw={draw}": _with_few(frozen, number, seed=seed, draw=draw)
        for number in [number for number in numbers if number <= smallest] or numbers[:1]
        for draw in range(draws)
    }


def _with_few(frozen: FrozenFeatures, per_class: int, *, seed: int, draw: int) -> Outcome:
    features, labels = frozen.train
    part = labelled_part(labels, per_class, seed=seed, draw=draw)
    settings: dict[str, Any] = {} if int(labels[part].bincount().max()) > 1 else {"regularization": _ALONE}
    probe = linear_probe(features[part], labels[part], *frozen.test, device=frozen.device, **settings)
    about = {"labels": len(part), "labels_per_class": per_class, "regularization": probe.regularization}
    return Outcome(probe.predictions, probe.top5, about, settings={"seed": seed}, labelled=part)
