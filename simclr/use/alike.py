"""Images whose features are nearly the same, and which images belong together."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simclr.eval.features import check_finite

_ROWS = 2048  # compared with as many at a time


def alike_by_features(features: np.ndarray, min_cosine: float) -> list[tuple[int, int, float]]:
    """Rows that look like an earlier one.

    Args:
        features: (N, F) float32, read some at a time.
        min_cosine: from which cosine similarity on two are alike, 0 to 1.
    Returns:
        (i, j, cosine), sorted: row j is the first that row i is like, j < i. One of each i at most.
    Raises:
        ValueError: if features are not finite.
    """
    first: dict[int, tuple[int, float]] = {}
    for top in range(0, len(features), _ROWS):
        rows = _unit(features, top)
        for left in range(0, top + 1, _ROWS):
            cosines = rows @ (rows if left == top else _unit(features, left)).T
            near = cosines >= min_cosine
            if left == top:
                near = near.tril(-1)
            for i in near.any(1).nonzero().flatten().tolist():
                if top + i not in first:
                    j = int(near[i].int().argmax())
                    first[top + i] = (left + j, float(cosines[i, j]))
    return [(i, j, cosine) for i, (j, cosine) in sorted(first.items())]


def _unit(features: np.ndarray, start: int) -> Tensor:
    rows = torch.from_numpy(np.array(features[start : start + _ROWS]))
    check_finite("features", rows)
    return normalize(rows, dim=1)


def groups_of(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """What belongs together by pairs that do: sorted lists of two and more."""
    home: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := home.setdefault(name, name)) != name:
            name = above
        return name

    for one, other in pairs:
        a, b = sorted((root(one), root(other)))
        home[b] = a
    groups: dict[str, list[str]] = {}
    for name in list(home):
        groups.setdefault(root(name), []).append(name)
    return sorted(sorted(group) for group in groups.values())
