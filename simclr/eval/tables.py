"""The record of an evaluation for people and for other programs: Markdown, and rows of a CSV file."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simclr.eval.suite import YARDSTICKS
from simclr.eval.supervised import supervised_in_words
from simclr.files import write_atomically
from simclr.paths import expanded, shown

_SUPERVISED = "supervised, its own classifier"
COLUMNS = (
    *(
        "run",
        "encoder",
        "epoch",
        "dataset",
        "metric",
        "protocol",
        "variant",
        "top1",
        "ci95_low",
        "ci95_high",
        "mean_per_class",
    ),
    *("mean_per_class_low", "mean_per_class_high", "top5", "top1_without_duplicates", "n_test", *YARDSTICKS),
    *("supervised_top1", "id", "hash", "encoder_sha256", "date"),
)


def name_of(result: Mapping[str, Any]) -> str:
    """A result for people: the protocol, and which of its results: `knn k=20`."""
    return " ".join(filter(None, (result["protocol"], result["variant"])))


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; a dash for none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def shown_results(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results of a record, with those that differ in their draw only as one: their summary."""
    summed = {(s["protocol"], s["variant"]): s for s in record["summaries"]}
    keys = [(result["protocol"], result["variant"].partition("/draw=")[0]) for result in record["results"]]
    return list({key: summed.get(key, r) for key, r in zip(keys, record["results"], strict=True)}.values())


def top1_of(result: Mapping[str, Any]) -> float:
    """Of a result, or the mean of a summary's draws."""
    return result["top1_mean"] if "draws" in result else result["top1"]


def yardsticks_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The top-1 accuracies beside a result or a summary, of the yardsticks that came to one."""
    found = result["yardsticks"].items()
    numbers = {name: value if "draws" in result else value and value["top1"] for name, value in found}
    return {name: value for name, value in numbers.items() if value is not None}


def settings_of_number(result: Mapping[str, Any]) -> str:
    """Which of its protocol's results a number is and by which settings, as its id says."""
    return "/".join(result["id"].split("/")[5:])


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each result in percent, beside the yardsticks that were measured."""
    yardsticks = record["yardsticks"]
    head = ["protocol", "top-1", "95 %", "per class", "95 %", *(y.replace("_", " ") for y in yardsticks)]
    rows = []
    for result in shown_results(record):
        others = [result["yardsticks"].get(yardstick) for yardstick in yardsticks]
        if "draws" in result:
            spread = "" if result["top1_std"] is None else f"sd {percent(result['top1_std'])}, "
            cells = [percent(result["top1_mean"]), f"{spread}{result['draws']} draws"]
            cells += [percent(result["mean_per_class_mean"]), "", *map(percent, others)]
        else:
            cells = [percent(result["top1"]), "-".join(map(percent, result["ci95"]))]
            cells += [percent(result["mean_per_class"]), "-".join(map(percent, result["mean_per_class_ci95"]))]
            cells += [percent(other and other["top1"]) for other in others]
        rows.append([name_of(result), *cells])
    if (own := record.get("supervised")) and own["top1"] is not None:
        cells = [percent(own["top1"]), "-".join(map(percent, own["ci95"]))]
        cells += [percent(own["mean_per_class"]), "-".join(map(percent, own["mean_per_class_ci95"]))]
        rows.append([_SUPERVISED, *cells, *[""] * len(yardsticks)])
    return head, rows


def identities(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The hash and the id of every number of the table, in the order of its rows."""
    found = [(result["hash"], result["id"]) for result in shown_results(record)]
    own = record.get("supervised")
    return [*found, (own["hash"], own["id"])] if own and own["top1"] is not None else found


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, a line each."""
    data, found = record["data"], [record["data"]["note"]]
    if copies := record["duplicates"]["test_images"]:
        without = ", ".join(f"{name_of(r)} {percent(r['top1_without_duplicates'])} %" for r in record["results"])
        found.append(
            f"{copies:,} of the {data['test_images']:,} test images are among the training images, pixel for pixel; "
            f"without them: {without}"
        )
    for result in record["results"]:
        about, name = result["about"], name_of(result)
        if end := about.get("lr_end"):
            found.append(f"{name}: the {end} of its learning rates was the best, beyond which a better one may lie")
        if end := about.get("regularization_end"):
            found.append(f"{name}: regularisation chosen at the {end} end of its grid, beyond which a better may lie")
    if (own := record.get("supervised")) and own["top1"] is None:
        found.append("the supervised run knows other classes: its encoder is measured, its own classifier is not")
    found += supervised_in_words(record.get("supervised"))
    if record["finished"] is False:
        found.append(
            f"the run was not finished: the encoder is that of step {record['global_step']} of {record['total_steps']}"
        )
    return [note for note in found if note]


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table with the identity of every number below, and the notes."""
    head, rows = table(record)
    lines = [f"# {record['encoder']}, epoch {record['epoch']}", ""]
    lines += [*markdown_table(head, rows), ""]
    lines += [f"- `{key}` {text}" for key, text in identities(record)]
    lines += ["", *(f"- {note}" for note in notes(record))]
    data = record["data"]
    lines += ["", f"{data['test_images']:,} test images of {data['test']}; {data['train_images']:,} training images."]
    return "\n".join(lines) + "\n"


def markdown_table(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """A table in Markdown, a line each.

    Args:
        head, rows: its cells.
        left: columns that are set to the left; the others hold numbers.
    """
    under = ["---"] * left + ["---:"] * (len(head) - left)
    return [_row(head), _row(under), *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each result, accuracies as fractions, by `COLUMNS`."""
    checkpoint = Path(record["checkpoint"])
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return [
        {
            "run": folder.name,
            **{key: record[key] for key in ("encoder", "epoch", "encoder_sha256", "date")},
            "dataset": record["data"]["on"] or record["data"]["test"],
            "metric": record["data"]["metric"],
            **{key: result[key] for key in ("protocol", "variant", "top1", "mean_per_class", "top5", "n_test")},
            "ci95_low": result["ci95"][0],
            "ci95_high": result["ci95"][1],
            "mean_per_class_low": result["mean_per_class_ci95"][0],
            "mean_per_class_high": result["mean_per_class_ci95"][1],
            "top1_without_duplicates": result["top1_without_duplicates"],
            **{y: (result["yardsticks"].get(y) or {}).get("top1") for y in YARDSTICKS},
            "supervised_top1": (record.get("supervised") or {}).get("top1"),
            "id": result["id"],
            "hash": result["hash"],
        }
        for result in record["results"]
    ]


def refuse_foreign_csv(path: str | Path) -> None:
    """Refuse a file to which rows of `COLUMNS` cannot be appended.

    Raises:
        ValueError: naming it.
    """
    path = expanded(path)
    if path.is_dir():
        raise ValueError(f"csv={shown(path)} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"csv={shown(path)}: there is no folder {shown(path.parent)}. Make it first.")
    if path.exists():
        head = path.read_bytes().split(b"\n", 1)[0].decode(errors="replace").strip()
        if head and head.split(",") != list(COLUMNS):
            raise ValueError(f"csv={shown(path)} has other columns than an evaluation. Give another file.")


def append_csv(path: str | Path, *records: Mapping[str, Any]) -> Path:
    """Append the results of records to a CSV file, with the names of the columns if it is not there or empty.

    Returns:
        The file.
    """
    refuse_foreign_csv(path)
    path = expanded(path)
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not before.strip():
        before = b""
        writer.writeheader()
    for record in records:
        writer.writerows(csv_rows(record))
    write_atomically(path, before + text.getvalue().encode())
    return path
