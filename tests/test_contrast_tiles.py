"""Every pair once, whatever the tiles; sums and gradients of each term against autograd on the matrix of all pairs."""

import pytest
import torch
import torch.nn.functional as F

from simclr.contrast import tiles

# Rows of this rank, all columns, where this rank begins, images of this rank; more than one tile, none that divides.
WORLDS = [(14, 14, 0, 7), (12, 31, 9, 6), (2, 2, 0, 1), (15, 15, 0, 5), (10, 23, 13, 5)]
TILES = [(1, 1), (3, 5), (4, 4), (5, 2), (64, 64)]


def pairs_that_count(rows: int, columns: int, start: int, excluded: tuple[int, ...]) -> torch.Tensor:
    count = torch.ones(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(rows):
            count[i, start + j] = abs(i - j) not in excluded
    return count


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "start", "n"), WORLDS)
def test_bands_cover_every_pair_that_counts_once(rows, columns, start, n, tile):
    excluded = tuple(range(0, rows, n))
    visits = torch.zeros(rows, columns, dtype=torch.int64)
    for band, parts in tiles.bands(rows, columns, start, excluded, tile):
        for part in parts:
            ones = torch.ones(band.stop - band.start, part.columns.stop - part.columns.start, dtype=torch.int64)
            for k in part.left_out:
                ones.diagonal(k).fill_(0)
            visits[band, part.columns] += ones
            if part.mirrored:
                assert part.columns == slice(start + part.mirrored.start, start + part.mirrored.stop)
                visits[part.mirrored, slice(start + band.start, start + band.stop)] += ones.T
    assert visits.equal(pairs_that_count(rows, columns, start, excluded).long())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("rows", "columns", "start", "own"), [(6, 4, 0, 4), (9, 20, 6, 6), (3, 17, 12, 5), (4, 6, 0, 2)]
)
def test_a_rectangle_covers_every_pair_that_counts_once(rows, columns, start, own, tile):
    left_out = (-4, -2, 0, 2, 4)
    visits = torch.zeros(rows, columns, dtype=torch.int64)
    for band, parts in tiles.rectangle(rows, columns, start, own, left_out, tile):
        for part in parts:
            ones = torch.ones(band.stop - band.start, part.columns.stop - part.columns.start, dtype=torch.int64)
            for k in part.left_out:
                ones.diagonal(k).fill_(0)
            visits[band, part.columns] += ones
            assert part.mirrored is None
    for i in range(rows):
        for j in range(columns):
            counts = not (start <= j < start + own and j - start - i in left_out)
            assert visits[i, j] == counts, (i, j)


