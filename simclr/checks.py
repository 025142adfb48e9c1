"""Checks of arguments that several rooms make, in the same words."""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def out_of_range(
    given: Mapping[str, Any],
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> list[str]:
    """What is wrong with settings, a phrase each, by the names of those that have a range; NaN is in none.

    Args:
        given: the settings; one that is absent or None is left to others.
        counts: are 1 or more.
        positive: are above 0 and finite.
        not_negative: are 0 or more.
        choices: what each may be.
    """
    ranges = (
        (counts, lambda value: value >= 1, "is not 1 or more"),
        (positive, lambda value: 0 < value < math.inf, "is not positive"),
        (not_negative, lambda value: value >= 0, "is negative"),
        *(
            ((name,), allowed.__contains__, f"is none of {listed(allowed)}")
            for name, allowed in (choices or {}).items()
        ),
    )
    return [
        f"{name}={given[name]} {wrong}"
        for names, fits, wrong in ranges
        for name in names
        if given.get(name) is not None and not fits(given[name])
    ]


def refuse(problems: Sequence[str]) -> None:
    """Raise one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")


def find_named(setting: str, name: str, known: Mapping[str, str], kind: str) -> Any:
    """The object that a name stands for: one of those known, or one at a path, `package.module.Name`.

    Args:
        setting: which names it.
        known: the paths by name.
        kind: what is at a path, "a class".
    Raises:
        ValueError: if there is none.
    """
    module, _, attribute = known.get(name, name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{setting}={name} is none of {listed(known)}, nor the path of {kind}: {error}.") from error


def listed(names: Iterable[Any], most: int = 10) -> str:
    """The first of some names and how many more there are: `a, b and 3 more`."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
