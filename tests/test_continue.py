"""Runs that end early and go on, at the command line: to the same bits, and with no other setting or image unsaid."""

import inspect
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Timer

from simclr.augment import SimCLRAugmentation
from simclr.byol import BYOL
from simclr.checkpoint import read_checkpoint
from simclr.cli.linear_eval import linear_eval
from simclr.cli.messages import BAD_INPUT, INTERRUPTED, TERMINATED
from simclr.cli.report import report
from simclr.cli.train import TrainCLI, parse_and_build, train
from simclr.continuation import RULES, Continuation, Rule, describe, refuse_changes, rule_of, trainer_changes
from simclr.dashboard import Dashboard
from simclr.data import ImageData
from simclr.module import SimCLR
from simclr.online_accuracy import OnlineKNN, OnlineProbe
from simclr.online_quality import OnlineQuality
from simclr.optim import warmup_cosine
from simclr.run_folder import RunFolder
from simclr.supervised import Supervised
from tiny import BATCH, STEPS, Record, fit, flags, tiny_data, tiny_model

pytestmark = pytest.mark.usefixtures("few_lambdas")

EPOCHS = 3
TOTAL = EPOCHS * STEPS
# The warm-up lasts longer than max_steps: until there the learning rate is that of the whole run.
RUN = {
    "trainer.max_epochs": EPOCHS,
    "model.warmup_epochs": 2,
    "trainer.log_every_n_steps": 1,
    "knn.every_n_epochs": 0,
    "quality.every_n_epochs": 0,
}
RUN["model.base_lr"] = 1.0


def content(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_run(cut: Path, whole: Path) -> None:
    """Weights, the optimiser's state and every metric, bit for bit."""
    a, b = content(cut), content(whole)
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(a["state_dict"][name], value) for name, value in b["state_dict"].items())
    states = [part["optimizer_states"][0]["state"] for part in (a, b)]
    assert all(torch.equal(states[0][k][name], value) for k, kept in states[1].items() for name, value in kept.items())
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    encoders = [torch.load(run / "encoder.pt", weights_only=True) for run in (cut, whole)]
    assert all(torch.equal(encoders[0][name], value) for name, value in encoders[1].items())


class Halt(Callback):
    """Asks the Trainer to stop at the end of a batch."""

    def __init__(self, epoch: int, batch: int):
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= (trainer.current_epoch, batch_idx) == self.at


def at_step(patch, step: int, act) -> None:
    """Do something during an optimiser step, the first being 1."""
    original = SimCLR.training_step

    def training_step(self, *args):
        if self.trainer.global_step == step - 1:
            act()
        return original(self, *args)

    patch.setattr(SimCLR, "training_step", training_step)


def time_is_up_at(step: int):
    """A clock that stands until this step, and then shows that years have passed."""

    def cut(patch):
        passed = [0.0]
        patch.setattr(Timer, "time_elapsed", lambda timer, stage="train": passed[0] + timer._offset)
        at_step(patch, step, lambda: passed.__setitem__(0, 1e9))

    return cut


def signal_at(step: int, number: int):
    return lambda patch: at_step(patch, step, lambda: os.kill(os.getpid(), number))


LIMIT = {"trainer.max_time": "00:01:00:00"}
STOPPER = {"trainer.callbacks": "EarlyStopping", "trainer.callbacks.monitor": "train_loss_epoch"}
STOPPER |= {"trainer.callbacks.patience": 1, "trainer.callbacks.min_delta": 1e9}
HALT = {"trainer.callbacks": "test_continue.Halt", "trainer.callbacks.epoch": 1, "trainer.callbacks.batch": 1}

