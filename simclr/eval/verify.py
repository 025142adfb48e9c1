"""Whether the numbers of a run's records are those that its encoder gives: computed again from images, and compared."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simclr.data import ImageData
from simclr.data.labelled import images_of_record
from simclr.eval.evaluation import LINEAR, RESULT, linear_evaluation
from simclr.eval.predictions import unpacked
from simclr.eval.protocol import find_protocol, settings_in
from simclr.eval.suite import EVAL, SCHEMA, evaluate, record_sha256
from simclr.eval.transfer import FOLDER
from simclr.paths import expanded

_NEEDED = ("results", "protocols", "yardsticks", "encoder_sha256", "checkpoint", "data", "sha256")
_NEEDED_LINEAR = ("linear_top1", "knn_top1", "protocol", "encoder_sha256", "checkpoint", "data")

_OF_A_RESULT = (
    "top1",
    "mean_per_class",
    "top5",
    "top1_without_duplicates",
    "ci95",
    "mean_per_class_ci95",
    "id",
    "hash",
)
_OF_DUPLICATES = ("test_images", "linear_top1_without", "knn_top1_without", "ci95_without")


@dataclass(frozen=True)
class Compared:
    """One thing that a record says, beside what was found.

    Attributes:
        what: for people, "logreg, top-1".
        recorded, found: the two, plain types; None for what one of them lacks.
    """

    what: str
    recorded: Any
    found: Any

    @property
    def equal(self) -> bool:
        """Whether they are the same, to the last digit."""
        return bool(self.recorded == self.found)


def records_of(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The records that a run folder holds, by their file, the latest of each kind.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: naming a file that is no record, or one of another version.
    """
    run_dir = expanded(run_dir)
    found = {}
    for name, needed in ((EVAL, _NEEDED), (RESULT, _NEEDED_LINEAR)):
        path = run_dir / name
        if path.is_file():
            found[name] = _read(path, name, needed)
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        if not re.search(r"\.\d+$", path.stem):  # else an earlier one
            found[f"{FOLDER}/{path.name}"] = _read(path, EVAL, _NEEDED)
    if not found:
        raise FileNotFoundError(f"no {EVAL} and no {RESULT} in {run_dir}. Measure the run first: simclr eval {run_dir}")
    return found


