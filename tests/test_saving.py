"""Checkpoints of a run at the command line: a save that fails, and what is left when one does."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from safetensors import safe_open

from simclr.checkpoint import LAST, load_encoder, read_checkpoint
from simclr.cli.messages import FAILED
from simclr.cli.saving import WholeCheckpoints
from simclr.cli.train import train
from simclr.intact import not_finite
from strict import sitecustomize as strict
from tiny import STEPS, flags

RUN = {"trainer.max_epochs": 3, "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 0, "quality.every_n_epochs": 0}


def run_and_code(arguments: list[str]) -> int:
    try:
        train(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


def full_disk(patch, path: str, writes: set[int]) -> None:
    """The disk has no room for these writes of a file, the first being 1."""
    fsync, seen = os.fsync, []

    def sync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if f".{Path(path).name}." in name:
            seen.append(name)
            if len(seen) in writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    patch.setattr(os, "fsync", sync)


def files_of(run: Path) -> list[str]:
    return sorted(p.name for p in run.rglob("*") if p.is_file() and "tfevents" not in p.name)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing has disturbed; not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(flags({**RUN, "run_dir": run}))
    return run


def assert_same(run: Path, whole: Path) -> None:
    a, b = (torch.load(folder / LAST, weights_only=True) for folder in (run, whole))
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(a["state_dict"][name], value) for name, value in b["state_dict"].items())
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@needs_proc
def test_a_save_that_finds_no_room_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "/nowhere")  # nothing is written there
    full_disk(monkeypatch, "last.ckpt", {1, 2})
    train(flags({**RUN, "run_dir": "run"}))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    reason = "last.ckpt could not be written (No space left on device)"
    assert len(said) == 2
    assert all(reason in line and "there is none before it, and the run goes on" in line for line in said)
    assert_same(Path("run"), whole)
    assert files_of(Path("run")) == files_of(whole)


@needs_proc
def test_a_run_whose_last_save_failed_does_not_end_as_if_nothing_were(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        full_disk(patch, "last.ckpt", {3})
        assert run_and_code(flags({**RUN, "run_dir": "run"})) == FAILED
    err = capsys.readouterr().err
    assert "the one before is kept" in err
    assert "error: trained" in err
    assert "run/checkpoints/last.ckpt could not be written (No space left on device). Make room, then continue" in err
    assert read_checkpoint("run").global_step == 2 * STEPS
    train(err.partition("continue with: simclr train ")[2].rstrip(".\n").split())
    assert_same(Path("run"), whole)


@needs_proc
@pytest.mark.parametrize("lost", ["encoder.pt", "encoder.safetensors"])
def test_an_encoder_that_found_no_room_is_left_by_the_same_command_later(tmp_path, monkeypatch, capsys, whole, lost):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        full_disk(patch, lost, {1})
        assert run_and_code(flags({**RUN, "run_dir": "run"})) == FAILED
    assert "encoder.pt could not be written (No space left on device). Make room" in capsys.readouterr().err
    assert not Path("run", lost).exists()
    train(["--ckpt_path", "run"])
    assert "already finished" in capsys.readouterr().out
    assert Path("run", "encoder.pt").read_bytes() == (whole / "encoder.pt").read_bytes()
    metadata = []
    for run in (Path("run"), whole):
        load_encoder(run / "encoder.safetensors")
        with safe_open(run / "encoder.safetensors", framework="pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]  # a hash of the weights among them


@needs_proc
def test_a_stop_whose_save_failed_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    full_disk(monkeypatch, "last.ckpt", {2})
    halt = {"trainer.callbacks": "test_continue.Halt", "trainer.callbacks.epoch": 1, "trainer.callbacks.batch": 1}
    assert run_and_code(flags({**RUN, **halt, "run_dir": "run"})) == FAILED
    assert f"at step {STEPS + 2} of" in capsys.readouterr().err
    assert read_checkpoint("run").global_step == STEPS


@needs_proc
def test_the_checkpoint_that_a_failed_one_would_have_replaced_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = {"trainer.callbacks": "ModelCheckpoint", "trainer.callbacks.filename": "{epoch}"}
    best |= {"trainer.callbacks.dirpath": "best", "trainer.callbacks.save_on_train_epoch_end": True}
    full_disk(monkeypatch, "epoch=2.ckpt", {1})
    train(flags({**RUN, **best, "run_dir": "run"}))
    assert os.listdir("best") == ["epoch=1.ckpt"]


@needs_proc
def test_pictures_and_metrics_that_find_no_room_do_not_end_a_run(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        full_disk(patch, "views.png", {1})
        train(flags({**RUN, "run_dir": "no_views"}))
    assert "views.png could not be written (No space left on device): the run goes on" in capsys.readouterr().err
    full_disk(monkeypatch, "metrics.csv", {1, 2})
    train(flags({**RUN, "run_dir": "run"}))
    assert capsys.readouterr().err.count("its rows wait for room") == 1
    assert_same(Path("run"), whole)


def test_an_epochs_row_is_in_the_file_before_its_checkpoint_is(tmp_path, monkeypatch, whole):
    rows, save = [], WholeCheckpoints.save_checkpoint

    def saving(self, *args, **kwargs):
        rows.append(Path("run/metrics.csv").read_bytes().count(b"\n") - 1)
        save(self, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", saving)
    train(flags({**RUN, "run_dir": "run"}))
    assert rows == [epoch * (STEPS + 1) for epoch in (1, 2, 3)]
    assert_same(Path("run"), whole)  # and not twice


TRAIN = "import sys; from simclr.cli.train import train; train(sys.argv[1:])"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    """SIGKILL at random moments of a run from memory, some epochs after each start."""
    settings = {**RUN, "trainer.max_epochs": 60, "model.warmup_epochs": 2}
    train(flags({**settings, "run_dir": tmp_path / "whole"}))
    run, draw, kills = tmp_path / "run", random.Random(0), 0
    arguments = flags({**settings, "run_dir": run})
    while kills < 12:
        command = [sys.executable, "-c", TRAIN, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=strict.environment()) as process:
            for line in process.stdout:
                if line.startswith("epoch"):
                    break
            time.sleep(draw.uniform(0, 0.4))
            process.kill()
        kills += 1
        read = read_checkpoint(run)
        assert not read.unfit
        if read.finished:
            break
        arguments = ["--ckpt_path", str(run)]
    assert kills > 3
    train(["--ckpt_path", str(run)])
    assert_same(run, tmp_path / "whole")
    assert not list(run.rglob("*.partial"))


class Ruin(Callback):
    """Weights of the encoder become NaN after the last step of an epoch: no loss has seen them."""

    def __init__(self, epoch: int, name: str = "encoder.conv1.weight"):
        self.epoch, self.name = epoch, name

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch and trainer.current_epoch == self.epoch:
            module.state_dict()[self.name].fill_(float("nan"))


RUIN = {"trainer.callbacks": "test_saving.Ruin"}


@pytest.mark.parametrize("name", ["encoder.conv1.weight", "encoder.bn1.running_var"])
def test_weights_that_are_ruined_never_replace_good_ones(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    ruin = {**RUIN, "trainer.callbacks.epoch": 2, "trainer.callbacks.name": name}
    assert run_and_code(flags({**RUN, **ruin, "run_dir": "run"})) == FAILED
    said = f"error: weights are not finite after step {3 * STEPS} ({name}): they are not saved. Lower base_lr"
    err = capsys.readouterr().err
    assert said in err
    assert "run/checkpoints/last.ckpt holds the last good weights." in err
    assert read_checkpoint("run").global_step == 2 * STEPS
    assert all(value.isfinite().all() for value in read_checkpoint("run").state_dict.values())
    assert not Path("run/encoder.pt").exists()


def test_a_run_without_checkpoints_that_ends_ruined_leaves_no_encoder_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    off = {**RUN, **RUIN, "trainer.callbacks.epoch": 2, "trainer.enable_checkpointing": False}
    assert run_and_code(flags({**off, "run_dir": "run"})) == FAILED
    captured = capsys.readouterr()
    assert f"error: weights are not finite after step {3 * STEPS} (conv1.weight)" in captured.err
    assert "trained" not in captured.out
    assert not list(Path("run").glob("encoder*"))


def test_a_buffer_may_hold_infinities_on_purpose():
    class Masked(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    network = Masked()
    assert not_finite(network) == []
    state = {"state": {0: {"velocity": torch.tensor([1.0, torch.inf]), "step": 3}}}
    assert not_finite(network, [state]) == ["velocity of parameter 0"]


# Fills a disk from one epoch on until the start of another.
FILL = """
import os, sys
from simclr.cli.train import train
from simclr.module import SimCLR
filler, full, free, room = sys.argv[1], *map(int, sys.argv[2:5])
def fill(self, *args):
    if self.current_epoch == full:
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        os.truncate(filler, os.path.getsize(filler) - room)
    if self.current_epoch == free:
        os.unlink(filler)
