"""Two ranks that end early and go on, together: to the same bits, however they were told to stop."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Callback

from ranks import run_ranks
from strict.sitecustomize import environment
from test_continue import LIMIT, STOPPER, run_and_code, signal_at, time_is_up_at
from tiny import BATCH, flags

ROOT = Path(__file__).parents[1]
# Ten steps an epoch: ranks ask each other after the first of them, the ninth and the last. The warm-up lasts longer
# than max_steps, so that until there the learning rate is that of the whole run.
RUN = {
    "trainer.max_epochs": 3,
    "model.warmup_epochs": 2,
    "trainer.log_every_n_steps": 1,
    "knn.every_n_epochs": 0,
    "quality.every_n_epochs": 0,
}
RUN |= {"data.shapes_train": 10 * BATCH, "trainer.devices": 2, "trainer.strategy": "ddp"}


class HaltOnOneRank(Callback):
    """Asks to stop in an epoch, the first being 0, on the second rank only."""

    def __init__(self, epoch: int = 1):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= (trainer.global_rank, trainer.current_epoch, batch_idx) == (1, self.epoch, 3)


HALT = {"trainer.callbacks": "test_continue_ranks.HaltOnOneRank"}

# Way of ending: settings, what happens on which ranks, what is said, exit code, settings of the command that goes on.
WAYS = {
    "sigterm": ({}, (1, signal_at(15, signal.SIGTERM)), "stopped at step 19 of 30", 143, []),
    "max_time": (LIMIT, (0, time_is_up_at(15)), "stopped by max_time at step 19 of 30", 0, []),
    "max_time in the last epoch": (LIMIT, (0, time_is_up_at(28)), "stopped by max_time at step 29 of 30", 0, []),
    "max_steps": ({"trainer.max_steps": 16}, None, "trained", 0, ["--trainer.max_steps", "-1"]),
    "EarlyStopping": (STOPPER, None, "stopped by EarlyStopping (Monitored", 0, []),
    "a callback": (HALT, None, "stopped by a callback on another rank at step 19 of 30", 0, []),
}


def digest(run: Path) -> list[float]:
    """The weights of a run's checkpoint, as numbers that travel between processes."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([value.flatten().double() for value in state.values()]).tolist()


def run_ways(root: str, ways: list[str]) -> dict[str, tuple]:
    """Way: exit code, what was said, exit code of what went on, weights, metrics."""
    rank, found = dist.get_rank(), {}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as Lightning tells the ranks that it launches
    os.chdir(root)
    whole = run_and_code(flags({**RUN, "run_dir": "whole"}))
    found["whole"] = whole, "", whole, digest(Path("whole")), Path("whole/metrics.csv").read_text()
    for number, way in enumerate(ways):
        settings, cut, _, _, more = WAYS[way]
        run, said = Path(f"cut-{number}"), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if cut is not None and cut[0] == rank:
                cut[1](patch)
            code = run_and_code(flags({**RUN, **settings, "run_dir": run}))
        dist.barrier()
        on = run_and_code(["--ckpt_path", str(run), *more])
        dist.barrier()
        found[way] = code, said.getvalue(), on, digest(run), (run / "metrics.csv").read_text()
    return found


def run_and_cut(root: str) -> tuple:
    """A run that nothing cuts, and one that is cut in each of its epochs, each time otherwise, and goes on."""
    rank, said = dist.get_rank(), []
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as Lightning tells the ranks that it launches
    os.chdir(root)
    codes = [run_and_code(flags({**RUN, "run_dir": "whole"}))]
    halt = {**HALT, "trainer.callbacks.epoch": 2}
    start, on = flags({**RUN, **LIMIT, **halt, "run_dir": "cut"}), ["--ckpt_path", "cut"]
    steps = [(start, 1, signal_at(5, signal.SIGTERM)), (on, 0, time_is_up_at(15)), (on, None, None), (on, None, None)]
    for arguments, who, cut in steps:
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if who == rank:
                cut(patch)
            codes.append(run_and_code(arguments))
        dist.barrier()
        said.append(out.getvalue())
    runs = [(digest(Path(run)), (Path(run) / "metrics.csv").read_text()) for run in ("whole", "cut")]
    return codes, said, *runs


def test_two_ranks_that_are_cut_by_a_signal_a_limit_and_a_callback_go_on_to_the_same_bits(tmp_path):
    """The signal comes on the second rank, the limit passes on the first, the callback asks on the second."""
    codes, said, whole, cut = run_ranks(run_and_cut, 2, str(tmp_path))[0]
    assert codes == [0, 143, 0, 0, 0], said
    ends = ["stopped at", "stopped by max_time at", "stopped by a callback on another rank at", "trained"]
    for text, end, step in zip(said, ends, (9, 19, 29, None), strict=True):
        assert (end if step is None else f"{end} step {step} of 30") in text
    assert cut == whole


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """(the working folder, what `run_ways` gave on the first rank, of the ways that tests ask for)"""
    root = tmp_path_factory.mktemp("ranks")
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {of.get("way") for of in parameters}
    return root, run_ranks(run_ways, 2, str(root), [way for way in WAYS if way in asked])[0]


@pytest.mark.slow  # each way by itself
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_that_end_early_go_on_to_the_same_bits(found, way):
    code, said, on, weights, metrics = found[1][way]
    assert (code, on) == (WAYS[way][3], 0), said
    assert WAYS[way][2] in said
    assert weights == found[1]["whole"][3]
    assert metrics == found[1]["whole"][4]


@pytest.mark.slow  # starts two processes twice
def test_ranks_that_were_launched_stop_by_a_callback_of_one_and_go_on_to_the_same_bits(found):
    root = found[0]
    command = [sys.executable, str(ROOT / "train.py")]
    options = {"cwd": root, "capture_output": True, "text": True, "env": environment(ROOT, ROOT / "tests")}
    cut = subprocess.run([*command, *flags({**RUN, **HALT, "run_dir": "launched"})], **options)
    assert cut.returncode == 0, cut.stderr
    said = "stopped by a callback on another rank at step 19 of 30; encoder in launched/encoder.pt; continue with:"
    assert said in cut.stdout
    done = subprocess.run([*command, "--ckpt_path", "launched"], **options)
    assert done.returncode == 0, done.stderr
    assert digest(root / "launched") == found[1]["whole"][3]
