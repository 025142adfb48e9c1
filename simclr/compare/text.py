"""A comparison as text: tables for the terminal, Markdown for a page, CSV for another program."""

import csv
import io
import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simclr.compare.rows import NOT_RECORDED, Comparison, figures_of

_WIDE = 6  # rows that can stand beside each other as columns


def print_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print what differs, what each run reached, and the paired tests."""
    # In a file a line may be as long as it needs.
    console = console or Console(width=max(80, Console().width) if Console().is_terminal else 2000)
    for title, head, lines in (_settings(found), _results(found), _pairs(found)):
        if not lines:
            continue
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(
                Text(printable(_breakable(name), console.encoding)),
                justify="right" if number else "left",
                overflow="fold",
            )
        for line in lines:
            table.add_row(*(Text(printable(_breakable(text), console.encoding)) for text in line))
        console.print(table)
        console.print()
    if not found.differing:
        console.print("No setting differs but the seed.", highlight=False)


def _breakable(text: str) -> str:
    """A text that a narrow column breaks after the settings of a protocol, not inside the name of one."""
    return re.sub(r",(?=[a-z_]+=)", ", ", text)


def printable(text: str, encoding: str) -> str:
    """Text as a terminal or a log of some encoding can show it: in ASCII `+-` for a plus-minus sign."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("\u00b1", "+-").replace(NOT_RECORDED, "-")
        return plain.encode(encoding, "replace").decode(encoding)
    return text


def as_markdown(found: Comparison) -> str:
    """The same tables and notes as Markdown."""
    parts = [f"# {len(found.runs)} runs compared\n"]
    for title, head, lines in (_settings(found), _results(found), _pairs(found)):
        if lines:
            rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
            text = "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
            parts.append(f"## {title}\n\n{text}\n")
    if not found.differing:
        parts.append("No setting differs but the seed.\n")
    remarks = [*found.notes, *(f"left out: {path}: {why}" for path, why in found.left_out)]
    if remarks:
        parts.append("\n".join(f"- {_cell(remark)}" for remark in remarks) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    for sign in "\\`*_<>|[]":  # in a run's name they are letters
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split()).replace("\\-", "-")


def as_csv(found: Comparison) -> str:
    """A row for each run, seeds too, with the number of its group; accuracies are fractions."""
    columns = found.columns
    head = ["run", "path", "group", "seed", "complete", "stands", *found.differing]
    for column in columns:
        head += [column.title, f"{column.title} low", f"{column.title} high"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for number, row in enumerate(found.rows):
        for run in row.runs:
            figures = figures_of(run)
            cells = [run.name, str(run.path), number, run.seed, run.complete, run.stands]
            cells += [run.settings.get(name) for name in found.differing]
            for column in columns:
                figure = figures.get(column)
                cells += ["", "", ""] if figure is None else [figure.value, *(figure.interval or ("", ""))]
            writer.writerow(cells)
    return text.getvalue()


Lines = tuple[str, list[str], list[list[str]]]


def _settings(found: Comparison) -> Lines:
    title, rows = "Settings that differ", found.rows
    if len(rows) <= _WIDE:
        lines = [[name, *(row.setting(name) for row in rows)] for name in found.differing]
        return title, ["", *(row.name for row in rows)], lines
    lines = [[row.name, *(row.setting(name) for name in found.differing)] for row in rows]
    return title, ["run", *found.differing], lines if found.differing else []


def _results(found: Comparison) -> Lines:
    """Figures as rows and runs as columns, or the other way round where there are many runs."""
    rows = found.rows
    texts = [[row.figures[c].text(c) if c in row.figures else "" for c in found.columns] for row in rows]
    if len(rows) <= _WIDE:
        head = ["", *(row.name for row in rows)]
        lines = [["seed", *(row.seeds for row in rows)], ["stands at", *(row.stands for row in rows)]]
        lines += [[c.title, *(text[i] for text in texts)] for i, c in enumerate(found.columns)]
        return "Final figures", head, lines
    head = ["run", "seed", "stands at", *(c.title for c in found.columns)]
    return "Final figures", head, [[r.name, r.seeds, r.stands, *t] for r, t in zip(rows, texts, strict=True)]


def _pairs(found: Comparison) -> Lines:
    head = ["by", "best", "beside", "ahead by, points (95 %)", "right alone", "McNemar's p (Holm)"]
    lines = []
    for pair in found.pairs:
        low, high = (f"{100 * bound:.1f}" for bound in pair.interval)
        ahead = f"{100 * pair.difference:.1f} ({low} to {high})"
        alone = f"{pair.only_best:,} : {pair.only_other:,} of {pair.images:,}"
        lines.append([pair.by, pair.best, pair.other, ahead, alone, f"{pair.p:.2g}"])
    return "The same test images, paired (these encoders; other seeds would give others)", head, lines