def problem(rows: int, columns: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    z = F.normalize(torch.randn(columns, 6, generator=generator, dtype=torch.float64), dim=1)
    return z, torch.rand(columns, generator=generator, dtype=torch.float64)


def value(name: str, logits: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The term on a matrix whose rows are the anchors."""
    return {
        "EXP": lambda: logits.exp(),
        "SOFTPLUS": lambda: torch.logaddexp(logits, torch.zeros_like(logits)),
        "HINGE": lambda: torch.relu(logits - thresholds[:, None]),
    }[name]()


@pytest.mark.parametrize("name", ["EXP", "SOFTPLUS", "HINGE"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "start", "n"), WORLDS)
def test_sums_and_gradient_are_those_of_the_whole_matrix(rows, columns, start, n, tile, name):
    temperature, excluded = 0.3, tuple(range(0, rows, n))
    z, numbers = problem(rows, columns, start)
    own = slice(start, start + rows)
    logits = z[own] @ z.T / temperature
    count = pairs_that_count(rows, columns, start, excluded)
    term, thresholds = getattr(tiles, name), numbers - 0.5
    expected = value(name, logits, thresholds[own]).where(count, 0).sum(1)
    sums, largest = tiles.sums(z[own], z, start, temperature, term, excluded, thresholds, tile=tile)
    torch.testing.assert_close(sums[:, 0], expected, rtol=1e-12, atol=1e-12)
    if name == "HINGE":
        assert sums[:, 1].equal(((logits > thresholds[own, None]) & count).sum(1).double())
    torch.testing.assert_close(largest, logits.where(count, -torch.inf).amax(1), rtol=1e-12, atol=0)

    # All anchors' sums, weighted: a pair counts from both ends. Autograd through this rank's rows only.
    weights = numbers + 0.1
    mine = z[own].clone().requires_grad_()
    everyone = torch.cat((z[:start], mine, z[start + rows :]))
    logits = everyone @ everyone.T / temperature
    counts = torch.ones(columns, columns, dtype=torch.bool)
    counts[own] = count
    counts[:, own] = count.T
    counts[:start, :start] = counts[start + rows :, start + rows :] = False  # pairs of others do not pull on these
    loss = (value(name, logits, thresholds).where(counts, 0) * weights[:, None]).sum()
    (expected,) = torch.autograd.grad(loss, mine)
    gradient = tiles.gradient(z[own], z, start, temperature, term, weights, excluded, thresholds, tile)
    torch.testing.assert_close(gradient / temperature, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "start", "n"), WORLDS)
def test_closest_below_is_the_hardest_pair_under_the_threshold(rows, columns, start, n, tile):
    z, numbers = problem(rows, columns, start)
    excluded, own = tuple(range(0, rows, n)), slice(start, start + rows)
    thresholds = (numbers[own] - 0.5) * 2
    below = (z[own] @ z.T / 0.5).where(pairs_that_count(rows, columns, start, excluded), -torch.inf)
    largest = below.amax(1)
    expected, number = below.where(below < thresholds[:, None], -torch.inf).max(1)
    logit, place, hardest = tiles.closest_below(z[own], z, start, 0.5, thresholds, excluded, tile)
    torch.testing.assert_close(logit, expected, rtol=1e-12, atol=0)
    assert place[logit > -torch.inf].equal(number[logit > -torch.inf])
    torch.testing.assert_close(hardest, largest, rtol=1e-12, atol=0)


def test_a_tile_has_the_same_size_for_every_batch_and_stays_in_a_cores_cache(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    height, width = tiles.tile_shape(torch.device("cpu"))
    assert height <= width
    assert 2**16 <= height * width <= 2**18  # 0.25 to 1 MB of float32: two of them fit a cache of 2 MB
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert sum(x * y for x, y in [tiles.tile_shape(torch.device("cpu"))]) == 3 * height * width


@pytest.mark.parametrize("term", [tiles.EXP, tiles.SOFTPLUS, tiles.HINGE])
def test_the_bodies_of_a_tile_compile_whole(term):
    """What CUDA compiles, traced without a graph break; the code generator is left out."""
    generator = torch.Generator().manual_seed(0)
    logits, scratch = torch.randn(2, 6, 9, generator=generator)
    i, j, w_i, w_j = (torch.rand(n, generator=generator) for n in (6, 9, 6, 9))
    thresholds = (i[:, None], j) if term.has_threshold else (None, None)
    compile_ = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    expected = term.sums(logits.clone(), *thresholds)
    found = torch.compile(term.sums, **compile_)(logits.clone(), *thresholds)
    torch.testing.assert_close(found, expected)
    arguments = (*thresholds, w_i[:, None], w_j)
    expected = term.slopes(logits.clone(), *arguments, scratch.clone())
    found = torch.compile(term.slopes, **compile_)(logits.clone(), *arguments, scratch.clone())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("views", "n", "tile"), [(2, 12, (5, 7)), (3, 5, (4, 4)), (2, 2, None)])
def test_the_histogram_of_negatives_is_that_of_the_double_loop(views, n, tile):
    z = torch.nn.functional.normalize(torch.randn(views * n, 6, generator=torch.Generator().manual_seed(n)), dim=1)
    counts = [0] * 16
    for i in range(views * n):
        for j in range(views * n):
            if i % n != j % n:  # not of one image
                cosine = sum(a * b for a, b in zip(z[i].tolist(), z[j].tolist(), strict=True))
                counts[min(15, int((cosine + 1) * 8))] += 1
    assert tiles.histogram(z, views, 16, tile).tolist() == counts
