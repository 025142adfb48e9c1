"""How far a run is: a bar in a terminal, lines elsewhere, and some steps of every metric however short the run."""

import csv
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning import Callback

from simclr import progress
from simclr.cli import main
from simclr.cli.messages import INTERRUPTED
from simclr.module import SimCLR
from simclr.progress import LOG_STEPS, LogInterval, Pace, ProgressLines, duration, work_of_steps
from simclr.training.step_log import StepLog
from tiny import STEPS, fit, flags


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3540, "59 min"),
        (3599, "1 h 0 min"),
        (7980, "2 h 13 min"),
        (86400 * 3 + 3600 * 4, "3 d 4 h"),
    ],
)
def test_a_duration_is_said_in_the_units_people_use(seconds, text):
    assert duration(seconds) == text


def test_the_pace_leaves_out_the_first_step_and_counts_the_global_batch():
    trainer = SimpleNamespace(estimated_stepping_batches=101, global_step=1)
    pace = Pace(trainer, batch_size=64)
    assert pace.images_per_second(0.0) is None
    pace.step(trainer, 1000.0)  # a first step that compiles for long
    assert pace.seconds_left(trainer, 1000.0) is None
    for step in range(2, 12):
        trainer.global_step = step
        pace.step(trainer, 1000.0 + 2 * (step - 1))
    assert pace.images_per_second(1020.0) == 32.0  # 64 images every 2 s
    assert pace.images_per_second(1020.0) is None  # nothing since
    assert pace.seconds_left(trainer, 1020.0) == 180.0  # 90 steps


def test_the_time_left_knows_that_views_grow():
    trainer = SimpleNamespace(estimated_stepping_batches=40, num_training_batches=20, accumulate_grad_batches=2)
    method = SimCLR("resnet8", image_size=32, start_size=16, grow_epochs=2)  # sides of 16, 24, 32 and 32 pixels
    pace = Pace(trainer, 64, work_of_steps(trainer, method))
    trainer.global_step = 1
    pace.step(trainer, 100.0)
    trainer.global_step = 10
    assert pace.seconds_left(trainer, 109.0) == pytest.approx(10 * (24**2 + 2 * 32**2) / 16**2)
    trainer.num_training_batches = float("inf")  # of a loader without a length
    assert work_of_steps(trainer, method)(7) == 7
    assert work_of_steps(trainer, SimCLR("resnet8", image_size=32))(7) == 7