# Way of ending: settings, what happens, what is said, exit code, settings of the command that goes on.
WAYS = {
    "ctrl-c": ({}, signal_at(6, signal.SIGINT), "stopped at step 6 of 12", INTERRUPTED, []),
    "sigterm": ({}, signal_at(6, signal.SIGTERM), "stopped at step 6 of 12", TERMINATED, []),
    "sigterm at an epoch's end": ({}, signal_at(8, signal.SIGTERM), "stopped at step 8 of 12", TERMINATED, []),
    "max_time": (LIMIT, time_is_up_at(6), "stopped by max_time at step 6 of 12", 0, []),
    "max_time at an epoch's end": (LIMIT, time_is_up_at(8), "stopped by max_time at step 8 of 12", 0, []),
    "max_time in the last epoch, then none": (
        LIMIT,
        time_is_up_at(11),
        "stopped by max_time at step 11 of 12",
        0,
        ["--trainer.max_time", "null"],
    ),
    "max_steps": ({"trainer.max_steps": 6}, None, "trained", 0, ["--trainer.max_steps", "-1"]),
    "EarlyStopping": (STOPPER, None, r"stopped by EarlyStopping \(Monitored metric .*\) at step 8 of 12", 0, []),
    "a callback": (HALT, None, "stopped by Halt at step 6 of 12", 0, []),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has cut; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    train(flags({**RUN, "run_dir": root / "run"}))
    return root / "run"


@pytest.fixture
def handlers():
    """Lightning ignores Ctrl-C once it has been told to stop by it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_and_code(arguments: list[str]) -> int:
    try:
        train(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


SLOW = ("sigterm at an epoch's end", "max_time at an epoch's end", "max_time in the last epoch, then none")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_a_run_that_ends_early_says_so_and_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, capsys, handlers, whole, way
):
    settings, cut, said, code, more = WAYS[way]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if cut is not None:
            cut(patch)
        assert run_and_code(flags({**RUN, **settings, "run_dir": "cut"})) == code
    out, err = capsys.readouterr()
    [last] = [line for line in (out + err).splitlines() if re.match("trained|stopped", line)]
    assert re.match(said, last)
    read = read_checkpoint("cut")
    assert read.finished == last.startswith("trained")
    assert read.stands.startswith(f"step {read.global_step} of {read.run['total_steps']}")
    command = last.partition("continue with: simclr train ")[2].split() or ["--ckpt_path", "cut"]
    assert last.startswith("trained") == (way == "max_steps")
    assert Path("cut/encoder.pt").exists() == (code == 0)
    assert run_and_code([*command, *more]) == 0
    assert "trained" in capsys.readouterr().out
    assert_same_run(Path("cut"), whole)


def test_a_stop_waits_for_the_gradients_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    accumulate = {**RUN, "trainer.accumulate_grad_batches": 2}
    train(flags({**accumulate, "run_dir": "whole"}))
    train(flags({**accumulate, **HALT, "trainer.callbacks.batch": 0, "run_dir": "cut"}))
    assert "stopped by Halt at step 3 of 6" in capsys.readouterr().out
    train(["--ckpt_path", "cut"])
    assert_same_run(Path("cut"), Path("whole"))


def test_what_is_measured_of_a_run_that_was_cut_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(flags({**RUN, **HALT, "run_dir": "cut"}))
    linear_eval(["--checkpoint", "cut"])
    assert "note: the run was not finished: the encoder is that of step 6 of 12" in capsys.readouterr().out
    record = json.loads(Path("cut/linear_eval.json").read_text())
    assert (record["epoch"], record["global_step"], record["total_steps"], record["finished"]) == (1, 6, 12, False)
    report(["--run_dir", "cut"])
    assert "The checkpoint stands at step 6 of 12, the run not finished." in Path("cut/report.html").read_text()


# Settings


def test_every_setting_has_one_place_in_the_rules(monkeypatch):
    class Parsed(Exception):
        pass

    found = {}

    def stop(cli):
        found.update(cli.config.as_dict())
        raise Parsed

    monkeypatch.setattr(TrainCLI, "before_instantiate_classes", stop)
    with pytest.raises(Parsed):
        parse_and_build([], RunFolder())
    groups = {name: set(part) for name, part in found.items() if isinstance(part, dict)}
    groups[""] = set(found) - set(groups)
    signatures = {
        "model": (SimCLR, BYOL, Supervised, SimCLRAugmentation),
        "data": (ImageData,),
        "trainer": (Trainer,),
        "knn": (OnlineKNN,),
        "probe": (OnlineProbe,),
        "quality": (OnlineQuality,),
        "dashboard": (Dashboard,),
    }
    for group, classes in signatures.items():  # what is not on the command line too
        groups[group] |= {name for kind in classes for name in inspect.signature(kind).parameters}
    groups["model"].discard("augmentation")  # its parts stand there
    for group, names in groups.items():
        placed = " ".join(RULES[group].values()).split()
        assert sorted(placed) == sorted(names), group
    assert rule_of("model.temperature") is Rule.FIXED


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(arguments: list[str], capsys) -> str:
    """The one line that a command answers with."""
    capsys.readouterr()
    assert run_and_code(arguments) == BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [
        ("model.base_lr", "2.0", "1.0"),
        ("model.weight_decay", "0.5", "0.0001"),
        ("model.momentum", "0.5", "0.9"),
        ("model.lr_scaling", "none", "linear"),
        ("model.temperature", "0.5", "0.2"),
        ("model.strength", "1.0", "0.5"),
        ("model.blur_prob", "0.5", "0.0"),
        ("model.loss", "dcl", "nt_xent"),
        ("model.views", "3", "2"),
        ("model.warmup_epochs", "1.0", "2.0"),
        ("model.micro_batch_size", "8", "None"),
        ("model.optimizer", "adamw", "lars"),
        ("data.batch_size", "8", "16"),
        ("data.load_size", "20", "16"),
        ("data.shapes_train", "32", "64"),
        ("seed_everything", "3", "0"),
        ("trainer.accumulate_grad_batches", "2", "1"),
        ("trainer.gradient_clip_val", "0.5", "None"),
        ("trainer.precision", "bf16-mixed", "32-true"),
        ("trainer.limit_train_batches", "2", "1.0"),
    ],
)
def test_a_setting_that_decides_what_is_learned_is_refused_with_both_values(
    tmp_path, monkeypatch, capsys, whole, setting, value, was
):
    monkeypatch.chdir(tmp_path)
    before = files_of(whole)
    name = "data.seed (seed_everything)" if setting == "seed_everything" else setting
    message = refused(["--ckpt_path", str(whole), f"--{setting}={value}"], capsys)
    assert f"cannot be continued: {name}={value} but the checkpoint has {was}. Restore the setting" in message
    assert files_of(whole) == before
    assert not list(tmp_path.iterdir())


def test_a_finished_run_says_so_and_nothing_is_touched(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    before = files_of(whole)
    capsys.readouterr()
    for more in ([], ["--run_dir", "elsewhere"], ["--trainer.max_time", "00:01:00:00"]):
        train(["--ckpt_path", str(whole), *more])
        assert capsys.readouterr().out == "already finished, 3 of 3 epochs; --trainer.max_epochs lengthens it\n"
    message = refused(["--ckpt_path", str(whole), "--trainer.max_epochs", "2"], capsys)
    assert f"trainer.max_epochs=2 ends before {whole}/checkpoints/last.ckpt, which stands at epoch 3" in message
    photos(tmp_path / "photos", 20)
    message = refused(["--ckpt_path", str(whole), "--data.train_dir", "photos"], capsys)
    assert "data.source=folder but the checkpoint has shapes" in message
    assert files_of(whole) == before
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def learning_rates(run: Path) -> list[float]:
    """The share of the full learning rate of every step."""
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = header.index("lr")
    return [float(row[column]) / (BATCH / 256) for row in rows if row[column]]


def test_a_finished_run_is_lengthened_with_the_schedule_of_its_new_length(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    config = Path("run/config.yaml").read_bytes()
    train(["--ckpt_path", "run", "--trainer.max_epochs", "4"])
    assert re.search(
        r"continued  from epoch 3\n {11}trainer.max_epochs=4, was 3: from step 12 on the learning rate follows the "
        r"schedule of 16 steps, before it that of 12\n",
        capsys.readouterr().out,
    )
    expected = [warmup_cosine(step, 8, 12 if step < 12 else 16) for step in range(16)]
    assert learning_rates(Path("run")) == pytest.approx(expected)
    assert Path("run/config.yaml").read_bytes() == config
    assert yaml.safe_load(Path("run/config.continued-1.yaml").read_text())["trainer"]["max_epochs"] == 4
    [record] = json.loads(Path("run/continuations.json").read_text())
    assert record["command"] == "simclr train --ckpt_path run --trainer.max_epochs 4"
    assert (record["from_step"], record["total_steps"]) == (12, 16)
    assert record["changed"] == {"trainer.max_epochs": {"was": 3, "is": 4}}
    assert record["said"][0].startswith("trainer.max_epochs=4, was 3")
    assert {"simclr", "torch", "pytorch-lightning", "kornia", "torchvision"} <= record["versions"].keys()
    train(["--ckpt_path", "run"])
    assert "already finished, 4 of 4 epochs" in capsys.readouterr().out


def test_a_continuation_is_recorded_beside_the_config_the_run_began_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(flags({**RUN, **HALT, "run_dir": "run"}))
    config = Path("run/config.yaml").read_bytes()
    train(["--ckpt_path", "run", "--run_dir", "other", "--model.channels_last", "false", "--knn.k", "3"])
    said = "model.channels_last=False, was True: the same batches and views, but not the same bits"
    assert f"continued  from step 6 of 12, the run not finished\n           {said}\n" in capsys.readouterr().out
    train(["--ckpt_path", "run"])
    for run, changed in (("other", {"model.channels_last", "knn.k"}), ("run", set())):
        assert Path(run, "config.yaml").read_bytes() == config
        [record] = json.loads(Path(run, "continuations.json").read_text())
        assert record["from_step"] == 6
        assert record["changed"].keys() == changed
        assert Path(run, "config.continued-1.yaml").exists() == bool(changed)
    assert content(Path("other"))["hyper_parameters"]["channels_last"] is False


def test_a_run_with_the_order_of_an_earlier_version_goes_on_and_says_so(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = content(tmp_path / "run")
    del checkpoint["run"]["order"]  # as the first version wrote it
    torch.save(checkpoint, path)
    train(["--ckpt_path", str(path), "--trainer.max_epochs", "4"])
    said = "the images' order is that of version 2 of this project's, was 1: from step 12 on other batches"
    assert said in capsys.readouterr().out
    assert content(tmp_path / "run")["run"]["order"] == 2


def test_batch_norm_over_other_groups_is_refused_and_on_other_devices_said(whole):
    read = read_checkpoint(whole)
    two = {**read.run, "devices": 2, "batch_norm_group": 32}
    other = trainer_changes({**two, "batch_norm_group": 16}, two)
    with pytest.raises(ValueError, match=r"sync_batchnorm=BatchNorm over 16 views but the checkpoint has .* over 32"):
        refuse_changes(other, "it")
    now = {"devices": 1, "batch_norm_group": 32}
    changes = trainer_changes(now, {**two, "batch_norm_group": 16})
    refuse_changes(changes, "it")
    found = Continuation(8, 12, "", changes)
    [line] = describe(found, replace(read, run={**two, "batch_norm_group": 16}), now)
    assert line.startswith(
        "trainer.devices=1, was 2: the same batches and views, BatchNorm over 32 views, 16 before, but"
    )


def test_a_trainer_in_python_follows_the_same_rules(tmp_path):
    first = fit(tmp_path, tiny_model(base_lr=1.0), max_epochs=1)
    first.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"model\.base_lr=2\.0 but the checkpoint has 1\.0"):
        fit(tmp_path, tiny_model(base_lr=2.0), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=2 but the checkpoint has 1"):
        fit(tmp_path, max_epochs=2, accumulate_grad_batches=2, ckpt_path=tmp_path / "x.ckpt")
    record = Record()
    fit(tmp_path, callbacks=[record], max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    expected = [BATCH / 256 * warmup_cosine(step, STEPS, 2 * STEPS) for step in range(STEPS, 2 * STEPS)]
    assert [step["lr"] for step in record.steps] == pytest.approx(expected)
    fine_tuned = SimCLR.load_from_checkpoint(tmp_path / "x.ckpt", base_lr=2.0, weights_only=True)
    record = Record()
    fit(tmp_path, fine_tuned, callbacks=[record], max_epochs=1)
    assert record.steps[-1]["lr"] == pytest.approx(2 * BATCH / 256)


# Images


def photos(root: Path, count: int, seed: int = 0) -> Path:
    """A folder of PNGs of two classes, none like another."""
    numbers = np.random.default_rng(seed)
    for number in range(count):
        path = root / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path, compress_level=0)
    return root


CONTINUE = ["--ckpt_path", "run"]
PHOTOS = {**RUN, "data.batch_size": 8, "data.train_dir": "photos"}  # 5 steps an epoch


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """A working folder with 40 photos and a run on them that stands at step 9 of 15; not to be changed."""
    root = tmp_path_factory.mktemp("halted")
    photos(root / "photos", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(flags({**PHOTOS, **HALT, "trainer.callbacks.batch": 3, "run_dir": "run"}))
    return root


@pytest.fixture
def here(halted, tmp_path, monkeypatch):
    """A copy of `halted` to work in."""
    shutil.copytree(halted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def replaced(path: Path) -> None:
    """Another image in as many bytes."""
    size = path.stat().st_size
    Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda root: (root / "cat" / "2.png").unlink(), "40 then, 39 now; 0 added, 1 removed, 0 changed"),
        (lambda root: shutil.copy(root / "cat/0.png", root / "cat/x.png"), "40 then, 41 now; 1 added, 0 removed, 0"),
        (lambda root: os.rename(root / "cat/0.png", root / "cat/x.png"), "40 then, 40 now; 1 added, 1 removed, 0"),
        (lambda root: replaced(root / "dog/1.png"), "40 then, 40 now; 0 added, 0 removed, 1 changed"),
        (lambda root: Image.new("RGB", (9, 9)).save(root / "dog/1.png"), "40 now; 0 added, 0 removed, 1 changed"),
    ],
    ids=["removed", "added", "renamed", "replaced by as many bytes", "replaced"],
)
def test_changed_images_are_refused_and_counted(here, capsys, change, counts):
    change(here / "photos")
    before = files_of(here)
    message = refused([*CONTINUE, "--data.train_dir", "photos"], capsys)
    assert "photos holds other images than the run began with" in message
    assert counts in message
    assert "--data.allow_changed_images true" in message
    assert files_of(here) == before


def test_another_folder_is_refused_and_a_moved_one_continues_to_the_same_bits(here, capsys):
    photos(here / "other", 40, seed=1)
    message = refused(["--ckpt_path", "run", "--data.train_dir", "other"], capsys)
    assert (
        "other holds other images than the run began with: 40 then, 40 now; 0 added, 0 removed, 40 changed" in message
    )
    train(flags({**PHOTOS, "run_dir": "whole"}))
    os.rename("photos", "moved")
    train(["--ckpt_path", "run", "--data.train_dir", "moved"])
    assert_same_run(here / "run", here / "whole")
    [record] = json.loads((here / "run" / "continuations.json").read_text())
    assert record["changed"].keys() == {"data.train_dir"}
    assert record["changed"]["data.train_dir"]["is"] == str(here / "moved")


def test_changed_images_are_allowed_on_request_counted_and_recorded(here, capsys):
    for number in range(20, 40):  # two steps an epoch are left, and the epoch begun has had four
        next((here / "photos").rglob(f"{number}.png")).unlink()
    own = ["--data.train_dir", "photos"]
    train([*CONTINUE, *own, "--data.allow_changed_images", "true"])
    said = "other images: 40 before, 20 now, 0 added, 20 removed, 0 changed; the order is that of the new set; of the "
    assert f"{said}epoch begun, 4 steps stay done" in capsys.readouterr().out
    [record] = json.loads((here / "run" / "continuations.json").read_text())
    assert record["images"] == {"was": 40, "now": 20, "added": 0, "removed": 20, "changed": 0}
    assert content(here / "run")["global_step"] == record["total_steps"] == 9 + 2
    expected = [warmup_cosine(step, *((10, 15) if step < 9 else (4, 11))) for step in range(11)]
    assert [rate * 2 for rate in learning_rates(here / "run")] == pytest.approx(expected)
    train([*CONTINUE, *own])  # the set that is there now is the run's
    assert "already finished, 3 of 3 epochs" in capsys.readouterr().out
    photos(here / "photos", 40)
    refused([*CONTINUE, *own], capsys)


def test_a_trainer_in_python_refuses_changed_images(tmp_path):
    photos(tmp_path / "photos", 20)
    settings = {"train_dir": str(tmp_path / "photos"), "batch_size": 4}
    trainer = fit(tmp_path, tiny_model(batch_size=4), tiny_data(**settings), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "photos" / "cat" / "0.png").unlink()
    options = {"max_epochs": 2, "ckpt_path": tmp_path / "x.ckpt"}
    with pytest.raises(ValueError, match=r"20 then, 19 now; 0 added, 1 removed"):
        fit(tmp_path, tiny_model(batch_size=4), tiny_data(**settings), **options)
    fit(tmp_path, tiny_model(batch_size=4), tiny_data(**settings, allow_changed_images=True), **options)
