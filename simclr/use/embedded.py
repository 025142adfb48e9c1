"""A folder of features as `simclr embed` leaves it: `features.npy`, `paths.txt`, `about.json`."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simclr.eval.features import check_finite
from simclr.paths import expanded

VERSION = 1
FEATURES, PATHS, ABOUT = "features.npy", "paths.txt", "about.json"
STATE, UNFINISHED = "unfinished.json", "features.npy.unfinished"  # while it is being made
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True, eq=False)
class Embedded:
    """Images and their features.

    Attributes:
        folder: where they lie.
        features: (N, F) float32, mapped from the file.
        names: the N images' paths below `root`, as `/` divides them.
        about: `encoder` (see `simclr.use.source.Source`), `images` (the folder they were in), `unreadable`
            ([name, reason] of those without features), `versions` and more.
    """

    folder: Path
    features: np.ndarray
    names: list[str]
    about: dict[str, Any]

    @property
    def root(self) -> str:
        """The folder that the images were in."""
        return self.about["images"]

    def refuse_query(self, query: Tensor) -> None:
        """Raise a ValueError for a query that is not (F,), or not of finite numbers."""
        width = self.features.shape[1]
        if query.shape != (width,):
            raise ValueError(f"the query has {query.numel()} numbers, those of {self.folder} have {width}.")
        check_finite("the query's features", query[None])

    def path(self, row: int) -> str:
        """The file of a row."""
        return os.path.join(self.root, *self.names[row].split("/"))


def read_embedded(folder: str | os.PathLike) -> Embedded:
    """Open what `simclr embed` has written; nothing is read into memory but the names.

    Raises:
        FileNotFoundError: if there is none, or it was not finished.
        ValueError: if it is of a later version, or damaged.
    """
    path = expanded(folder)
    if (path / STATE).is_file() and not (path / ABOUT).is_file():
        raise FileNotFoundError(f"{folder} is not finished. The simclr embed that began it goes on where it was.")
    if not (path / ABOUT).is_file():
        raise FileNotFoundError(f"{folder} holds no features: it has no {ABOUT}. Use simclr embed first.")
    try:
        about = json.loads((path / ABOUT).read_bytes())
        if about["simclr_embed"] != VERSION:
            raise ValueError(f"it is of version {about['simclr_embed']}, this simclr reads version {VERSION}")
        features = np.load(path / FEATURES, mmap_mode="r", allow_pickle=False)
        names = names_of((path / PATHS).read_bytes())
        wanted = (about["rows"], about["encoder"]["feature_dim"])
        if features.shape != wanted or features.dtype != np.float32 or len(names) != len(features):
            raise ValueError(f"{FEATURES} is {features.shape}, {PATHS} names {len(names)}, {wanted} were written")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder} cannot be read: {why}. Embed the images again into another folder.") from error
    return Embedded(path, features, names, about)


def in_a_line(name: str) -> str:
    """A file's name for people: what ends a line or moves a terminal's cursor as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def names_as_lines(names: Iterable[str]) -> bytes:
    r"""A name a line; a backslash and what ends a line are written `\\`, `\n` and `\r`."""
    return os.fsencode("".join(re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name) + "\n" for name in names))


def names_of(content: bytes) -> list[str]:
    """The names that `names_as_lines` has written."""
    back = {written[1]: char for char, written in _ESCAPES.items()}
    lines = os.fsdecode(content).split("\n")[:-1]
    return [re.sub(r"\\(.)", lambda found: back.get(found[1], found[0]), line) for line in lines]
