"""A process that keeps what it frees takes no pages anew; one that was not told so does."""

import sys

import pytest

import forked

STEPS = """
import resource, sys, torch
from simclr.allocator import keep_freed_memory
if sys.argv[1] == "keep": keep_freed_memory()
def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**24) for _ in range(4)]  # 64 MB each, more than glibc keeps by itself
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(6): pages_of_a_step()  # until the blocks have found their places
print(pages_of_a_step() / (4 * 2**26 / resource.getpagesize()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("told", "low", "high"), [("keep", 0, 0.05), ("not", 0.5, 2)])
def test_a_step_takes_no_pages_anew(told, low, high):
    done = forked.run(["-c", STEPS, told])
    assert done.returncode == 0, done.stderr
    assert low <= float(done.stdout) <= high