def test_accumulation_counts_batches_for_the_speed_and_steps_for_the_rest():
    trainer = SimpleNamespace(estimated_stepping_batches=10, global_step=0)
    pace = Pace(trainer, batch_size=10)
    for batch in range(1, 9):
        trainer.global_step = batch // 2
        pace.step(trainer, float(batch))
    assert pace.images_per_second(8.0) == 10.0
    assert pace.seconds_left(trainer, 8.0) == pytest.approx(7 / 4 * 6)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 10 s whenever it is looked at."""
    now = [0.0]

    def look() -> float:
        now[0] += 10
        return now[0]

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=look))


def test_without_a_terminal_a_line_every_30_seconds_says_where_the_run_is(tmp_path, monkeypatch, capsys, clock):
    looks = []
    original = StepLog.mean
    monkeypatch.setattr(StepLog, "mean", lambda self: looks.append(1) or original(self))
    monkeypatch.setattr(SimCLR, "on_train_epoch_end", lambda self: None)  # which looks at it too
    fit(tmp_path, callbacks=[ProgressLines()], max_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * STEPS // 3
    assert len(looks) == len(lines)  # a look at the loss waits for the device
    pattern = r"epoch 1/3  step 3/12  loss \d\.\d{3}  2 images/s  90 s left"
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert [re.search(r"step (\d+)/12", line)[1] for line in lines] == ["3", "6", "9", "12"]
    assert lines[-1].startswith("epoch 3/3")


def test_the_first_line_comes_after_ten_steps_where_the_run_will_last(tmp_path, capsys, clock, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    enough = Callback()
    enough.on_train_batch_end = lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == 70)
    fit(tmp_path, callbacks=[ProgressLines(seconds=50.0), enough], max_epochs=50)
    first, second, *_ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert re.fullmatch(r"epoch 3/50  step 11/200  loss \d\.\d{3}  16 images/s  3 min left", first), first
    assert "step 61/200" in second


def test_a_short_run_has_no_such_lines(tmp_path, capsys):
    fit(tmp_path, callbacks=[ProgressLines()], max_epochs=1)
    assert capsys.readouterr().out == ""


def test_the_bar_counts_from_1_and_shows_the_speed_and_the_rest(tmp_path, monkeypatch, capsys, clock):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "train",
            *flags(
                {
                    "trainer.enable_progress_bar": "true",
                    "run_dir": "run",
                    "knn.every_n_epochs": 0,
                    "quality.every_n_epochs": 0,
                }
            ),
        ]
    )
    said = capsys.readouterr()
    drawn = re.split(r"[\r\n]", said.out + said.err)
    end = f"{STEPS}/{STEPS}, loss " + r"\d\.\d{3}  2 images/s"
    assert any(re.match(rf"epoch 1/2 .* {end}  40 s left", text) for text in drawn), drawn
    assert any(re.match(rf"epoch 2/2 .* {end}\s*$", text) for text in drawn), drawn
    assert not any(text.startswith(("Epoch", "epoch 0")) for text in drawn)


@pytest.mark.parametrize(
    ("terminal", "wanted", "bar", "lines"),
    [
        (True, None, True, False),
        (False, None, False, True),
        (False, "true", True, False),
        (True, "false", False, False),
        (False, "false", False, False),
    ],
)
def test_a_terminal_has_a_bar_and_a_log_file_lines(terminal, wanted, bar, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    used = []
    monkeypatch.setattr("simclr.cli.train.Trainer.fit", lambda trainer, *_, **__: used.extend(trainer.callbacks))
    main(["train", *flags({"run_dir": "run", **({"trainer.enable_progress_bar": wanted} if wanted else {})})])
    kinds = {type(callback).__name__ for callback in used}
    assert ("ProgressBar" in kinds, "ProgressLines" in kinds) == (bar, lines)
    assert "TQDMProgressBar" not in kinds


def test_a_bar_of_the_users_is_the_only_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = []
    monkeypatch.setattr("simclr.cli.train.Trainer.fit", lambda trainer, *_, **__: used.extend(trainer.callbacks))
    main(["train", *flags({"run_dir": "run", "trainer.callbacks": "TQDMProgressBar"})])
    kinds = [type(callback).__name__ for callback in used]
    assert kinds.count("TQDMProgressBar") == 1
    assert not {"ProgressBar", "ProgressLines"} & set(kinds)


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


STEP_METRICS = ("train_loss", "lr", "contrast_top1", "positive_cosine", "negative_cosine")


def test_a_short_run_has_steps_of_every_metric_and_an_interval_given_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", *flags({"run_dir": "short"})])
    for name in STEP_METRICS:
        assert sum(bool(row[name]) for row in rows(tmp_path / "short")) == 2 * STEPS, name
    main(["train", *flags({"run_dir": "given", "trainer.log_every_n_steps": 3})])
    assert [row["step"] for row in rows(tmp_path / "given") if row["train_loss"]] == ["2", "5"]
    main(["train", *flags({"run_dir": "none", "trainer.log_every_n_steps": 25})])
    assert "train_loss" not in rows(tmp_path / "none")[0]


@pytest.mark.parametrize(("total", "every"), [(1, 1), (9, 1), (75, 7), (249, 24), (250, LOG_STEPS), (10**6, LOG_STEPS)])
def test_the_interval_is_a_tenth_of_a_short_run(total, every):
    trainer = SimpleNamespace(estimated_stepping_batches=total, log_every_n_steps=50)
    LogInterval().on_train_start(trainer, None)
    assert trainer.log_every_n_steps == every


def test_a_continued_run_logs_the_steps_of_an_uncut_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer.max_epochs": 6,
        "knn.every_n_epochs": 0,
        "quality.every_n_epochs": 0,
    }  # 24 steps: every second is logged
    main(["train", *flags({**settings, "run_dir": "whole"})])
    original, steps = SimCLR.training_step, []

    def interrupted(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 2 * STEPS + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "training_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(["train", *flags({**settings, "run_dir": "cut"})])
    assert stopped.value.code == INTERRUPTED
    main(["train", "--ckpt_path", "cut/checkpoints/last.ckpt"])
    logged = [str(step) for step in (0, *range(1, 24, 2))]  # the first and the last too
    assert [row["step"] for row in rows(tmp_path / "whole") if row["lr"]] == logged
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
