"""What is left of an experiment: table, figure and verdict in its folder, and one page of all that were run."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simclr import __version__
from simclr.ablate.experiment import MARKS, Experiment, rule_in_words
from simclr.ablate.figure import figure_of
from simclr.ablate.results import RESULT_VERSION
from simclr.ablate.table import as_csv, as_markdown, number
from simclr.ablate.verdict import Results, Verdict
from simclr.files import write_atomically

VERDICT, SECTION, INDEX = "verdict.json", "section.md", "index.md"


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
    write_atomically(out / "figure.png", figure_of(experiment, results))
    record: dict[str, Any] = {
        "experiment": experiment.name,
        "verdict": asdict(verdict),
        "rule": experiment.rule,
        "on": on,
    }
    record |= {"version": RESULT_VERSION, "simclr": __version__, "full": experiment.full}
    record |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(out / VERDICT, (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / SECTION, section(experiment, table, verdict, on).encode())


def section(experiment: Experiment, table: str, verdict: Verdict, on: str) -> str:
    """An experiment as a section that can be read without the paper."""
    lines = [
        f"## {experiment.title}",
        "",
        experiment.question,
        "",
        f"**{verdict.word.capitalize()}.** {verdict.sentence}",
    ]
    lines += ["", f"Rule, published beforehand: {rule_in_words(experiment.rule)}.", "", f"On {on}.", ""]
    lines += [table, f"![{experiment.title}: the paper's values, and ours]({experiment.name}/figure.png)", ""]
    if experiment.notes:
        lines += [experiment.notes, ""]
    lines += ["What the paper reports:", ""]
    for paper in experiment.paper:
        said = f"{paper.says} " if paper.says else ""
        values = ", ".join(f"{name} {text}" for name, text in paper.printed.items())
        unit = f" ({paper.unit})" if paper.unit else ""
        with_what = f" {paper.protocol}." if paper.protocol else ""
        told = f"{values}." if values else ""
        lines.append(f"- {paper.name}{unit}: {said}{told}{with_what} {paper.source} [{paper.mark}]".replace("  ", " "))
    return "\n".join([*lines, ""])


def write_index(out: Path) -> Path:
    """The page that joins all experiments in a folder.

    Args:
        out: whose folders hold one each.
    """
    found = []
    for path in sorted(out.glob(f"*/{VERDICT}")):
        try:
            found.append((path.parent, json.loads(path.read_text())))
        except ValueError:  # written by another program
            continue
    marks = "; ".join(f"[{mark}] {meaning}" for mark, meaning in MARKS.items())
    lines = ["# What the papers found, run again", ""]
    lines += [
        "Each section states what a paper reports and what was measured here, by a rule that was published with the "
        "experiment. *Held* and *reversed* are about these images and networks, not the paper's. With one seed "
        "an interval is that of these images: another run may differ by more. Paper values: "
        f"{marks}.",
        "",
        "| experiment | verdict | effect | n | date |",
        "|---|---|---|---|---|",
    ]
    for folder, record in found:
        verdict, effect = record["verdict"], record["verdict"]["effect"] or {}
        low_high = effect.get("interval")
        said = number(effect.get("value")) + (f" ({number(low_high[0])} to {number(low_high[1])})" if low_high else "")
        n = effect.get("n", "")
        lines.append(f"| {folder.name} | {verdict['word']} | {said} | {n} | {record['date'][:10]} |")
    sections = [(folder / SECTION).read_text() for folder, _ in found if (folder / SECTION).is_file()]
    path = out / INDEX
    write_atomically(path, "\n".join([*lines, "", *sections]).encode())
    return path
