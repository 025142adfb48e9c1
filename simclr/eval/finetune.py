"""Fine-tuning: all weights of the encoder trained on with labels, from its representation h (Chen et al. 2020, appendix
B.5 and B.8) or from a middle layer of the projection head (SimCLRv2, Chen et al. 2020b)."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr.eval.classifier import score_classifier
from simclr.eval.features import check_split, extract_features
from simclr.eval.few_labels import labelled_part, labels_per_class
from simclr.eval.linear import TRAINING_VIEW, crop_and_flip
from simclr.eval.protocol import FrozenFeatures, Outcome
from simclr.eval.training import WithHead, head_layers, train_epochs
from simclr.optim import LARS
from simclr.seeding import epoch_order

_FEW = 0.05  # of the labels: below it the longer training of SimCLRv2's 1 %
# Of SimCLRv2's 1 % of ImageNet: 12 811 images in batches of 1 024, 60 epochs. Of LARS a weight moves by a thousandth of
# its length times the rate in a step: over the few steps that 60 epochs of a small set have, hardly at all.
_STEPS = 750


@dataclass(frozen=True, eq=False)
class Tuned:
    """A network that was fine-tuned.

    Attributes:
        body: images -> features.
        classifier: of them.
        about: for the record.
    """

    body: WithHead
    classifier: nn.Linear
    about: dict[str, Any]

    def logits(self, views: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, C)."""
        return self.classifier(self.body(views))

    def score(self, frozen: FrozenFeatures) -> Outcome:
        """What it says of the test images."""
        return score(self.body, self.classifier, frozen, self.about)


def finetune(
    frozen: FrozenFeatures,
    *,
    epochs: int = 30,
    batch_size: int = 256,
    base_lr: float = 0.05,
    weight_decay: float = 0.0,
    from_layer: int = 0,
    seed: int = 0,
) -> Outcome:
    """The protocol: a linear classifier and every weight of a copy of the encoder, by SGD on crops and flips.

    Nesterov momentum .9, cosine to zero, no warm-up, the last epoch's network scored. Beside it the random encoder says
    what the same training reaches from scratch. The encoder itself stays as it is.

    Args:
        frozen: the encoder and its features.
        epochs: over the training images.
        batch_size: images a step.
        base_lr: per 256 images.
        weight_decay: L2 on all weights but biases and those of normalisation.
        from_layer: how many layers of the projection head are kept under the classifier: 0 for h, 1 as in SimCLRv2.
        seed: of the order of the images and their crops.
    Raises:
        ValueError: if a setting is out of range or there are no test images to pass through the trained network.
        RuntimeError: if training diverges.
    """
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "base_lr": base_lr}
    settings["weight_decay"] = weight_decay
    part = torch.arange(len(frozen.train[1]))
    return tune(frozen, part, **settings, from_layer=from_layer, seed=seed).score(frozen)


def semi_finetune(
    frozen: FrozenFeatures,
    *,
    fractions: Sequence[float] = (0.01, 0.1),
    per_class: Sequence[int] = (),
    draws: int = 3,
    epochs: int | None = None,
    batch_size: int = 256,
    base_lr: float = 0.005,
    from_layer: int = 0,
    seed: int = 0,
) -> dict[str, Outcome]:
    """The protocol: fine-tuning on the labels that `semi` has, drawn several times, as SimCLRv2 does it.

    LARS without decay, and without its trust ratio for the classifier. The rate: base_lr x sqrt(images a step), cosine
    to zero, no warm-up.

    Args:
        frozen: the encoder and its features.
        fractions: of the training labels, each in (0, 1]; one label of each class at least.
        per_class: labels of each class, in place of fractions: the curve of `label_efficiency`, fine-tuned.
        draws: choices of labels for each fraction or number, a result each.
        epochs: over the labelled images. If not given: 60 below 5 % of the labels, else 30, and as many as have 750
            steps, about those of SimCLRv2's 1 % of ImageNet.
        batch_size: images a step; all where they are fewer.
        base_lr: per image.
        from_layer: how many layers of the projection head are kept under the classifier: 0 for h, 1 as in SimCLRv2.
        seed: of the choices, the order of the images and their crops.
    """
    if not (fractions or per_class) or not all(0 < fraction <= 1 for fraction in fractions) or draws < 1:
        raise ValueError(f"fractions={list(fractions)}, draws={draws}: needed fractions in (0, 1] and 1 draw or more.")
    if per_class and min(per_class) < 1:
        raise ValueError(f"per_class={list(per_class)}: needed 1 label or more.")
    labels = frozen.train[1]
    classes = len(labels.unique())
    wanted = {f"labels_per_class={number}": number for number in sorted(set(per_class))}
    if not wanted:
        wanted = {f"labels={100 * f:g}%": labels_per_class(labels, f) for f in sorted(set(fractions))}
    found = {}
    for name, number in wanted.items():
        given = epochs if epochs is not None else usual_epochs(number * classes, len(labels), batch_size)
        options: dict[str, Any] = {"epochs": given}
        options |= {"batch_size": batch_size, "base_lr": base_lr, "from_layer": from_layer, "seed": seed}
        for draw in range(draws):
            part = labelled_part(labels, number, seed=seed, draw=draw)
            tuned = tune(frozen, part, **options, optimizer="lars")
            tuned.about.update(labels=len(part), labels_per_class=number)
            outcome = tuned.score(frozen)
            found[f"{name}/draw={draw}"] = Outcome(
                outcome.predictions, outcome.top5, outcome.about, settings=options, labelled=part
            )
    return found


