"""The same command, given again after a real SIGKILL, ends the run that it began, in the same bits."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from simclr.checkpoint import read_checkpoint
from simclr.cli import saving
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import resumes, train
from test_continue import RUN, assert_same_run, run_and_code, whole  # noqa: F401
from tiny import STEPS, flags

# A process that trains and, as it takes a step, is killed by the one signal that nothing can catch.
KILLED = """
import os, signal, sys
from simclr.cli.train import train
from simclr.module import SimCLR
step, plain = int(sys.argv[1]), SimCLR.training_step
def training_step(self, *args):
    if self.trainer.global_step == step - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args)
SimCLR.training_step = training_step
train(sys.argv[2:])
"""
AGAIN = flags({**RUN, "run_dir": "run", "resume": "auto"})


def killed_at(step: int, arguments: list[str]) -> None:
    done = forked.run(["-c", KILLED, str(step), *arguments])
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_same_command_starts_goes_on_after_kills_and_says_when_it_is_done(tmp_path, monkeypatch, capsys, whole):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    killed_at(2, AGAIN)  # before the first checkpoint
    assert not list(Path("run").rglob("*.ckpt"))
    killed_at(STEPS + 2, AGAIN)  # from the start again, into the second epoch
    train(AGAIN)
    assert f"from step {STEPS} of" in capsys.readouterr().out
    assert_same_run(Path("run"), whole)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    train(AGAIN)
    assert "already finished, 3 of 3 epochs" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["a flipped bit", pytest.param("gone", marks=pytest.mark.slow)])
def test_where_the_last_checkpoint_is_damaged_the_newest_sound_one_is_used_and_said(
    tmp_path,
    monkeypatch,
    capsys,
    whole,  # noqa: F811
    damage,
):
    monkeypatch.chdir(tmp_path)
    again = [*AGAIN, "--checkpoint.every_n_steps=1", "--checkpoint.keep=3"]
    killed_at(STEPS + 3, again)
    last = Path("run/checkpoints/last.ckpt")
    kept = sorted(path.name for path in last.parent.glob("step-*.ckpt"))
    if damage == "gone":
        last.unlink()
        step, sound = STEPS + 2, kept[-1]
    else:  # it is the newest of those that are kept, by another name
        step, sound = STEPS + 1, kept[-2]
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 4
        last.write_bytes(content)
    capsys.readouterr()
    train(again)
    said = capsys.readouterr().out
    assert f"Going on from run/checkpoints/{sound}, of step {step}" in said
    assert (
        "last.ckpt is gone" if damage == "gone" else "last.ckpt cannot be read as a checkpoint: it is damaged"
    ) in said
    assert_same_run(Path("run"), whole)


@pytest.mark.parametrize(
    ("accumulate", "inside"), [(1, 1), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, 3), (2, 1)))]
)
def test_a_run_saved_inside_epochs_goes_on_from_there_after_a_kill(tmp_path, monkeypatch, capsys, accumulate, inside):
    monkeypatch.chdir(tmp_path)
    run = {**RUN, "trainer.accumulate_grad_batches": accumulate, "resume": "auto"}
    train(flags({**run, "run_dir": "whole"}))
    again = flags({**run, "run_dir": "run", "checkpoint.every_n_steps": 1, "checkpoint.keep": 2})
    steps = STEPS // accumulate
    killed_at(steps + inside + 1, again)  # in the batch after, which may be the epoch's last
    names = ["last.ckpt", *(f"step-{steps + before}.ckpt" for before in (inside - 1, inside))]
    assert sorted(path.name for path in Path("run").rglob("*.ckpt")) == sorted(names)
    capsys.readouterr()
    train(again)
    assert f"from step {steps + inside} of {3 * steps}" in capsys.readouterr().out
    assert_same_run(Path("run"), Path("whole"))
    assert read_checkpoint(f"run/checkpoints/step-{3 * steps}.ckpt").global_step == 3 * steps


def test_a_run_is_saved_by_the_clock_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "write_checkpoint", lambda path, content: saved.append(content["global_step"]))
    clock = iter(range(0, 10_000, 25))  # seconds that pass between two looks at it
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(clock))
    arguments = flags({**RUN, "run_dir": "run", "checkpoint.every_minutes": 1.0})
    run_and_code(arguments)
    assert saved == sorted(saved)
    assert len([step for step in saved if step % STEPS]) > 1  # inside epochs
    assert {STEPS, 2 * STEPS, 3 * STEPS} <= set(saved)


@pytest.mark.parametrize(
    ("option", "message"),
    [("every_n_steps=0", "is less than 1"), ("keep=-1", "is less than 0"), ("every_minutes=0", "is not positive")],
)
def test_a_schedule_that_is_none_is_refused(tmp_path, monkeypatch, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    assert run_and_code([*flags(RUN), f"--checkpoint.{option}"]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_being_asked_a_taken_folder_is_refused_with_what_helps(tmp_path, monkeypatch, capsys, whole):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    killed_at(1, AGAIN)
    assert run_and_code(AGAIN[:-1]) == BAD_INPUT
    assert (
        "ended before its first checkpoint. Choose another, or start it anew with --resume auto"
        in capsys.readouterr().err
    )
    shutil.copytree(whole, "done")
    assert run_and_code(flags({**RUN, "run_dir": "done"})) == BAD_INPUT
    err = capsys.readouterr().err
    assert "continue it with --ckpt_path done/checkpoints/last.ckpt, or with the same command and --resume auto" in err


def test_another_folder_with_files_in_it_is_never_emptied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "thesis.tex"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    assert run_and_code(AGAIN) == BAD_INPUT
    assert "run_dir=run is taken." in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"


def test_a_setting_that_would_make_another_run_is_refused_when_the_command_is_given_again(
    tmp_path,
    monkeypatch,
    capsys,
    whole,  # noqa: F811
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    assert run_and_code([*AGAIN, "--model.temperature", "0.3"]) == BAD_INPUT
    assert "model.temperature=0.3 but the checkpoint has 0.2" in capsys.readouterr().err
    assert run_and_code([*AGAIN[:-2], "--resume", "auto"]) == BAD_INPUT
    assert "resume=auto needs --run_dir" in capsys.readouterr().err


def test_minutes_given_again_do_not_measure_again(tmp_path, monkeypatch, capsys, whole):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    train([*(flag for flag in AGAIN if not flag.startswith("--trainer.max_epochs")), "--minutes", "5"])
    assert capsys.readouterr().out.startswith("already finished, 3 of 3 epochs")


@pytest.mark.parametrize(
    ("asked", "environment", "goes_on"),
    [
        (None, {}, False),
        ("auto", {}, True),
        (None, {"SLURM_RESTART_COUNT": "0"}, False),
        (None, {"SLURM_RESTART_COUNT": "2"}, True),
        (None, {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ("never", {"TORCHELASTIC_RESTART_COUNT": "1"}, False),
    ],
)
def test_a_job_that_was_restarted_goes_on_by_itself(monkeypatch, asked, environment, goes_on):
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resumes(asked) is goes_on


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "files"])
def test_kills_at_random_moments_end_in_the_same_bits(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    settings = {**RUN, "resume": "auto", "trainer.max_epochs": 150, "data.workers": 0 if where == "memory" else 2}
    settings |= {"data.memory_limit_gb": 1.0 if where == "memory" else 0.0}
    train(flags({**settings, "run_dir": "whole"}))
    command = [sys.executable, "-c", "import sys; from simclr.cli.train import train; train(sys.argv[1:])"]
    command += flags({**settings, "run_dir": "cut"})
    draw, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=draw.uniform(3, 8) if kills < 10 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills > 2
    assert_same_run(Path("cut"), Path("whole"))
