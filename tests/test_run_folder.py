"""A run folder has one writer, whose claim dies with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace

from simclr.checkpoint import LAST
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.files import hold
from simclr.run_folder import RunFolder
from test_continue import files_of
from test_saving import run_and_code
from tiny import flags

HOLDER = """
import subprocess, sys
from pathlib import Path
from simclr.files import hold
let_go = hold(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "60"])  # inherits nothing of it
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_held_until_its_holder_dies_and_nothing_is_left(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as process:
        child = int(process.stdout.readline())
        with pytest.raises(BlockingIOError):
            hold(tmp_path)
        process.kill()
        process.wait()
    let_go = hold(tmp_path)  # though a process that it has started lives
    os.kill(child, signal.SIGKILL)
    let_go()
    hold(tmp_path)()
    assert os.listdir(tmp_path) == []


def config_of(run: Path) -> Namespace:
    return Namespace(run_dir=run, config=None, data=Namespace(train_dir="photos"), model=Namespace(encoder="f"))


@pytest.fixture
def another(tmp_path, monkeypatch):
    """The folder of a run that goes on in another process, as one that still reads its images."""
    folder = RunFolder()
    folder.choose(config_of(tmp_path / "run"), None)
    monkeypatch.delenv("SIMCLR_RUN_DIR")
    yield tmp_path / "run"
    folder.let_go()


def test_a_second_run_in_a_folder_is_refused_before_the_first_has_written(another, monkeypatch, capsys):
    assert run_and_code(flags({"run_dir": another})) == BAD_INPUT
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run_dir={another} belongs to a run that still goes on")
    assert another.is_dir()
    assert os.listdir(another) == [".writer.json"]  # of the first


def test_a_run_that_goes_on_is_not_continued_beside_itself(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(flags({"run_dir": run, "trainer.max_epochs": 1}))
    before = files_of(run)
    let_go = hold(run)
    capsys.readouterr()
    assert run_and_code(["--ckpt_path", str(run / LAST), "--trainer.max_epochs", "2"]) == BAD_INPUT
    assert "belongs to a run that still goes on" in capsys.readouterr().err
    assert files_of(run) == before
    train(["--ckpt_path", str(run / LAST), "--trainer.max_epochs", "2", "--run_dir", str(tmp_path / "copy")])
    let_go()
    train(["--ckpt_path", str(run / LAST), "--trainer.max_epochs", "2"])
    hold(run)()  # each has let go of it


def test_ranks_of_one_run_are_one_writer(another, monkeypatch):
    monkeypatch.setenv("SIMCLR_RUN_DIR", f"{os.getppid()}:{another}")
    assert RunFolder().choose(config_of(another), None) == another


def test_what_dead_writers_left_goes_when_a_run_goes_on(tmp_path):
    run = tmp_path / "run"
    train(flags({"run_dir": run, "trainer.max_epochs": 1}))
    for path in (run / ".config.yaml.0a1b2c3d.partial", run / "checkpoints" / ".other.ckpt.0a1b2c3d.partial"):
        path.write_bytes(b"half")
    train(["--ckpt_path", str(run / LAST), "--trainer.max_epochs", "2"])
    assert not list(run.rglob("*.partial"))
