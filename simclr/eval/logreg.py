"""Logistic regression on frozen features by full-batch L-BFGS: what to compare encoders by.

It is convex, so its answer depends on the features alone, and it takes seconds. The regularisation is chosen on a split
of the training data.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simclr.data.splits import stratified_split
from simclr.eval.classifier import ProbeResult, score_classifier
from simclr.eval.features import check_split
from simclr.eval.protocol import FrozenFeatures, Outcome

# Half decades. Standardised features make one grid serve all encoders: from almost no regularisation to so much that
# 50 000 images barely move the weights.
REGULARIZATION_GRID = tuple(10 ** (e / 2) for e in range(10, -3, -1))
_VALIDATION_FRACTION, _VALIDATION_LIMIT = 0.2, 10_000  # 10 000 images tell accuracies apart to .004
_PAST_THE_BEST = 3  # the path ends after so many lambdas in a row that are worse by more than two standard errors
_CHUNK_NUMBERS = 2**24  # numbers a chunk of features may hold
_CACHED_NUMBERS = 2**18  # on a CPU, for each thread: what its cache holds is read from memory once for two products
_KEPT_EVALUATIONS = 3  # of L-BFGS, the last ones: where it ends is mostly one of them
_LOOSE = 1e-3  # tolerance of a fit whose accuracy counts, not its digits
_GRAM_ROWS, _GRAM_WIDTH = 4096, 8192  # images that estimate the curvature; width above which it is not estimated


class NotConverged(RuntimeError):
    """The final fit of L-BFGS ended before its gradient was small enough: there is no number."""


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    regularization: float | Sequence[float] = REGULARIZATION_GRID,
    selection_size: int = 20_000,
    max_iterations: int = 1000,
    num_classes: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Train a linear classifier on the training features and score it once on the test features.

    Multinomial logistic regression with L2 on features standardised by the training set's mean and standard deviation
    (a constant feature is left out). Lambda is chosen by accuracy on a stratified fifth of the training data
    (10 000 images at most), from strong to weak until accuracy has clearly fallen, the strongest of equally good ones;
    then the classifier is fitted to all training data. Because lambda multiplies |W|^2 beside the *sum* over images, a
    value chosen on fewer images holds for all of them.

    Args:
        train_features, test_features: (N, F) and (M, F) float.
        train_labels, test_labels: (N,) and (M,) integer in 0 .. C - 1; a test class that training lacks is refused.
        regularization: lambda > 0, or the lambdas to choose from.
        selection_size: images that each lambda is fitted to during the choice, at most.
        max_iterations: of the final fit.
        num_classes: C; by default one more than the largest training label.
        seed: of the split.
        device: where to compute; by default where train_features are.
    Returns:
        ProbeResult.
    Raises:
        ValueError: if features, labels or a setting are out of range, with every problem of the data listed.
        NotConverged: if the final fit does not converge.
    """
    num_classes = check_split(train_features, train_labels, test_features, test_labels, num_classes)
    device = torch.device(device) if device is not None else train_features.device
    features = train_features.to(device, torch.float32)
    labels = train_labels.to(device, torch.int64)
    grid = sorted({float(v) for v in _listed(regularization)}, reverse=True)
    if not grid or not all(0 < v < math.inf for v in grid) or selection_size < 1 or max_iterations < 1:
        raise ValueError(
            f"regularization={regularization}, selection_size={selection_size}, max_iterations={max_iterations}: "
            "needed lambdas > 0 and sizes >= 1."
        )
    mean, scale = standardisation(features)
    features = (features - mean) * scale
    scores: dict[float, float] = {}
    starts: dict[float, tuple[Tensor, Tensor]] | None = None
    if len(grid) > 1:
        scores, starts = _validation_accuracies(features, labels, num_classes, grid, selection_size, seed)
    # Equal scores go to the strongest regularisation, which comes first.
    chosen = max(grid, key=lambda v: scores.get(v, 0.0))
    fit = _fit(features, labels, num_classes, chosen, starts.get(chosen) if starts else None, max_iterations)
    if not fit.converged:  # float32 products can be too coarse for the last steps
        start = fit.weight, fit.bias
        fit = _fit(features, labels, num_classes, chosen, start, max_iterations, product_dtype=torch.float64)
    if not fit.converged:
        raise NotConverged(
            f"L-BFGS did not converge in {fit.iterations} iterations at regularization={chosen:.4g} (gradient "
            f"{fit.gradient:.2g}): raise max_iterations={max_iterations}, or regularize more."
        )
    weight = fit.weight * scale.double()
    bias = fit.bias - weight @ mean.double()
    return score_classifier(
        weight,
        bias,
        test_features,
        test_labels,
        method="lbfgs",
        iterations=fit.iterations,
        regularization=chosen,
        validation_accuracy=scores,
    )


