"""Images that are there twice, or nearly: by a hash of their pixels, or by their features and a small copy of each.

Features alone would not do: an encoder takes many images of a class for the same. Small copies alone would not either:
two photographs of a bright sky are alike.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.data.fingerprint import pixel_digest
from simclr.report.sample import Sample

COSINE, CORRELATION = 0.95, 0.95  # of features, and of small grey copies: at least
_SIDE = 12  # pixels of a small copy
_AT_ONCE = 1024  # rows of similarities
_KEPT = 64  # of the nearest pairs


@dataclass(frozen=True)
class Pair:
    """Two images: (sample, place in it) each, the cosine of their features, and whether their pixels are the same."""

    a: tuple[int, int]
    b: tuple[int, int]
    cosine: float
    same: bool


@dataclass(frozen=True)
class Alike:
    """What was found among some images.

    Attributes:
        images: how many were looked at.
        same: pairs whose pixels are the same.
        same_across: those of them that are of two samples.
        near: further pairs that reach `COSINE` and `CORRELATION`.
        pairs: the nearest pairs, equal ones first.
    """

    images: int
    same: int
    same_across: int
    near: int
    pairs: list[Pair]


def find_alike(samples: list[Sample], most: int = 12) -> Alike:
    """The pairs of images in some samples that are alike; an image of a group of equal ones stands for the group.

    Args:
        samples: of any sizes, features of one encoder.
        most: pairs to name.
    """
    digests: dict[bytes, list[tuple[int, int]]] = {}
    for number, sample in enumerate(samples):
        for place, image in enumerate(sample.pixels.contiguous().numpy()):
            digests.setdefault(pixel_digest(image), []).append((number, place))
    groups = list(digests.values())
    equal = [Pair(group[0], other, 1.0, True) for group in groups for other in group[1:]]
    equal.sort(key=lambda pair: pair.a[0] == pair.b[0])  # of a test and a training image first
    firsts = [group[0] for group in groups]
    features = torch.stack([samples[number].features[place] for number, place in firsts])
    copies = torch.cat([_small_copies(sample.pixels) for sample in samples])  # (all images, _SIDE, _SIDE)
    begins = [0, *accumulate(len(sample.index) for sample in samples)]
    copies = copies[[begins[number] + place for number, place in firsts]]
    near, nearest = _nearest_pairs(F.normalize(features.float().cpu(), dim=1), copies)
    named = [Pair(firsts[i], firsts[j], cosine, False) for cosine, i, j in nearest]
    return Alike(
        images=sum(len(sample.index) for sample in samples),
        same=len(equal),
        same_across=sum(pair.a[0] != pair.b[0] for pair in equal),
        near=near,
        # Equal ones take half of the room at most: what nobody would find without features is the rest.
        pairs=[*equal[: max(most // 2, most - len(named))], *named][:most],
    )


def _small_copies(pixels: Tensor) -> Tensor:
    """(n, _SIDE, _SIDE) float32 grey, of mean 0 and length 1, or 0 for an image of one colour."""
    grey = torch.cat([some.float().mean(1, keepdim=True) for some in pixels.cpu().split(_AT_ONCE)])  # (n, 1, S, S)
    small = F.adaptive_avg_pool2d(grey, _SIDE).squeeze(1)
    small = small - small.mean((1, 2), keepdim=True)
    return small / small.flatten(1).norm(dim=1).clamp_min(1e-3)[:, None, None]


def _nearest_pairs(directions: Tensor, copies: Tensor) -> tuple[int, list[tuple[float, int, int]]]:
    """How many pairs are alike, and the nearest of them by the cosine of their features: (cosine, i, j), i < j.

    Args:
        directions: (N, F) float32, of length 1.
        copies: (N, _SIDE, _SIDE), see `_small_copies`.
    """
    flat, mirrored = copies.flatten(1), copies.flip(2).flatten(1)
    count = 0
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(directions), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        cosine = (directions[rows] @ directions[start:].T).triu(1)  # (rows, N - start): each pair once
        alike = torch.maximum(flat[rows] @ flat[start:].T, mirrored[rows] @ flat[start:].T) >= CORRELATION
        i, j = ((cosine >= COSINE) & alike).nonzero(as_tuple=True)
        count += len(i)
        values, best = cosine[i, j].topk(min(_KEPT, len(i)))
        found += zip(values.tolist(), (start + i[best]).tolist(), (start + j[best]).tolist(), strict=True)
    found.sort(key=lambda pair: (-pair[0], pair[1:]))
    return count, [(min(1.0, cosine), i, j) for cosine, i, j in found[:_KEPT]]
