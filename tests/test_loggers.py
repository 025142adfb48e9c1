"""Where metrics go: one CSV that a continued run extends, and W&B only when asked, when it can, and inside the run."""

import csv
import os
import socket
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr.checkpoint import Checkpoint
from simclr.cli.train import train
from simclr.loggers import MetricsCSV, build_loggers, wandb_mode
from tiny import flags

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the right form, of nobody


def rows(path):
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def log(run_dir, steps, resume_step=None, **more):
    resumed = resume_step and Checkpoint(run_dir, {}, {}, {}, epoch=0, global_step=resume_step, run={"epochs": 1})
    logger = MetricsCSV(run_dir, resumed)
    for step in steps:
        logger.log_metrics({"train_loss": step / 10, **more}, step)
    logger.finalize("success")


def test_a_continued_run_keeps_its_earlier_rows_and_writes_later_ones_again(tmp_path):
    log(tmp_path, range(6), lr=1.0)
    log(tmp_path, range(4, 8), resume_step=4, knn_top1=0.5)
    expected = [{"step": k, "train_loss": k / 10, "lr": 1.0} for k in range(4)]
    expected += [{"step": k, "train_loss": k / 10, "knn_top1": 0.5} for k in range(4, 8)]
    assert rows(tmp_path / "metrics.csv") == expected
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_more_rows_than_the_logger_holds_back_survive_a_resume(tmp_path):
    log(tmp_path, range(120))
    log(tmp_path, range(110, 240), resume_step=110)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == list(range(240))


def test_the_mean_of_an_epoch_that_was_not_whole_is_written_again(tmp_path):
    log(tmp_path, range(3), epoch=0)
    log(tmp_path, range(3, 5), resume_step=3, epoch=1)
    logger = MetricsCSV(tmp_path, Checkpoint(tmp_path, {}, {}, {}, epoch=1, global_step=5, run={"epochs": 1}))
    logger.log_metrics({"train_loss_epoch": 1.0, "epoch": 1}, 4)  # at a limit of steps
    logger.finalize("success")
    MetricsCSV(tmp_path, Checkpoint(tmp_path, {}, {}, {}, epoch=1, global_step=5, run={"epochs": 1})).save()
    assert [row.get("train_loss_epoch") for row in rows(tmp_path / "metrics.csv")] == [None] * 5


def test_a_run_continued_in_another_folder_begins_its_own_file(tmp_path):
    log(tmp_path / "b", range(4, 6), resume_step=4)
    assert [row["step"] for row in rows(tmp_path / "b" / "metrics.csv")] == [4, 5]


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """A machine without a W&B key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.fixture
def no_network(monkeypatch):
    """A machine where every connection fails: the attempts. Asks that nobody waits for one without a limit."""
    attempts = []

    def fail(address, timeout=None, *args, **kwargs):
        attempts.append(address)
        assert timeout is not None
        assert timeout <= 5
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", fail)
    return attempts


def test_tensorboard_has_each_step_of_a_continued_run_once_and_no_metric_of_nothing(tmp_path):
    for steps, stands in ((range(6), None), (range(4, 8), 4)):
        resumed = stands and Checkpoint(tmp_path, {}, {}, {}, epoch=0, global_step=stands, run={"epochs": 1})
        (logger,) = (logger for logger in build_loggers(tmp_path, "disabled", "", resumed) if "Event" in repr(logger))
        logger.log_hyperparams({"temperature": 0.2})
        for step in steps:
            logger.log_metrics({"train_loss": step + (10 if resumed else 0)}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train_loss"]
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16), (7, 17)]


def test_auto_without_a_key_is_offline_and_says_so_in_one_line(no_key, no_network, capsys):
    assert wandb_mode("auto") == "offline"
    out = capsys.readouterr().out
    assert out.startswith("wandb: no key found, logging offline into the run folder")
    assert out.count("\n") == 1


def test_auto_with_a_key_but_no_network_is_offline_at_once(no_key, no_network, capsys):
    no_key.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == "offline"
    assert no_network == [("api.wandb.ai", 443)], "one attempt, of seconds at most"
    out = capsys.readouterr().out
    assert "api.wandb.ai cannot be reached, logging offline" in out
    assert out.count("\n") == 1


def test_a_key_may_stand_in_netrc(no_key, tmp_path, monkeypatch):
    reached = []

    class Connection:
        def close(self):
            reached.append("closed")

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: reached.append(address) or Connection())
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode("auto") == "online"
    assert reached == [("api.wandb.ai", 443), "closed"]
    (tmp_path / "netrc").write_text(f"machine elsewhere.org login user password {KEY}\n")
    assert wandb_mode("auto") == "offline"


def test_online_without_a_key_is_refused_and_with_one_is_not_second_guessed(no_key, no_network):
    with pytest.raises(ValueError, match="wandb=online needs a key: run `wandb login`"):
        wandb_mode("online")
    no_key.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("online") == "online"


def test_disabled_never_imports_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would fail
    assert [type(logger).__name__ for logger in build_loggers(tmp_path, "disabled", "p")] == [
        "MetricsCSV",
        "EventFiles",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # starts W&B's own process
@pytest.mark.filterwarnings("default")  # W&B's own
def test_an_offline_run_writes_below_its_folder_only_and_no_key(no_key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    before = {p.name for p in tmp_path.iterdir()}
    train([*flags({"wandb": "offline", "run_dir": "run", "trainer.max_epochs": 1})])
    assert {p.name for p in tmp_path.iterdir()} - before - {"home"} == {"run"}
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_row_that_was_not_written_to_its_end_is_none(tmp_path):
    log(tmp_path, range(6))
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-2])
    log(tmp_path, [5], resume_step=6)
    assert [row["step"] for row in rows(path)] == list(range(6))


def test_the_file_of_a_continued_run_is_there_until_it_is_replaced(tmp_path):
    log(tmp_path, range(6))
    before = (tmp_path / "metrics.csv").read_bytes()
    resumed = MetricsCSV(tmp_path, Checkpoint(tmp_path, {}, {}, {}, epoch=0, global_step=4, run={"epochs": 1}))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    resumed.log_metrics({"train_loss": 0.4}, 4)
    resumed.save()
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == list(range(5))


def test_rows_that_find_no_room_are_written_once_there_is_some(tmp_path, monkeypatch, capsys):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train_loss": 0.0}, 0)
    logger.save()
    before = (tmp_path / "metrics.csv").read_bytes()
    for step in (1, 2):
        logger.log_metrics({"train_loss": 0.0}, step)
        with monkeypatch.context() as patch:
            patch.setattr("simclr.loggers._as_csv", no_room)
            logger.save()
        assert (tmp_path / "metrics.csv").read_bytes() == before
    assert capsys.readouterr().err.count("metrics.csv could not be written (No space left on device)") == 1
    logger.finalize("success")
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == [0, 1, 2]


def no_room(*args):
    raise OSError(28, os.strerror(28))
