"""Logistic regression against Newton's method and its own stationarity; SGD against the protocol's letter."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr import SimCLRAugmentation
from simclr.data.splits import stratified_split
from simclr.eval import (
    extract_features,
    linear_evaluation_sgd,
    linear_probe,
    linear_probe_sgd,
    logreg,
    train_linear_sgd,
    wilson_interval,
)
from simclr.seeding import epoch_order


def _data(n=240, m=90, classes=3, width=5, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    mix = torch.randn(width, width, generator=generator)

    def draw(count):
        labels = torch.randint(classes, (count,), generator=generator)
        x = centres[labels] + spread * torch.randn(count, width, generator=generator)
        return (x @ mix) * torch.logspace(-2, 3, width) + 10, labels  # correlated, of very unequal scales

    return *draw(n), *draw(m)


def _objective(parameters, x, labels, regularization, classes):
    """The definition: sum of cross-entropies + lambda / 2 |W|^2, bias free."""
    weight, bias = parameters[:-classes].view(classes, -1), parameters[-classes:]
    return F.cross_entropy(x @ weight.T + bias, labels, reduction="sum") + regularization / 2 * weight.square().sum()


def _standardised(x, by):
    by = by.double()
    return (x.double() - by.mean(0)) / by.std(0, correction=0)


def plain_sgd(
    epoch_features, classes, *, epochs=100, batch_size=512, base_lr=0.1, momentum=0.9, weight_decay=0.0
) -> nn.Linear:
    """The paper's classifier (Chen et al. 2020, appendix B.6) by torch's own layer, optimiser and cosine, in float64.

    `epoch_features(epoch)` gives all features and labels of an epoch, in the order in which it visits them.
    """
    size, width = epoch_features(0)[0].shape
    classifier = nn.Linear(width, classes, dtype=torch.float64)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    groups = [{"params": [classifier.weight], "weight_decay": weight_decay}, {"params": [classifier.bias]}]
    optimizer = torch.optim.SGD(groups, lr=base_lr * batch_size / 256, momentum=momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * math.ceil(size / batch_size))
    for epoch in range(epochs):
        x, y = epoch_features(epoch)
        for start in range(0, size, batch_size):
            batch = slice(start, start + batch_size)
            optimizer.zero_grad()
            F.cross_entropy(classifier(x[batch].double()), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False)


def in_order(x, y, seed=0):
    """The features of an epoch, for `plain_sgd`, that are the same in each but for their order."""

    def of_epoch(epoch):
        order = epoch_order(seed, epoch, len(x))
        return x[order], y[order]

    return of_epoch


def of_views(encoder, images, labels, seed=0, crop_scale=(0.08, 1.0)):
    """The features of an epoch, for `plain_sgd`, of images cropped and flipped anew as the paper does."""
    off = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0}
    augment = SimCLRAugmentation(encoder.image_size, crop_scale=crop_scale, mean=encoder.mean, std=encoder.std, **off)
    frozen = copy.deepcopy(encoder).eval()

    def of_epoch(epoch):
        order = epoch_order(seed, epoch, len(images))
        views = augment.view(images[order], order, epoch, seed, view=2)  # pretraining has drawn views 0 and 1
        with torch.no_grad():
            return frozen(views), labels[order]

    return of_epoch


@pytest.mark.parametrize("regularization", [0.1, 10.0, 1000.0])
def test_lbfgs_finds_what_newton_finds(regularization):
    x, y, test_x, test_y = _data()
    z = _standardised(x, x)
    p = torch.zeros(3 * 6, dtype=torch.float64)
    for _ in range(50):
        value = p.clone().requires_grad_()
        gradient = torch.autograd.grad(_objective(value, z, y, regularization, 3), value)[0]
        hessian = torch.autograd.functional.hessian(lambda q: _objective(q, z, y, regularization, 3), p)
        p = p - torch.linalg.pinv(hessian) @ gradient  # pinv: a constant added to all biases changes nothing
    assert gradient.abs().max() < 1e-9
    logits = _standardised(test_x, x) @ p[:-3].view(3, 5).T + p[-3:]
    result = linear_probe(x, y, test_x, test_y, regularization=regularization)
    got = test_x.double() @ result.weight.double().T + result.bias.double()
    torch.testing.assert_close(got.log_softmax(1), logits.log_softmax(1), atol=2e-3, rtol=1e-3)
    assert torch.equal(result.predictions, logits.argmax(1))
    assert result.regularization == regularization
    assert result.validation_accuracy == {}


def test_the_gradient_of_the_definition_vanishes_where_lbfgs_stops():
    x, y, *_ = _data(n=2000, classes=7, width=40)
    result = linear_probe(x, y, x[:50], y[:50], regularization=3.0)
    std = x.double().std(0, correction=0)
    weight = result.weight.double() * std  # back on standardised features
    bias = result.bias.double() + result.weight.double() @ x.double().mean(0)
    p = torch.cat((weight.flatten(), bias)).requires_grad_()
    gradient = torch.autograd.grad(_objective(p, _standardised(x, x), y, 3.0, 7), p)[0] / len(x)
    assert gradient.abs().max() < 1e-5
    off = torch.autograd.grad(_objective(p * 1.01, _standardised(x, x), y, 3.0, 7), p)[0] / len(x)
    assert off.abs().max() > 1e-4  # the bound can tell


def test_the_problem_that_is_solved_is_the_definition_in_other_coordinates():
    """Value and gradient of the preconditioned problem, by autograd through the change of coordinates, in float64."""
    x, labels, *_ = _data(n=60, classes=4, width=6)
    x = _standardised(x, x)
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((4, 6), (4,)))
    problem = logreg._Problem(
        lambda w, b: logreg._loss_and_gradient(x, labels, w, b, torch.float64), 0.05, x.T @ x / 60, (weight, bias)
    )
    v, b = problem.v.detach().clone().requires_grad_(), problem.b.detach().clone().requires_grad_()
    w, c = v @ problem._inverse, b / problem._shift
    expected = F.cross_entropy(x @ w.T + c, labels) + 0.05 / 2 * w.square().sum()
    expected.backward()
    assert problem.closure().item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(problem.v.grad, v.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(problem.b.grad, b.grad, rtol=1e-10, atol=1e-13)
    assert problem.gradient() == pytest.approx(torch.cat((v.grad.flatten(), b.grad)).norm().item(), rel=1e-10)
    for found, given in zip(problem.solution(), (weight, bias), strict=True):
        torch.testing.assert_close(found, given)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_a_fit_ends_as_soon_as_the_norm_of_its_gradient_is_small(monkeypatch, tolerance):
    x, labels, *_ = _data(n=2000, classes=10, width=60)
    mean, scale = logreg.standardisation(x)
    evaluations, evaluate = [], logreg._loss_and_gradient
    monkeypatch.setattr(logreg, "_loss_and_gradient", lambda *a: evaluations.append(1) or evaluate(*a))
    fit = logreg._fit((x - mean) * scale, labels, 10, 1.0, tolerance=tolerance)
    assert fit.converged
    # The largest entry is about a tenth of the norm here: a fit that went by it would go on to .05 tolerance or less.
    assert tolerance / 5 < fit.gradient <= tolerance
    assert len(evaluations) <= 2 * fit.iterations + 2  # and a step is known where the one before ended


def test_a_separable_problem_is_solved_and_shuffled_labels_are_chance():
    x, y, test_x, test_y = _data(n=600, m=400, spread=0.05)
    assert linear_probe(x, y, test_x, test_y).accuracy == 1
    y = y[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    assert linear_probe(x, y, test_x, test_y).accuracy < 0.5


def test_test_labels_and_features_never_reach_the_choice():
    x, y, test_x, test_y = _data()
    first = linear_probe(x, y, test_x, test_y)
    other = linear_probe(x, y, test_x.flip(0)[:40] * 2, (test_y[:40] + 1) % 3)
    assert first.regularization == other.regularization
    assert first.validation_accuracy == other.validation_accuracy
    assert torch.equal(first.weight, other.weight)
    assert torch.equal(first.bias, other.bias)
    assert first.accuracy != other.accuracy


def test_the_choice_regularises_noise_and_not_signal():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    noisy = torch.randn(200, 150, generator=generator)
    noisy[:, 0] += 1.5 * y
    clean = torch.cat((noisy[:, :1] * 0.01 + y[:, None], torch.randn(200, 2, generator=generator)), 1)
    assert (
        linear_probe(noisy, y, noisy, y).regularization
        >= 10 * linear_probe(clean, y, clean, y, regularization=(1e-1, 1e-2)).regularization
    )


def test_of_equally_good_lambdas_the_strongest_is_taken():
    x, y, test_x, test_y = _data(n=600, spread=0.05)
    result = linear_probe(x, y, test_x, test_y)
    best = [v for v, score in result.validation_accuracy.items() if score == max(result.validation_accuracy.values())]
    assert len(best) > 1
    assert result.regularization == max(best)


@pytest.mark.parametrize(("later", "tried"), [(0.6, 5), (0.86, 9)], ids=["clearly worse", "within two errors"])
def test_the_path_ends_once_accuracy_has_clearly_fallen(monkeypatch, later, tried):
    # Two features that name the class of .9 and of `later` of the images: the one a fit looks at is its accuracy, with
    # a standard error of .03 on the 100 images held back. On real fits the path's end hangs on the draw of the split.
    y = torch.arange(500) % 2
    sign = 2.0 * y - 1
    x = torch.stack([torch.where(torch.arange(500) // 2 % 50 < share * 50, sign, -sign) for share in (0.9, later)], 1)
    grid = [10.0**e for e in range(4, -5, -1)]
    asked, fit = [], logreg._fit

    def looks_at_one_feature(features, labels, num_classes, regularization, *args, **kwargs):
        asked.append(regularization)
        seen = 0 if regularization > 100 else 1
        weight = torch.tensor([[-1.0, 1.0]]).T * F.one_hot(torch.tensor(seen), 2)
        return dataclasses.replace(
            fit(features, labels, num_classes, 1.0), weight=weight.double(), bias=torch.zeros(2).double()
        )

    monkeypatch.setattr(logreg, "_fit", looks_at_one_feature)
    result = linear_probe(x, y, x, y, regularization=grid)
    assert list(result.validation_accuracy) == grid[:tried]
    assert asked == [*grid[:tried], grid[0]]  # then the strongest of the best, on all images
    assert result.regularization == grid[0]


def test_the_split_is_stratified_disjoint_and_bounded():
    labels = torch.cat((torch.zeros(500), torch.ones(100), torch.full((10,), 2), torch.tensor([3]))).long()
    fit, validation = stratified_split(labels, 0.2, seed=0, limit=10**6)
    assert torch.equal(torch.cat((fit, validation)).sort().values, torch.arange(611))
    assert torch.bincount(labels[validation], minlength=4).tolist() == [100, 20, 2, 0]
    fit, validation = stratified_split(labels, 0.2, seed=0, limit=61)
    assert not set(fit.tolist()) & set(validation.tolist())
    assert torch.bincount(labels[fit]).tolist() == [40, 8, 1, 1]
    assert not torch.equal(fit, stratified_split(labels, 0.2, seed=1, limit=61)[0])


def test_the_result_carries_its_uncertainty():
    x, y, test_x, test_y = _data(classes=8, width=6)
    result = linear_probe(x, y, test_x, test_y)
    correct = int((result.predictions == test_y).sum())
    assert result.accuracy == correct / 90
    assert result.ci95 == wilson_interval(correct, 90)
    assert result.n_test == 90
    assert result.accuracy < result.top5 < 1
    logits = test_x @ result.weight.T + result.bias
    assert result.top5 == sum(int(t) in row.topk(5).indices for row, t in zip(logits, test_y, strict=True)) / 90


def test_constant_features_do_no_harm():
    x, y, test_x, test_y = _data()
    plain = linear_probe(x, y, test_x, test_y, regularization=1.0)
    constant = torch.full((240, 1), 0.1)
    constant[::2] = constant[::2].nextafter(torch.ones(()))  # as rounding leaves it
    drifting = torch.full((90, 1), 7.0)
    more = linear_probe(torch.cat((x, constant), 1), y, torch.cat((test_x, drifting), 1), test_y, regularization=1.0)
    assert (more.weight[:, 5] == 0).all()
    assert torch.equal(plain.predictions, more.predictions)


def test_more_features_than_images_and_no_convergence():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 300, generator=generator), torch.arange(60) % 3
    assert linear_probe(x, y, x, y, regularization=1e-2).accuracy == 1
    with pytest.raises(RuntimeError, match="did not converge in 1 iterations"):
        linear_probe(x, y, x, y, regularization=1e-2, max_iterations=1)


@pytest.mark.parametrize("probe", [linear_probe, partial(linear_probe_sgd, epochs=3)], ids=["lbfgs", "sgd"])
def test_the_probe_repeats_itself(probe):
    x, y, test_x, test_y = _data()
    x, test_x = x / 100, test_x / 100
    a, b = (probe(x, y, test_x, test_y) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.predictions, b.predictions)


def test_sgd_follows_the_protocol_step_by_step():
    generator = torch.Generator().manual_seed(0)
    epochs = [[(torch.randn(8, 4, generator=generator), torch.arange(8) % 3) for _ in range(5)] for _ in range(4)]
    weight, bias = train_linear_sgd(
        lambda e: epochs[e], feature_dim=4, num_classes=3, steps_per_epoch=5, epochs=4, batch_size=64, weight_decay=0.01
    )
    w, b = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    velocity_w, velocity_b = torch.zeros_like(w), torch.zeros_like(b)
    for step, (x, y) in enumerate(batch for epoch in epochs for batch in epoch):
        residual = ((x.double() @ w.T + b).softmax(1) - F.one_hot(y, 3)) / 8
        lr = 0.1 * 64 / 256 * 0.5 * (1 + math.cos(math.pi * step / 20))
        for p, velocity, gradient in (
            (w, velocity_w, residual.T @ x.double() + 0.01 * w),
            (b, velocity_b, residual.sum(0)),
        ):
            velocity.mul_(0.9).add_(gradient)
            p -= lr * (gradient + 0.9 * velocity)
    torch.testing.assert_close(weight.double(), w, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(bias.double(), b, atol=1e-6, rtol=1e-4)


def test_sgd_reports_the_last_epoch_even_when_it_is_the_worst():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    def train(last_is_bad):
        weight, bias = train_linear_sgd(
            lambda e: [(x * 1000, 1 - y)] * 10 if last_is_bad and e == 4 else [(x, y)] * 10,
            feature_dim=4,
            num_classes=2,
            steps_per_epoch=10,
            epochs=5,
            batch_size=256,
        )
        return float(((x @ weight.T + bias).argmax(1) == y).double().mean())

    assert train(last_is_bad=False) > 0.9
    assert train(last_is_bad=True) < 0.1


def test_sgd_refuses_a_wrong_schedule_and_stops_on_divergence():
    x, y = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    settings = {"feature_dim": 2, "num_classes": 2, "epochs": 2, "batch_size": 256}
    with pytest.raises(ValueError, match="epoch 0 gave 1 batches"):
        train_linear_sgd(lambda e: [(x, y)], steps_per_epoch=2, **settings)
    with pytest.raises(RuntimeError, match="diverged in epoch 0"):
        train_linear_sgd(lambda e: [(x * torch.nan, y)], steps_per_epoch=1, **settings)
    with pytest.raises(ValueError, match="base_lr > 0"):
        train_linear_sgd(lambda e: [(x, y)], steps_per_epoch=1, base_lr=0, **settings)


def test_bad_input_is_refused():
    x, y, test_x, test_y = _data()
    with pytest.raises(ValueError, match="lambdas > 0"):
        linear_probe(x, y, test_x, test_y, regularization=0.0)
    with pytest.raises(ValueError, match="widths differ"):
        linear_probe(x, y, test_x[:, :3], test_y)
    with pytest.raises(ValueError, match="NaN or infinite in 1 of 240 rows, first in row 7"):
        linear_probe(x.index_fill(0, torch.tensor([7]), torch.nan), y, test_x, test_y)


class _Pixels(nn.Module):
    """An encoder whose features are the four quarters' mean colors."""

    image_size, mean, std = 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.bn(F.adaptive_avg_pool2d(x, 2).flatten(1))