SimCLR.on_train_epoch_start = fill
train(sys.argv[5:])
"""
FULL = {  # the epoch from whose start the disk is full, and bytes that stay free
    "before the first checkpoint": (0, 0),
    "before the second": (1, 0),
    "until the end": (2, 0),
    "but for half a checkpoint": (1, 65_536),
    "of temporary files alone": (0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL)
def test_a_disk_that_is_really_full_for_an_epoch(tmp_path, whole, variant):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        elsewhere = variant == "of temporary files alone"
        run, (full, room) = (tmp_path if elsewhere else disk) / "run", FULL[variant]
        free = 99 if elsewhere else full + 1
        command = [sys.executable, "-c", FILL, disk / "filler", str(full), str(free), str(room)]
        environment = strict.environment() | {"TMPDIR": str(disk if elsewhere else tmp_path)}
        settings = flags({**RUN, "run_dir": run})
        done = subprocess.run([*command, *settings], capture_output=True, text=True, env=environment)
        assert ("last.ckpt could not be written (No space left on device)" in done.stderr) != elsewhere
        assert "Traceback" not in done.stderr
        assert done.returncode == (FAILED if full == 2 else 0), done.stderr
        if full == 2:
            assert read_checkpoint(run).global_step == 2 * STEPS  # the old one
            (disk / "filler").unlink()
            train(["--ckpt_path", str(run)])
        assert_same(run, whole)
        assert not list(run.rglob("*.partial"))
    finally:
        subprocess.run(["umount", disk], check=True)
