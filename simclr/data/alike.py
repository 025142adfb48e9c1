"""Images that are nearly the same: by a 64-bit hash of what they show, then by their pixels.

The hash is that of the low frequencies of a gray image of 32 pixels (its cosine transform, each coefficient above or
below their median; Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions"). Another size,
another quality of a JPEG or a little more light change few of its bits. Turned and cropped images have others.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from simclr.data.decode import ReadingRules, UnreadableError, read_images

NEAR_BITS = 6  # of 64 that may differ
_NEAR_LEVELS = 6.0  # of 255 that pixels may differ by, on average
_SIDE, _LOW = 32, 8  # pixels of what is hashed, frequencies a side
# Pixels of what is compared: so few that grain and the blocks of a JPEG are averaged away. Of 9 000 images of CIFAR-10
# 16 pairs have near hashes; here they differ by 7 levels and more, and a JPEG of quality 50 by 3 to 5.
_SEEN = 16
_BAND, _BANDS = 16, 4  # two hashes that differ in 7 bits or fewer agree but for one bit in a band of a quarter of them
_MOST = 20_000  # pairs whose pixels are compared

_frequency, _place = torch.arange(_LOW)[:, None], torch.arange(_SIDE)[None]
_COSINES = torch.cos(torch.pi * (2 * _place + 1) * _frequency / (2 * _SIDE))  # (8, 32), DCT-II


def picture_hash(image: Tensor) -> int:
    """The hash of what an image shows, 0 to 2^64 - 1.

    Args:
        image: (C, S, S), any type.
    """
    gray = adaptive_avg_pool2d(image.float().mean(0, keepdim=True), _SIDE)[0]
    low = (_COSINES @ gray @ _COSINES.T).flatten()
    low[0] = 0  # the mean is no part of what is shown
    return int(np.packbits((low > low.median()).numpy()).view(">u8")[0])


def near_hashes(hashes: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """Pairs of hashes that differ in few bits, without comparing each with each.

    Args:
        hashes: (N,) uint64, no two equal.
        bits: how many may differ, 7 at most.
    Returns:
        (P, 2) int64, places i < j, in their order.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in range(_BANDS):
        keys = (hashes >> np.uint64(_BAND * band)).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        placed = keys[order]
        for flipped in (0, *(1 << i for i in range(_BAND))):
            wanted = keys ^ np.uint16(flipped)
            first, last = (np.searchsorted(placed, wanted, side) for side in ("left", "right"))
            for part in np.array_split(np.arange(len(hashes)), max(1, int((last - first).sum()) >> 22)):
                count = last[part] - first[part]
                i = np.repeat(part, count)
                within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
                j = order[np.repeat(first[part], count) + within]
                i, j = i[i < j], j[i < j]
                near = _ones(hashes[i] ^ hashes[j]) <= bits
                found.append(np.stack((i[near], j[near]), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of uint64 words are one."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(1) if len(words) else np.zeros(0)


def nearly_equal(
    paths: Sequence[str], hashes: Sequence[int], rules: ReadingRules, threads: int = 1
) -> tuple[list[tuple[int, int]], int]:
    """Images that nearly equal an earlier one, which may be equal to it too.

    Args:
        paths: N files that can be read.
        hashes: N, as `picture_hash` gives them.
        rules: how files are read.
        threads: how many decode at once.
    Returns:
        (i, j), sorted: image i looks like image j, the first of those that do, j < i; and how many pairs of unlike
        hashes were not looked at, because they were too many.
    """
    distinct, first = np.unique(np.asarray(hashes, dtype=np.uint64), return_index=True)
    pairs = near_hashes(distinct)
    # Of the images with one hash the first stands for all, and each of the others is compared with it.
    first_of = dict(zip(distinct.tolist(), first.tolist(), strict=True))
    same = [(i, first_of[of]) for i, of in enumerate(hashes) if first_of[of] != i]
    unlike = sorted(tuple(sorted((int(first[a]), int(first[b])), reverse=True)) for a, b in pairs)
    wanted = [(i, j) for i, j in (*same, *unlike)]
    looked_at = wanted[:_MOST]
    found: dict[int, int] = {}
    for start in range(0, len(looked_at), 512):
        part = looked_at[start : start + 512]
        places = sorted({i for pair in part for i in pair})
        try:
            seen = read_images([paths[i] for i in places], _SEEN, threads=threads, rules=rules)
        except UnreadableError:
            continue  # gone meanwhile
        where = {place: k for k, place in enumerate(places)}
        levels = seen.float() if seen.dtype == torch.uint8 else seen.float() / 257  # of 255
        for i, j in part:
            if (levels[where[i]] - levels[where[j]]).abs().mean() <= _NEAR_LEVELS:
                found[i] = min(j, found.get(i, j))
    return sorted(found.items()), len(wanted) - len(looked_at)
