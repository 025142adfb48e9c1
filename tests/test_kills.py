"""SIGKILL at random moments, each followed by the same command: the same bits, and nothing of the dead is left.

A moment is told to the run by its environment (`killed.py`), or is when this process kills it: a failure names the
seed, by which it repeats. The program that this project's parts are missing from goes through the same, and fails it.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from killed import KILL, LEFT, MARK, marked, temporaries
from simclr.checkpoint import read_checkpoint
from strict import sitecustomize as strict
from tiny import BATCH, STEPS, flags

ROOT = Path(__file__).parents[1]
SIGKILLED = -9
EPOCHS = 6
PLAIN = {"trainer.max_epochs": EPOCHS, "trainer.log_every_n_steps": 1, "resume": "auto"}
PLAIN |= {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0}
FILES = {"data.train_dir": "images", "data.memory_limit_gb": 0}
CACHE = {"model.micro_batch_size": BATCH // 2}
SAVED = {"checkpoint.every_n_steps": 3, "checkpoint.keep": 2}
ACCUMULATED = {"trainer.accumulate_grad_batches": 2}
TWO = {"trainer.devices": 2, "trainer.strategy": "ddp"}

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # of one core
    pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch"),
]


def photos(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def patience(seconds: float) -> float:
    """Seconds on a machine that does nothing else: a process that gets a tenth of a core needs ten times as long."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Survivor:
    """A run that is begun again and again, in a folder of its own.

    Args:
        place: a folder; the run's is below it, and the one for temporary files.
        program: `simclr` or `stock`.
        settings: of the command line.

    Attributes:
        kills: how often it was.
        waited: seconds that processes of a dead run stayed, of each kill.
        ends: (what was asked for, exit code, last checkpoint's step after it), of each start, for messages.
    """

    def __init__(self, place: Path, program: str, settings: dict[str, Any]):
        self.place, self.program, self.settings = place, program, settings
        self.run, self.tmp = place / "run", place / "tmp"
        self.tmp.mkdir(exist_ok=True)  # a disk may be there
        self.kills, self.waited, self.ends = 0, [], []
        self.left: list[str] = []  # temporaries of the dead
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        environment = strict.environment(ROOT, ROOT / "tests") | {"TMPDIR": str(self.tmp), MARK: self.mark}
        environment |= {LEFT: str(place / "left"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(ROOT / "tests" / "killed.py"), "serve"]
        self.server = subprocess.Popen(command, cwd=place, env=environment, **pipes)
        assert self.server.stdout.readline() == "ready\n"

    def __enter__(self) -> "Survivor":
        return self

    def __exit__(self, *args: object) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.kill()
        self.server.wait()

    def alive(self) -> list[int]:
        """The processes of the run."""
        return [pid for pid in marked(self.mark) if pid != self.server.pid]

    def start(self, moment: dict[str, Any] | None = None, clock: float | None = None, **other: Any) -> int:
        """Give the command, with a moment to die at, or to be killed at after seconds; returns its exit code."""
        words = flags({**self.settings, "run_dir": "run", **other})
        if self.program == "stock":
            words = [word for word in words if word.startswith(("--run_dir", "--trainer.max_e"))]
        seen = self.place / "left"
        asked = {"command": [self.program, *words], "said": str(self.place / "said")}
        asked["environment"] = {KILL: json.dumps(moment) if moment else ""}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        if clock is not None:
            until = time.monotonic() + clock
            while time.monotonic() < until and Path(f"/proc/{pid}").exists():
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        self.kills += code != 0
        self.waited += [self._seconds_to_quiet()] if code else []
        self.ends.append((moment or clock, other, code, self.step()))
        if seen.exists():  # it came as far as to train
            assert not set(self.left) & set(json.loads(seen.read_text())), f"{self.ends}: of an earlier one"
            seen.unlink()
        self.left = temporaries(self.tmp, self.run)
        with (self.place / "starts").open("a") as file:
            print(*self.ends[-1], f"{self.waited[-1]:.1f} s" if code else "", *self.left, sep="; ", file=file)
        return code

    def _seconds_to_quiet(self) -> float:
        began = time.monotonic()
        while left := self.alive():
            waited = time.monotonic() - began
            if waited > patience(60):
                names = [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{self.ends}: {names} are still there")
            time.sleep(0.05)
        return time.monotonic() - began

    def step(self) -> int:
        """Of the last checkpoint; 0 if there is none."""
        last = self.run / "checkpoints" / "last.ckpt"
        return torch.load(last, weights_only=True)["global_step"] if last.exists() else 0

    def said(self) -> str:
        return (self.place / "said").read_text()


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes() else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{at}.{key}" for key in a.keys() ^ b.keys()]
        return found + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{at}[{i}]")]
    return [] if a == b else [at]


LEARNED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "epoch_loss")


def compare(run: Path, whole: Path) -> list[str]:
    """What differs between a run and one that nothing has cut: weights, optimiser, schedule, metrics, encoder."""
    found = []
    paths = [folder / "checkpoints" / "last.ckpt" for folder in (run, whole)]
    a, b = (torch.load(path, weights_only=True) for path in paths)
    for name in LEARNED:
        found += differences(a.get(name), b.get(name), name)
    if (whole / "metrics.csv").exists():
        found += [] if (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes() else ["metrics.csv"]
        encoders = [torch.load(folder / "encoder.pt", weights_only=True) for folder in (run, whole)]
        found += differences(*encoders, "encoder.pt")
    return found


CASES = {
    "from memory": {**PLAIN, **SAVED},
    "from memory, in micro-batches, accumulated, saved at epochs": {**PLAIN, **CACHE, **ACCUMULATED},
    "from files": {**PLAIN, **FILES, **SAVED},
    "from files, in micro-batches, accumulated": {**PLAIN, **FILES, **CACHE, **ACCUMULATED, **SAVED},
}
TWO_RANKS = {
    "two ranks from memory, in micro-batches": {**PLAIN, **TWO, **SAVED, "model.micro_batch_size": BATCH // 2},
    "two ranks from files, accumulated": {**PLAIN, **TWO, **FILES, **SAVED, **ACCUMULATED},
}


def drawn(kind: str, draw: random.Random, done: int, until: int, per_epoch: int) -> dict[str, Any]:
    """A moment of a kind, in the run's steps from the last checkpoint to `until`."""
    number, after = draw.randrange(done, max(until, done + 1)), draw.uniform(0, 0.04)
    if kind == "operation":
        return {"at": kind, "number": draw.randint(1, 24)}
    if kind == "end":
        return {"at": kind, "number": number // per_epoch, "after": after}
    return {"at": kind, "number": number, "after": after if kind == "step" else draw.uniform(0, 0.004)} | (
        {"name": "last.ckpt"} if kind == "write" else {}
    )


def survive(run: Survivor, seed: int, seconds: float, ranks: int = 1) -> None:
    """Kill a run five times, each time going on with the same command, and let it end; it would take these seconds."""
    draw = random.Random(seed)
    per_epoch = STEPS // run.settings.get("trainer.accumulate_grad_batches", 1)
    total = EPOCHS * per_epoch
    kinds = ["operation", "step", "write", "end"]
    draw.shuffle(kinds)
    kinds.append("clock")  # last: it may ring after the end
    for number, kind in enumerate(kinds):
        workers = draw.choice((0, 2))  # not the same as before: free
        other = {"data.workers": workers} if "data.train_dir" in run.settings else {}
        if kind == "clock":
            code = run.start(clock=draw.uniform(0, 0.8 * seconds), **other)
            assert code in (-signal.SIGKILL, 0), f"{run.ends}: {run.said()}"
            continue
        # What is left of the life is shared out among the deaths to come.
        moment = drawn(kind, draw, run.step(), run.step() + (total - run.step()) // (len(kinds) - number), per_epoch)
        if ranks > 1:
            # Files are the first rank's alone.
            moment["rank"] = draw.choice((0, -2) if kind in ("operation", "write") else (0, 1, -1, -2))
        code = run.start(moment, **other)
        assert code != 0 or run.step() == total, f"{run.ends}: {run.said()}"
        assert code == -signal.SIGKILL or code == 0 or ranks > 1, f"{run.ends}: {run.said()}"
    assert run.start() == 0, f"{run.ends}: {run.said()}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("case", [*CASES, *TWO_RANKS])
def test_whatever_kills_a_run_the_same_command_ends_in_the_same_bits(tmp_path, case, seed):
    settings = {**CASES, **TWO_RANKS}[case]
    if "data.train_dir" in settings:
        photos(tmp_path / "images", STEPS * BATCH)
    with Survivor(tmp_path, "simclr", settings) as run:
        began = time.monotonic()
        assert run.start(run_dir="whole") == 0, run.said()  # the same command, which nothing cuts
        survive(run, seed, time.monotonic() - began, ranks=2 if case in TWO_RANKS else 1)
        print(f"\n{case}, seed {seed}: {run.kills} kills; processes stayed {max(run.waited):.1f} s at most; {run.ends}")
        assert compare(run.run, tmp_path / "whole") == [], run.ends
        assert temporaries(run.tmp, run.run) == [], run.ends
        assert max(run.waited) < patience(5), (run.waited, run.ends)
        assert run.kills >= 4, run.ends


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("offset", range(4))
def test_a_death_before_any_operation_on_files_is_survived(tmp_path, offset):
    """Not at random: before each time that the run opens, renames, removes or makes something in its folder."""
    settings = {**PLAIN, "trainer.max_epochs": 2, "checkpoint.every_n_steps": 3, "checkpoint.keep": 1}
    with Survivor(tmp_path, "simclr", settings) as run:
        assert run.start(run_dir="whole") == 0, run.said()
        number = 1 + offset
        while run.start({"at": "operation", "number": number}, run_dir=f"run-{number}") != 0:
            folder = tmp_path / f"run-{number}"
            assert run.start(run_dir=folder.name) == 0, f"{number}: {run.said()}"
            assert compare(folder, tmp_path / "whole") == [], number
            assert list(folder.rglob("*.partial")) == [], number
            number += 4
        assert number > 20  # a run has more


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 20 MB."""
    place = tmp_path / "tmp"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_deaths_during_writes_damage_no_checkpoint(tmp_path, disk):
    """With the folder for temporary files on another file system than the run's, and a checkpoint of some MB."""
    settings = {**PLAIN, "trainer.max_epochs": 20, "checkpoint.every_n_steps": 1, "model.width": 2}
    draw, cut, step = random.Random(0), 0, 0
    with Survivor(tmp_path, "simclr", settings) as run:
        assert run.start(run_dir="whole") == 0, run.said()
        for number in range(30):
            moment = {"at": "write", "name": "last.ckpt", "number": step + 2, "after": draw.uniform(0, 0.02)}
            assert run.start(moment) == -signal.SIGKILL, run.said()
            cut += any(run.run.rglob(".last.ckpt.*.partial"))
            if (run.run / "checkpoints" / "last.ckpt").exists():
                read = read_checkpoint(run.run)
                assert read.unfit == []
                assert read.global_step >= step, number
                step = read.global_step
        assert cut >= 10, "few were killed while writing"
        assert run.start() == 0, run.said()
        print(f"\n30 kills, {cut} of them left a temporary, the last at step {step}")
        assert compare(run.run, tmp_path / "whole") == []
        assert temporaries(run.tmp, run.run) == []


@pytest.mark.slow
def test_what_torch_and_lightning_give_by_themselves_fails_the_same_comparison(tmp_path):
    with Survivor(tmp_path, "stock", {"trainer.max_epochs": 3}) as run:
        for name in ("whole", "again"):
            assert run.start(run_dir=name) == 0, run.said()
        assert compare(tmp_path / "again", tmp_path / "whole") == []  # uncut, it does repeat
        assert run.start({"at": "step", "number": STEPS + 3}) == -signal.SIGKILL, run.said()
        assert run.step() == STEPS
        assert run.start() == 0, run.said()
    found = compare(run.run, tmp_path / "whole")
    assert "global_step" not in found  # it came as far
    assert any(name.startswith("state_dict.encoder") for name in found)
