"""Whether a finding held, by a rule that was published beforehand.

An effect is a sum of weighted cells, such as a - b. Over several seeds it is tested by the paired t of the seeds' sums;
of one seed, where every cell has an answer for each of the same images, by the sum of each image: exactly, by McNemar's
test, where two cells are compared. A number without either has no interval, and resolves nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simclr.ablate.experiment import Experiment
from simclr.ablate.results import Result
from simclr.compare.paired import mcnemar
from simclr.eval.predictions import unpacked

HELD, NOT_RESOLVED, REVERSED, NOT_RUN = "held", "not resolved", "reversed", "not run"
# Points that one seed must differ by: another seed of such runs differs by about two (standard deviation).
ONE_SEED = 3.0
Results = Mapping[tuple[str, int], Result]


@dataclass(frozen=True)
class Effect:
    """A sum of weighted cells.

    Attributes:
        value: its mean over seeds.
        interval: of 95 %; None where nothing tells its spread.
        p: two-sided, of an effect of 0; None likewise.
        n: seeds.
        images: that one seed was tested on; 0 where seeds were compared.
        test: in words.
    """

    value: float
    interval: tuple[float, float] | None
    p: float | None
    n: int
    images: int = 0
    test: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a rule says.

    Attributes:
        word: held, not resolved, reversed or not run.
        sentence: for people.
        effect: that decided; of a rule of several parts, that of the first part with the word of the whole.
        parts: of such a rule.
    """

    word: str
    sentence: str
    effect: Effect | None = None
    parts: tuple["Verdict", ...] = ()


Weights = Mapping[tuple[str, str], float]  # of cells and their metrics


def effect_of(weights: Weights, results: Results) -> Effect | None:
    """A sum of weighted cells; None if one of them has no number.

    Args:
        weights: of a cell and one of its metrics each.
        results: by cell and seed.
    """
    of_cells = {
        (cell, metric): {seed: r for (name, seed), r in results.items() if name == cell and metric in r.metrics}
        for cell, metric in weights
    }
    seeds = sorted(set.intersection(*(set(found) for found in of_cells.values())))
    if not seeds:
        return None
    sums = [sum(w * of_cells[key][seed].metrics[key[1]] for key, w in weights.items()) for seed in seeds]
    if len(seeds) > 1:
        return paired_t(sums)
    return _of_images(weights, {key: of_cells[key][seeds[0]] for key in weights}) or Effect(
        sums[0], None, None, 1, 0, "one run, without a spread"
    )


def paired_t(sums: Sequence[float]) -> Effect:
    """The mean of two or more numbers, with its interval and p by Student's t."""
    from scipy import stats  # type: ignore[import-untyped]  # it takes half a second to import

    n, mean = len(sums), math.fsum(sums) / len(sums)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in sums) / (n - 1))
    se = sd / math.sqrt(n)
    if se == 0:  # runs that cannot differ, such as of counts
        return Effect(mean, (mean, mean), 0.0 if mean else 1.0, n, 0, f"all {n} seeds alike")
    half = float(stats.t.ppf(0.975, n - 1)) * se
    return Effect(mean, (mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / se, n - 1)), n, 0, "paired t")


def _of_images(weights: Weights, results: Mapping[tuple[str, str], Result]) -> Effect | None:
    """Of one seed, on the same images; None if the cells were not measured on the same, or not by image."""
    hashes = {result.images.get(metric) for (_, metric), result in results.items()}
    if len(hashes) != 1 or None in hashes:
        return None
    each = {key: unpacked(result.per_image[key[1]]).double() for key, result in results.items()}
    sums = 100 * torch.stack([w * each[key] for key, w in weights.items()]).sum(0)  # (images,), points
    count, mean = len(sums), float(sums.mean())
    # As `compare`: the variance of a difference of paired proportions (Wald), without a degree of freedom less.
    se = float(sums.var(correction=0)) ** 0.5 / math.sqrt(count)
    interval = (mean - 1.96 * se, mean + 1.96 * se)
    if sorted(weights.values()) == [-1, 1]:
        p, test = mcnemar(int((sums > 0).sum()), int((sums < 0).sum())), "McNemar"
    else:
        p, test = (math.erfc(abs(mean) / se / math.sqrt(2)) if se else float(mean == 0)), "by image, normal"
    return Effect(mean, interval, p, 1, count, test)


def judge(experiment: Experiment, results: Results) -> Verdict:
    """The verdict of an experiment's rule on its results."""
    return _judge(experiment.rule, next(iter(experiment.metrics)), experiment, results)


def _judge(rule: Mapping[str, Any], metric: str, experiment: Experiment, results: Results) -> Verdict:
    metric = rule.get("metric") or metric
    kind = rule["kind"]
    if kind == "all":
        parts = tuple(_judge(part, metric, experiment, results) for part in rule["of"])
        words = [part.word for part in parts]
        order = (NOT_RUN, REVERSED, NOT_RESOLVED)
        word = next((word for word in order if word in words), HELD)
        decides = next((part for part in parts if part.word == word and part.effect is not None), parts[0])
        return Verdict(word, " ".join(part.sentence for part in parts), decides.effect, parts)
    if kind == "counts":
        return _counts(experiment, results)
    if kind == "monotone":
        return _monotone(rule, metric, results)
    metric_b = rule.get("metric_b", metric)
    sides = [(rule["a"], metric, 1.0), (rule["b"], metric_b, -1.0)]
    sides += [(rule["c"], metric, -1.0), (rule["d"], metric, 1.0)] if kind == "interaction" else []
    weights: dict[tuple[str, str], float] = {}
    for cell, of_cell, weight in sides:  # one cell may stand on both sides of an interaction
        weights[str(cell), of_cell] = weights.get((str(cell), of_cell), 0.0) + weight
    effect = effect_of(weights, results)
    what = f"{rule['a']} - {rule['b']}" if metric_b == metric else f"{rule['a']}, {metric} - {metric_b}"
    what = f"({what}) - ({rule['c']} - {rule['d']})" if kind == "interaction" else what
    if effect is None:
        done = {cell for (cell, _), result in results.items() if result.status == "done"}
        missing = [cell for cell, _ in weights if cell not in done] or [metric]
        return Verdict(NOT_RUN, f"{what}: not run ({', '.join(missing)} missing).")
    word = word_of(kind, effect, float(rule["margin"]))
    inside = f" in {metric}" if metric_b == metric else ""
    return Verdict(word, f"{what}{inside}: {in_words(effect)}: {word}.", effect)


