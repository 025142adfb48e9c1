"""The command line, in this process: a run from a folder of images to its result, and one line for what is wrong."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler
from safetensors import safe_open

from simclr import load_encoder, memory
from simclr.checkpoint import read_checkpoint
from simclr.cli import main
from simclr.cli.linear_eval import linear_eval
from simclr.cli.messages import BAD_INPUT, INTERRUPTED, program
from simclr.cli.saving import newest_checkpoint
from simclr.cli.train import train
from simclr.data import ImageData
from simclr.eval import encoder_sha256, wilson_interval
from simclr.eval.evaluation import linear_evaluation
from simclr.module import SimCLR
from simclr.run_folder import RunFolder
from tiny import BATCH, STEPS, flags

pytestmark = pytest.mark.usefixtures("few_lambdas")


def photos(root, count, classes=("cat", "dog"), seed=0):
    """A folder of PNGs whose classes differ in brightness; `classes=("",)` writes them flat."""
    numbers = np.random.default_rng(seed)
    for number in range(count):
        name = classes[number % len(classes)]
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 128, (20, 24, 3)) + 100 * (number % len(classes))
        Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def everything(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


FILES = [
    "checkpoints/last.ckpt",
    "config.yaml",
    "encoder.pt",
    "encoder.safetensors",
    "machine.csv",
    "metrics.csv",
    "views.png",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with photos in it, and everything that a first and a second run left there."""
    root = tmp_path_factory.mktemp("place")
    photos(root / "data" / "train", 40)
    photos(root / "data" / "test", 10, seed=1)
    photos(root / "flat", 20, ("",))
    images = everything(root)
    folders = {"data.train_dir": "data/train", "data.test_dir": "data/test", "knn.every_n_epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for _ in range(2):
            train(flags(folders))
    return root, [path for path in everything(root) if path not in images]


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place[0])
    return place[0]


def content(path):
    return torch.load(path, weights_only=True)


def test_a_run_leaves_its_folder_and_nothing_else_and_a_second_run_another(place):
    left = [re.sub(r"(?<=tensorboard/).*", "*", path) for path in place[1]]
    expected = {f"runs/{name}/{file}" for name in ("train_resnet8", "train_resnet8-2") for file in FILES}
    expected |= {f"runs/{name}/tensorboard/*" for name in ("train_resnet8", "train_resnet8-2")}
    assert set(left) == expected


def test_the_encoder_written_is_the_one_of_the_last_checkpoint(here):
    encoder = load_encoder("runs/train_resnet8")
    weights = content("runs/train_resnet8/encoder.pt")
    assert weights.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())


