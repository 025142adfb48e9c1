"""What a protocol of evaluation is: a function from frozen features to a guess for each test image.

A protocol is chosen by its name in `PROTOCOLS` or by the path of its function; the keyword arguments of its signature
are its settings. One file each: knn.py is the shortest.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simclr.checks import find_named

PROTOCOLS = {"knn": "simclr.eval.knn.knn", "logreg": "simclr.eval.logreg.logreg", "linear": "simclr.eval.linear.linear"}
# Those of `simclr eval`, which may come to several results each.
OF_EVAL = {
    **PROTOCOLS,
    "knn": "simclr.eval.knn.knn_of_several",
    "heads": "simclr.eval.heads.heads",
    "semi": "simclr.eval.few_labels.semi",
    "label_efficiency": "simclr.eval.few_labels.label_efficiency",
    "finetune": "simclr.eval.finetune.finetune",
    "semi_finetune": "simclr.eval.finetune.semi_finetune",
    "distill": "simclr.eval.distill.distill",
}

# How often what a protocol computes has changed for the same settings, from 1: part of a number's hash.
REVISIONS = {"semi_finetune": 2, "distill": 2}


class TrainSet(Protocol):
    """What a protocol that looks at images needs of a data set: length, labels, and images by their numbers."""

    @property
    def labels(self) -> Tensor:
        """(N,) integer."""

    def __len__(self) -> int: ...

    def images(self, index: Tensor) -> Tensor:
        """(n,) int64 -> (n, C, S, S)."""


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """What a protocol may look at; not at the test labels, beyond checking that training has their classes.

    Attributes:
        encoder: in eval mode while it is measured; a protocol that changes it is found out.
        train, test: features (N, F) float32 and labels (N,) int64, of all images, without augmentation.
        train_images: the images behind `train`, in the same order.
        device: where to compute.
        test_images: batches of (images, labels) behind `test`, for a protocol that trains a copy of the encoder.
        head: the projection head behind the encoder, for one that trains from its layers; None where there is none.
    """

    encoder: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    train_images: TrainSet
    device: torch.device | str = "cpu"
    test_images: Iterable[Any] | None = None
    head: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a protocol came to.

    Attributes:
        predictions: (M,) int64 on the CPU, the class given to each test image.
        top5: fraction of the test images whose class is among five guesses; None where a protocol makes one.
        about: for the record, in plain types: the settings as they were resolved, and what else is to be known.
        settings: of this one result, where the protocol comes to several and what they differ in is in their names.
        labelled: where only some labels were used, the places of those training images, (n,) int64.
    """

    predictions: Tensor
    top5: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    labelled: Tensor | None = None


# Of a protocol that comes to several results, what each is of: "k=20", "labels=1%/draw=0".
Outcomes = Mapping[str, Outcome]


def find_protocol(name: str, known: Mapping[str, str] = PROTOCOLS) -> Callable[..., Any]:
    """The function of a protocol by its name, or by its path: `package.module.function`.

    Args:
        name: as given.
        known: the paths by name.
    Raises:
        ValueError: if there is none.
    """
    return find_named("protocol", name, known, "a function")


def settings_in(protocol: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The settings in the signature of a protocol."""
    return {name: p for name, p in inspect.signature(protocol).parameters.items() if p.kind is p.KEYWORD_ONLY}


def settings_of(name: str, given: Mapping[str, Any], known: Mapping[str, str] = PROTOCOLS) -> dict[str, Any]:
    """The settings of a protocol, those not given by its defaults.

    Args:
        name, known: as for `find_protocol`.
        given: settings by name.
    Raises:
        ValueError: for a setting that the protocol does not have.
    """
    defaults = {setting: p.default for setting, p in settings_in(find_protocol(name, known)).items()}
    if unknown := [setting for setting in given if setting not in defaults]:
        raise ValueError(f"{', '.join(unknown)}: no setting of {name}, which has {', '.join(defaults) or 'none'}.")
    return {**defaults, **given}
