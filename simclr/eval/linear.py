"""The paper's linear evaluation: a linear classifier trained by SGD (Chen et al. 2020, appendix B.6 and
google-research/simclr), for numbers that stand beside published ones."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.augment import SimCLRAugmentation
from simclr.eval.classifier import ProbeResult, score_classifier
from simclr.eval.features import check_split, encode, frozen
from simclr.eval.protocol import FrozenFeatures, Outcome, TrainSet
from simclr.seeding import epoch_order

TRAINING_VIEW = 2  # pretraining draws views 0 and 1; the same crops again would be no new sample


def train_linear_sgd(
    epoch_features: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    *,
    feature_dim: int,
    num_classes: int,
    steps_per_epoch: int,
    epochs: int = 100,
    batch_size: int = 512,
    base_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The paper's linear classifier by SGD; what is returned is the last epoch's.

    google-research/simclr trains CIFAR for 100 epochs at batch 512 without decay, ImageNet for 90 at batch 4096 with
    decay 1e-6. Unlike there, the last incomplete batch of an epoch is used, so that small sets work too.

    Args:
        epoch_features: epoch -> batches of (features (n, F), labels (n,)), steps_per_epoch of them.
        feature_dim, num_classes: F and C.
        steps_per_epoch: number of batches of every epoch: the cosine needs to know its end.
        epochs, batch_size, base_lr, momentum, weight_decay: lr = base_lr * batch_size / 256 at the start, cosine to 0.
        device: where to compute.
    Returns:
        weight (C, F) and bias (C,), float32 on the device.
    Raises:
        ValueError: if a setting is out of range or an epoch has another number of batches.
        RuntimeError: if the loss becomes NaN or infinite.
    """
    if min(feature_dim, steps_per_epoch, epochs, batch_size) < 1 or num_classes < 2:
        raise ValueError(
            f"feature_dim={feature_dim}, steps_per_epoch={steps_per_epoch}, epochs={epochs}, batch_size={batch_size}, "
            f"num_classes={num_classes}: needed >= 1, and at least 2 classes."
        )
    if not (base_lr > 0 and 0 < momentum < 1 and weight_decay >= 0):
        raise ValueError(
            f"base_lr={base_lr}, momentum={momentum}, weight_decay={weight_decay}: needed base_lr > 0, "
            "0 < momentum < 1, weight_decay >= 0."
        )
    weight = torch.zeros(num_classes, feature_dim, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    lr = base_lr * batch_size / 256
    # The bias of the supervised head is not decayed (in google-research/simclr it is, by SGD; by LARS it is not).
    groups = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True)
    for epoch in range(epochs):
        steps, losses = 0, []
        for features, labels in epoch_features(epoch):
            progress = (epoch * steps_per_epoch + steps) / (epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
            with torch.enable_grad():  # callers hold a frozen encoder under no_grad
                loss = F.cross_entropy(F.linear(features.to(device).float(), weight, bias), labels.to(device))
                weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
            optimizer.step()
            losses.append(loss.detach())
            steps += 1
        if steps != steps_per_epoch:
            raise ValueError(f"epoch {epoch} gave {steps} batches, steps_per_epoch={steps_per_epoch}.")
        # Asked once an epoch: each question waits for the device.
        if not torch.stack(losses).isfinite().all():
            raise RuntimeError(f"the linear classifier diverged in epoch {epoch}: lower base_lr={base_lr}.")
    return weight.detach(), bias.detach()


def linear_probe_sgd(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    base_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    num_classes: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """The paper's classifier on features as they come, the same in every epoch; the last epoch's is scored.

    For features of augmented images see `linear_evaluation_sgd`.

    Args:
        train_features, test_features: (N, F) and (M, F) float.
        train_labels, test_labels: (N,) and (M,) integer in 0 .. C - 1; a test class that training lacks is refused.
        epochs, batch_size, base_lr, momentum, weight_decay: as for `train_linear_sgd`.
        num_classes: C; by default one more than the largest training label.
        seed: of the order in which the images are visited.
        device: where to compute; by default where train_features are.
    Raises:
        ValueError: if features, labels or a setting are out of range, with every problem of the data listed.
        RuntimeError: if SGD diverges.
    """
    num_classes = check_split(train_features, train_labels, test_features, test_labels, num_classes)
    device = torch.device(device) if device is not None else train_features.device
    features = train_features.to(device, torch.float32)
    labels = train_labels.to(device, torch.int64)
    steps = -(-len(features) // batch_size)

    def epoch_features(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        for index in epoch_order(seed, epoch, len(features)).to(device).split(batch_size):
            yield features[index], labels[index]

    weight, bias = train_linear_sgd(
        epoch_features,
        feature_dim=features.shape[1],
        num_classes=num_classes,
        steps_per_epoch=steps,
        epochs=epochs,
        batch_size=batch_size,
        base_lr=base_lr,
        momentum=momentum,
        weight_decay=weight_decay,
        device=device,
    )
    return score_classifier(weight, bias, test_features, test_labels, method="sgd", iterations=epochs * steps)


def linear_evaluation_sgd(
    encoder: nn.Module,
    train_set: TrainSet,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    base_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """The paper's linear evaluation: SGD on features of cropped and flipped training images, fresh in every epoch.

    Each epoch passes all images through the encoder: as much as `epochs` extractions; `simclr.eval.linear_probe` is the
    quick way. The order and the crops are pure functions of (seed, epoch, image index).

    Args:
        encoder: frozen, (n, C, S, S) -> (n, F), with `.image_size` and perhaps `.mean`, `.std`.
        train_set: len(), `.labels` (N,), `.images(index)` -> (n, C, S, S).
        test_features, test_labels: from `extract_features` on the test set, without augmentation.
        crop_scale: smallest and largest crop, as a fraction of the image's area.
        epochs, batch_size, base_lr, momentum, weight_decay: as for `train_linear_sgd`.
        seed: of the order and the crops.
        device: where to compute; by default where the encoder is.
    Returns:
        ProbeResult of the last epoch.
    Raises:
        ValueError: if labels and features do not belong together or a setting is out of range.
        RuntimeError: if a parameter or buffer of the encoder changed, or SGD diverged.
    """
    home = next((t.device for t in (*encoder.parameters(), *encoder.buffers())), torch.device("cpu"))
    device = torch.device(device) if device is not None else home
    labels = torch.as_tensor(train_set.labels).cpu()
    size = len(train_set)
    if len(labels) != size:
        raise ValueError(f"train_set has {size} images and {len(labels)} labels.")
    # The training features come later, batch by batch; rows of the test features stand in for their width.
    stand_in = test_features[:1].expand(size, -1)
    num_classes = check_split(stand_in, labels, test_features, test_labels)
    augmentation = crop_and_flip(encoder, crop_scale)

    def epoch_features(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        for index in epoch_order(seed, epoch, size).split(batch_size):
            images = train_set.images(index).to(device, non_blocking=True)
            view = augmentation.view(images, index, epoch, seed, TRAINING_VIEW)
            features = encode(encoder, view)
            yield features, labels[index].to(torch.int64)

    with frozen(encoder):
        try:
            encoder.to(device)
            augmentation.to(device)
            weight, bias = train_linear_sgd(
                epoch_features,
                feature_dim=test_features.shape[1],
                num_classes=num_classes,
                steps_per_epoch=-(-size // batch_size),
                epochs=epochs,
                batch_size=batch_size,
                base_lr=base_lr,
                momentum=momentum,
                weight_decay=weight_decay,
                device=device,
            )
        finally:
            encoder.to(home)
    steps = epochs * -(-size // batch_size)
    return score_classifier(weight, bias, test_features, test_labels, method="sgd", iterations=steps)


def crop_and_flip(encoder: nn.Module, crop_scale: tuple[float, float] = (0.08, 1.0)) -> SimCLRAugmentation:
    """What happens to the images of supervised training: random crops and flips, normalised for the encoder.

    Args:
        encoder: with `.image_size` and perhaps `.mean`, `.std`.
        crop_scale: smallest and largest crop, as a fraction of the image's area.
    """
    normalization = {
        name: getattr(encoder, name) for name in ("mean", "std") if getattr(encoder, name, None) is not None
    }
    if len(normalization) < 2:
        normalization = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    image_size: Any = encoder.image_size
    return SimCLRAugmentation(
        image_size,
        crop_scale=crop_scale,
        strength=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob=0.0,
        channels=len(normalization["mean"]),
        **normalization,
    )


def linear(
    frozen: FrozenFeatures,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    base_lr: float = 0.1,
    weight_decay: float = 0.0,
) -> Outcome:
    """The protocol: `linear_evaluation_sgd` on the training images, cropped and flipped.

    Args:
        frozen: the encoder and its features.
        epochs: of sgd.
        batch_size: of sgd, images a step.
        base_lr: of sgd, per 256 images.
        weight_decay: of sgd, L2 on the classifier's weights.
    """
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "base_lr": base_lr,
        "weight_decay": weight_decay,
    }
    images, test = frozen.train_images, frozen.test
    probe = linear_evaluation_sgd(frozen.encoder, images, *test, device=frozen.device, **settings)
    return Outcome(probe.predictions, probe.top5, settings)
