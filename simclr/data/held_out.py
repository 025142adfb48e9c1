"""The images of a training folder that are never trained on: how many, and which."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST, FRACTION = 2000, 0.02  # of a folder, by default
FEWEST = 20  # that make figures worth having, of a folder of 1 000 images: one image more or less is 5 points
_CHOICE = b"held out"  # no run's seed may change the choice: runs are compared by these images
_AT_ONCE = 2**16  # paths taken out of a `PackedPaths`, six times faster than one by one


def held_out_count(setting: float | None, images: int) -> int:
    """How many images of a folder are held out.

    Args:
        setting: a number of images, a fraction below 1, or None: 2 000 or 2 %, whichever is fewer, and none of a folder
            from which that would be fewer than 20.
        images: in the folder.
    """
    if setting is None:
        count = min(MOST, int(images * FRACTION))
        return count if count >= FEWEST else 0
    return round(setting * images) if setting < 1 else int(setting)


def held_out_numbers(root: str, paths: Sequence[str], labels: Tensor | None, count: int) -> Tensor:
    """Which images of a folder are held out: those whose names, below the folder, have the smallest hashes.

    So the choice is a function of the folder's contents, wherever it lies, and of a folder with a few images more or
    fewer it is nearly the same. Every class gives about its share: one of a size for 5 images gives 4 to 6.

    Args:
        root: the folder.
        paths: N files below it.
        labels: (N,) int64, or None.
        count: how many, up to N.
    Returns:
        (count,) int64 numbers of the paths, ascending.
    """
    below = len(os.path.join(root, ""))

    def hashes():
        for first in range(0, len(paths), _AT_ONCE):
            for path in paths[first : first + _AT_ONCE]:
                name = os.fsencode(path[below:].replace(os.sep, "/"))
                yield int.from_bytes(hashlib.blake2b(name, digest_size=8, person=_CHOICE).digest(), "little")

    keys = np.fromiter(hashes(), np.uint64, len(paths))
    order = np.argsort(keys, kind="stable")
    if labels is not None:
        classes = labels.cpu().numpy()
        of_class = order[np.argsort(classes[order], kind="stable")]  # class after class, by hash within each
        sizes = np.bincount(classes)
        starts = (sizes.cumsum() - sizes)[classes[of_class]]
        place = np.arange(len(classes)) - starts  # within the class
        # Each class spread evenly over (0, 1), from a random offset: the first `count` of all hold its share of each.
        # The offset is of other bits than those that order the class.
        offset = (keys[of_class[starts]] * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64) / 2.0**64
        order = of_class[np.lexsort((keys[of_class], (place + offset) / sizes[classes[of_class]]))]
    return torch.from_numpy(np.sort(order[:count]).astype(np.int64))