class _TrainSet:
    def __init__(self, n=96):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(n) % 3
        self.pixels = torch.randint(0, 120, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.pixels[torch.arange(n), self.labels] += 100  # the class is a tint
        self.asked = []

    def __len__(self):
        return len(self.labels)

    def images(self, index):
        self.asked.append(index)
        return self.pixels[index]


def test_linear_evaluation_on_augmented_images_learns_and_leaves_the_encoder_unchanged():
    encoder, train_set = _Pixels().train(), _TrainSet()
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    test = extract_features(encoder, [(train_set.pixels, train_set.labels)])
    result = linear_evaluation_sgd(encoder, train_set, *test, epochs=3, batch_size=40)
    assert result.accuracy == 1
    assert result.method == "sgd"
    assert result.iterations == 9
    assert encoder.training
    assert all(torch.equal(state[k], v) for k, v in encoder.state_dict().items())
    asked = torch.cat(train_set.asked).view(3, 96)
    assert torch.equal(asked.sort(1).values, torch.arange(96).expand(3, 96))
    assert not torch.equal(asked[0], asked[1])
    again = linear_evaluation_sgd(encoder, train_set, *test, epochs=3, batch_size=40)
    assert torch.equal(result.weight, again.weight)


def test_linear_evaluation_crops_and_flips_but_keeps_the_colors():
    class Watching(_Pixels):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    seen, train_set = [], _TrainSet(12)
    colors = torch.arange(36, dtype=torch.uint8).view(12, 3) * 7
    train_set.pixels[:] = colors[:, :, None, None]  # each image one color
    encoder = Watching()
    test = torch.rand(3, 12), torch.arange(3)
    linear_evaluation_sgd(encoder, train_set, *test, epochs=1, batch_size=12)
    order = train_set.asked[0]
    expected = (colors[order] / 255 - 0.5) / 0.25
    torch.testing.assert_close(seen[0], expected[:, :, None, None].expand(12, 3, 8, 8), atol=1e-4, rtol=0)
    train_set.pixels[:] = (torch.arange(8) * 30).to(torch.uint8)  # a ramp: crops stretch it, flips turn it
    linear_evaluation_sgd(encoder, train_set, *test, epochs=2, batch_size=12)
    slopes = torch.stack([x[..., -1] - x[..., 0] for x in seen[1:]]).mean((2, 3))  # (2 epochs, 12)
    assert (slopes > 0).any()
    assert (slopes < 0).any()
    assert len(slopes.flatten().unique()) > 12
