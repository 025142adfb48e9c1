"""A continued run changes what is meant to change (`--resume_with`), says so, records it, and refuses the rest."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from simclr.cli.messages import BAD_INPUT, TERMINATED
from simclr.cli.train import train
from simclr.continuation import ON_PURPOSE, Rule, rule_of
from simclr.module import SimCLR
from test_continue import RUN, assert_same_run, content, learning_rates, run_and_code, signal_at
from test_resume import killed_at
from tiny import BATCH, STEPS, flags

AGAIN = flags({**RUN, "run_dir": "run", "resume": "auto", "model.temperature": 0.2})


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """A run that stands at step 6 of 12; not to be changed."""
    root = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(6, signal.SIGTERM)(patch)
        assert run_and_code(flags({**RUN, "run_dir": root / "run", "model.temperature": 0.2})) == TERMINATED
    return root / "run"


@pytest.fixture
def run(halted, tmp_path, monkeypatch):
    """A copy of it in the working folder."""
    shutil.copytree(halted, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def losses(run: Path) -> list[str]:
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = header.index("train_loss")
    return [row[column] for row in rows if row[column]]


def test_what_is_meant_to_change_changes_from_there_on_and_is_said_and_recorded(run, halted, capsys):
    shutil.copytree(halted, "same")
    train(["--ckpt_path", "same"])
    capsys.readouterr()
    train(["--ckpt_path", "run", "--resume_with", "model.temperature=0.5", "--resume_with=model.blur_prob=0.5"])
    out = capsys.readouterr().out
    said = "model.temperature=0.5, was 0.2, model.blur_prob=0.5, was 0.0: changed on purpose, so from step 6 on it is"
    assert f"{said} another run" in out
    assert losses(run)[:6] == losses(Path("same"))[:6]
    assert all(a != b for a, b in zip(losses(run)[6:], losses(Path("same"))[6:], strict=True))
    assert content(run)["hyper_parameters"]["temperature"] == 0.5
    [record] = json.loads((run / "continuations.json").read_text())
    assert record["resume_with"] == ["model.temperature=0.5", "model.blur_prob=0.5"]
    assert record["changed"]["model.temperature"] == {"was": 0.2, "is": 0.5}
    settings = yaml.safe_load((run / "config.continued-1.yaml").read_text())
    assert settings["model"]["temperature"] == 0.5
    assert settings["resume_with"] is None  # the config repeats the run in another folder
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["temperature"] == 0.2


@pytest.mark.slow
def test_the_same_command_goes_on_after_another_death_and_is_not_refused(run, capsys):
    again = [*AGAIN, "--resume_with", "model.temperature=0.5"]
    killed_at(7, again)  # before a checkpoint has the change
    killed_at(2 * STEPS + 2, again)  # after one has
    capsys.readouterr()
    train(again)
    assert "changed on purpose" not in capsys.readouterr().out
    changed = [record["changed"].keys() for record in json.loads((run / "continuations.json").read_text())]
    assert ["model.temperature" in names for names in changed] == [True, True, False]
    assert content(run)["hyper_parameters"]["temperature"] == 0.5
    train(again)
    assert "already finished" in capsys.readouterr().out
    # Without it the command asks for the run that was before.
    assert run_and_code(AGAIN) == BAD_INPUT
    err = capsys.readouterr().err
    assert "model.temperature=0.2 but the checkpoint has 0.5. Restore the setting, change it on purpose" in err
    assert "--resume_with model.temperature=0.2" in err


def test_rates_that_the_optimiser_remembers_change_too(run):
    train(["--ckpt_path", "run", *(f"--resume_with=model.{part}" for part in ("base_lr=2.0", "weight_decay=0.5"))])
    rates = learning_rates(run)
    train(["--ckpt_path", "run", "--trainer.max_epochs", "4", "--resume_with", "model.momentum=0.5"])
    group, other = content(run)["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], other["weight_decay"], group["momentum"]) == (0.5, 0.0, 0.5)
    assert group["initial_lr"] == 2.0 * BATCH / 256
    before = [step / 8 for step in range(1, 7)]  # of the warm-up
    assert rates[:8] == pytest.approx([*before, 2 * 7 / 8, 2.0])


def test_a_change_on_purpose_reaches_the_loss(run, monkeypatch):
    seen = []
    plain = SimCLR.loss
    monkeypatch.setattr(SimCLR, "loss", lambda self, *args: seen.append(self.hparams.temperature) or plain(self, *args))
    train(["--ckpt_path", "run", "--resume_with", "[model.temperature=0.3]"])
    assert set(seen) == {0.3}


REFUSED = {
    "temperature": "resume_with=temperature is no KEY=VALUE. Use --resume_with model.temperature=0.2.",
    "model.temprature=0.2": "unknown key model.temprature. Did you mean model.temperature?",
    "model.temperature=warm": "model.temperature=warm is not",
    "model.width=0.5": "resume_with model.width: it decides the shapes of the weights",
    "model.optimizer=adamw": "resume_with model.optimizer: it decides the shapes of the weights, the order of the",
    "data.batch_size=8": "resume_with data.batch_size: it decides the shapes of the weights, the order of the",
    "seed_everything=3": "resume_with seed_everything: it decides the shapes of the weights, the order of the",
    "trainer.max_epochs=9": "resume_with trainer.max_epochs: a run goes on with another one anyway. Give --trainer",
    "knn.k=3": "resume_with knn.k: a run goes on with another one anyway. Give --knn.k.",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_change_is_refused_with_what_to_do(run, capsys, asked):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_and_code(["--ckpt_path", "run", "--resume_with", asked]) == BAD_INPUT
    err = capsys.readouterr().err
    assert REFUSED[asked] in err
    assert err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_where_nothing_goes_on_there_is_nothing_to_change(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_and_code([*AGAIN, "--resume_with", "model.temperature=0.5"]) == BAD_INPUT
    assert "there is none yet. To begin with it: --model.temperature 0.5." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_what_is_refused_otherwise_needs_a_purpose():
    assert {rule_of(name) for name in ON_PURPOSE} == {Rule.FIXED}
    assert not {f"model.{name}" for name in SimCLR.architecture} & ON_PURPOSE


def test_a_copied_or_moved_run_goes_on_where_it_lies_and_so_does_one_of_an_earlier_version(
    run, halted, tmp_path, monkeypatch, capsys
):
    shutil.copytree(run, "copy")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run, tmp_path / "elsewhere" / "moved")
    shutil.copytree(halted, "old")
    old = content(Path("old"))
    for key in ("order", "optimizer_tensors"):  # what the first version did not write
        old["run"].pop(key)
    since = {"depth": 1.0, "phi": None, "small_crops": 0, "small_crop_size": None, "small_crop_scale": None}
    config = yaml.safe_load(Path("old/config.yaml").read_text())
    for name in since:  # and settings that it did not have
        old["hyper_parameters"].pop(name)
        config["model"].pop(name)
    Path("old/config.yaml").write_text(yaml.safe_dump(config))
    torch.save(old, Path("old/checkpoints/last.ckpt"))
    for setting, refused in (("depth=2", "depth=2.0 but the checkpoint has 1.0"), ("small_crops=2", "small_crops")):
        with pytest.raises(SystemExit):
            train(["--ckpt_path", "old", f"--model.{setting}"])
        assert refused in capsys.readouterr().err
    monkeypatch.chdir("elsewhere")
    places = tmp_path / "copy", tmp_path / "elsewhere" / "moved", tmp_path / "old"
    for place in places:
        train(["--ckpt_path", str(place)])
        assert (place / "encoder.pt").exists()
        assert len(json.loads((place / "continuations.json").read_text())) == 1
    assert_same_run(places[0], places[1])
    record = json.loads((places[2] / "continuations.json").read_text())[0]  # what it says of them did happen
    assert record["changed"] == {}
    assert record["settings_since"] == {f"model.{name}": value for name, value in since.items()}
    assert [path.name for path in Path().iterdir()] == ["moved"]  # the old place is not made again
