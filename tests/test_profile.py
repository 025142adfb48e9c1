"""`simclr profile`: a table, one line for a mistake, and nothing written."""

import pytest

from simclr.cli import main
from simclr.cli.messages import BAD_INPUT, INTERRUPTED
from simclr.profile import StepClock
from tiny import flags


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_the_command_prints_a_table_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["profile", *flags({"model.micro_batch_size": 8}), "--steps=5"])
    printed = capsys.readouterr().out
    for row in ("augmentation", "backward", "the step untouched", "images/s", "advice", "8 at a time"):
        assert row in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("--steps=0", "steps=0 is not a positive number"),
        ("--stepz=3", "unknown key stepz. Did you mean steps?"),
        ("--model.micro_batch_size=5", "micro_batch_size=5 does not divide"),
        ("--ckpt_path=x.ckpt", "a profile begins anew"),
        ("--trainer.profiler=simple", "simclr profile is one itself"),
    ],
)
def test_a_mistake_gets_one_line(wrong, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["profile", *flags({}), wrong])
    error = capsys.readouterr().err
    assert stop.value.code == BAD_INPUT
    assert answer in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_with_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StepClock, "on_train_batch_end", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["profile", *flags({})])
    assert stop.value.code == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: no profile"
    assert not list(tmp_path.iterdir())