def logreg(frozen: FrozenFeatures, *, max_iterations: int = 1000) -> Outcome:
    """The protocol: `linear_probe` on the frozen features, regularisation chosen on a split of the training data.

    Args:
        frozen: the encoder and its features.
        max_iterations: of the final fit.
    """
    probe = linear_probe(*frozen.train, *frozen.test, max_iterations=max_iterations, device=frozen.device)
    about = {"regularization": probe.regularization, "regularization_end": probe.regularization_end}
    return Outcome(probe.predictions, probe.top5, about)


def predict_by_logreg(
    features: Tensor, labels: Tensor, queries: Tensor, *, regularization: float, max_iterations: int = 100
) -> Tensor:
    """The classes that a logistic regression fitted to some features gives to others: one fit, nothing chosen.

    For accuracies to watch, not to report: features are standardised and lambda acts as in `linear_probe`, but the fit
    ends at a gradient ten times as large, or after `max_iterations`.

    Args:
        features, labels: (N, F) float and (N,) integer in 0 .. C - 1, C >= 2.
        queries: (M, F) float.
        regularization: lambda > 0.
        max_iterations: of L-BFGS.
    Returns:
        (M,) int64, on the features' device.
    """
    mean, scale = standardisation(features)
    fit = _fit(
        (features - mean) * scale,
        labels,
        int(labels.max()) + 1,
        regularization,
        max_iterations=max_iterations,
        tolerance=_LOOSE,
    )
    return (((queries - mean) * scale) @ fit.weight.float().T + fit.bias.float()).argmax(1)


@dataclass
class _Fit:
    weight: Tensor  # (C, F) float64, on standardised features
    bias: Tensor  # (C,)
    iterations: int
    gradient: float  # norm in preconditioned coordinates: half its square estimates the loss still to gain
    converged: bool


