"""Weighted kNN against a double loop, and ties that do not depend on luck."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from simclr.eval import knn_accuracy, knn_predict, nearest
from simclr.eval.knn import knn_predictions


def _clusters(n, m, classes=4, width=6, spread=1.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)

    def draw(count):
        labels = torch.randint(classes, (count,), generator=generator)
        return centres[labels] + spread * torch.randn(count, width, generator=generator), labels

    return *draw(n), *draw(m)


def _dumb(train, train_labels, test, k, temperature):
    predictions = []
    for query in test.double():
        near = []
        for i, row in enumerate(train.double()):
            near.append((-float(query @ row / query.norm() / row.norm()), i))
        votes = {}
        for similarity, i in sorted(near)[:k]:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0) + math.exp(-similarity / temperature)
        predictions.append(max(sorted(votes), key=votes.get))
    return predictions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (30, 0.02), (30, 10.0), (80, 0.1)])
def test_knn_is_the_double_loop(k, temperature):
    train, train_labels, test, test_labels = _clusters(80, 60)
    predictions = knn_predict(train, train_labels, test, k, temperature)
    assert predictions.tolist() == _dumb(train, train_labels, test, k, temperature)
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k, temperature)
    assert accuracy == sum(p == t for p, t in zip(predictions.tolist(), test_labels.tolist(), strict=True)) / 60
    assert 0.3 < accuracy < 0.95  # neither chance nor trivial, so that agreement means something


def test_scale_and_chunks_change_nothing():
    train, train_labels, test, _ = _clusters(300, 101)
    whole = knn_predict(train, train_labels, test, 20)
    for chunk_size in (1, 7, 100, 1000):
        assert torch.equal(whole, knn_predict(train, train_labels, test, 20, chunk_size=chunk_size))
    scales = torch.logspace(-2, 2, 101)[:, None]
    assert torch.equal(whole, knn_predict(train * 50, train_labels, test * scales, 20))


def test_the_lower_number_wins_a_tie():
    same = torch.ones(40, 3)
    labels = torch.arange(40) % 4
    assert knn_predict(same, labels.flip(0), same[:1], 1).tolist() == [3]  # image 0
    assert knn_predict(same, labels, same[:1], 8).tolist() == [0]  # two votes each: class 0
    assert knn_predict(same, labels.roll(2), same[:1], 5).tolist() == [2]  # images 0 to 4: class 2 has two


def test_an_image_votes_for_itself():
    train, train_labels, *_ = _clusters(50, 1)
    assert knn_accuracy(train, train_labels, train, train_labels, k=1) == 1


def test_bad_settings_are_refused():
    train, train_labels, test, test_labels = _clusters(80, 60)
    for k in (0, 81):
        with pytest.raises(ValueError, match="needed 1 to 80"):
            knn_accuracy(train, train_labels, test, test_labels, k)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            knn_accuracy(train, train_labels, test, test_labels, 5, temperature)
    with pytest.raises(ValueError, match=r"classes \[9\] that train_labels lack"):
        knn_accuracy(train, train_labels, test, torch.full((60,), 9), 5)


def test_the_nearest_are_those_of_highest_cosine_and_of_equals_the_first():
    bank = torch.tensor([[0.0, 1.0], [10.0, 0.0], [1.0, 1.0], [2.0, 2.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[0.1, 0.0], [0.0, -3.0]]), bank, 3).tolist() == [[1, 2, 3], [1, 4, 2]]


def test_several_k_from_one_search_are_each_as_alone():
    draw = torch.Generator().manual_seed(2)
    bank, queries = torch.randn(60, 5, generator=draw), torch.randn(25, 5, generator=draw)
    labels = torch.arange(60) % 3
    found = knn_predictions(bank, labels, queries, [1, 7, 60], 0.2)
    for k in (1, 7, 60):
        assert torch.equal(found[k], knn_predict(bank, labels, queries, k, 0.2))
        # scikit-learn's brute force, with our votes for its weights.
        other = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.2))
        assert (other.fit(bank.numpy(), labels.numpy()).predict(queries.numpy()) == found[k].numpy()).all()
    with pytest.raises(ValueError, match="k=61 with 60 training images"):
        knn_predictions(bank, labels, queries, [1, 61])
