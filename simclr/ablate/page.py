"""What is left of an experiment: table, figure and verdict in its folder, and one page of all that were run."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from simclr import __version__
from simclr.ablate.experiment import Experiment, rule_in_words
from simclr.ablate.figure import figure_of
from simclr.ablate.results import RESULT_VERSION
from simclr.ablate.table import as_csv, as_markdown, number
from simclr.ablate.verdict import ONE_SEED, Results, Verdict
from simclr.files import write_atomically

VERDICT, SECTION, FIGURE, INDEX = "verdict.json", "section.md", "figure.png", "index.md"


def write_experiment(experiment: Experiment, results: Results, verdict: Verdict, out: Path, on: str) -> None:
    """Write the table (Markdown, CSV), the figure, the verdict and the section of the page.

    Args:
        experiment: what was run.
        results: by cell and seed.
        verdict: on them.
        out: its folder.
        on: images and device, for people.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = as_markdown(experiment, results)
    write_atomically(out / "table.md", table.encode())
    write_atomically(out / "table.csv", as_csv(experiment, results).encode())
    write_atomically(out / FIGURE, figure_of(experiment, results))
    record: dict[str, Any] = {
        "experiment": experiment.name,
        "verdict": asdict(verdict),
        "rule": experiment.rule,
        "on": on,
    }
    record |= {"version": RESULT_VERSION, "simclr": __version__, "full": experiment.full}
    dates = [result.date for result in results.values() if result.date]
    record |= {"date": max(dates, default=datetime.now(UTC).isoformat(timespec="seconds")), "torch": torch.__version__}
    write_atomically(out / VERDICT, (json.dumps(record, indent=1) + "\n").encode())
    torch_version = torch.__version__.partition("+")[0]
    about = f"{on}; {record['date'][:10]}, simclr {__version__}, torch {torch_version}"
    write_atomically(out / SECTION, section(experiment, table, verdict, about, out.name).encode())


def section(experiment: Experiment, table: str, verdict: Verdict, on: str, folder: str) -> str:
    """An experiment as a section that can be read without the paper; its figure lies in this folder."""
    lines = [
        f"## {experiment.title}",
        "",
        f"`simclr ablate {experiment.name}`{' `--full`' if experiment.full else ''}: {experiment.question}",
        "",
        f"**{verdict.word.capitalize()}.** {verdict.sentence}",
    ]
    lines += [
        "",
        f"Rule, published beforehand: held if {rule_in_words(experiment.rule)}.",
        "",
        f"{on[0].upper()}{on[1:]}.",
        "",
    ]
    lines += [table, f"![{experiment.title}: as published, and ours]({folder}/{FIGURE})", ""]
    if experiment.notes:
        lines += [experiment.notes, ""]
    if experiment.earlier:
        lines += [f"Earlier forms: {experiment.earlier}", ""]
    lines += ["What the paper reports:", ""]
    for paper in experiment.paper:
        said = f"{paper.says} " if paper.says else ""
        values = ", ".join(f"{name} {text}" for name, text in paper.printed.items())
        unit = f" ({paper.unit})" if paper.unit else ""
        with_what = f" {paper.protocol}." if paper.protocol else ""
        told = f"{values}." if values else ""
        lines.append(f"- {paper.name}{unit}: {said}{told}{with_what} {paper.source}.".replace("  ", " "))
    return "\n".join([*lines, ""])


def write_index(out: Path) -> Path:
    """The page that joins all experiments in a folder, in that folder.

    Args:
        out: whose folders hold one each.
    """
    path = out / INDEX
    write_atomically(path, _page(_found(out)).encode())
    return path


def write_page(out: Path, path: Path, known: Sequence[str]) -> Path:
    """The same as a page elsewhere, such as in a documentation.

    Args:
        out: whose folders hold one experiment each.
        path: of the Markdown file. Its figures are written into a folder of the same name beside it.
        known: names of all experiments, for a line about those that were not run.
    Raises:
        ValueError: if there is no experiment in the folder, or the page is no Markdown file.
    """
    if path.suffix != ".md":
        raise ValueError(f"page={path} is no Markdown file. Give it a name that ends in .md.")
    found = _found(out)
    if not found:
        raise ValueError(f"out={out} holds no experiment. Run one there: simclr ablate NAME --out {out}.")
    figures = path.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):  # of an experiment that the page has no more
        old.unlink()
    for folder, _ in found:
        write_atomically(figures / f"{folder.name}.png", (folder / FIGURE).read_bytes())
    absent = [name for name in known if name not in {folder.name for folder, _ in found}]
    text = _page(found, f"Not run yet in its present form: {', '.join(absent)}." if absent else "")
    # Figures from here on lie beside the page.
    text = re.sub(rf"\]\(([^()/]+)/{FIGURE}\)", rf"]({figures.name}/\1.png)", text)
    write_atomically(path, text.encode())
    return path


def _found(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The experiments in a folder, with what their verdicts say."""
    found = []
    for path in sorted(out.glob(f"*/{VERDICT}")):
        try:
            record = json.loads(path.read_text())
            _row(path.parent, record)
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or written by another program
            continue
        found.append((path.parent, record))
    return found


def _page(found: Sequence[tuple[Path, dict[str, Any]]], more: str = "") -> str:
    lines = ["# What the papers found, run again", ""]
    lines += [
        "Each section states what a paper reports and what was measured here, by a rule that was published with the "
        "experiment; forms that were run before are told with what they gave. *Held*, and *reversed*, where the "
        "interval lies on the other side, are about these images and networks, not the paper's. With one seed an "
        f"interval is that of these images, and another run may differ by more: below {ONE_SEED:g} points nothing is "
        "claimed.",
        "",
        "| experiment | verdict | effect (95 % interval) | n | date |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(folder, record) for folder, record in found]
    lines += ["", more] if more else []
    sections = [(folder / SECTION).read_text() for folder, _ in found if (folder / SECTION).is_file()]
    return "\n".join([*lines, "", *sections])


def _row(folder: Path, record: dict[str, Any]) -> str:
    """Of the table that the page begins with."""
    verdict, effect = record["verdict"], record["verdict"]["effect"] or {}
    low_high = effect.get("interval")
    said = number(effect.get("value")) + (f" ({number(low_high[0])} to {number(low_high[1])})" if low_high else "")
    counted = re.match(r"\d+ of \d+(?= counts)", verdict["sentence"])
    said = said or (counted[0] if counted else "")
    name = f"[{folder.name}](#{_anchor(folder)})"
    return f"| {name} | {verdict['word']} | {said} | {_n(effect)} | {record['date'][:10]} |"


def _n(effect: dict[str, Any]) -> str:
    if not effect:
        return ""
    seeds = f"{effect['n']} seed{'s' if effect['n'] > 1 else ''}"
    return f"{seeds}, {effect['images']:,} images" if effect.get("images") else seeds


def _anchor(folder: Path) -> str:
    """Of the section's heading, as GitHub and mkdocs make it."""
    file = folder / SECTION
    title = file.read_text().partition("\n")[0].removeprefix("## ") if file.is_file() else folder.name
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