def word_of(kind: str, effect: Effect, margin: float) -> str:
    """The verdict on an effect.

    Args:
        kind: "difference" or "interaction": held from the margin on, if the interval lies above 0 and p is below .05;
            reversed if it lies below 0, likewise. Of one seed, nothing is either below ONE_SEED points. "below": held
            if the interval lies below the margin, reversed if above. "equal": held if it lies within the margin of 0,
            reversed if outside.
        effect: see `effect_of`.
        margin: in the metric's unit.
    """
    if effect.interval is None:
        return NOT_RESOLVED
    low, high = effect.interval
    if kind == "below":
        return HELD if high < margin else REVERSED if low > margin else NOT_RESOLVED
    if kind == "equal":
        if -margin < low and high < margin:
            return HELD
        return REVERSED if low > margin or high < -margin else NOT_RESOLVED
    sure = effect.p is not None and effect.p < 0.05
    least = ONE_SEED if effect.n == 1 and effect.images else 0.0
    if effect.value >= max(margin, least) and low > 0 and sure:
        return HELD
    return REVERSED if high < 0 and effect.value <= -least and sure else NOT_RESOLVED


def _monotone(rule: Mapping[str, Any], metric: str, results: Results) -> Verdict:
    sign = 1.0 if rule["direction"] == "higher" else -1.0
    cells = [str(cell) for cell in rule["cells"]]
    steps = [effect_of({(b, metric): 1.0, (a, metric): -1.0}, results) for a, b in itertools.pairwise(cells)]
    whole = effect_of({(cells[-1], metric): 1.0, (cells[0], metric): -1.0}, results)
    what = f"{metric} from {cells[0]} to {cells[-1]}"
    if whole is None or any(step is None for step in steps):
        return Verdict(NOT_RUN, f"{what}: not run.")
    signs = [sign * step.value for step in steps if step is not None]
    word = HELD if all(step > 0 for step in signs) else NOT_RESOLVED
    word = REVERSED if all(step < 0 for step in signs) else word
    alike = sum(step > 0 for step in signs)
    return Verdict(
        word,
        f"{what}: {in_words(whole)}, {rule['direction']} in {alike} of {len(signs)} steps: {word}.",
        whole,
    )


def agrees(ours: float, printed: float, digits: int) -> bool:
    """Whether a count is what a paper prints, rounded or cut to so many digits after the point."""
    unit = 10.0**-digits
    return (
        abs(round(ours, digits) - printed) < unit / 2 or abs(math.floor(ours / unit + 1e-9) * unit - printed) < unit / 2
    )


def counted(experiment: Experiment, results: Results) -> list[tuple[str, str, float, float, int, bool]]:
    """Cell, metric, ours, the paper's, its digits, and whether they agree, of every count that a paper prints."""
    rows = []
    for table in experiment.paper:
        for cell, printed in table.values.items() if table.metric else ():
            found = next((r for (name, _), r in results.items() if name == cell and table.metric in r.metrics), None)
            if found is not None and table.metric is not None:
                digits = len(table.printed[cell].partition(".")[2])
                ours = found.metrics[table.metric]
                rows.append((cell, table.metric, ours, printed, digits, agrees(ours, printed, digits)))
    return rows


def _counts(experiment: Experiment, results: Results) -> Verdict:
    rows = counted(experiment, results)
    wanted = sum(len(table.values) for table in experiment.paper if table.metric)
    if len(rows) < wanted:
        return Verdict(NOT_RUN, f"{len(rows)} of {wanted} counts were made: not run.")
    differ = [
        f"{metric} of {cell} {ours:.{digits + 1}f} against {printed:g}"
        for cell, metric, ours, printed, digits, ok in rows
        if not ok
    ]
    word = HELD if not differ else REVERSED if len(differ) == len(rows) else NOT_RESOLVED
    but = f" Not equal: {', '.join(differ)}." if differ else ""
    equal = f"{len(rows) - len(differ)} of {len(rows)} counts are the paper's"
    return Verdict(word, f"{equal}, rounded or cut to its last digit: {word}.{but}")


def in_words(effect: Effect) -> str:
    """An effect with its interval, p and n."""
    said = f"{effect.value:+.2f}"
    if effect.interval is not None and effect.p is not None:
        low, high = effect.interval
        p = "p < 0.001" if effect.p < 0.001 else f"p = {effect.p:.3f}"
        said += f" (95 % interval {low:+.2f} to {high:+.2f}; {effect.test}, {p}"
    else:
        said += f" ({effect.test}"
    seeds = f"n = {effect.n} seed{'s' if effect.n > 1 else ''}"
    return f"{said}; {seeds}{f', {effect.images:,} images' if effect.images else ''})"
