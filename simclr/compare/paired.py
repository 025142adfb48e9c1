"""Two runs on the same test images: McNemar's test (McNemar 1947), which two separate intervals cannot replace."""

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from simclr.compare.runs import Run
from simclr.eval.predictions import unpacked


@dataclass(frozen=True)
class Pair:
    """A run beside the best one on the same test images.

    Attributes:
        best, other: names.
        images: how many both have classified.
        only_best, only_other: images that one got right and the other did not.
        difference: accuracy of the best less that of the other, a fraction.
        interval: of 95 %, of the difference between paired proportions (Wald).
        p: exact, two-sided, raised by Holm's method to stand for all comparisons on these images.
    """

    best: str
    other: str
    images: int
    only_best: int
    only_other: int
    difference: float
    interval: tuple[float, float]
    p: float


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin for each image that the two classify differently.

    Args:
        only_a, only_b: how many images one of them got right alone.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    tail, term = 0, 1
    for k in range(least + 1):  # whole numbers: no rounding, however many images
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def holm(ps: list[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def paired(runs: list[Run]) -> tuple[list[Pair], list[str]]:
    """Each run beside the best one that was measured on the same test images.

    Returns:
        The pairs, and the names of runs that have an accuracy and no partner, whose intervals alone must do.
    """
    measured = [(run, correct) for run in runs if run.result and (correct := _correct(run.result)) is not None]
    measured.sort(key=lambda found: found[1][0])
    pairs: list[Pair] = []
    for _, group in groupby(measured, key=lambda found: found[1][0]):
        pairs += _beside_the_best([(run.name, right) for run, (_, right) in group])
    named = {name for pair in pairs for name in (pair.best, pair.other)}
    return pairs, [run.name for run in runs if run.result and run.name not in named]


def _beside_the_best(measured: list[tuple[str, list[bool]]]) -> list[Pair]:
    measured = sorted(measured, key=lambda found: -sum(found[1]))
    (best, right), others = measured[0], measured[1:]
    pairs = [_pair(best, right, other, wrong) for other, wrong in others]
    return [replace(pair, p=p) for pair, p in zip(pairs, holm([pair.p for pair in pairs]), strict=True)]


def _pair(best: str, a: list[bool], other: str, b: list[bool]) -> Pair:
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    difference = (only_a - only_b) / n
    half = 1.96 * math.sqrt(max(0.0, only_a + only_b - (only_a - only_b) ** 2 / n)) / n
    interval = difference - half, difference + half
    return Pair(best, other, n, only_a, only_b, difference, interval, mcnemar(only_a, only_b))


def _correct(result: dict[str, Any]) -> tuple[str, list[bool]] | None:
    """(which test images, whether each was classified correctly); None if the record does not have them."""
    kept = result.get("predictions")
    try:
        predictions, labels = unpacked(kept["linear"]), unpacked(kept["labels"])  # type: ignore[index]
        if len(predictions) != len(labels) or len(labels) == 0:
            return None
        return str(kept["images_sha256"]), (predictions == labels).tolist()  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
