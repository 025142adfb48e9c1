"""What a report reads of a run folder: metrics at their time, evaluations in their order."""

import json

import pytest

from simclr.report import read_metrics, read_results
from simclr.report.run import read_config, read_evaluations
from suite_record import result, suite_record


def test_metrics_are_placed_by_epochs_done(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,knn_top1,lr,step,train_loss,train_loss_epoch\n"
        "0,,0.1,4,2.5,\n0,,,9,,2.25\n1,,0.2,14,2.0,\n1,0.4375,,19,,1.75\n"
    )
    history = read_metrics(tmp_path)
    assert history["train_loss_epoch"] == [(1, 2.25), (2, 1.75)]
    assert history["train_loss"] == [(0.5, 2.5), (1.5, 2.0)]
    assert history["lr"] == [(0.5, 0.1), (1.5, 0.2)]
    assert history["knn_top1"] == [(2, 0.4375)]


def test_a_step_written_again_by_a_continued_run_counts_once(tmp_path):
    rows = "0,9,2.5,\n0,9,,2.25\n1,14,2.0,\n1,14,1.9,\n1,19,,1.75\n"
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss,train_loss_epoch\n" + rows)
    assert read_metrics(tmp_path)["train_loss"] == [(1, 2.5), (1.5, 1.9)]


def test_a_run_inside_its_first_epoch_has_no_column_for_its_loss_and_is_read(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,train_loss\n0,0.1,4,2.5\n")
    assert read_metrics(tmp_path) == {}
    assert read_metrics(tmp_path, per_epoch=10) == {"lr": [(0.5, 0.1)], "train_loss": [(0.5, 2.5)]}


@pytest.mark.parametrize("tail", [b"2,,24,1", b"2,1.", b"\0" * 700, b"2,\0\0\0"])
def test_what_a_kill_or_a_power_cut_leaves_of_the_last_row_is_not_read(tmp_path, tail):
    whole = b"epoch,lr,step,train_loss_epoch\n0,,9,2.25\n1,0.5,19,1.75\n"
    (tmp_path / "metrics.csv").write_bytes(whole + tail)
    assert read_metrics(tmp_path) == {"train_loss_epoch": [(1, 2.25), (2, 1.75)], "lr": [(2, 0.5)]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"1,0.5,19.5,1.75", "in line 3: invalid literal"),
        (b"1,half,19,1.75", "in line 3: could not convert string to float: 'half'"),
        (b"\0" * 20, "in line 3: its values are of other kinds than a run writes"),
        (b"1,0.5,19,1.75,\xff", "it is not UTF-8 text"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, row, words):
    (tmp_path / "metrics.csv").write_bytes(b"epoch,lr,step,train_loss_epoch\n0,,9,2.25\n" + row + b"\n2,,29,1.5\n")
    with pytest.raises(ValueError, match=rf"metrics\.csv cannot be read as metrics of a run.*{words}"):
        read_metrics(tmp_path)


def test_results_come_newest_first(tmp_path):
    names = {"linear_eval.json": 0.3, "linear_eval.1.json": 0.1, "linear_eval.10.json": 0.25, "linear_eval.2.json": 0.2}
    for name, value in names.items():
        record = {"linear_top1": value, "ci95": [0, 1], "random_encoder_top1": None, "raw_pixels_top1": None}
        (tmp_path / name).write_text(json.dumps(record))
    assert [result["linear_top1"] for result in read_results(tmp_path)] == [0.3, 0.25, 0.2, 0.1]


def test_what_is_not_there_is_empty_and_what_is_damaged_is_named(tmp_path):
    assert (read_metrics(tmp_path), read_results(tmp_path), read_config(tmp_path)) == ({}, [], {})
    (tmp_path / "config.yaml").write_text("trainer: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path)


def test_evaluations_by_protocol_come_newest_first_and_what_is_none_is_named(tmp_path):
    for name, epoch in {"eval.json": 9, "eval.1.json": 1, "eval.10.json": 8}.items():
        (tmp_path / name).write_text(json.dumps(suite_record([result("knn", "k=5", [True, False])], epoch=epoch)))
    assert [record["epoch"] for record in read_evaluations(tmp_path)] == [9, 8, 1]
    for text, words in {
        '{"schema": "other/2"}': "its schema is not simclr.eval/1",
        "{": "cannot be read",
        "[]": "read",
    }.items():
        (tmp_path / "eval.1.json").write_text(text)
        with pytest.raises(ValueError, match=rf"eval\.1\.json.*{words}"):
            read_evaluations(tmp_path)