def test_the_safetensors_file_of_a_run_opens_anywhere(here, tmp_path):
    shutil.copy("runs/train_resnet8/encoder.safetensors", tmp_path / "mine.safetensors")
    alone, encoder = load_encoder(tmp_path / "mine.safetensors"), load_encoder("runs/train_resnet8")
    assert encoder_sha256(alone) == encoder_sha256(encoder)
    assert alone.transform == encoder.transform
    with safe_open(tmp_path / "mine.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()["simclr"])
    last = content("runs/train_resnet8/checkpoints/last.ckpt")
    assert (settings["epochs"], settings["global_step"]) == (2, last["global_step"])


def test_metrics_hold_loss_and_knn_of_every_epoch(here):
    header, *rows = Path("runs/train_resnet8/metrics.csv").read_text().splitlines()
    of_epochs, of_steps = {"knn_top1", "train_loss_epoch"}, {"train_loss", "lr", "contrast_top1"}
    assert of_epochs | of_steps < set(header.split(","))
    measured = [row for row in csv.DictReader([header, *rows]) if row["knn_top1"]]
    assert [(row["epoch"], row["step"]) for row in measured] == [("0", "1"), ("1", "3")]  # two steps an epoch, from 0
    knn, losses = ([float(row[name]) for row in measured] for name in ("knn_top1", "train_loss_epoch"))
    assert {8 * accuracy for accuracy in knn} <= set(range(9))  # of 40 training images 8 are queries
    assert losses[0] != losses[1]


def test_config_yaml_repeats_the_run_bit_for_bit(here, tmp_path):
    run = tmp_path / "again"
    train(["--config", "runs/train_resnet8/config.yaml", "--run_dir", str(run)])
    first, again = content("runs/train_resnet8/encoder.pt"), content(run / "encoder.pt")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (run / "metrics.csv").read_text() == Path("runs/train_resnet8/metrics.csv").read_text()
    old, new = (yaml.safe_load(Path(p).read_text()) for p in ("runs/train_resnet8/config.yaml", run / "config.yaml"))
    assert old == new


def test_runs_side_by_side_choose_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Namespace(run_dir=None, config=None, data=Namespace(train_dir="photos"), model=Namespace(encoder="f"))
    folders = [RunFolder() for _ in range(3)]
    assert [str(folder.choose(config, None)) for folder in folders] == [
        f"runs/photos_f{end}" for end in ("", "-2", "-3")
    ]
    for folder in reversed(folders):
        folder.remove_empty()
    assert not (tmp_path / "runs").exists()


def test_a_second_run_of_one_slurm_job_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = Namespace(run_dir=None, config=None, data=Namespace(train_dir="photos"), model=Namespace(encoder="f"))
    first = RunFolder()
    path = first.choose(config, None)
    assert str(path) == "runs/photos_f-7"
    (path / "config.yaml").write_text("")
    first.let_go()  # it has ended
    with pytest.raises(ValueError, match="is taken"):
        RunFolder().choose(config, None)


def test_a_launched_rank_takes_its_launchers_folder_whatever_else_is_set(monkeypatch):
    monkeypatch.setenv("SIMCLR_RUN_DIR", f"{os.getppid()}:elsewhere/run")
    monkeypatch.setenv("SLURM_PROCID", "0")  # of an interactive shell, which all ranks inherit
    folder = RunFolder()
    assert not folder.first
    assert str(folder.choose(Namespace(), None)) == "elsewhere/run"
    monkeypatch.setenv("SIMCLR_RUN_DIR", f"{os.getpid()}:another/run")  # inherited from another run
    assert RunFolder().first


def test_a_run_without_checkpoints_and_one_with_the_users_beside_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(flags({"trainer.enable_checkpointing": "false", "run_dir": "none", "trainer.max_epochs": 1}))
    assert "no checkpoint, as asked" in capsys.readouterr().out
    assert not (tmp_path / "none" / "checkpoints").exists()
    theirs = {"trainer.callbacks": "ModelCheckpoint", "trainer.callbacks.save_on_train_epoch_end": "true"}
    train(flags({"run_dir": "both", "trainer.max_epochs": 1, **theirs}))
    assert (tmp_path / "both" / "checkpoints" / "last.ckpt").exists()


def test_our_checkpoint_has_the_key_that_lightning_gives_it(tmp_path):
    ours = newest_checkpoint(tmp_path)
    key = "NewestCheckpoint" + ModelCheckpoint(save_on_train_epoch_end=True).state_key.removeprefix("ModelCheckpoint")
    assert ours.state_key == key
    assert not ours._every_n_train_steps  # or it would have to look after every batch
    assert ours._train_time_interval is None


@pytest.mark.parametrize(
    ("began", "train", "measure"),
    [
        ("/home/me/simclr/train.py", "python train.py", "python linear_eval.py"),
        ("linear_eval.py", "python train.py", "python linear_eval.py"),
        ("/usr/local/bin/simclr", "simclr train", "simclr linear-eval"),
        ("/usr/lib/python3/site-packages/simclr/__main__.py", "simclr train", "simclr linear-eval"),
    ],
)
def test_records_and_advice_name_a_program_that_is_there(monkeypatch, began, train, measure):
    monkeypatch.setattr(sys, "argv", [began, "train"])
    assert [" ".join(program(command)) for command in ("train", "linear-eval")] == [train, measure]
    assert program("eval") == ["simclr", "eval"]


def test_a_profiler_asked_for_is_used_and_none_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: used.append(type(trainer.profiler)))
    train(flags({"run_dir": "plain"}))
    train(flags({"run_dir": "profiled", "trainer.profiler": "simple"}))
    assert used == [PassThroughProfiler, SimpleProfiler]


def test_a_run_goes_on_with_its_own_settings_and_with_no_others(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 40)
    train(flags({"data.train_dir": "photos", "run_dir": "run", "data.batch_size": 20}))
    config = Path("run/config.yaml").read_text()
    train(["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_epochs", "3"])
    assert "epoch 3/3" in capsys.readouterr().out
    assert Path("run/config.yaml").read_text() == config
    for path in Path("run").glob("config*.yaml"):
        path.unlink()
    message = refused(train, flags({"ckpt_path": "run/checkpoints/last.ckpt", "data.batch_size": 20}), capsys)
    assert "data.source=shapes but the checkpoint has folder" in message


