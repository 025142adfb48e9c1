"""Warnings are errors in the processes that tests start as in pytest's own: see strict/sitecustomize.py."""

import json
import os
import sys
from typing import Any

import pytest

from strict import sitecustomize as strict


def pytest_configure(config: pytest.Config) -> None:
    os.environ.update(strict.environment())
    sys.addaudithook(_refuse_a_lenient_child)


def _refuse_a_lenient_child(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "subprocess.Popen":
        return
    command, environment = arguments[1], arguments[3]
    python = not isinstance(command, str | bytes) and str(command[0]) == sys.executable
    if python and environment is not None and strict.HERE not in environment.get("PYTHONPATH", ""):
        raise AssertionError("a Python process with an environment of its own: take strict.sitecustomize.environment")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marked = [line for mark in item.iter_markers("filterwarnings") for line in mark.args]
    lines = [*item.config.getini("filterwarnings"), *marked]
    for line in lines:
        strict.parse(line)  # a child could only print that it cannot read one
    os.environ[strict.FILTERS] = json.dumps(lines)
