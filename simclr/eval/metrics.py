"""Accuracies and what they are worth: top-k, Wilson's interval, the confusion matrix."""

import math

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of samples whose label is among the k best scored classes.

    A class beats an equally scored one when its number is lower, so that constant scores do not count as correct:
    torchmetrics' `multiclass_accuracy` takes of equal scores whichever `topk` puts first.

    Args:
        logits: (N, C) scores, any scale.
        labels: (N,) integer, in 0 .. C - 1.
        k: how many classes may be named; k >= C gives 1.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: if the shapes do not fit, N = 0, k < 1, a label is out of range, or a score is NaN.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(logits) == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: needed (N, C) and (N,), N > 0."
        )
    if k < 1:
        raise ValueError(f"k={k}: needed k >= 1.")
    _check_classes("labels", labels, logits.shape[1])
    if logits.isnan().any():
        raise ValueError(f"logits hold {int(logits.isnan().sum())} NaN.")
    labels = labels.to(logits.device, torch.int64)
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]  # (N, C)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return int((rank < k).sum()) / len(labels)


def wilson_interval(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a fraction (Wilson 1927; Newcombe 1998, method 3).

    It says how far the accuracy could be from that on all images of this kind; it knows nothing of the spread over
    training seeds.

    Args:
        correct: number of successes, 0 .. n.
        n: number of trials, > 0.
        z: the normal quantile; 1.96 gives 95 %.
    Returns:
        (low, high), fractions in [0, 1].
    Raises:
        ValueError: if n < 1, correct is outside 0 .. n, or z <= 0.
    """
    if n < 1 or not 0 <= correct <= n or not z > 0:
        raise ValueError(f"correct={correct}, n={n}, z={z}: needed 0 <= correct <= n, n >= 1, z > 0.")
    p = correct / n
    shrink = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / shrink
    # At 0 and n successes one end is exact; rounding would leave it 1e-17 beside 0 or 1.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """How often each class was taken for each other.

    Args:
        predictions, labels: (N,) integer class numbers.
        num_classes: C; by default one more than the largest number in either.
    Returns:
        (C, C) int64 on the CPU: row = true class, column = predicted class.
    Raises:
        ValueError: if the lengths differ, N = 0, or a number is outside 0 .. C - 1.
    """
    if predictions.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}: needed (N,) twice, N > 0."
        )
    if num_classes is None:
        num_classes = int(max(predictions.max(), labels.max())) + 1
    _check_classes("predictions", predictions, num_classes)
    _check_classes("labels", labels, num_classes)
    numbers = predictions.cpu().to(torch.int64), labels.cpu().to(torch.int64)
    return multiclass_confusion_matrix(*numbers, num_classes, validate_args=False)


def _check_classes(name: str, numbers: Tensor, num_classes: int) -> None:
    if numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"{name} are {numbers.dtype}: needed integer class numbers.")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name} reach from {low} to {high}: needed 0 to {num_classes - 1}.")


def class_recalls(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which fraction of each class is classified correctly, and how many images it has; classes without any left out.

    Args:
        predictions, labels: (M,) integer, on the CPU.
    Returns:
        (C,) float64 and (C,) int64, by rising class number.
    """
    sizes = labels.bincount()
    right = labels[predictions == labels].bincount(minlength=len(sizes))
    there = sizes > 0
    return right[there].double() / sizes[there], sizes[there]


def mean_per_class(predictions: Tensor, labels: Tensor) -> float:
    """Accuracy with every class counting the same, however many images it has: the mean of the classes' recalls.

    Args:
        predictions, labels: (M,) integer, on the CPU.
    """
    return float(class_recalls(predictions, labels)[0].mean())


def bootstrap_interval(predictions: Tensor, labels: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of `mean_per_class` under drawing the images of each class again.

    Drawing n images with replacement, of which a share r is right, gives a binomial count of right ones: so that is
    what is drawn.

    Args:
        predictions, labels: (M,) integer, on the CPU.
        draws: how many.
        seed: of them.
    """
    recalls, sizes = (part.numpy() for part in class_recalls(predictions, labels))
    drawn = np.random.default_rng(seed).binomial(sizes, recalls, (draws, len(sizes))) / sizes
    low, high = np.quantile(drawn.mean(1), (0.025, 0.975))
    return float(low), float(high)
