"""Warnings are errors in the processes that tests start as in pytest's own: see strict/sitecustomize.py."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import forked
from strict import sitecustomize as strict


def pytest_configure(config: pytest.Config) -> None:
    os.environ.update(strict.environment())
    sys.addaudithook(_refuse_a_lenient_child)


def _refuse_a_lenient_child(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "subprocess.Popen":
        return
    command, environment = arguments[1], arguments[3]
    python = not isinstance(command, str | bytes) and str(command[0]) == sys.executable
    # torch's compiler, on a machine of many cores, starts processes of its own.
    of_torch = python and any("_inductor" in str(part) for part in command[1:])
    if python and not of_torch and environment is not None and strict.HERE not in environment.get("PYTHONPATH", ""):
        raise AssertionError("a Python process with an environment of its own: take strict.sitecustomize.environment")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # not above: the process that only hands out tests does without

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    marked = [line for mark in item.iter_markers("filterwarnings") for line in mark.args]
    lines = [*item.config.getini("filterwarnings"), *marked]
    for line in lines:
        strict.parse(line)  # a child could only print that it cannot read one
    os.environ[strict.FILTERS] = json.dumps(lines)
    if "PYTEST_XDIST_WORKER" in os.environ:
        forked.warm()  # before the program under test starts the same server with fewer imports


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")  # a test that failed while it watched leaves the next one alone


@pytest.fixture(scope="module")
def few_lambdas() -> Iterator[None]:
    """Logistic regression chooses among four regularisations, not fifteen, for a module that is not about the choice.

    The weakest ones, which take most of the time, are not among them.
    """
    from simclr.eval.logreg import linear_probe

    with pytest.MonkeyPatch.context() as patch:
        assert "regularization" in linear_probe.__kwdefaults__
        patch.setitem(linear_probe.__kwdefaults__, "regularization", (1e4, 1e3, 1e2, 1e1))
        yield
