"""An experiment as data: what a file in `configs/ablations` says, checked."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simclr.checks import listed

WORKS = ("pretrain", "supervised", "responses", "counts")
FIGURES = ("bars", "lines", "heatmap", "curves")
RULES = {  # kind: what it needs beside it
    "difference": {"a", "b", "margin"},
    "interaction": {"a", "b", "c", "d", "margin"},
    "below": {"a", "b", "margin"},
    "equal": {"a", "b", "margin"},
    "monotone": {"cells", "direction"},
    "counts": set(),
    "all": {"of"},
}
_KEYS = {"title", "question", "paper", "cost", "work", "recipe", "seeds", "base", "cells", "full", "metrics", "rule"}
_OPTIONAL = {"figure", "notes", "earlier", "recipe", "base", "full", "seeds"}


@dataclass(frozen=True)
class PaperTable:
    """What a paper reports.

    Attributes:
        name: of the table or figure, for people.
        source: paper, identifier and place in it.
        values: by the name of the cell that stands beside them, or by the paper's own row.
        printed: the same as the paper prints them, which tells how many digits there are.
        unit, protocol: of the values; what they were measured with.
        metric: of ours that stands beside the values, if one does.
        says: a finding without numbers.
    """

    name: str
    source: str
    values: dict[str, float]
    unit: str = ""
    protocol: str = ""
    metric: str | None = None
    says: str = ""
    printed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One setting of an experiment.

    Attributes:
        name: unique in it.
        work: what computes it, of WORKS.
        recipe: of `configs/pretrain`, that the settings override.
        settings: for pretrain, options of `simclr train`, and `probe.*` of `simclr.ablate.probes`; otherwise arguments
            of the program that does the work.
        start: the cell whose run this one measures in another way, if any.
    """

    name: str
    work: str
    recipe: str | None
    settings: dict[str, Any]
    start: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A finding that can be looked at again.

    Attributes:
        name, title, question: for people.
        paper: what is known.
        minutes: what the default form is expected to take on two cores.
        measured: where and when that was measured; empty if it was not.
        seeds: runs of each cell.
        cells: of the form that was asked for.
        metrics: name -> meaning and unit; the first is what the figure shows.
        rule: how the verdict is reached, published with the experiment.
        figure: kind and arrangement; for bars `metric`, and `beside`, a second one.
        notes: how this differs from the paper.
        earlier: forms that were run before this one, and what they gave.
    """

    name: str
    title: str
    question: str
    paper: tuple[PaperTable, ...]
    minutes: float
    measured: str
    seeds: int
    cells: tuple[Cell, ...]
    metrics: dict[str, str]
    rule: dict[str, Any]
    figure: dict[str, Any] = field(default_factory=lambda: {"kind": "bars"})
    notes: str = ""
    earlier: str = ""
    full: bool = False

    def cell(self, name: str) -> Cell:
        """A cell by its name."""
        return next(cell for cell in self.cells if cell.name == name)


def read_experiment(path: Path, full: bool = False) -> Experiment:
    """An experiment of a file.

    Args:
        path: YAML.
        full: the form for GPUs, with the settings and cells of `full` over the others; a cell that is null there is
            none of it, and a rule, figure or notes there stand in place of the others.
    Raises:
        ValueError: if something is missing, unknown or names a cell that is not there, with the file and all of it.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no experiment: a mapping with {listed(sorted(_KEYS - _OPTIONAL))} was needed.")
    problems = [f"unknown key {key}" for key in content if key not in _KEYS | _OPTIONAL]
    problems += [f"{key} is missing" for key in sorted(_KEYS - _OPTIONAL) if not content.get(key)]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    paper, problems = _paper(content["paper"])
    cells = _cells(content, full, problems)
    names, metrics = {cell.name for cell in cells}, dict(content["metrics"])
    of_full: dict[str, Any] = (content.get("full") if full else None) or {}
    rule: dict[str, Any] = of_full.get("rule") or content["rule"]
    problems += _rule_problems(rule, names, metrics)
    problems += [f"{t.name} stands beside {t.metric}, no metric" for t in paper if t.metric not in (None, *metrics)]
    figure: dict[str, Any] = of_full.get("figure") or content.get("figure") or {"kind": "bars"}
    if figure.get("kind") not in FIGURES:
        problems.append(f"figure.kind={figure.get('kind')} is not one of {', '.join(FIGURES)}")
    shown = {key: figure[key] for key in ("metric", "beside") if key in figure}
    problems += [f"figure.{key}={name} is no metric" for key, name in shown.items() if name not in metrics]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return Experiment(
        name=path.stem,
        title=content["title"],
        question=content["question"],
        paper=tuple(paper),
        minutes=float(content["cost"]["minutes"]),
        measured=str(content["cost"].get("measured") or ""),
        seeds=int({**content, **of_full}.get("seeds", 1)),
        cells=tuple(cells),
        metrics=metrics,
        rule=dict(rule),
        figure=dict(figure),
        notes=str(of_full.get("notes") or content.get("notes") or "").strip(),
        earlier="" if full else str(content.get("earlier") or "").strip(),
        full=full,
    )


def find(name: str, known: Mapping[str, Path]) -> Path:
    """The file of an experiment.

    Args:
        name: of one that is known, or a file of one's own.
        known: name -> file.
    Raises:
        ValueError: for neither, with the nearest name.
    """
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    plain = name.lower().replace("_", "-").replace(" ", "-").replace("colour", "color")
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5) or [n for n in known if plain and plain in n]
    meant = f"Did you mean {near[0]}? " if near else ""
    raise ValueError(f"unknown experiment {name}. {meant}simclr ablate --list shows all {len(known)}.")


