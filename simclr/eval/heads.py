"""Many linear heads at once: a whole sweep of learning rates in one pass over the features (Oquab et al. 2023, DINOv2,
appendix B.3 and its `eval/linear.py`, whose thirteen learning rates these are)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simclr.data.splits import stratified_split
from simclr.eval.classifier import score_classifier
from simclr.eval.features import check_split
from simclr.eval.logreg import standardisation
from simclr.eval.protocol import FrozenFeatures, Outcome
from simclr.seeding import epoch_order

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_VALIDATION_FRACTION, _VALIDATION_LIMIT = 0.1, 10_000  # 10 000 images tell accuracies apart to .004


def train_heads(
    features: Tensor,
    labels: Tensor,
    lrs: Sequence[float],
    *,
    num_classes: int,
    epochs: int = 10,
    batch_size: int = 1024,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """H linear classifiers, one for each learning rate, on the same batches, zero at the start; after the last step.

    Their logits are one product, and so are their gradients. What each head learns is what it would learn alone by
    Nesterov SGD with a cosine to zero.

    Args:
        features, labels: (N, F) float32 and (N,) integer, on the device to compute on.
        lrs: H learning rates per 256 images: each acts as lr * batch_size / 256.
        num_classes: C.
        epochs, batch_size: the last, incomplete batch of an epoch is used.
        momentum, weight_decay: of SGD; biases are not decayed.
        seed: of the order in which the images are visited.
    Returns:
        weight (H, C, F) and bias (H, C). A head that diverged holds numbers that are not finite.
    """
    heads, size, width = len(lrs), len(features), features.shape[1]
    kwargs: dict[str, Any] = {"dtype": features.dtype, "device": features.device}
    lr = torch.tensor(lrs, **kwargs).mul_(batch_size / 256).repeat_interleave(num_classes)[:, None]  # (H C, 1)
    # Biases are apart: as a column of ones beside the features they would cost these their alignment.
    weight, bias = (_Weights(torch.zeros(heads * num_classes, n, **kwargs), lr, momentum) for n in (width, 1))
    steps, step = epochs * -(-size // batch_size), 0
    for epoch in range(epochs):
        for index in epoch_order(seed, epoch, size).to(features.device).split(batch_size):
            x, y = features.index_select(0, index), labels.index_select(0, index)
            logits = torch.addmm(bias.value, weight.value, x.T)  # (H C, n)
            # Over classes while images lie side by side, which a CPU can take sixteen at a time: classes are few.
            p = logits.view(heads, num_classes, len(x)).softmax(1)
            p.scatter_add_(1, y.expand(heads, 1, -1), p.new_full((1,), -1.0).expand(heads, 1, len(x)))
            p = p.view(-1, len(x))
            torch.addmm(weight.gradient, p, x, beta=0, alpha=1 / len(x), out=weight.gradient)
            if weight_decay:
                weight.gradient.add_(weight.value, alpha=weight_decay)
            torch.mean(p, 1, keepdim=True, out=bias.gradient)
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            weight.step(cosine)
            bias.step(cosine)
            step += 1
    return weight.value.view(heads, num_classes, width), bias.value.view(heads, num_classes)


class _Weights:
    """Weights of all heads with what Nesterov's SGD keeps of them; a rate for each row.

    Args:
        value: (H C, n), the weights at the start.
        lr: (H C, 1).
        momentum: of all.
    """

    def __init__(self, value: Tensor, lr: Tensor, momentum: float):
        self.value, self.lr, self.momentum = value, lr, momentum
        self.gradient, self.speed = torch.zeros_like(value), torch.zeros_like(value)

    def step(self, factor: float) -> None:
        """One step along the gradient, which is written over; rates are multiplied by the factor."""
        self.speed.mul_(self.momentum).add_(self.gradient)
        self.value.addcmul_(self.lr, self.gradient.add_(self.speed, alpha=self.momentum), value=-factor)


def heads(
    frozen: FrozenFeatures,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 10,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """The protocol: a linear head for each learning rate, in one pass; the best on a tenth of the training images.

    That tenth (10 000 images at most, classes in proportion) is kept from all heads; the test images see the chosen
    head only. Features are standardised by the training images', so that one grid serves all encoders: DINOv2's come
    out of a normalisation layer.

    Args:
        frozen: the encoder and its features.
        lrs: learning rates to choose from, per 256 images.
        epochs: over the training images.
        batch_size: images a step.
        weight_decay: L2 on the heads' weights.
        seed: of the split and the order of the images.
    Raises:
        ValueError: if a setting is out of range, features and labels do not belong together, or nothing can be held
            back.
        RuntimeError: if every head diverges.
    """
    lrs = sorted(float(lr) for lr in lrs)
    if not lrs or not all(0 < lr < math.inf for lr in lrs) or min(epochs, batch_size) < 1 or not weight_decay >= 0:
        raise ValueError(
            f"lrs={lrs}, epochs={epochs}, batch_size={batch_size}, weight_decay={weight_decay}: needed learning rates "
            "> 0, counts >= 1 and a decay >= 0."
        )
    num_classes = check_split(*frozen.train, *frozen.test)
    features, labels = (part.to(frozen.device) for part in frozen.train)
    fraction = min(_VALIDATION_FRACTION, _VALIDATION_LIMIT / len(labels))
    kept, held = stratified_split(labels, fraction, seed=seed)
    if len(held) == 0:
        raise ValueError("every class has a single training image, none can be held back to choose a learning rate.")
    mean, scale = standardisation(features)
    features = (features - mean) * scale
    weight, bias = train_heads(
        features[kept],
        labels[kept],
        lrs,
        num_classes=num_classes,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
    )
    finite = (weight.isfinite().all(2) & bias.isfinite()).all(1)  # (H,)
    if not finite.any():
        raise RuntimeError(f"every linear head diverged: lower heads.lrs, of which the least was {lrs[0]:g}.")
    right = sum(
        torch.addmm(bias.view(-1, 1), weight.flatten(0, 1), features[i].T)
        .view(len(lrs), num_classes, -1)
        .argmax(1)
        .eq(labels[i])
        .sum(1)
        for i in held.split(1024)
    )
    scores = torch.where(finite, torch.as_tensor(right), -1).tolist()
    best = scores.index(max(scores))  # of equally good ones the least
    factor = weight[best].double() * scale.double()
    probe = score_classifier(
        factor,
        bias[best].double() - factor @ mean.double(),
        *frozen.test,
        method="sgd",
        iterations=epochs * -(-len(kept) // batch_size),
    )
    ends = {0: "least", len(lrs) - 1: "greatest"} if len(lrs) > 1 else {}
    about = {
        "lr": lrs[best],
        "lr_end": ends.get(best),
        "validation_top1": {f"{lr:g}": score / len(held) for lr, score in zip(lrs, scores, strict=True) if score >= 0},
        "validation_images": len(held),
    }
    return Outcome(probe.predictions, probe.top5, about)
