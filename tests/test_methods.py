"""A method of one's own, at the command line: trained, continued, evaluated and reported without touching another
file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from simclr import BYOL, SimCLR, Supervised, load_encoder
from simclr.checkpoint import read_checkpoint
from simclr.cli.linear_eval import linear_eval
from simclr.cli.messages import BAD_INPUT
from simclr.cli.report import report
from simclr.cli.train import train
from simclr.training.method import find_method, name_of
from tiny import STEPS, flags, tiny_model
from toy import Toy

pytestmark = pytest.mark.usefixtures("few_lambdas")

SMALL = {"method": "toy.Toy", "model.projection_dim": 8, "model.warmup_epochs": 0, "trainer.log_every_n_steps": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a whole run of the toy."""
    place = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(flags({**SMALL, "run_dir": "whole"}))
    return place


def test_it_ends_in_the_bits_of_a_run_that_was_not_stopped(runs, monkeypatch):
    monkeypatch.chdir(runs)
    half = {
        **SMALL,
        "run_dir": "half",
        "trainer.callbacks": "[{class_path: test_continue.Halt, init_args: {epoch: 1, batch: 1}}]",
    }
    train(flags(half))
    assert read_checkpoint("half").global_step == STEPS + 2
    train(["--ckpt_path", "half", "--trainer.callbacks=null"])
    a, b = (
        torch.load(Path(name, "checkpoints/last.ckpt"), weights_only=True)["state_dict"] for name in ("whole", "half")
    )
    assert all(torch.equal(a[name], value) for name, value in b.items())


def test_it_is_evaluated_and_reported_under_its_own_name(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    linear_eval(["--checkpoint", "whole"])
    assert json.loads(Path("whole/linear_eval.json").read_text())["linear_top1"] > 0
    report(["--run_dir", "whole"])
    page = Path("whole/report.html").read_text()
    assert "toy, balance 0.01" in page
    assert "NT-Xent" not in page
    assert load_encoder("whole").feature_dim == read_checkpoint("whole").state_dict["head.0.weight"].shape[1]


def test_its_settings_are_written_and_repeat_it(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    config = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert config["method"] == "toy.Toy"
    assert config["model"]["balance"] == 0.01
    train(["--config", "whole/config.yaml", "--run_dir", "again"])
    assert "toy, balance 0.01" in capsys.readouterr().out
    a, b = (read_checkpoint(name).state_dict for name in ("whole", "again"))
    assert all(torch.equal(a[name], value) for name, value in b.items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.balance=0.5"], "model.balance=0.5 but the checkpoint has 0.01"),
        (["--model.projection_dim=4"], "model.projection_dim=4 but the checkpoint has 8"),
        (["--method=simclr"], "is a run of method=toy.Toy, which cannot be continued as simclr"),
    ],
)
def test_it_is_not_continued_with_other_settings_nor_as_another_method(runs, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "whole", "run")
    own = [] if "--method" not in more[0] else ["--config", "shapes_resnet8"]
    with pytest.raises(SystemExit) as stop:
        train(["--ckpt_path", "run", *own, *more])
    assert stop.value.code == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("byol2", "method=byol2 is none of simclr, byol, supervised, nor the path of a class"),
        ("toy.Nobody", "module 'toy' has no attribute 'Nobody'"),
        ("torch.nn.Linear", "is no method of pretraining: it lacks architecture, objective, training_step"),
    ],
)
def test_what_is_no_method_is_refused_by_name(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train(flags({"method": name}))
    assert stop.value.code == BAD_INPUT
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [SimCLR, BYOL, Supervised])
def test_every_method_scales_its_encoder(kind):
    model = kind("efficientnet", image_size=32, width=0.25, depth=1.1, batch_size=8)
    assert [len(stage) for stage in model.encoder.features[1:8]] == [2, 3, 3, 4, 4, 5, 2]
    assert model.encoder.feature_dim == 320
    assert model.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 320)
    assert {"width", "depth", "phi"} <= set(kind.architecture)
    with pytest.raises(ValueError, match="phi=9 is not a whole number from 0 to 7"):
        kind("efficientnet", image_size=32, phi=9)


def test_a_method_is_found_by_the_name_it_says():
    assert find_method(name_of(tiny_model())) is type(tiny_model())
    assert find_method("toy.Toy") is Toy
