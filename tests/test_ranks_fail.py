"""Ranks that die, raise or hang, from the command line: all end, one says why, and nothing of them is left."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.ranks import echo
from simclr.files import hold
from strict.sitecustomize import environment
from tiny import flags

ROOT = Path(__file__).parents[1]
MARK = "SIMCLR_TEST_MARK"
# Trains, and on one rank does something else than one step.
PROGRAM = """
import os, signal, sys, time
from simclr.cli.train import train
from simclr.distributed import rank
from simclr.module import SimCLR
who, step, how = os.environ["FAILS"].split(":")
plain = SimCLR.training_step
def training_step(self, *args):
    if (self.trainer.global_step, rank()) == (int(step), int(who)):
        open("now", "w").close()
        if how == "raise":
            raise RuntimeError("the disk of this machine burns")
        if how == "damaged":
            raise ValueError("cat/1.png cannot be read: truncated")
        if how == "exit":
            os._exit(7)
        if how == "hang":
            time.sleep(600)
        if how == "wait":
            time.sleep(3)
        else:
            os.kill(os.getpid(), getattr(signal, how))
    return plain(self, *args)
SimCLR.training_step = training_step
if __name__ == "__main__":  # worker processes import this file
    train(sys.argv[1:])
"""
TWO = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.workers": 0, "trainer.max_epochs": 3}
TWO |= {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "run_dir": "run"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]


def marked(mark: str) -> list[int]:
    """The processes that have inherited a mark, of whatever parent."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone, or someone else's
            continue
    return found


class Started:
    """A program that trains on two ranks, in a working folder of its own."""

    def __init__(self, where: Path, fails: str, launcher: list[str] = [sys.executable], **settings):  # noqa: B006
        self.where, self.mark = where, uuid.uuid4().hex
        (where / "program.py").write_text(PROGRAM)
        command = [*launcher, "program.py", *flags({**TWO, **settings})]
        variables = environment(ROOT, ROOT / "tests") | {MARK: self.mark, "FAILS": fails}
        with open(where / "out", "w") as out, open(where / "err", "w") as err:
            self.process = subprocess.Popen(command, cwd=where, stdout=out, stderr=err, env=variables)

    def ends(self, within: float = 500) -> tuple[int, str, float]:
        """Exit code, what was said on stderr, and the seconds since something failed."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        seconds = time.time() - (self.where / "now").stat().st_mtime
        self.are_gone()
        return code, (self.where / "err").read_text(), seconds

    def are_gone(self) -> None:
        """All processes end, and what they had held is free."""
        until = time.monotonic() + 60
        while left := marked(self.mark):
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"{left} live: {(self.where / 'err').read_text()}")
            time.sleep(0.2)
        if (self.where / "run").is_dir():
            hold(self.where / "run")()
        assert not list(self.where.rglob("*.partial"))

    def kill(self) -> None:
        """A test that fails leaves nothing either."""
        for process in marked(self.mark):
            os.kill(process, signal.SIGKILL)

    def reached(self) -> None:
        """Wait for the step at which something is done."""
        until = time.monotonic() + 300
        while not (self.where / "now").exists():
            assert self.process.poll() is None, (self.where / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.1)


def said(err: str) -> list[str]:
    """All lines of ours; torchrun's report of its own is left out."""
    ours = err.split("torch/distributed/elastic/multiprocessing/api.py")[0]
    return [line for line in err.splitlines() if line.startswith("error: ")] + [
        line for line in ours.splitlines() if not re.match(r"error: |[WE]\d{4} ", line)
    ]


