"""A warning is an error in every process that a test starts, but for those that pyproject.toml exempts."""

import subprocess
import sys
import warnings

import pytest

from ranks import run_ranks
from simclr.data import FileImages, GlobalBatchSampler, TrainLoader
from strict.sitecustomize import environment

EXEMPTED = "\n  ``instantiate_classes`` was deprecated in some version"  # and begins with what -W cannot say


def warn(message: str, category: type[Warning] = UserWarning) -> str:
    warnings.warn(message, category, stacklevel=2)
    return "went on"


def child(*statements: str) -> subprocess.CompletedProcess:
    program = "\n".join(("import multiprocessing, os, subprocess, sys, warnings", *statements))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_warning_in_a_rank_fails_and_an_exempted_one_does_not():
    with pytest.raises(RuntimeError, match=r"rank . failed:(.|\n)*UserWarning: a warning of a rank"):
        run_ranks(warn, 2, "a warning of a rank")
    assert run_ranks(warn, 2, EXEMPTED, DeprecationWarning) == ["went on"] * 2


@pytest.mark.parametrize(
    "statement",
    [
        "warnings.warn('a warning of a child')",
        "sys.exit(subprocess.run([sys.executable, '-c', 'import warnings; warnings.warn(\"a warning of a child\")'])"
        ".returncode)",
    ],
    ids=["child", "grandchild"],
)
def test_a_warning_in_a_subprocess_fails(statement):
    done = child(statement)
    assert done.returncode == 1
    assert "UserWarning: a warning of a child" in done.stderr


def test_an_exempted_warning_in_a_subprocess_does_not_fail():
    done = child(f"warnings.warn({EXEMPTED!r}, DeprecationWarning)")
    assert done.returncode == 0, done.stderr
    done = child(f"warnings.warn({EXEMPTED!r}, UserWarning)")
    assert done.returncode == 1


@pytest.mark.filterwarnings("ignore:known")
def test_what_a_mark_exempts_is_exempted_in_a_subprocess_of_its_test():
    assert child("warnings.warn('known')").returncode == 0
    assert child("warnings.warn('unknown')").returncode == 1


class Warns(FileImages):
    def images(self, index, threads=1, begun=None):
        return warn("a warning of a worker")


def test_a_warning_in_a_worker_fails():
    with pytest.raises(UserWarning, match="a warning of a worker"):
        next(iter(TrainLoader(Warns("files", ["a.png"] * 4, 8), GlobalBatchSampler(4, 2), workers=1)))


def test_a_subprocess_whose_environment_would_let_warnings_pass_is_refused():
    with pytest.raises(AssertionError, match="an environment of its own"):
        subprocess.run([sys.executable, "-c", ""], env={})
    done = subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('x')"], env=environment("elsewhere"))
    assert done.returncode == 1
