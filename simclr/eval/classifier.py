"""A finished linear classifier, and what it reached on the test images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from simclr.eval.metrics import top_k_accuracy, wilson_interval


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear classifier on frozen features reached on the test set.

    Attributes:
        accuracy: fraction of the test images.
        top5: likewise; None with five classes or fewer, of which five guesses name every one.
        ci95: Wilson's 95 % interval of `accuracy`: the uncertainty from the number of test images.
        n_test: number of test images.
        method: "lbfgs" or "sgd".
        regularization: lambda of sum_i cross-entropy_i + lambda / 2 |W|^2, W on standardised features (scikit-learn's
            1 / C); None for sgd.
        validation_accuracy: of each lambda tried, on the part of the training data kept back for the choice; empty
            when there was nothing to choose.
        weight, bias: (C, F) and (C,) float32 on the CPU, for features as they came (standardisation is folded in):
            logits = features @ weight.T + bias.
        predictions: (M,) int64 on the CPU, the class given to each test image.
        iterations: L-BFGS iterations of the final fit, or SGD steps.
    """

    accuracy: float
    top5: float | None
    ci95: tuple[float, float]
    n_test: int
    method: str
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)
    iterations: int
    regularization: float | None = None
    validation_accuracy: Mapping[float, float] = field(default_factory=dict)

    @property
    def regularization_end(self) -> Literal["strongest", "weakest"] | None:
        """Which end of its grid the lambda chosen is, so that a better one may lie beyond; None if it is inside."""
        # A path that ends before its grid does has fallen behind the best, so its last lambda is never the choice.
        tried = self.validation_accuracy
        if not tried:
            return None
        ends: dict[float | None, Literal["strongest", "weakest"]] = {min(tried): "weakest", max(tried): "strongest"}
        return ends.get(self.regularization)


def score_classifier(
    weight: Tensor, bias: Tensor, test_features: Tensor, test_labels: Tensor, **more: Any
) -> ProbeResult:
    """The result of a classifier that is done: the only place of the linear protocols that sees test labels.

    Args:
        weight, bias: (C, F) and (C,), for features as they come.
        test_features, test_labels: (M, F) and (M,).
        more: the other attributes of `ProbeResult`.
    """
    weight, bias = weight.float().cpu(), bias.float().cpu()
    logits = (
        torch.cat([chunk.cpu().double() @ weight.double().T for chunk in test_features.split(8192)]) + bias.double()
    )
    labels = test_labels.cpu().to(torch.int64)
    predictions = logits.argmax(1)
    return ProbeResult(
        accuracy=top_k_accuracy(logits, labels, 1),
        top5=top_k_accuracy(logits, labels, 5) if logits.shape[1] > 5 else None,
        ci95=wilson_interval(int((predictions == labels).sum()), len(labels)),
        n_test=len(labels),
        weight=weight,
        bias=bias,
        predictions=predictions,
        **more,
    )
