"""A suite: one encoder on several labelled data sets, each a record, together one table.

A suite is a YAML file. `root` is where torchvision's sets are kept; a data set is a word (see `simclr.data.labelled`)
or a mapping; paths are from the file's folder:

    root: datasets
    protocols: [logreg]
    datasets:
      - torchvision:CIFAR10
      - {data: torchvision:Flowers102, protocols: [logreg, knn]}
      - {name: ours, data: photos/train, test: photos/test, metric: mean_per_class}
      - labels.csv
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simclr.data.labelled import LIBRARY, METRICS
from simclr.eval.tables import name_of, percent, shown_results
from simclr.paths import expanded

FOLDER = "transfer"  # in the run folder: a record for each data set
TABLE = "transfer.md"
_KEYS = ("root", "protocols", "datasets")
_OF_A_SET = ("name", "data", "test", "protocols", "metric")


@dataclass(frozen=True)
class SuiteEntry:
    """A data set of a suite.

    Attributes:
        name: of its record, and for people.
        data, test, root: as `simclr.data.labelled.labelled_data` takes them, from the root.
        protocols: by which it is measured; None for those of the suite or the command.
        metric: to be shown, if not the papers': top1 or mean_per_class.
    """

    name: str
    data: str
    test: str | None = None
    root: str | None = None
    protocols: list[str] | None = None
    metric: str | None = None


def read_suite(path: str | Path, root: str | None = None) -> list[SuiteEntry]:
    """The data sets of a suite file.

    Args:
        path: the file.
        root: where torchvision's sets are kept, in place of what the file says.
    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming what in it is wrong.
    """
    file = expanded(path)
    if not file.is_file():
        raise FileNotFoundError(f"suite={path} is not a file: a YAML file with a list of datasets is needed.")
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"suite={path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ValueError(f"suite={path} has no list of datasets. Write `datasets: [torchvision:CIFAR10, photos]`.")
    _refuse_unknown(content, _KEYS, f"suite={path}")
    place = root or (None if content.get("root") is None else _from(file, content["root"]))
    entries = [_entry(item, file, place, _words(content.get("protocols"), path), path) for item in content["datasets"]]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"suite={path} has several data sets called {', '.join(twice)}. Give each a name of its own.")
    return entries


def _entry(item: Any, file: Path, root: str | None, protocols: list[str] | None, path: Any) -> SuiteEntry:
    given = {"data": item} if isinstance(item, str) else item
    if not isinstance(given, dict) or not isinstance(given.get("data"), str):
        raise ValueError(f"suite={path}: {item!r} is no data set. Write a word, or {{data: WORD, test: WORD}}.")
    _refuse_unknown(given, _OF_A_SET, f"suite={path}, {given['data']}")
    metric = given.get("metric")
    if metric is not None and metric not in METRICS:
        raise ValueError(f"suite={path}, {given['data']}: metric={metric} is none of {', '.join(METRICS)}.")
    name = str(given.get("name") or default_name(given["data"]))
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"suite={path}: the name {name!r} is that of a file. Use letters, digits, - and _.")
    return SuiteEntry(
        name,
        _from(file, given["data"]),
        None if given.get("test") is None else _from(file, given["test"]),
        root,
        _words(given.get("protocols"), path) or protocols,
        metric,
    )


def default_name(word: str) -> str:
    """What a data set is called that has no name: the last part of its path, or of its name."""
    plain = Path(word.removeprefix(LIBRARY)).resolve() if not word.startswith(LIBRARY) else Path(word[len(LIBRARY) :])
    last = plain.parent.name if plain.name.lower() in ("train", "training") else plain.stem
    return re.sub(r"[^\w.+-]+", "_", last) or "data"


def _from(file: Path, word: Any) -> str:
    """A path of a suite from the file's folder; a name of torchvision as it is."""
    text = str(word)
    return text if text.startswith(LIBRARY) else str(file.parent / expanded(text))


def _words(given: Any, path: Any) -> list[str] | None:
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else given
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(
            f"suite={path}: protocols={given!r} is no list of protocols. Write `protocols: [knn, logreg]`."
        )
    return [word.strip() for word in words]


def _refuse_unknown(content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown key {key}, there are {', '.join(known)}.{meant}")


def suite_table(records: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows over all data sets: each result by the metric of its data set, in percent.

    Args:
        records: of `simclr.eval.suite.evaluate`, by the data sets' names.
    """
    yardsticks = list(dict.fromkeys(name for record in records.values() for name in record["yardsticks"]))
    head = ["data set", "protocol", "metric", "value", "95 %", *(name.replace("_", " ") for name in yardsticks)]
    rows = []
    for name, record in records.items():
        metric = record["data"]["metric"]
        for result in shown_results(record):
            if "draws" in result:
                value, spread = result[f"{metric}_mean"], result["top1_std"] if metric == "top1" else None
                between = f"{'' if spread is None else f'sd {percent(spread)}, '}{result['draws']} draws"
            else:
                interval = result["ci95" if metric == "top1" else "mean_per_class_ci95"]
                value, between = result[metric], "-".join(map(percent, interval))
            others = [result["yardsticks"].get(yardstick) for yardstick in yardsticks]
            shown = [percent(other[metric] if isinstance(other, dict) else other) for other in others]
            what = "mean per class" if metric == "mean_per_class" else "top-1"
            rows.append([name, name_of(result), what, percent(value), between, *shown])
    return head, rows
