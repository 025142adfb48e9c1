"""The benchmarks run: each in its quick form, and prints its tables."""

import subprocess
import sys
from pathlib import Path

import pytest

from strict.sitecustomize import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["survival.py", "--quick"],
        ["dashboards.py"],
        ["training.py", "--quick"],
        ["nt_xent.py", "--quick"],
        ["gradient_cache.py", "--quick"],
        ["evaluation.py", "--quick"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_benchmark_runs_to_its_table(arguments, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|---|" in done.stdout
