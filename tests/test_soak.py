"""Runs of many steps: what they hold in memory stays what it is."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from PIL import Image
from pytorch_lightning import Callback

from strict import sitecustomize as strict
from tiny import flags

ROOT = Path(__file__).parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")
STEPS_AN_EPOCH, BATCH = 50, 8


def parents() -> dict[int, int]:
    """Of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    return found


def resident(pid: int) -> int:
    """Bytes of a process in memory that no file backs: its own, and what it shares by memory."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)


class Resident(Callback):
    """Writes what the process, and those it has started, hold: a line of step, bytes and bytes of the others."""

    def __init__(self, path: str, every_n_steps: int):
        self.path, self.every = path, every_n_steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % self.every:
            return
        of, mine, others = parents(), os.getpid(), 0
        for pid, parent in of.items():
            while parent != mine and parent in of:
                parent = of[parent]
            if parent == mine:
                others += resident(pid)
        with open(self.path, "a") as file:
            file.write(f"{trainer.global_step} {resident(mine)} {others}\n")


def curve(folder: Path, source: str, steps: int, every: int) -> list[tuple[int, int, int]]:
    """(step, bytes, bytes of other processes) of a run of the command line with all that it has by default."""
    settings = {"data.batch_size": BATCH, "model.width": 0.125, "trainer.max_epochs": steps // STEPS_AN_EPOCH}
    settings |= {"data.shapes_train": STEPS_AN_EPOCH * BATCH, "checkpoint.every_n_steps": 20, "checkpoint.keep": 2}
    settings |= {"knn.every_n_epochs": 5, "quality.every_n_epochs": 5, "trainer.log_every_n_steps": 1}
    settings |= {"trainer.callbacks": "test_soak.Resident", "trainer.callbacks.path": "curve"}
    settings |= {"trainer.callbacks.every_n_steps": every, "run_dir": "run"}
    if source == "files":
        for number in range(STEPS_AN_EPOCH * BATCH):
            path = folder / "images" / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number % 256, 7 * number % 256, 99)).save(path)
        settings |= {"data.train_dir": "images", "data.memory_limit_gb": 0, "data.workers": 1}
    command = [sys.executable, str(ROOT / "train.py"), *flags(settings)]
    path = strict.environment(ROOT, ROOT / "tests")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr
    lines = (folder / "curve").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("source", ["memory", "files"])
def test_memory_is_flat_over_twenty_thousand_steps(tmp_path, source):
    points = curve(tmp_path, source, steps=20_000, every=100)
    for which in (1, 2):
        early, late = ([p[which] for p in points if a < p[0] <= b] for a, b in ((2_000, 4_000), (18_000, 20_000)))
        print(source, which, [p[which] >> 10 for p in points[::10]])
        assert len(early) == len(late) == 20
        assert median(late) <= 1.01 * median(early), [p[which] for p in points]
