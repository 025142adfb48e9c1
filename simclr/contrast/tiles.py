"""Sums over all pairs of projections without the matrix of all pairs: tile by tile, with the gradient.

Let z (M, D) be all projections, s_ij = z_i . z_j / temperature, and f a term of s_ij. `sums` gives, for each anchor i
of this rank, sum_j f(s_ij); `gradient` gives, for weights w of all M anchors, sum_j (w_i + w_j) f'(s_ij) z_j. Because s
is symmetric that is the whole gradient of sum_i w_i sum_j f(s_ij) over the anchors of all ranks: a rank that knows the
others' z and *one weight per row* needs no further communication, and its own square of the matrix needs the upper
triangle only. The most that is ever allocated is a few tiles, which stay in a CPU's cache.

Anchors need not be candidates (`own`): the matrix then is a rectangle, of which each pair counts for its anchor alone.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Values in a tile. CPU: 512 KB for each thread, so that two of them fit its cache. CUDA: 32 MB, where a kernel takes
# longer than its launch.
TILE_VALUES = {"cpu": 2**17, "cuda": 2**23}


class Tile(NamedTuple):
    """A part of the matrix of logits, in a band of rows.

    Attributes:
        columns: of the candidates.
        mirrored: the columns as anchors, where the tile also stands for its mirrored image; else None.
        left_out: diagonals of the tile (0: from its first corner) whose pairs do not count.
    """

    columns: slice
    mirrored: slice | None
    left_out: tuple[int, ...]


class Term(NamedTuple):
    """f(s) and f'(s) on a tile of logits S (r, c), which both may overwrite; a pair that does not count is -inf in S.

    Attributes:
        sums: (S, threshold_i (r, 1), threshold_j (c)) -> sums of the rows (K, r) and of the columns (K, c).
        slopes: (S, threshold_i, threshold_j, w_i (r, 1), w_j (c), scratch like S) -> (w_i + w_j) f'(S), (r, c).
        outputs: K.
        has_threshold: whether f depends on its anchor's threshold; if not, None is passed.
    """

    sums: Callable[..., tuple[Tensor, Tensor]]
    slopes: Callable[..., Tensor]
    outputs: int = 1
    has_threshold: bool = False


def _exp_sums(logits: Tensor, threshold_i: None, threshold_j: None) -> tuple[Tensor, Tensor]:
    e = logits.exp_()
    return e.sum(1)[None], e.sum(0)[None]


def _exp_slopes(logits, threshold_i, threshold_j, w_i, w_j, scratch) -> Tensor:
    return logits.exp_().mul_(torch.add(w_i, w_j, out=scratch))


def _softplus_sums(logits: Tensor, threshold_i: None, threshold_j: None) -> tuple[Tensor, Tensor]:
    # log(1 + e^s) = max(s, 0) + log1p(e^-|s|), which is exact at both ends.
    value = logits.abs().neg_().exp_().log1p_().add_(logits.clamp_(min=0))
    return value.sum(1)[None], value.sum(0)[None]


def _softplus_slopes(logits, threshold_i, threshold_j, w_i, w_j, scratch) -> Tensor:
    return logits.sigmoid_().mul_(torch.add(w_i, w_j, out=scratch))


def _hinge_sums(logits: Tensor, threshold_i: Tensor, threshold_j: Tensor) -> tuple[Tensor, Tensor]:
    sums = []
    for threshold, dim in ((threshold_i, 1), (threshold_j, 0)):
        above = logits - threshold
        active = (above > 0).sum(dim).to(logits.dtype)
        sums.append(torch.stack((above.clamp_(min=0).sum(dim), active)))
    return sums[0], sums[1]


def _hinge_slopes(logits, threshold_i, threshold_j, w_i, w_j, scratch) -> Tensor:
    torch.mul(logits > threshold_i, w_i, out=scratch)
    return scratch.add_((logits > threshold_j) * w_j)


EXP = Term(_exp_sums, _exp_slopes)
SOFTPLUS = Term(_softplus_sums, _softplus_slopes)
HINGE = Term(_hinge_sums, _hinge_slopes, 2, has_threshold=True)  # max(s - threshold, 0), and how many are above 0


def bands(
    rows: int, columns: int, start: int, left_out: tuple[int, ...], tile: tuple[int, int]
) -> Iterator[tuple[slice, list[Tile]]]:
    """Bands of rows, in tiles that cover each pair of an anchor and a candidate once, by itself or as a mirrored image.

    Args:
        rows: this rank's anchors, which are the candidates `start` ... `start + rows - 1`.
        columns: all candidates.
        left_out: pairs (i, i + k) of own anchors do not count, nor do their mirrored images, for these k >= 0.
        tile: height and width.
    """
    height, width = tile
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        # In this rank's own square: the tile on the diagonal, then those right of it, which stand for both triangles.
        offsets = {sign * k for k in left_out for sign in (1, -1)}
        band = [Tile(slice(start + top, start + bottom), None, tuple(k for k in offsets if abs(k) < bottom - top))]
        for left in range(bottom, rows, width):
            right = min(left + width, rows)
            diagonals = [k + top - left for k in left_out]
            inside = tuple(k for k in diagonals if top - bottom < k < right - left)
            band.append(Tile(slice(start + left, start + right), slice(left, right), inside))
        for begin, end in ((0, start), (start + rows, columns)):
            band += [Tile(slice(left, min(left + width, end)), None, ()) for left in range(begin, end, width)]
        yield slice(top, bottom), band


def rectangle(
    rows: int, columns: int, start: int, own: int, left_out: tuple[int, ...], tile: tuple[int, int]
) -> Iterator[tuple[slice, list[Tile]]]:
    """As `bands`, of anchors that are none of the candidates.

    Args:
        rows: this rank's anchors.
        columns: all candidates.
        start, own: this rank's candidates are `start` ... `start + own - 1`.
        left_out: pairs of anchor i and this rank's candidate i + k do not count, for these k of either sign.
        tile: height and width.
    """
    height, width = tile
    for top in range(0, rows, height):
        bottom, band = min(top + height, rows), []
        for begin, end, of_this_rank in ((0, start, False), (start, start + own, True), (start + own, columns, False)):
            for left in range(begin, end, width):
                right = min(left + width, end)
                diagonals = [k + top + start - left for k in left_out] if of_this_rank else []
                inside = tuple(k for k in diagonals if top - bottom < k < right - left)
                band.append(Tile(slice(left, right), None, inside))
        yield slice(top, bottom), band


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Height and width of a tile that suits the device."""
    values = TILE_VALUES.get(device.type, TILE_VALUES["cuda"])
    if device.type == "cpu":
        values *= torch.get_num_threads()
    width = 2 ** (values.bit_length() // 2)
    return values // width, width


def sums(
    anchors: Tensor,
    candidates: Tensor,
    start: int,
    temperature: float,
    term: Term,
    left_out: tuple[int, ...] = (0,),
    thresholds: Tensor | None = None,
    with_largest: bool = True,
    tile: tuple[int, int] | None = None,
    own: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each anchor's sum of a term over its pairs, and its largest logit among them.

    Args:
        anchors: (m, D), normalised; they are the candidates `start` ... `start + m - 1`.
        candidates: (M, D), normalised.
        start: see `anchors`.
        temperature: divides the cosines.
        term: what is summed.
        left_out: see `tiles`.
        thresholds: (M,) of each candidate, for a term that has one.
        with_largest: look for the largest logit; a tenth of the work on a CPU.
        tile: height and width; by the device if not given.
        own: if given, the anchors are no candidates, and so many of those are this rank's, from `start` on: see
            `rectangle`.
    Returns:
        (m, K) for the K outputs of the term, and (m,), -inf for an anchor without pairs or if not looked for.
    """
    matrix = _Matrix(anchors, candidates, start, temperature, left_out, tile, own)
    total = matrix.zeros(term.outputs, len(anchors))
    largest = matrix.zeros(len(anchors)).fill_(-torch.inf)
    reduce = compiled_on(term.sums, anchors.device.type)
    for rows, band in matrix:
        threshold_i = thresholds[start:][rows, None] if thresholds is not None else None
        for columns, mirrored, logits in band:
            threshold_j = thresholds[columns] if thresholds is not None else None
            if with_largest:
                _maximum(largest[rows], logits.amax(1))
                if mirrored:
                    _maximum(largest[mirrored], logits.amax(0))
            row_sums, column_sums = reduce(logits, threshold_i, threshold_j)
            total[:, rows].add_(row_sums)
            if mirrored:
                total[:, mirrored].add_(column_sums)
    return total.T, largest


def gradient(
    anchors: Tensor,
    candidates: Tensor,
    start: int,
    temperature: float,
    term: Term,
    weights: Tensor,
    left_out: tuple[int, ...] = (0,),
    thresholds: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    own: int | None = None,
    anchor_weights: Tensor | None = None,
) -> Tensor:
    """What the sums of all anchors of all ranks, weighted, pull on this rank's: sum_j (w_i + w_j) f'(s_ij) z_j.

    The gradient with respect to z_i is this divided by the temperature.

    Args:
        weights: (M,), of each candidate as an anchor.
        anchor_weights: (m,), of each anchor, with `own` only: else they are the weights of the same candidates.
        anchors, candidates, start, temperature, term, left_out, thresholds, tile, own: as for `sums`.
    Returns:
        (m, D).
    """
    matrix = _Matrix(anchors, candidates, start, temperature, left_out, tile, own)
    total = matrix.zeros(*anchors.shape)
    scratch = torch.empty_like(matrix.buffer)
    slope = compiled_on(term.slopes, anchors.device.type)
    for rows, band in matrix:
        as_candidates = slice(start + rows.start, start + rows.stop)
        z_i, total_i = anchors[rows], total[rows]
        weight_i = weights[as_candidates, None] if anchor_weights is None else anchor_weights[rows, None]
        threshold_i = thresholds[as_candidates, None] if thresholds is not None else None
        for columns, mirrored, logits in band:
            threshold_j = thresholds[columns] if thresholds is not None else None
            room = scratch[: logits.numel()].view_as(logits)
            slopes = slope(logits, threshold_i, threshold_j, weight_i, weights[columns], room)
            _add_product(total_i, slopes, candidates[columns])
            if mirrored:
                _add_product(total[mirrored], slopes.T, z_i)
    return total


def closest_below(
    anchors: Tensor,
    candidates: Tensor,
    start: int,
    temperature: float,
    thresholds: Tensor,
    left_out: tuple[int, ...] = (0,),
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each anchor's pair with the largest logit below the anchor's threshold: a semi-hard negative.

    Args:
        thresholds: (m,), of each anchor.
        anchors, candidates, start, temperature, left_out, tile: as for `sums`.
    Returns:
        The pairs' logits (m,), -inf where there is none; their candidates' numbers (m,); and, as `sums` does, each
        anchor's largest logit (m,).
    """
    matrix = _Matrix(anchors, candidates, start, temperature, left_out, tile)
    best = matrix.zeros(len(anchors)).fill_(-torch.inf)
    largest, number = best.clone(), torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    for rows, band in matrix:
        for columns, mirrored, logits in band:
            sides = [(rows, columns.start, 1), (mirrored, start + rows.start, 0)]
            for anchor, first, dim in sides[: 2 if mirrored else 1]:
                _maximum(largest[anchor], logits.amax(dim))
                below = logits.where(logits < thresholds[anchor].unsqueeze(dim), -torch.inf)
                value, place = below.max(dim)
                better = value > best[anchor]
                best[anchor] = torch.where(better, value, best[anchor])
                number[anchor] = torch.where(better, place + first, number[anchor])
    return best, number, largest


def histogram(z: Tensor, views: int, bins: int = 64, tile: tuple[int, int] | None = None) -> Tensor:
    """How the cosines of the negatives are distributed: of all pairs of projections of two images.

    Args:
        z: (views * N, D), normalised, view after view.
        views: of each image.
        bins: of one width, from -1 to 1.
        tile: height and width; by the device if not given.
    Returns:
        (bins,) int64 on the device of z: pairs, each counted once from either end.
    """
    counts = torch.zeros(1 + bins, dtype=torch.int64, device=z.device)  # what is left out, then the bins
    same_image = tuple(range(0, len(z), len(z) // views))
    for _, band in _Matrix(z, z, 0, 1.0, same_image, tile):
        for _, mirrored, cosines in band:
            # To int before 1 is added: -1, which rounds to a little less, is of the first bin.
            place = cosines.add_(1).mul_(bins / 2).clamp_(-1, bins - 1).int().add_(1)
            counts += torch.bincount(place.flatten(), minlength=1 + bins) * (2 if mirrored else 1)
    return counts[1:]


class _Matrix:
    """The logits of all pairs, one tile after the other in one buffer: (rows, [(columns, mirrored, logits), ...])."""

    def __init__(
        self,
        anchors: Tensor,
        candidates: Tensor,
        start: int,
        temperature: float,
        left_out: tuple[int, ...],
        tile: tuple[int, int] | None,
        own: int | None = None,
    ):
        rows, columns = len(anchors), len(candidates)
        height, width = tile or tile_shape(anchors.device)
        height, width = min(height, rows), min(width, columns)
        self.anchors, self.candidates, self.temperature = anchors, candidates, temperature
        self.dtype = torch.promote_types(candidates.dtype, torch.float32)
        self.buffer = self.zeros(height * max(height, width))
        if own is None:
            self.bands = bands(rows, columns, start, left_out, (height, width))
        else:
            self.bands = rectangle(rows, columns, start, own, left_out, (height, width))

    def zeros(self, *shape: int) -> Tensor:
        return self.anchors.new_zeros(shape, dtype=self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Iterator[tuple[slice, slice | None, Tensor]]]]:
        for rows, band in self.bands:
            yield rows, self._band(self.anchors[rows], band)

    def _band(self, z_i: Tensor, band: list[Tile]) -> Iterator[tuple[slice, slice | None, Tensor]]:
        for columns, mirrored, left_out in band:
            z_j = self.candidates[columns]
            logits = self.buffer[: len(z_i) * len(z_j)].view(len(z_i), len(z_j))
            if z_i.dtype == self.dtype:
                logits.addmm_(z_i, z_j.T, beta=0, alpha=1 / self.temperature)
            else:  # operands of 16 bits, sums of 32
                torch.mm(z_i, z_j.T, out_dtype=self.dtype, out=logits).div_(self.temperature)
            for k in left_out:
                logits.diagonal(k).fill_(-torch.inf)
            yield columns, mirrored, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a.to(b.dtype), b, out_dtype=total.dtype)


def _maximum(largest: Tensor, other: Tensor) -> None:
    torch.maximum(largest, other, out=largest)


@functools.cache
def compiled_on(function: Callable, device_type: str) -> Callable:
    """On CUDA, where Triton is there, the element-wise work on a tile is a few kernels in place of ten."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        return torch.compile(function, dynamic=True)
    return function