def rule_in_words(rule: Mapping[str, Any]) -> str:
    """A rule as people read it."""
    kind, margin = rule["kind"], rule.get("margin")
    metric = f" in {rule['metric']}" if rule.get("metric") else ""
    if kind == "all":
        return "; and ".join(rule_in_words(part) for part in rule["of"])
    if kind == "difference" and "metric_b" in rule:
        return (
            f"of {rule['a']}, {rule['metric']} is at least {margin:g} above {rule['metric_b']}, and the interval "
            "excludes 0"
        )
    if kind == "difference":
        return f"{rule['a']} is at least {margin:g} above {rule['b']}{metric}, and the interval excludes 0"
    if kind == "interaction":
        return (
            f"({rule['a']} - {rule['b']}) is at least {margin:g} more than ({rule['c']} - {rule['d']}){metric}, and "
            "the interval excludes 0"
        )
    if kind == "below":
        return f"the interval of {rule['a']} - {rule['b']} lies below {margin:g}{metric}"
    if kind == "equal" and "metric_b" in rule:
        return f"of {rule['a']}, the interval of {rule['metric']} - {rule['metric_b']} lies within {margin:g} of 0"
    if kind == "equal":
        return f"the interval of {rule['a']} - {rule['b']} lies within {margin:g} of 0{metric}"
    if kind == "monotone":
        return f"each of {', '.join(rule['cells'])} is {rule['direction']} than the one before{metric}"
    return "every count is the paper's, rounded or cut to the last digit that it prints"


def _paper(given: Any) -> tuple[list[PaperTable], list[str]]:
    tables, problems = [], []
    fields = set(PaperTable.__dataclass_fields__) - {"printed"}
    for number, table in enumerate(given if isinstance(given, list) else [given], 1):
        about = f"paper table {number}"
        if not isinstance(table, dict):
            problems.append(f"{about} is no mapping")
            continue
        about = f"{about} ({table.get('name', 'without a name')})"
        missing = [key for key in ("name", "source") if not table.get(key)]
        problems += [f"{about} has no {key}" for key in missing]
        problems += [f"{about}: unknown key {key}" for key in table if key not in fields]
        if not table.get("values") and not table.get("says"):
            problems.append(f"{about} has neither values nor says")
        values = table.get("values") or {}
        printed = {str(key): str(v) for key, v in values.items()}  # in quotes in the file where it ends in a zero
        bad = [key for key, text in printed.items() if not re.fullmatch(r"-?\d+(\.\d+)?", text)]
        problems += [f"{about}: {key} is no number" for key in bad]
        if not problems:
            numbers = {key: float(text) for key, text in printed.items()}
            tables.append(PaperTable(**{**table, "values": numbers, "printed": printed}))
    return tables, problems


def _cells(content: Mapping[str, Any], full: bool, problems: list[str]) -> list[Cell]:
    of_full = (content.get("full") or {}) if full else {}
    more = of_full.get("cells") or {}
    given = {
        name: settings for name, settings in {**content["cells"], **more}.items() if more.get(name, {}) is not None
    }
    base = {**(content.get("base") or {}), **(of_full.get("base") or {})}
    cells = []
    for name, settings in given.items():
        settings = dict(settings or {})
        work = settings.pop("work", content["work"])
        recipe = of_full.get("recipe", content.get("recipe"))
        recipe, start = settings.pop("recipe", recipe), settings.pop("start", None)
        own_base = {key: v for key, v in base.items() if work == content["work"] or key.startswith(f"{work}.")}
        own_base = {key.removeprefix(f"{work}."): v for key, v in own_base.items() if not _of_another(key, work)}
        if work not in WORKS:
            problems.append(f"cell {name}: work={work} is not one of {', '.join(WORKS)}")
        if start is not None and work != "pretrain":
            problems.append(f"cell {name} starts from {start}, which work={work} does not")
        if start is not None and start not in given:
            problems.append(f"cell {name} starts from {start}, which is no cell")
        cells.append(Cell(str(name), work, recipe, {**own_base, **settings}, start))
    return cells


def _of_another(key: str, work: str) -> bool:
    return any(key.startswith(f"{other}.") for other in WORKS if other != work)


def _rule_problems(rule: Any, cells: Iterable[str], metrics: Iterable[str]) -> list[str]:
    if not isinstance(rule, dict) or rule.get("kind") not in RULES:
        return [f"rule.kind is not one of {', '.join(RULES)}"]
    kind = rule["kind"]
    problems = [f"rule {rule['kind']} has no {key}" for key in sorted(RULES[rule["kind"]] - rule.keys())]
    unknown = (
        rule.keys()
        - RULES[rule["kind"]]
        - {"kind", "metric"}
        - ({"metric_b"} if kind in ("difference", "equal") else set())
    )
    problems += [f"rule {rule['kind']}: unknown key {key}" for key in sorted(unknown)]
    if problems:
        return problems
    same = kind in ("difference", "equal", "below") and rule["a"] == rule["b"]
    if same and rule.get("metric_b") in (None, rule.get("metric")):
        problems.append(f"rule {kind} compares {rule['a']} with itself")
    named = [rule[key] for key in ("a", "b", "c", "d") if key in rule] + list(rule.get("cells", ()))
    problems += [f"rule names the cell {name}, which is not there" for name in named if name not in set(cells)]
    of_metrics = [rule[key] for key in ("metric", "metric_b") if key in rule]
    problems += [f"rule names the metric {name}, which is not there" for name in of_metrics if name not in set(metrics)]
    if rule.get("direction") not in (None, "lower", "higher"):
        problems.append("rule.direction is not lower or higher")
    return problems + [found for part in rule.get("of", ()) for found in _rule_problems(part, cells, metrics)]
