"""The table of an experiment, as Markdown and CSV: ours and the paper's, cell by cell."""

import csv
import io
import math

from simclr.ablate.experiment import Experiment
from simclr.ablate.verdict import Results


def rows(experiment: Experiment, results: Results) -> list[dict[str, str]]:
    """A row for each cell: mean and standard deviation of each metric, the paper's values, n, what failed."""
    found = []
    for cell in experiment.cells:
        of_cell = [result for (name, _), result in results.items() if name == cell.name]
        done = [result for result in of_cell if result.status == "done"]
        row = {"cell": cell.name}
        for metric in experiment.metrics:
            values = [result.metrics[metric] for result in done if metric in result.metrics]
            row[metric] = mean_and_sd(values)
            for table in experiment.paper:
                if table.metric == metric:
                    row[column(table.name)] = table.printed.get(cell.name, "")
        for table in experiment.paper:
            if table.metric is None and cell.name in table.values:
                row[column(table.name)] = table.printed[cell.name]
        row["n"] = str(len(done))
        row["seconds"] = f"{sum(result.seconds for result in done):.0f}"
        failed = [f"seed {result.seed} failed: {result.why}" for result in of_cell if result.status == "failed"]
        row["remarks"] = "; ".join(failed) or ("" if done else "not run")
        found.append(row)
    names = list(dict.fromkeys(name for row in found for name in row))
    last = ["n", "seconds", "remarks"]
    names = [name for name in names if name not in last] + last
    return [{name: row.get(name, "") for name in names} for row in found]


def as_markdown(experiment: Experiment, results: Results) -> str:
    """The table, with what its columns mean below it."""
    lines = rows(experiment, results)
    # How long a run took depends on what else the machine did: for as_csv.
    names = [name for name in lines[0] if name != "seconds"]
    names = [name for name in names if name != "remarks" or any(line["remarks"] for line in lines)]
    text = f"| {' | '.join(map(_cell, names))} |\n|{'---|' * len(names)}\n"
    text += "".join(f"| {' | '.join(_cell(line[name]) for name in names)} |\n" for line in lines)
    meaning = [f"`{name}`: {words}" for name, words in experiment.metrics.items()]
    return f"{text}\n{'; '.join(meaning)}. Mean and standard deviation over n seeds.\n"


def as_csv(experiment: Experiment, results: Results) -> str:
    """The same for programs."""
    lines = rows(experiment, results)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def column(name: str) -> str:
    """The heading of a paper's column."""
    return f"paper: {name}"


def mean_and_sd(values: list[float]) -> str:
    """For people; empty without a value."""
    if not values:
        return ""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return number(mean)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{number(mean)} ± {number(sd)}"


def number(value: float | None) -> str:
    """Two digits after the point, and three where there is little before it."""
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