def _read(path: Path, kind: str, needed: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if kind == EVAL and isinstance(record, dict) and record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')}, this version reads {SCHEMA}.")
    lacking = [key for key in needed if not isinstance(record, dict) or key not in record]
    if lacking:
        raise ValueError(f"{path} is no record of an evaluation: it lacks {', '.join(lacking)}.")
    return record


def verify_record(
    name: str,
    record: Mapping[str, Any],
    run_dir: str | Path,
    *,
    folders: Mapping[str, str | None] | None = None,
    supervised: str | Path | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[Compared]:
    """Compute the numbers of a record again, without any cache, and put them beside what it says.

    Args:
        name: of the file, `eval.json`, `linear_eval.json` or `transfer/NAME.json`.
        record: what it holds.
        run_dir: the run folder; the checkpoint is looked for in it under its recorded name.
        folders: settings of `ImageData` in place of the recorded ones, for images that have moved.
        supervised: the supervised run that the record stands beside, if it has moved.
        device: where to compute.
        say: is told what goes on, a line at a time.
    Returns:
        Everything compared, in order: content of the file, encoder, images, numbers.
    Raises:
        FileNotFoundError, ValueError: if the checkpoint or the images are not there.
    """
    checkpoint = _checkpoint(record, expanded(run_dir))
    changed = {key: value for key, value in (folders or {}).items() if value is not None}
    data = images_of_record(record["data"]["settings"], **changed)
    data.validate()
    again = _again_linear if name == RESULT else _again
    beside = record.get("supervised")
    counterpart = (supervised or beside["checkpoint"]) if beside else None
    return again(record, checkpoint, data, counterpart, device, say)


def _checkpoint(record: Mapping[str, Any], run_dir: Path) -> Path:
    recorded = Path(record["checkpoint"])
    for path in (run_dir / "checkpoints" / recorded.name, run_dir / recorded.name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no checkpoint {recorded.name} in {run_dir}, of which its record is.")


def _again(
    record: Mapping[str, Any], checkpoint: Path, data: ImageData, counterpart: Any, device: Any, say: Any
) -> list[Compared]:
    settings = record["protocols"]
    found, _ = evaluate(
        checkpoint,
        data,
        list(settings),
        settings=settings,
        yardsticks=record["yardsticks"],
        supervised=counterpart,
        on=record["data"].get("on"),
        device=device,
        say=say,
    )
    compared = [Compared("content of the file", record["sha256"], record_sha256(record))]
    compared.append(Compared("encoder", record["encoder_sha256"], found["encoder_sha256"]))
    compared.append(Compared("preprocessing", record.get("preprocessing"), found["preprocessing"]))
    for images in ("train", "test"):
        was, is_ = (each["data"].get(f"{images}_sha256") for each in (record, found))
        compared.append(Compared(f"{images} images and labels", was, is_))
    compared.append(Compared("test labels", record.get("labels"), found["labels"]))
    pairs = [{(r["protocol"], r["variant"]): r for r in each["results"]} for each in (record, found)]
    for key in dict.fromkeys([*pairs[0], *pairs[1]]):
        title = " ".join(filter(None, key))
        a, b = (pair.get(key, {}) for pair in pairs)
        compared += [Compared(f"{title}, {part}", a.get(part), b.get(part)) for part in _OF_A_RESULT]
        compared.append(_predictions(f"{title}, predictions", a.get("predictions"), b.get("predictions")))
        for yardstick in record["yardsticks"]:
            other, again = ((part.get("yardsticks") or {}).get(yardstick) for part in (a, b))
            compared.append(Compared(f"{title}, {yardstick.replace('_', ' ')}", other, again))
    compared.append(Compared("means over draws", record.get("summaries"), found["summaries"]))
    compared += _compared_supervised(record.get("supervised"), found["supervised"])
    return compared


def _compared_supervised(recorded: Any, found: Any) -> list[Compared]:
    """The supervised counterpart of two records; nothing where neither has one."""
    if not recorded and not found:
        return []
    was, is_ = recorded or {}, found or {}
    parts = ("encoder_sha256", "top1", "mean_per_class", "hash")
    compared = [Compared(f"supervised, {part}", was.get(part), is_.get(part)) for part in parts]
    return [*compared, _predictions("supervised, predictions", was.get("predictions"), is_.get("predictions"))]


def _again_linear(
    record: Mapping[str, Any], checkpoint: Path, data: ImageData, counterpart: Any, device: Any, say: Any
) -> list[Compared]:
    protocol = record["protocol"]
    names = settings_in(find_protocol(LINEAR.get(protocol, protocol)))
    knn = {name: record[f"knn_{name}"] for name in settings_in(find_protocol("knn")) if f"knn_{name}" in record}
    found = linear_evaluation(
        checkpoint,
        data,
        protocol=protocol,
        settings={name: record[name] for name in names if name in record},
        knn=knn,
        supervised=counterpart,
        device=device,
        say=say,
    )
    compared = [Compared("encoder", record["encoder_sha256"], found["encoder_sha256"])]
    was, is_ = (each.get("predictions") or {} for each in (record, found))
    compared.append(Compared("test images", was.get("images_sha256"), is_.get("images_sha256")))
    compared.append(Compared("test labels", was.get("labels"), is_.get("labels")))
    a, b = (each.get("duplicates") or {} for each in (record, found))  # whose examples are paths from here
    compared += [Compared(f"duplicates, {key}", a.get(key), b.get(key)) for key in _OF_DUPLICATES]
    keys = ["linear_top1", "linear_top5", "ci95", "knn_top1", "random_encoder_top1", "raw_pixels_top1"]
    keys += ["starting_weights_top1", "supervised_top1"]
    compared += [Compared(key, record.get(key), found.get(key)) for key in (*keys, "confusion_matrix")]
    compared += [_predictions(f"{key} predictions", was.get(key), is_.get(key)) for key in ("linear", "knn")]
    return [*compared, *_compared_supervised(record.get("supervised"), found.get("supervised"))]


def _predictions(what: str, recorded: Any, found: Any) -> Compared:
    """Equal predictions, or how many of them differ."""
    try:
        a, b = unpacked(recorded), unpacked(found)
        if len(a) == len(b) and (different := int((a != b).sum())):
            return Compared(what, "as recorded", f"{different} of {len(a)} images classified otherwise")
    except ValueError:
        pass
    return Compared(what, recorded, found)


def differing(compared: Iterable[Compared]) -> list[Compared]:
    """Those that are not equal."""
    return [each for each in compared if not each.equal]
