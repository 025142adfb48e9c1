"""What a cell has given, in a file of its folder: written whole, read strictly, of one version."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simclr.files import write_atomically

RESULT = "result.json"
# Raised with every change of what is measured or how: results of another version are computed anew.
RESULT_VERSION = 2


@dataclass(frozen=True)
class Result:
    """Of one cell and seed.

    Attributes:
        cell, seed: whose.
        status: "done" or "failed".
        metrics: name -> number.
        per_image: metric -> packed 0 and 1, one for each image, whose mean is the metric / 100.
        images: metric -> a hash of these images, in their order.
        curves: name -> points (x, y).
        why: of a failure.
        seconds: that it took.
        device, date: where and when.
        settings: that it was computed with.
        version: RESULT_VERSION.
    """

    cell: str
    seed: int
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0
    device: str = ""
    date: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = RESULT_VERSION


def write_result(result: Result, folder: Path) -> None:
    """Into the cell's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULT, (json.dumps(asdict(result), indent=1) + "\n").encode())


def read_result(folder: Path, settings: dict[str, Any]) -> tuple[Result | None, str]:
    """The result in a folder, if it is one of these settings and this version; else None, and why.

    Args:
        folder: of the cell.
        settings: that it must have been computed with.
    """
    path = folder / RESULT
    if not path.is_file():
        return None, ""
    try:
        content = json.loads(path.read_text())
        if content.get("version") != RESULT_VERSION:
            return None, f"its result is of version {content.get('version')}, this one writes {RESULT_VERSION}"
        result = Result(**content)
    except (ValueError, TypeError, AttributeError) as error:
        return None, f"its result cannot be read ({type(error).__name__})"
    if result.settings != json.loads(json.dumps(settings)):
        return None, "its result is of other settings"
    return (result, "") if result.status == "done" else (None, f"it failed before: {result.why}")
