"""Figures without labels: against double loops in float64, and at their limits."""

import math

import pytest
import torch

from simclr.eval import alignment, instance_retrieval, rank_me, spread, uniformity


def features(n: int = 7, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 3


def directions(z: torch.Tensor) -> list[list[float]]:
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z.double().tolist()]


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def test_alignment_and_uniformity_are_the_double_loops():
    z1, z2 = features(), features(seed=1)
    a, b = directions(z1), directions(z2)
    assert alignment(z1, z2) == pytest.approx(sum(map(squared_distance, a, b)) / 7, abs=1e-6)
    pairs = [math.exp(-2 * squared_distance(a[i], a[j])) for i in range(7) for j in range(i)]
    assert uniformity(z1) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-6)


def test_figures_of_pairs_are_the_same_however_many_rows_are_looked_at_at_once(monkeypatch):
    z = features(50)
    expected = float(torch.pdist(torch.nn.functional.normalize(z.double())).square().mul(-2).exp().mean().log())
    other = z + 2 * features(50, seed=1)
    retrieved = instance_retrieval(z, other)
    assert 0 < retrieved < 1
    for rows in (1, 7, 1024):
        monkeypatch.setattr("simclr.eval.quality._ROWS", rows)
        assert uniformity(z) == pytest.approx(expected, abs=1e-12)
        assert instance_retrieval(z, other) == retrieved


def test_spread_is_the_deviation_of_each_coordinate():
    z = features()
    columns = list(zip(*directions(z), strict=True))
    deviations = [math.sqrt(sum((x - sum(c) / 7) ** 2 for x in c) / 7) for c in columns]
    assert spread(z) == pytest.approx(sum(deviations) / 5 * math.sqrt(5), abs=1e-6)


def test_rank_is_the_entropy_of_the_eigenvalues_roots():
    h = features(9, 4)
    values = torch.linalg.eigvalsh(h.double().T @ h.double()).sqrt().tolist()
    share = [value / sum(values) + 1e-7 for value in values]
    assert rank_me(h) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_features_of_so_many_equal_directions_have_that_rank(rank):
    h = torch.zeros(24, 16)
    h[torch.arange(24), torch.arange(24) % rank] = 2.0
    assert rank_me(h) == pytest.approx(rank, rel=1e-4)


def test_retrieval_counts_images_whose_other_view_is_nearer_than_any_other_image():
    h1, h2 = features(40), features(40) + 0.6 * features(40, seed=1)
    a, b = directions(h1), directions(h2)
    right = [min(range(40), key=lambda j: squared_distance(a[i], b[j])) == i for i in range(40)]
    right += [min(range(40), key=lambda j: squared_distance(b[i], a[j])) == i for i in range(40)]
    assert 0.2 < sum(right) / 80 < 0.95  # neither all nor none, so that the double loop decides
    assert instance_retrieval(h1, h2) == pytest.approx(sum(right) / 80)
    assert instance_retrieval(h1, h1 * 5) == 1
    assert instance_retrieval(torch.ones(40, 5), torch.ones(40, 5)) == 0


def test_a_sphere_is_filled_and_a_point_is_collapsed():
    even = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert spread(even) == pytest.approx(1, abs=0.01)
    assert uniformity(even) == pytest.approx(-4 + 2 * 4 / 64, abs=0.05)  # exp(-4 + 4 cos), cos of variance 1 / 64
    same = torch.ones(50, 64)
    assert (spread(same), uniformity(same), alignment(same, 3 * same)) == pytest.approx((0, 0, 0), abs=1e-6)
    assert rank_me(same) == pytest.approx(1, abs=1e-3)
    assert uniformity(torch.zeros(50, 64)) == pytest.approx(0, abs=1e-6), "as of a projection head that is dead"


def test_the_scale_of_a_projection_changes_nothing():
    z1, z2, scale = features(), features(seed=1), torch.rand(7, 1) + 0.5
    for figure in (uniformity, spread):
        assert figure(scale * z1) == pytest.approx(figure(z1), abs=1e-6)
    assert alignment(scale * z1, z2) == pytest.approx(alignment(z1, z2), abs=1e-6)


@pytest.mark.parametrize("figure", [alignment, instance_retrieval])
def test_views_of_other_images_are_refused(figure):
    with pytest.raises(ValueError, match=r"features \(7, 5\) and \(6, 5\): needed \(N, D\), N >= 2, of one shape"):
        figure(features(), features(6))


@pytest.mark.parametrize("figure", [uniformity, spread, rank_me])
def test_one_image_has_no_figure(figure):
    with pytest.raises(ValueError, match=r"features \(1, 5\): needed \(N, D\), N >= 2"):
        figure(features(1))