def test_a_run_named_by_its_config_file(here, tmp_path, monkeypatch):
    (tmp_path / "my_recipe.yaml").write_text("model:\n  temperature: 0.7\n")
    monkeypatch.chdir(tmp_path)
    train(["--config", "my_recipe.yaml", *flags({"trainer.max_epochs": 1})])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["my_recipe"]
    assert yaml.safe_load((tmp_path / "runs" / "my_recipe" / "config.yaml").read_text())["model"]["temperature"] == 0.7


def test_ctrl_c_then_the_command_it_prints_gives_the_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer.log_every_n_steps": 1,
        "trainer.max_epochs": 3,
        "knn.every_n_epochs": 0,
        "quality.every_n_epochs": 0,
    }
    train(flags({**settings, "run_dir": "whole"}))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    step, original = [0], SimCLR.training_step

    def interrupted(self, batch, batch_idx):
        step[0] += 1
        if step[0] == STEPS + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "training_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(flags({**settings, "run_dir": "cut"}))
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    assert stopped.value.code == INTERRUPTED
    assert content("cut/checkpoints/last.ckpt")["global_step"] == STEPS + 2
    command = capsys.readouterr().err.split("continue with: simclr train ")[1]
    train(command.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    whole, cut = content("whole/encoder.pt"), content("cut/encoder.pt")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert Path("whole/metrics.csv").read_text() == Path("cut/metrics.csv").read_text()


KEYS = ["linear_top1", "linear_top5", "ci95", "knn_top1", "random_encoder_top1", "raw_pixels_top1", "encoder_sha256"]


def test_linear_eval_writes_the_record_leaves_the_checkpoint_and_keeps_an_earlier_result(here, capsys):
    def state():
        return {
            path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for path in everything(here)
            if "linear_eval" not in path and "events.out" not in path  # what it writes
        }

    before = state()
    linear_eval(["--checkpoint", "runs/train_resnet8"])
    path = here / "runs" / "train_resnet8" / "linear_eval.json"
    first = path.read_text()
    record = json.loads(first)
    assert set(KEYS) <= record.keys()
    assert record["command"] == "simclr linear-eval --checkpoint runs/train_resnet8"
    assert {"simclr", "torch", "torchvision", "kornia", "pytorch_lightning", "python"} == record["versions"].keys()
    assert (record["data"]["train"], record["data"]["test"]) == ("data/train", "data/test")
    assert (record["data"]["train_images"], record["data"]["test_images"]) == (40, 10)
    assert record["data"]["classes"] == ["cat", "dog"]
    assert record["epoch"] == 2
    assert record["ci95"] == list(wilson_interval(round(10 * record["linear_top1"]), 10))
    assert f"{100 * record['linear_top1']:.1f} %" in capsys.readouterr().out
    linear_eval(["--checkpoint", "runs/train_resnet8/checkpoints/last.ckpt", "--knn_k", "3"])
    assert path.with_name("linear_eval.1.json").read_text() == first
    assert json.loads(path.read_text())["knn_k"] == 3
    assert state() == before


def test_the_settings_of_linear_eval_reach_the_evaluation(here):
    of_sgd = {"epochs": 3, "batch_size": 8, "base_lr": 0.5, "weight_decay": 0.2}
    settings = {"protocol": "sgd", **of_sgd, "knn_k": 3, "knn_temperature": 0.7}
    linear_eval(["--checkpoint=runs/train_resnet8-2", *(f"--{name}={value}" for name, value in settings.items())])
    record = json.loads((here / "runs" / "train_resnet8-2" / "linear_eval.json").read_text())
    checkpoint = read_checkpoint("runs/train_resnet8-2")
    data = ImageData(**{**checkpoint.data, "seed": 0})
    of_knn = {"k": 3, "temperature": 0.7}
    expected = linear_evaluation("runs/train_resnet8-2", data, protocol="sgd", settings=of_sgd, knn=of_knn)
    for key in (*settings, "linear_top1", "linear_top5", "knn_top1", "confusion_matrix"):
        assert record[key] == expected[key], key


def test_linear_eval_on_other_images_than_the_runs(here, tmp_path):
    photos(tmp_path / "other", 30, ("a", "b", "c"))
    linear_eval(["--checkpoint", "runs/train_resnet8-2", "--data.train_dir", str(tmp_path / "other"),
                 "--data.test_dir", "null"])  # fmt: skip
    record = json.loads((here / "runs" / "train_resnet8-2" / "linear_eval.json").read_text())
    assert record["data"]["classes"] == ["a", "b", "c"]
    assert (record["data"]["train_images"], record["data"]["test_images"]) == (24, 6)
    assert "no labelled test set" in record["data"]["note"]


def refused(call, arguments, capsys):
    """The one line that a command answers with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def test_images_without_labels_train_without_knn_and_are_no_evaluation(here, tmp_path, capsys):
    train(flags({"data.train_dir": str(here / "flat"), "run_dir": str(tmp_path / "run"), "knn.every_n_epochs": 1}))
    assert "knn" not in (tmp_path / "run" / "metrics.csv").read_text()
    message = refused(linear_eval, ["--checkpoint", str(tmp_path / "run")], capsys)
    assert "flat has no labels: evaluation needs an image set with two or more class folders" in message
    assert "linear_eval.json" not in everything(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.temprature=1"], "unknown key model.temprature. Did you mean model.temperature?"),
        (["--model.temprature", "1"], "unknown key model.temprature. Did you mean model.temperature?"),
        (["--config=typo.yaml"], "unknown key model.temprature in typo.yaml. Did you mean model.temperature?"),
        (["--trainer.max_epoch=1"], "unknown key trainer.max_epoch. Did you mean trainer.max_epochs?"),
        (["--trainer.max_epoch", "1"], "unknown key trainer.max_epoch. Did you mean trainer.max_epochs?"),
        (["--temperature=1"], "unknown key temperature. Did you mean model.temperature?"),
        (["--config=nothing.yaml"], "nothing.yaml"),
        (["--config=broken.yaml"], "broken.yaml is not valid YAML: .* line 2"),
        (["--data.train_dir=photo"], r"data.train_dir=photo does not exist\. .* Did you mean .*photos\?"),
        (["--data.train_dir=empty"], "data.train_dir=empty holds no images"),
        (["--data.train_dir=photos/0.png"], "is a file"),
        (["--data.batch_size=15", "--trainer.devices=2"], "does not divide over 2 devices. Use a multiple of 2"),
        (["--data.batch_size=128"], "data.batch_size=128 is more than the 64 training images"),
        (["--data.batch_size=many"], r"data\.batch_size=many is not .*int"),
        (["--model.temperature=0"], "temperature=0.0 is not positive"),
        (["--model.temperature=-1"], "temperature=-1.0 is not positive"),
        (["--model.temperature=0.001"], "temperature=0.001 is below 0.0015"),
        (["--model.micro_batch_size=5"], "micro_batch_size=5 does not divide the 16 images of a batch. .* 4 or 8"),
        (["--model.encoder=resnet19"], "Unknown encoder 'resnet19'. Did you mean"),
        (["--model.encoder=alexnet", "--model.image_size=32"], "encoder alexnet cannot take images of 32 px: "),
        (
            ["--model.encoder=squeezenet1_1", "--model.image_size=32", "--model.start_size=8", "--model.grow_epochs=1"],
            "start_size=8: encoder squeezenet1_1 cannot take images of that size: ",
        ),
        (["--model.head=mlp"], "model.head=mlp is not .*identity.*linear"),
        (["--model.blur_prob=2"], "blur_prob"),
        (["--optimizer=adam"], "unknown key optimizer. Did you mean model.optimizer?"),
        (["--ckpt_path=nothing.ckpt"], "no checkpoint at nothing.ckpt"),
        (["--ckpt_path=photos/0.png"], "cannot be read as a checkpoint"),
        (["--run_dir=photos"], "run_dir=photos is taken. Choose another"),
        (["--trainer.accelerator=quantum"], "quantum"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs=-1: a cosine needs an end"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=knn_top1", "--knn.every_n_epochs=0"],
            "EarlyStopping watches knn_top1, which this run never measures: knn.every_n_epochs is 0.",
        ),
        (["--wandb=maybe"], "wandb=maybe is not .*auto.*online.*offline.*disabled"),
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 20, ("",))
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.yaml").write_text("model:\n  temprature: 1\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    before = everything(tmp_path)
    taken = {argument.lstrip("-").split("=")[0] for argument in arguments}
    taken |= {"model.width"} if "model.encoder" in taken else set()  # of a ResNet
    others = [flag for flag in flags({}) if flag.lstrip("-").split("=")[0] not in taken]
    pattern = message if re.search(r"\\|\.\*", message) else re.escape(message)
    assert re.search(pattern, refused(train, [*others, *arguments], capsys))
    assert everything(tmp_path) == before
    assert not (tmp_path / "runs").exists()  # not even an empty folder


def test_a_step_that_cannot_fit_is_refused_unless_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    message = refused(train, flags({}), capsys)
    assert message.endswith("Use a smaller encoder or batch. To try it all the same: --check_memory false.")
    assert not everything(tmp_path)
    with pytest.warns(UserWarning, match="may not fit"):
        train(flags({"check_memory": "false", "run_dir": "run", "trainer.max_epochs": 1}))
    assert (tmp_path / "run" / "encoder.pt").exists()


def test_a_checkpoint_of_another_architecture_is_not_continued(here, tmp_path, capsys):
    before = everything(here)
    changed = flags({"model.width": 0.5, "ckpt_path": "runs/train_resnet8", "run_dir": str(tmp_path / "run")})
    message = refused(train, changed, capsys)
    assert "is of another architecture (model.width=0.5 but the checkpoint has 0.25)" in message
    assert everything(here) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint"),
        (["--checkpoint=nothing"], "no checkpoint at nothing"),
        (["--checkpoint=runs"], "Did you mean runs/train_resnet8"),
        (["--checkpoint=data/train/cat/0.png"], "cannot be read as a checkpoint"),
        (["--checkpont=runs/train_resnet8"], "unknown key checkpont. Did you mean checkpoint?"),
        (["--checkpoint=runs/train_resnet8", "--protocl=sgd"], "unknown key protocl. Did you mean protocol?"),
        (["--checkpoint=runs/train_resnet8", "--protocol=svm"], "protocol=svm is not"),
        (["--checkpoint=runs/train_resnet8", "--data.train_dir=flat", "--data.test_dir=null"], "flat has no labels"),
        (
            ["--checkpoint=runs/train_resnet8", "--data.train_dir=flat", "--data.test_dir=data/test"],
            "flat has no labels",
        ),
        (["--checkpoint=runs/train_resnet8", "--data.test_dir=flat"], "flat has no labels"),
        (["--checkpoint=runs/train_resnet8", "--data.test_dir=nothing"], "data.test_dir=nothing does not exist"),
        (["--checkpoint=runs/train_resnet8", "--device=quantum"], "device=quantum cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_of_linear_eval_is_one_line_and_leaves_nothing(here, capsys, arguments, message):
    before = everything(here)
    assert message in refused(linear_eval, arguments, capsys)
    assert everything(here) == before


def test_the_one_command_reaches_the_others(capsys):
    assert refused(main, ["trian"], capsys) == "unknown command trian. Did you mean train?"
    assert "There are train, supervised, linear-eval" in refused(main, ["xyz"], capsys)
    assert refused(main, ["train", "--modle.width=1"], capsys).startswith("unknown key modle.width. Did you mean")
    main([])
    assert "linear-eval" in capsys.readouterr().out
    main(["--version"])
    assert re.fullmatch(r"simclr \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_loss_that_is_not_finite_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train(flags({"model.base_lr": 1e30, "model.optimizer": "sgd", "model.warmup_epochs": 0, "run_dir": "run"}))
    assert stopped.value.code == 1
    assert "error: the loss is nan at step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "encoder.pt").exists()


def test_a_fast_dev_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(flags({"trainer.fast_dev_run": "true"}))
    assert not everything(tmp_path)


def test_a_barebones_run_trains_and_watches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(SimCLR, "on_train_end", lambda model: trained.append(model.global_step))
    train(flags({"trainer.barebones": "true", "trainer.max_epochs": 1}))
    assert trained == [STEPS]
    left = {path.rsplit("/", 1)[1] for path in everything(tmp_path)}
    assert left == {"config.yaml", "encoder.pt", "encoder.safetensors"}


def test_batch_seed_and_image_size_reach_model_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(
        flags(
            {
                "seed_everything": 3,
                "run_dir": "run",
                "trainer.max_epochs": 1,
                "knn.every_n_epochs": 0,
                "quality.every_n_epochs": 0,
            }
        )
    )
    checkpoint = content("run/checkpoints/last.ckpt")
    for part in ("hyper_parameters", "datamodule_hyper_parameters"):
        settings = checkpoint[part]
        assert (settings["batch_size"], settings["seed"], settings["image_size"]) == (BATCH, 3, 16)