KILLED = (
    r"error: rank {} \(process \d+ on .+\) (was ended by SIGKILL|has died without a word), and the run ends with it"
)
RAISED = r"error: RuntimeError: the disk of this machine burns \(in .*program.py, line \d+; SIMCLR_TRACEBACK=1 shows"
WAYS = {
    "killed 1": ("1:5:SIGKILL", [sys.executable], KILLED.format(1), FAILED),
    "killed 0": ("0:5:SIGKILL", [sys.executable], KILLED.format(0), -signal.SIGKILL),
    "raises 1": ("1:5:raise", [sys.executable], RAISED, FAILED),
    "raises 0": ("0:5:raise", [sys.executable], RAISED, FAILED),
    "raises in the first step": ("1:0:raise", [sys.executable], RAISED, FAILED),
    "damaged 1": ("1:5:damaged", [sys.executable], r"error: cat/1.png cannot be read: truncated", BAD_INPUT),
    "exits": ("1:5:exit", [sys.executable], r"error: rank 1 .* (with exit code 7 and|has died) without a word", FAILED),
    "crashes": ("1:5:SIGSEGV", [sys.executable], r"error: rank 1 .*(SIGSEGV|has died without a word)", FAILED),
    "killed 1, torchrun": ("1:5:SIGKILL", STANDALONE, KILLED.format(1), 1),
    "killed 0, torchrun": ("0:5:SIGKILL", STANDALONE, KILLED.format(0), 1),
    "raises 1, torchrun": ("1:5:raise", STANDALONE, RAISED, 1),
    "raises 0, torchrun": ("0:5:raise", STANDALONE, RAISED, 1),
}
QUICK = ("killed 1",)
SLOW = pytest.mark.slow  # each starts two processes


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=SLOW) for way in WAYS])
def test_a_rank_that_fails_ends_all_within_a_minute_and_one_says_why(tmp_path, way):
    fails, launcher, message, code = WAYS[way]
    started = Started(tmp_path, fails, launcher)
    ended, err, seconds = started.ends()
    lines = said(err)
    assert len(lines) == 1, err
    assert re.match(message, lines[0]), err
    assert ended != 0
    assert ended in (code, FAILED), err
    assert seconds < 60
    if way == "raises in the first step":
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_waited_for_as_long_as_is_said(tmp_path, rank):
    started = Started(tmp_path, f"{rank}:5:hang", rank_timeout=0.5)
    code, err, seconds = started.ends()
    assert code == FAILED
    [line] = said(err)
    assert f"error: rank {1 - rank} has waited 0.5 min for another rank, which neither went on nor died" in line
    assert 25 < seconds < 30 + 60


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], STANDALONE], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path, launcher, number):
    folder = tmp_path / "images"
    photos(folder, 40)
    settings = {"data.train_dir": folder, "data.batch_size": 8, "data.workers": 2, "data.memory_limit_gb": 0.0}
    started = Started(tmp_path, "1:6:wait", launcher, **settings)
    started.reached()
    assert len(marked(started.mark)) > 4  # ranks, workers and what serves them
    started.process.send_signal(number)
    code, err, seconds = started.ends()
    assert code != 0
    assert seconds < 60
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (number == signal.SIGKILL), err
    assert "Traceback" not in err or "torch.distributed" in err, err


@pytest.mark.slow
def test_sigterm_before_training_begins_leaves_nothing(tmp_path):
    started = Started(tmp_path, "1:0:wait")
    time.sleep(6)
    started.process.terminate()
    assert started.process.wait(60) != 0
    started.are_gone()


def photos(root: Path, count: int) -> None:
    from test_continue import photos

    photos(root, count)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:13969. This is typically"), "gone"),
        (RuntimeError("[pair.cc:545] Read error [127.0.0.1]:28365: Connection reset by peer."), "gone"),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 30000ms for recv operation to complete"), "silent"),
        (RuntimeError("NCCL communicator was aborted on rank 0."), "gone"),
        (RuntimeError("rank 0 failed: No space left on device"), "gone"),
        (ValueError("rank 1 got projections that are not finite; its own error says which."), "gone"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (FloatingPointError("the loss is not finite at step 3"), None),
        (ValueError("cat/1.png cannot be read"), None),
        (OSError("Connection reset by peer"), None),
    ],
)
def test_an_echo_of_another_ranks_failure_is_told_from_an_error(error, kind):
    assert echo(error) == kind