class _Problem:
    """The objective as L-BFGS sees it: `v` and `b`, its value and gradient by them, `closure`.

    Features of a network are strongly correlated, so the plain problem is ill-conditioned and takes hundreds of
    iterations. It is solved in coordinates V with W = V L^-1, where L L' is the Hessian to expect: h * Gram +
    lambda / N, h the mean variance p (1 - p) of the predicted probabilities at the start.

    Args:
        evaluate: (W, bias) -> mean cross-entropy and its gradient.
        decay: lambda / N.
        gram: (F, F) float64.
        start: W and bias, (C, F) and (C,) float64.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor, Tensor], "_Evaluation"],
        decay: float,
        gram: Tensor,
        start: tuple[Tensor, Tensor],
    ):
        self._evaluate, self._decay = evaluate, decay
        self._first: _Evaluation | None = evaluate(*start)
        # A perfect start has no variance, and the problem is not flat everywhere.
        variance = max(self._first.variance(), 1e-3 / len(start[0]))
        factor = variance * gram
        factor.diagonal().add_(decay)
        factor = torch.linalg.cholesky(factor)  # (F, F)
        # The explicit inverse is fine here: any linear map would be, as long as the gradient takes its transpose.
        self._inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        self._shift = variance**0.5
        self.v = (start[0] @ factor).requires_grad_()
        self.b = (start[1] * self._shift).requires_grad_()
        # Of places that were looked at last: v and b, the gradient by them, the value.
        self._known: deque[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=_KEPT_EVALUATIONS)

    def closure(self) -> Tensor:
        """The value where v and b stand; leaves the gradient in them. A place that is known costs nothing."""
        here = (place for place in self._known if torch.equal(place[0], self.v) and torch.equal(place[1], self.b))
        if (place := next(here, None)) is None:
            weight, bias = self.solution()
            found, self._first = self._first or self._evaluate(weight, bias), None
            grad_v, grad_b = (found.weight + self._decay * weight) @ self._inverse.T, found.bias / self._shift
            value = found.loss + self._decay / 2 * weight.square().sum()
            place = self.v.detach().clone(), self.b.detach().clone(), grad_v, grad_b, value
            self._known.append(place)
        *_, self.v.grad, self.b.grad, value = place
        return value

    def gradient(self) -> float:
        """The norm of the gradient where v and b stand: half its square estimates the loss still to gain."""
        self.closure()
        assert self.v.grad is not None
        assert self.b.grad is not None
        return float((self.v.grad.square().sum() + self.b.grad.square().sum()).sqrt())

    def solution(self) -> tuple[Tensor, Tensor]:
        """W and bias."""
        return self.v.detach() @ self._inverse, self.b.detach() / self._shift


def _fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    regularization: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    gram: Tensor | None = None,
    product_dtype: torch.dtype = torch.float32,
) -> _Fit:
    """Minimise mean cross-entropy + regularization / (2 N) |W|^2 by L-BFGS from `start` or zero."""
    size, width = features.shape
    if start is None:
        kwargs: dict[str, Any] = {"dtype": torch.float64, "device": features.device}
        start = torch.zeros(num_classes, width, **kwargs), torch.zeros(num_classes, **kwargs)
    problem = _Problem(
        lambda weight, bias: _loss_and_gradient(features, labels, weight, bias, product_dtype),
        regularization / size,
        _gram(features) if gram is None else gram,
        start,
    )
    # An iteration at a time: torch compares the largest entry of the gradient, up to sqrt(C F) times smaller than the
    # norm that counts, and would go on to where the noise of float32 products is all that its line search sees.
    optimizer = torch.optim.LBFGS(
        [problem.v, problem.b],
        max_iter=1,
        max_eval=26,  # of its line search, and one that is known
        tolerance_grad=0,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    iterations, norm = 0, problem.gradient()
    while norm > tolerance and iterations < max_iterations:
        before = problem.v.detach().clone(), problem.b.detach().clone()
        optimizer.step(problem.closure)
        iterations, norm = iterations + 1, problem.gradient()
        if torch.equal(before[0], problem.v) and torch.equal(before[1], problem.b):
            break  # no step downhill is left at this precision
    return _Fit(*problem.solution(), iterations, norm, norm <= tolerance)


@dataclass
class _Evaluation:
    loss: Tensor  # mean cross-entropy, float64
    weight: Tensor  # its gradient, (C, F)
    bias: Tensor  # (C,)
    squares: Tensor  # sum of p^2 over images and classes
    images: int

    def variance(self) -> float:
        """The mean of p (1 - p) over images and classes."""
        return float(self.images - self.squares) / (self.images * len(self.bias))


def _loss_and_gradient(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, product_dtype: torch.dtype
) -> _Evaluation:
    """Mean cross-entropy and its gradient by weight and bias.

    Products within a chunk are taken in product_dtype, everything summed over many images in float64: float32 sums
    alone leave a gradient too noisy to converge on.
    """
    loss, squares = weight.new_zeros(()), weight.new_zeros(())
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    factor, offset, size = weight.to(product_dtype), bias[:, None], len(features)
    for x, y in zip(*(part.split(_chunk(features, len(weight))) for part in (features, labels)), strict=True):
        x, y = x.to(product_dtype), y[None]
        # Images lie side by side, which a CPU can take eight at a time: classes are few.
        log_p = (factor @ x.T).double().add_(offset).log_softmax(0)  # (C, n)
        loss -= log_p.gather(0, y).sum()
        p = log_p.exp_()
        squares += torch.dot(p.view(-1), p.view(-1))
        residual = p.scatter_add_(0, y, p.new_full((1, 1), -1.0).expand_as(y))
        grad_weight += (residual.to(x.dtype) @ x).double()
        grad_bias += residual.sum(1)
    return _Evaluation(loss / size, grad_weight / size, grad_bias / size, squares, size)


def _chunk(features: Tensor, num_classes: int) -> int:
    """Images whose logits are taken at a time."""
    numbers = _CACHED_NUMBERS * torch.get_num_threads() if features.device.type == "cpu" else _CHUNK_NUMBERS
    return max(256, min(8192, numbers // max(features.shape[1], num_classes)))


def _gram(features: Tensor) -> Tensor:
    """Mean of x x' over evenly spread images, enough of them for the preconditioner; the identity when too wide."""
    size, width = features.shape
    if width > _GRAM_WIDTH:
        return torch.eye(width, dtype=torch.float64, device=features.device)
    sample = features[:: max(1, size // max(_GRAM_ROWS, 2 * width))]
    return (sample.T @ sample).double() / len(sample)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each feature, (F,) float32 each; 0 for a feature that does not vary."""
    mean = sum(chunk.double().sum(0) for chunk in features.split(8192)) / len(features)
    variance = sum((chunk.double() - mean).square().sum(0) for chunk in features.split(8192)) / len(features)
    std = variance.sqrt()
    # What float32 cannot tell from rounding is no variation.
    constant = std <= 1e-6 * mean.abs()
    scale = torch.where(constant, torch.zeros_like(std), 1 / torch.where(constant, torch.ones_like(std), std))
    return mean.float(), scale.float()


def _validation_accuracies(
    features: Tensor, labels: Tensor, num_classes: int, grid: Sequence[float], selection_size: int, seed: int
) -> tuple[dict[float, float], dict[float, tuple[Tensor, Tensor]]]:
    """Accuracy on the held-back part for the lambdas tried, strongest first, and the classifiers that reached it."""
    fraction = min(_VALIDATION_FRACTION, _VALIDATION_LIMIT / len(labels))
    fit_index, validation_index = stratified_split(labels, fraction, seed=seed, limit=selection_size)
    if len(validation_index) == 0:
        raise ValueError(
            "every class has a single training image, none can be held back to choose regularization: pass one value."
        )
    x, y = features[fit_index], labels[fit_index]
    gram = _gram(x)
    scores: dict[float, float] = {}
    classifiers: dict[float, tuple[Tensor, Tensor]] = {}
    for value in grid:
        # The choice needs accuracies, not digits, so the tolerance is loose and a slow end of the path is no error.
        start = _further(classifiers, value)
        fit = _fit(x, y, num_classes, value, start, max_iterations=100, tolerance=_LOOSE, gram=gram)
        classifiers[value] = fit.weight, fit.bias
        correct = 0
        for index in validation_index.split(8192):
            logits = features[index] @ fit.weight.float().T + fit.bias.float()
            correct += int((logits.argmax(1) == labels[index]).sum())
        scores[value] = correct / len(validation_index)
        # Accuracy rises to one summit and falls along the path, and its weak end is the slowest to fit.
        best = max(scores.values())
        margin = 2 * (best * (1 - best) / len(validation_index)) ** 0.5
        if len(scores) > _PAST_THE_BEST and max(list(scores.values())[-_PAST_THE_BEST:]) < best - margin:
            break
    return scores, classifiers


def _further(path: Mapping[float, tuple[Tensor, Tensor]], value: float) -> tuple[Tensor, Tensor] | None:
    """Where to begin for the next lambda of a path: the line through the last two classifiers, over log lambda."""
    if len(path) < 2:
        return next(iter(path.values()), None)
    (before, (weight, bias)), (last, (last_weight, last_bias)) = list(path.items())[-2:]
    step = math.log(value / last) / math.log(last / before)
    return last_weight + step * (last_weight - weight), last_bias + step * (last_bias - bias)


def _listed(value: float | Sequence[float]) -> Sequence[float]:
    return [value] if isinstance(value, int | float) else list(value)
