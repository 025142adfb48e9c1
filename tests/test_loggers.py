"""Where metrics go: one CSV that a continued run extends, and TensorBoard, which has all that the CSV has."""

import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr.checkpoint import Checkpoint
from simclr.loggers import EventFiles, MachineCSV, MetricsCSV, Points, Shown, build_loggers, show
from simclr.step_figures import MACHINE


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


def test_tensorboard_has_each_step_of_a_continued_run_once_and_no_metric_of_nothing(tmp_path):
    for steps, stands in ((range(6), None), (range(4, 8), 4)):
        resumed = stands and Checkpoint(tmp_path, {}, {}, {}, epoch=0, global_step=stands, run={"epochs": 1})
        (logger,) = (logger for logger in build_loggers(tmp_path, resumed) if "Event" in repr(logger))
        logger.log_hyperparams({"temperature": 0.2})
        for step in steps:
            logger.log_metrics({"train_loss": step + (10 if resumed else 0)}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train_loss"]
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16), (7, 17)]


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


def test_what_the_machine_decides_has_a_file_of_its_own(tmp_path):
    loggers = build_loggers(tmp_path)[:2]
    rows_given = [
        ({"train_loss": 1.0, "epoch": 0}, 0),
        ({"train_loss": 0.5, "epoch": 0, **dict.fromkeys(MACHINE, 2.0)}, 1),
        ({"epoch_seconds": 3.0, "epoch": 0, "train_loss_epoch": 0.75}, 1),
    ]
    for row, step in rows_given:
        for logger in loggers:
            logger.log_metrics(row, step)
            logger.save()
    assert rows(tmp_path / "metrics.csv") == [
        {"step": 0, "epoch": 0, "train_loss": 1.0},
        {"step": 1, "epoch": 0, "train_loss": 0.5},
        {"step": 1, "epoch": 0, "train_loss_epoch": 0.75},
    ]
    assert rows(tmp_path / "machine.csv") == [
        {"step": 1, "epoch": 0, **dict.fromkeys(MACHINE, 2.0)},
        {"step": 1, "epoch": 0, "epoch_seconds": 3.0},
    ]
    resumed = MachineCSV(tmp_path, Checkpoint(tmp_path, {}, {}, {}, epoch=0, global_step=2, run={"epochs": 0}))
    resumed.log_metrics({"step_seconds": 1.0, "epoch": 0}, 2)
    resumed.save()  # what stands for an epoch that was not whole is written again
    assert [row["step"] for row in rows(tmp_path / "machine.csv")] == [1, 2]
    assert "epoch_seconds" not in rows(tmp_path / "machine.csv")[1]


def events_of(run_dir) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "histograms": 0}).Reload()


def shown() -> Shown:
    picture = Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))
    histogram = torch.tensor([0, 3, 0, 2, 0]), torch.linspace(-1, 1, 6)
    points = Points(torch.eye(3, 4), ["a", "b", "b"], torch.zeros(3, 3, 8, 8))
    return Shown({"views": picture}, {"cosines": histogram}, {"features": points})


def test_tensorboard_shows_pictures_histograms_and_a_space_as_they_were_given(tmp_path):
    logger = EventFiles(str(tmp_path), name="tensorboard", version="")
    show([logger], shown(), 7)
    show([logger], shown(), 7)  # of a run that ends here for the second time: no words, and no second space
    logger.finalize("success")
    events = events_of(tmp_path)
    first = events.Images("views")[0]
    assert (first.step, first.width, first.height) == (7, 5, 4)
    histogram = events.Histograms("cosines")[0].histogram_value
    assert histogram.num == 5
    assert histogram.min == pytest.approx(-0.6)
    assert histogram.max == pytest.approx(0.6)
    assert histogram.sum == pytest.approx(3 * -0.4 + 2 * 0.4)
    folder = tmp_path / "tensorboard" / "00007" / "features"
    assert (folder / "metadata.tsv").read_text().split() == ["a", "b", "b"]
    with Image.open(folder / "sprite.png") as sprite:
        assert sprite.size == (16, 16)
    assert (tmp_path / "tensorboard" / "projector_config.pbtxt").read_text().count("sprite.png") == 1


def test_the_hparams_tab_has_the_settings_by_name_and_the_results_to_come(tmp_path):
    logger = EventFiles(str(tmp_path), name="tensorboard", version="", default_hp_metric=False)
    logger.settings = {"model": {"temperature": 0.2, "blur_sigma": [0.1, 2.0], "start_size": None}, "wandb": "auto"}
    logger.log_hyperparams({"temperature": 0.2})
    logger.finalize("success")
    content = events_of(tmp_path).summary_metadata
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parsed

    start = parsed(content["_hparams_/session_start_info"].plugin_data.content)
    assert start.hparams["model.temperature"].number_value == 0.2
    assert start.hparams["model.blur_sigma"].string_value == "[0.1, 2.0]"
    assert sorted(start.hparams) == ["model.blur_sigma", "model.temperature", "wandb"]
    assert {"_hparams_/experiment", "_hparams_/session_end_info", "custom_scalars__config__"} <= content.keys()


def test_a_full_disk_costs_the_pictures_only_and_is_said_once(tmp_path, monkeypatch, capsys):
    logger = EventFiles(str(tmp_path), name="tensorboard", version="")
    monkeypatch.setattr("simclr.loggers._to_tensorboard", no_room)
    for step in (1, 2):
        show([logger], shown(), step)
    assert capsys.readouterr().err.count("could not be written (No space left on device)") == 1
