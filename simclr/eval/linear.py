"""Linear evaluation: how well a linear classifier does on frozen features.

Two protocols. `lbfgs`, full-batch logistic regression, is convex: its answer depends on the features alone, takes
seconds, and is what to compare encoders by. `sgd` is the protocol of the paper (Chen et al. 2020, appendix B.6 and
google-research/simclr), for numbers that stand beside published ones. Neither looks at the test set before it is done.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.augment import SimCLRAugmentation
from simclr.data.splits import stratified_split
from simclr.eval.features import check_split, encode, frozen
from simclr.eval.metrics import top_k_accuracy, wilson_interval
from simclr.seeding import epoch_order

# Half decades. Standardised features make one grid serve all encoders: from almost no regularisation to so much that
# 50 000 images barely move the weights.
REGULARIZATION_GRID = tuple(10 ** (e / 2) for e in range(10, -3, -1))
_VALIDATION_FRACTION, _VALIDATION_LIMIT = 0.2, 10_000  # 10 000 images tell accuracies apart to .004
_PAST_THE_BEST = 3  # the path ends after so many lambdas in a row that are worse by more than two standard errors
_CHUNK_NUMBERS = 2**24  # numbers a chunk of features may hold
_GRAM_ROWS, _GRAM_WIDTH = 4096, 8192  # images that estimate the curvature; width above which it is not estimated
_AUGMENTATION_VIEW = 2  # pretraining draws views 0 and 1; the same crops again would be no new sample


class NotConverged(RuntimeError):
    """The final fit of L-BFGS ended before its gradient was small enough: there is no number."""


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
        return {min(tried): "weakest", max(tried): "strongest"}.get(self.regularization) if tried else None


class TrainSet(Protocol):
    """What `linear_evaluation_sgd` needs of a data set: length, labels, and images by their numbers."""

    labels: Tensor  # (N,) integer

    def __len__(self) -> int: ...

    def images(self, index: Tensor) -> Tensor:
        """(n,) int64 -> (n, 3, S, S) uint8."""


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    regularization: float | Sequence[float] = REGULARIZATION_GRID,
    selection_size: int = 20_000,
    max_iterations: int = 1000,
    epochs: int = 100,
    batch_size: int = 512,
    base_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    num_classes: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Train a linear classifier on the training features and score it once on the test features.

    lbfgs: multinomial logistic regression with L2 on features standardised by the training set's mean and standard
    deviation (a constant feature is left out). Lambda is chosen by accuracy on a stratified fifth of the training data
    (10 000 images at most), from strong to weak until accuracy has clearly fallen, the strongest of equally good ones;
    then the classifier is fitted to all training data. Because lambda multiplies |W|^2 beside the *sum* over images, a
    value chosen on fewer images holds for all of them.

    sgd: the paper's: features as they come, zero initialisation, Nesterov momentum, lr = base_lr * batch_size / 256,
    cosine to 0 without warm-up; the classifier of the last epoch is scored. For features of augmented images see
    `linear_evaluation_sgd`.

    Args:
        train_features, test_features: (N, F) and (M, F) float.
        train_labels, test_labels: (N,) and (M,) integer in 0 .. C - 1; a test class that training lacks is refused.
        method: the protocol. regularization, selection_size and max_iterations belong to lbfgs; epochs, batch_size,
            base_lr, momentum and weight_decay to sgd.
        regularization: lambda > 0, or the lambdas to choose from.
        selection_size: images that each lambda is fitted to during the choice, at most.
        max_iterations: of the final fit.
        num_classes: C; by default one more than the largest training label.
        seed: of the split, and of the order in which sgd visits the images.
        device: where to compute; by default where train_features are.
    Returns:
        ProbeResult.
    Raises:
        ValueError: if features, labels or a setting are out of range, with every problem of the data listed.
        RuntimeError: if L-BFGS does not converge (`NotConverged`) or SGD diverges.
    """
    if method not in ("lbfgs", "sgd"):
        raise ValueError(f"method={method!r}: needed 'lbfgs' or 'sgd'.")
    num_classes = check_split(train_features, train_labels, test_features, test_labels, num_classes)
    device = torch.device(device) if device is not None else train_features.device
    features = train_features.to(device, torch.float32)
    labels = train_labels.to(device, torch.int64)
    if method == "sgd":
        size = len(features)

        def epoch_features(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
            for index in epoch_order(seed, epoch, size).to(device).split(batch_size):
                yield features[index], labels[index]

        weight, bias = train_linear_sgd(
            epoch_features,
            feature_dim=features.shape[1],
            num_classes=num_classes,
            steps_per_epoch=-(-size // batch_size),
            epochs=epochs,
            batch_size=batch_size,
            base_lr=base_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            device=device,
        )
        extra = {"iterations": epochs * -(-size // batch_size)}
    else:
        grid = sorted({float(v) for v in _listed(regularization)}, reverse=True)
        if not grid or not all(0 < v < math.inf for v in grid) or selection_size < 1 or max_iterations < 1:
            raise ValueError(
                f"regularization={regularization}, selection_size={selection_size}, max_iterations={max_iterations}: "
                "needed lambdas > 0 and sizes >= 1."
            )
        mean, scale = _standardisation(features)
        features = (features - mean) * scale
        scores, start = {}, None
        if len(grid) > 1:
            scores, start = _validation_accuracies(features, labels, num_classes, grid, selection_size, seed)
        # Equal scores go to the strongest regularisation, which comes first.
        chosen = max(grid, key=lambda v: scores.get(v, 0.0))
        fit = _fit(features, labels, num_classes, chosen, start.get(chosen) if start else None, max_iterations)
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
        extra = {"iterations": fit.iterations, "regularization": chosen, "validation_accuracy": scores}
    return _score(weight, bias, test_features, test_labels, method=method, **extra)


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
    # As in google-research/simclr: the bias of the supervised head is not decayed.
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

    Each epoch passes all images through the encoder, so it costs as much as `epochs` extractions; `linear_probe` is the
    quick way. The order and the crops are pure functions of (seed, epoch, image index).

    Args:
        encoder: frozen, (n, 3, S, S) -> (n, F), with `.image_size` and perhaps `.mean`, `.std`.
        train_set: len(), `.labels` (N,), `.images(index)` -> (n, 3, S, S) uint8.
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
    normalization = {
        name: getattr(encoder, name) for name in ("mean", "std") if getattr(encoder, name, None) is not None
    }
    if len(normalization) < 2:
        normalization = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    augmentation = SimCLRAugmentation(
        encoder.image_size,
        crop_scale=crop_scale,
        strength=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob=0.0,
        **normalization,
    )

    def epoch_features(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        for index in epoch_order(seed, epoch, size).split(batch_size):
            images = train_set.images(index).to(device, non_blocking=True)
            view = augmentation.view(images, index, epoch, seed, _AUGMENTATION_VIEW)
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
    return _score(weight, bias, test_features, test_labels, method="sgd", iterations=steps)


def _score(weight: Tensor, bias: Tensor, test_features: Tensor, test_labels: Tensor, **extra) -> ProbeResult:
    """Score a finished classifier: the only place of this file that sees test labels."""
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
        **extra,
    )


@dataclass
class _Fit:
    weight: Tensor  # (C, F) float64, on standardised features
    bias: Tensor  # (C,)
    iterations: int
    gradient: float  # norm in preconditioned coordinates: half its square estimates the loss still to gain
    converged: bool


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
    """Minimise mean cross-entropy + regularization / (2 N) |W|^2 by L-BFGS from `start` or zero.

    Features of a network are strongly correlated, so the plain problem is ill-conditioned and takes hundreds of
    iterations. It is solved in coordinates V with W = V L^-1, where L L' is the Hessian to expect: h * Gram +
    lambda / N, h the mean variance p (1 - p) of the predicted probabilities at the start.
    """
    size, width = features.shape
    decay = regularization / size
    gram = _gram(features) if gram is None else gram
    kwargs = {"dtype": torch.float64, "device": features.device}
    if start is None:
        start = torch.zeros(num_classes, width, **kwargs), torch.zeros(num_classes, **kwargs)
    variance = _loss_and_gradient(features, labels, *start, product_dtype)[3]
    variance = max(variance, 1e-3 / num_classes)  # a perfect start has none, and the problem is not flat everywhere
    factor = variance * gram
    factor.diagonal().add_(decay)
    factor = torch.linalg.cholesky(factor)  # (F, F)
    # The explicit inverse is fine here: any linear map would be, as long as the gradient takes its transpose.
    inverse = torch.linalg.solve_triangular(factor, torch.eye(width, **kwargs), upper=False)
    shift = variance**0.5

    v = (start[0] @ factor).requires_grad_()
    b = (start[1] * shift).requires_grad_()

    def closure() -> Tensor:
        weight = v.detach() @ inverse
        loss, grad_weight, grad_bias, _ = _loss_and_gradient(
            features, labels, weight, b.detach() / shift, product_dtype
        )
        loss = loss + decay / 2 * weight.square().sum()
        grad_weight = grad_weight + decay * weight
        v.grad = grad_weight @ inverse.T
        b.grad = grad_bias / shift
        return loss

    optimizer = torch.optim.LBFGS(
        [v, b],
        max_iter=max_iterations,
        max_eval=max_iterations * 2,
        tolerance_grad=tolerance / v.numel() ** 0.5,  # torch compares the largest entry: this bounds the norm
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    closure()
    gradient = float((v.grad.square().sum() + b.grad.square().sum()).sqrt())
    iterations = optimizer.state[v]["n_iter"]
    return _Fit(v.detach() @ inverse, b.detach() / shift, iterations, gradient, gradient <= tolerance)


def _loss_and_gradient(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean cross-entropy, its gradient by weight and bias, and the mean of p (1 - p) over images and classes.

    Products within a chunk are taken in product_dtype, everything summed over many images in float64: float32 sums
    alone leave a gradient too noisy to converge on.
    """
    loss, variance = weight.new_zeros(()), weight.new_zeros(())
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    factor = weight.to(product_dtype)
    rows = max(256, min(8192, _CHUNK_NUMBERS // max(features.shape[1], len(weight))))
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        x = x.to(product_dtype)
        log_p = (x @ factor.T).double().add_(bias).log_softmax(1)  # (n, C)
        loss -= log_p.gather(1, y[:, None]).sum()
        residual = log_p.exp_()
        variance += (residual - residual.square()).sum()
        residual.scatter_add_(1, y[:, None], residual.new_full((len(y), 1), -1.0))
        grad_weight += (residual.to(x.dtype).T @ x).double()
        grad_bias += residual.sum(0)
    size = len(features)
    return loss / size, grad_weight / size, grad_bias / size, float(variance) / (size * len(weight))


def _gram(features: Tensor) -> Tensor:
    """Mean of x x' over evenly spread images, enough of them for the preconditioner; the identity when too wide."""
    size, width = features.shape
    if width > _GRAM_WIDTH:
        return torch.eye(width, dtype=torch.float64, device=features.device)
    sample = features[:: max(1, size // max(_GRAM_ROWS, 2 * width))]
    return (sample.T @ sample).double() / len(sample)


def _standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
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
    scores, classifiers, start = {}, {}, None
    for value in grid:
        # The choice needs accuracies, not digits, so the tolerance is loose and a slow end of the path is no error.
        fit = _fit(x, y, num_classes, value, start, max_iterations=100, tolerance=1e-3, gram=gram)
        start = classifiers[value] = fit.weight, fit.bias
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


def _listed(value: float | Sequence[float]) -> Sequence[float]:
    return [value] if isinstance(value, int | float) else list(value)