def usual_epochs(labelled: int, images: int, batch_size: int) -> int:
    """Those of `semi_finetune` with so many labelled images of all of them, where none are given."""
    return max(60 if labelled < _FEW * images else 30, math.ceil(_STEPS / math.ceil(labelled / batch_size)))


def tune(
    frozen: FrozenFeatures,
    part: Tensor,
    *,
    epochs: int,
    batch_size: int,
    base_lr: float,
    weight_decay: float = 0.0,
    from_layer: int = 0,
    optimizer: Literal["sgd", "lars"] = "sgd",
    seed: int = 0,
) -> Tuned:
    """Train a classifier and every weight of a copy of the encoder on some of the training images.

    Args:
        frozen: the encoder and its features.
        part: (n,) int64, places of the labelled images.
        epochs, batch_size, base_lr, weight_decay, from_layer, seed: see `finetune`.
        optimizer: sgd, whose rate is per 256 images; lars, whose is per image and grows with the root of the batch.
    Raises:
        ValueError: if a setting is out of range or there are no test images to pass through the trained network.
        RuntimeError: if training diverges.
    """
    if min(epochs, batch_size) < 1 or not base_lr > 0 or not weight_decay >= 0 or from_layer < 0:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, base_lr={base_lr}, weight_decay={weight_decay}, from_layer="
            f"{from_layer}: needed counts >= 1, base_lr > 0, a decay >= 0 and a layer >= 0."
        )
    if frozen.test_images is None:
        raise ValueError("fine-tuning passes the test images through a network of its own, and there are none.")
    num_classes, labels = check_split(*frozen.train, *frozen.test), frozen.train[1]
    device = torch.device(frozen.device)
    layers = head_layers(frozen.head, from_layer)
    body = WithHead(copy.deepcopy(frozen.encoder), copy.deepcopy(layers), frozen.train[0].shape[1])
    body.to(device).requires_grad_()
    classifier = zero_classifier(body.feature_dim, num_classes).to(device)
    size = min(batch_size, len(part))
    lr = base_lr * (batch_size / 256 if optimizer == "sgd" else math.sqrt(size))
    steps_by = descent(body, classifier, lr, weight_decay, optimizer)
    order = Crops(frozen, body, part, batch_size, seed)
    steps = epochs * order.per_epoch

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, view in order(epoch):
            yield view, labels[index].to(device)

    with torch.random.fork_rng():  # dropout, where an encoder has it
        torch.manual_seed(seed)
        training = train_epochs(
            nn.Sequential(body, classifier),
            steps_by,
            batches,
            lambda step: lr * (1 + math.cos(math.pi * step / steps)) / 2,
            steps=steps,
            per_epoch=order.per_epoch,
            of="fine-tuning",
            hint=f"lower base_lr={base_lr}",
        )
        for _ in training:
            pass
    kept = {"from_layer": len(body.layers)} if from_layer else {}
    return Tuned(body, classifier, {"steps": steps, **kept})


def zero_classifier(feature_dim: int, num_classes: int) -> nn.Linear:
    """A linear classifier that says nothing yet: F features, C classes."""
    classifier = nn.Linear(feature_dim, num_classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


def descent(
    body: nn.Module, classifier: nn.Linear, lr: float, weight_decay: float, optimizer: Literal["sgd", "lars"]
) -> torch.optim.Optimizer:
    """The optimiser of a network and its classifier; biases and normalisation do not decay.

    LARS has its trust ratio for the weights of the network only, as in google-research/simclr: a classifier that begins
    at zero would hardly leave it by steps of a thousandth of its length.
    """
    weights, rest = [p for p in body.parameters() if p.ndim > 1], [p for p in body.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "trust": True},
        {"params": [classifier.weight], "weight_decay": weight_decay, "trust": False},
        {"params": [*rest, classifier.bias], "weight_decay": 0.0, "trust": False},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "lars":
        return LARS(groups, lr=lr, momentum=0.9)
    for group in groups:
        group.pop("trust")
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


class Crops:
    """Some training images in a new order each epoch, cropped and flipped anew: a function of (seed, epoch, image).

    Args:
        frozen: with the images.
        body: whose preprocessing they are given.
        part: (n,) int64, their places.
        batch_size: images a step.
        seed: of the order and the crops.
    Attributes:
        per_epoch: steps.
    """

    def __init__(self, frozen: FrozenFeatures, body: nn.Module, part: Tensor, batch_size: int, seed: int):
        self.frozen, self.part, self.seed = frozen, part, seed
        self.device = torch.device(frozen.device)
        self.augmentation = crop_and_flip(body).to(self.device)
        # BatchNorm takes no single image.
        self.full = [places for places in torch.arange(len(part)).split(batch_size) if len(places) > 1]
        if not self.full:
            raise ValueError(f"{len(part)} labelled image and batches of {batch_size}: needed two images or more.")
        self.per_epoch = len(self.full)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of an epoch: places (n,) and views (n, 3, S, S) on the device, a step at a time."""
        order = self.part[epoch_order(self.seed, epoch, len(self.part))]
        for places in self.full:
            index = order[places]
            images = self.frozen.train_images.images(index).to(self.device, non_blocking=True)
            yield index, self.augmentation.view(images, index, epoch, self.seed, TRAINING_VIEW)


def score(body: nn.Module, classifier: nn.Linear, frozen: FrozenFeatures, about: dict[str, Any]) -> Outcome:
    """What a network says of the test images, which pass through it once."""
    assert frozen.test_images is not None  # or it would have been refused
    features, labels = extract_features(body, frozen.test_images, device=frozen.device)
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    probe = score_classifier(weight, bias, features, labels, method="sgd", iterations=about.get("steps", 0))
    return Outcome(probe.predictions, probe.top5, about)
