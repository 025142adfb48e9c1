"""Accuracies against sorting, and Wilson's interval against the table in which it was compared with ten others."""

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score

from simclr.eval import confusion_matrix, top_k_accuracy, wilson_interval
from simclr.eval.metrics import bootstrap_interval, mean_per_class


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_what_sorting_gives(k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    hits = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        hits += label in sorted(range(7), key=lambda c: -row[c])[:k]
    assert top_k_accuracy(logits, labels, k) == hits / 200


def test_constant_scores_earn_no_more_than_the_first_classes():
    labels = torch.tensor([0, 1, 2, 3])
    assert top_k_accuracy(torch.zeros(4, 4), labels, 1) == 0.25
    assert top_k_accuracy(torch.zeros(4, 4), labels, 2) == 0.5
    assert top_k_accuracy(torch.zeros(4, 4), labels, 5) == 1.0


def test_top_k_refuses_what_it_cannot_score():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="0 to 1"):
        top_k_accuracy(torch.zeros(2, 2), labels + 1)
    with pytest.raises(ValueError, match="NaN"):
        top_k_accuracy(torch.full((2, 2), torch.nan), labels)
    with pytest.raises(ValueError, match="integer"):
        top_k_accuracy(torch.zeros(2, 2), labels.float())
    with pytest.raises(ValueError, match="k >= 1"):
        top_k_accuracy(torch.zeros(2, 2), labels, 0)
    with pytest.raises(ValueError, match="needed"):
        top_k_accuracy(torch.zeros(3, 2), labels)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_stays_between_0_and_1():
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
    with pytest.raises(ValueError, match="correct <= n"):
        wilson_interval(21, 20)


def test_confusion_matrix_counts_pairs():
    matrix = confusion_matrix(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 1, 1]), 4)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    expected[0, 0], expected[1, 2], expected[1, 1] = 1, 2, 1
    assert torch.equal(matrix, expected)
    with pytest.raises(ValueError, match="predictions reach"):
        confusion_matrix(torch.tensor([4]), torch.tensor([0]), 4)


def test_mean_per_class_and_its_interval_are_those_of_scikit_learn_and_of_drawing_images_again():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], [150, 40, 10])  # no image of class 1
    predictions = np.where(draw.random(200) < 0.7, labels, draw.integers(0, 4, 200))
    ours = torch.from_numpy(predictions), torch.from_numpy(labels)
    assert mean_per_class(*ours) == pytest.approx(recall_score(labels, predictions, labels=[0, 2, 3], average="macro"))
    means = []
    for _ in range(3000):
        again = np.concatenate([draw.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in (0, 2, 3)])
        means.append(np.mean([(predictions[again] == c)[labels[again] == c].mean() for c in (0, 2, 3)]))
    # .01 is four standard errors of the quantiles of either.
    assert bootstrap_interval(*ours) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)
    assert bootstrap_interval(*ours) == bootstrap_interval(*ours)
