"""The images of a report: which are shown, which are near, and where they lie on a map."""

import sys

import pytest
import torch

from simclr.report.sample import Sample, choose_queries, tsne


def sample_of(labels):
    """As many images as labels, of no importance."""
    count = len(labels)
    pixels, features = torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.zeros(count, 2)
    return Sample("set", torch.arange(count), pixels, features, labels, None, count)


def test_queries_are_one_of_each_class_in_their_order_then_others():
    labels = torch.tensor([2, 2, 2, 0, 0, 1])
    chosen = choose_queries(sample_of(labels), 5)
    assert labels[chosen[:3]].tolist() == [0, 1, 2]
    assert len(set(chosen.tolist())) == 5
    many = choose_queries(sample_of(torch.arange(100)), 10)
    assert many.tolist() == list(range(0, 100, 10))  # from all along the alphabet


def test_the_map_keeps_groups_together_and_is_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    features = torch.eye(16)[labels] + 0.1 * torch.randn(120, 16, generator=generator)
    state = torch.get_rng_state()
    places = tsne(features)
    assert torch.equal(places, tsne(features))
    assert torch.equal(state, torch.get_rng_state())
    distance = torch.cdist(places, places).fill_diagonal_(float("inf"))
    assert torch.equal(labels[distance.argmin(1)], labels)
    centres = torch.stack([places[labels == label].mean(0) for label in range(4)])
    spread = max(float((places[labels == label] - centres[label]).norm(dim=1).max()) for label in range(4))
    assert torch.pdist(centres).min() > 2 * spread


def test_a_map_of_equal_features_is_still_a_map():
    places = tsne(torch.ones(40, 16))
    assert places.shape == (40, 2)
    assert places.isfinite().all()


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        tsne(torch.eye(8))
