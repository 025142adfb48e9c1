"""A part of each class held back: the test of a set that has none, the choice of a classifier's regularisation."""

import torch
from torch import Tensor

from simclr.seeding import epoch_order


def stratified_split(labels: Tensor, fraction: float, *, seed: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Numbers of the images to keep and to hold back, classes in proportion: a function of the arguments alone.

    Of each class about this fraction is held back: one image at least of a class that has two, and never the last one,
    because no classifier can name a class that it has not seen.

    Args:
        labels: (N,) integer >= 0.
        fraction: to hold back, 0 to 1.
        seed: of the choice.
        limit: keep about so many of every N images, in proportion, and leave the rest out of both; all if None.
    Returns:
        kept (n,) and held (m,) int64 on the labels' device: classes one after the other, in random order within them.
    """
    size = len(labels)
    order = epoch_order(seed, 0, size).to(labels.device)
    counts = labels.bincount()
    order = order[labels[order].argsort(stable=True)]
    own = labels[order]
    place = torch.arange(size, device=labels.device) - (counts.cumsum(0) - counts)[own]  # within the class
    held = (counts * fraction).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    kept = counts - held
    if limit is not None:
        kept = (kept * min(1.0, limit / size)).ceil().long()
    is_held = place < held[own]
    return order[~is_held & (place < (held + kept)[own])], order[is_held]
