"""Two runs on the same test images: McNemar's test (McNemar 1947), which two separate intervals cannot replace."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simclr.compare.runs import Run
from simclr.eval.predictions import unpacked
from simclr.eval.tables import name_of, settings_of_number


@dataclass(frozen=True)
class Pair:
    """A run beside the best one on the same test images.

    Attributes:
        by: what classified.
        best, other: names.
        images: how many both have classified.
        only_best, only_other: images that one got right and the other did not.
        difference: accuracy of the best less that of the other, a fraction.
        interval: of 95 %, of the difference between paired proportions (Wald).
        p: exact, two-sided, raised by Holm's method to stand for all comparisons on these images.
    """

    by: str
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
    """Each run beside the best one that was measured on the same test images, by each way of measuring.

    Returns:
        The pairs, and the names of runs that have an accuracy and no partner, whose intervals alone must do.
    """
    groups: dict[tuple[str, str], list[tuple[str, list[bool]]]] = {}
    for run in runs:
        for key, correct in _measured(run):
            groups.setdefault(key, []).append((run.name, correct))
    pairs = [pair for (by, _), group in sorted(groups.items()) for pair in _beside_the_best(by, group)]
    named = {name for pair in pairs for name in (pair.best, pair.other)}
    return pairs, [run.name for run in runs if (run.result or run.evaluation) and run.name not in named]


def meaning_of(record: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, str]:
    """What a number of `simclr eval` is of but for the encoder: for people, and as a hash, equal where all is.

    Args:
        record: whose number it is.
        result: one of its results or summaries.
    """
    data, settings = record["data"], settings_of_number(result)
    own = [part for part in settings.split("/") if part and part != result["variant"]]
    words = "; ".join(filter(None, [" ".join(own), f"{data['test_images']:,} of {data['test']}"]))
    about = [result["protocol"], result["variant"], settings, data.get("train_sha256"), data.get("test_sha256")]
    return f"{name_of(result)} ({words})", hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _measured(run: Run) -> Iterator[tuple[tuple[str, str], list[bool]]]:
    """(what classified, which images under which settings), and whether each image was classified correctly."""
    if run.result is not None:
        kept = run.result.get("predictions") or {}
        if correct := _correct(kept.get("linear"), kept.get("labels")):
            yield ("linear classifier", str(kept.get("images_sha256"))), correct
    record = run.evaluation or {"results": ()}
    for result in record["results"]:
        # Draws of labelled images are samples themselves: which of two runs' belong together nobody can say.
        if "/draw=" not in result["variant"] and (correct := _correct(result.get("predictions"), record["labels"])):
            yield meaning_of(record, result), correct


def _beside_the_best(by: str, measured: list[tuple[str, list[bool]]]) -> list[Pair]:
    measured = sorted(measured, key=lambda found: -sum(found[1]))
    (best, right), others = measured[0], measured[1:]
    pairs = [_pair(by, best, right, other, wrong) for other, wrong in others]
    return [replace(pair, p=p) for pair, p in zip(pairs, holm([pair.p for pair in pairs]), strict=True)]


def _pair(by: str, best: str, a: list[bool], other: str, b: list[bool]) -> Pair:
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    difference = (only_a - only_b) / n
    half = 1.96 * math.sqrt(max(0.0, only_a + only_b - (only_a - only_b) ** 2 / n)) / n
    interval = difference - half, difference + half
    return Pair(by, best, other, n, only_a, only_b, difference, interval, mcnemar(only_a, only_b))


def _correct(predictions: object, labels: object) -> list[bool] | None:
    """Whether each test image was classified correctly; None if a record does not have it."""
    try:
        said, true = unpacked(predictions), unpacked(labels)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return (said == true).tolist() if len(said) == len(true) > 0 else None
