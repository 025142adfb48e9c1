"""Imported by every Python process that a test starts, before anything else: a warning is an error there too.

`conftest.py` puts this folder on the children's path, and into FILTERS what pytest goes by itself: the filters of
pyproject.toml, the one list of what is exempted everywhere, and the marks of the test.
"""

import importlib
import json
import os
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
FILTERS = "SIMCLR_TEST_WARNINGS"


def environment(*path: str | os.PathLike) -> dict[str, str]:
    """What a process that a test starts must have in its environment, with these folders to import from too."""
    rest = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in ("", HERE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join((HERE, *map(str, path), *rest))}


def parse(line: str) -> tuple[str, str, type[Warning], str, int]:
    """What `warnings.filterwarnings` takes for a line of pytest's: action:message:category:module:line, from the left.

    Message and module are regular expressions, which Python's own -W and PYTHONWARNINGS take for plain text.
    """
    action, message, category, module, number = (line.split(":") + [""] * 5)[:5]
    home, _, name = (category.strip() or "Warning").rpartition(".")
    return action, message, getattr(importlib.import_module(home or "builtins"), name), module, int(number or 0)


if __name__ == "sitecustomize":  # not where a test imports it, after filters that the program under test has set
    for line in json.loads(os.environ.get(FILTERS, "[]")):
        warnings.filterwarnings(*parse(line))
