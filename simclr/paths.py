"""Paths that people give: what they mean, how they are stored, and how a message shows them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike) -> Path:
    """A path as a user gives it, with `~` and `~name` as home folders: shells expand them only where a word begins.

    Raises:
        ValueError: for the home of a user who is not here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{os.fspath(path)} begins with a home folder that is not known here. Write it out."
        ) from error


def stored(path: str | os.PathLike) -> str:
    """A path as a run keeps it: from the root, so that it means the same from any other folder."""
    parts = expanded(path).absolute().parts
    ups = [i for i, part in enumerate(parts) if part == os.pardir]
    if not ups:
        return str(Path(*parts))
    # `..` behind a link leads above where the link points to, which dropping both names would miss.
    return str(Path(*parts[: ups[-1] + 1]).resolve().joinpath(*parts[ups[-1] + 1 :]))


def shown(path: str | os.PathLike) -> str:
    """A stored path for people: from the current folder, if it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
