"""Weights to begin with: taken as they are, wholly or not at all; nothing is fetched, and nothing is needed twice."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from pytorch_lightning import Callback
from safetensors.torch import save_file

from simclr import load_encoder
from simclr.checkpoint import STARTING_ENCODER, read_checkpoint, sha256_of
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.encoders import build_encoder
from simclr.export.card import CARD
from simclr.export.formats import export_encoder
from simclr.module import SimCLR
from simclr.starting_weights import read_starting_weights
from strict.sitecustomize import environment
from test_continue import files_of
from tiny import fit, flags, tiny_model

pytestmark = pytest.mark.usefixtures("few_lambdas")

ROOT = Path(__file__).parents[1]
FAST = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "dashboard.every_n_epochs": 0}
STILL = {**FAST, "trainer.max_epochs": 1}


def tiny(seed: int) -> dict[str, torch.Tensor]:
    """Weights of the tiny runs' encoder, statistics of BatchNorm too."""
    torch.manual_seed(seed)
    encoder = build_encoder("resnet8", image_size=16, width=0.25)
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=drawn) if value.is_floating_point() else value + 7
        for name, value in encoder.state_dict().items()
    }


@pytest.fixture(scope="module")
def stock():
    """torchvision's own network at random, its classifier included."""
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()


@pytest.fixture(scope="module")
def resnet18():
    return build_encoder("resnet18")


IMAGENET = {"encoder": "resnet18", "stem": "imagenet", "image_size": 224}


def taken(source, encoder, settings=IMAGENET, prefix=None):
    """What an encoder has after it took the weights of a source."""
    read = read_starting_weights(str(source), encoder, settings, prefix)
    encoder.load_state_dict(read.weights)
    return read, encoder.state_dict()


def equal(a, b, names=None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in names or b)


# Kinds of sources


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors", "state_dict", "model", "student and teacher", "deep"])
def test_every_weight_of_a_file_is_taken_as_it_is_and_the_classifier_is_dropped(kind, tmp_path, stock, resnet18):
    nested = {
        "state_dict": {"state_dict": stock, "epoch": 3, "loss": torch.ones(())},
        "model": {"model": stock, "args": {"lr": 1}},
        "student and teacher": {"student": {"wrong": torch.ones(1)}, "teacher": stock},
        "deep": {"model": {"state_dict": stock}},
    }
    path = tmp_path / (f"w.{kind}" if kind in ("pt", "pth", "safetensors") else "w.ckpt")
    save_file(stock, path) if kind == "safetensors" else torch.save(nested.get(kind, stock), path)
    read, weights = taken(path, resnet18)
    assert equal(stock, weights)
    assert set(read.dropped) == {"fc.weight", "fc.bias"}  # safetensors sorts its names
    assert f"dropped: {', '.join(read.dropped)}" in read.text
    assert read.sha256 == sha256_of(weights)


def test_a_prefix_takes_one_of_two_networks_and_the_rest_is_said(tmp_path, stock, resnet18):
    other = {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in stock.items()}
    both = {f"module.encoder_q.{name}": value for name, value in stock.items()} | other
    torch.save({"state_dict": both | {"module.queue": torch.ones(2)}}, tmp_path / "moco.pth.tar")
    with pytest.raises(
        ValueError, match=r"Give --model.weights_prefix module.encoder_k. or --model.weights_prefix mod"
    ):
        read_starting_weights(str(tmp_path / "moco.pth.tar"), resnet18, IMAGENET)
    for prefix in ("module.encoder_q", "module.encoder_q."):
        read, weights = taken(tmp_path / "moco.pth.tar", resnet18, prefix=prefix)
        assert equal(stock, weights)
        assert {"module.queue", "module.encoder_k.conv1.weight", "module.encoder_q.fc.weight"} <= set(read.dropped)
        assert len(read.dropped) == len(stock) + 3


def test_files_from_before_batch_norm_counted_are_taken(tmp_path, stock, resnet18):
    old = {name: value for name, value in stock.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read, weights = taken(tmp_path / "old.pth", resnet18)
    assert equal(old, weights, [name for name in old if not name.startswith("fc.")])
    assert len(read.weights) == 120


def test_torchvisions_weights_come_by_name_from_its_cache_without_a_connection(tmp_path, monkeypatch, stock, resnet18):
    def refuse(*args, **kwargs):
        raise OSError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    with pytest.raises(ValueError, match=r"torchvision:IMAGENET1K_V1 could not be fetched: .*Without a network, bring"):
        read_starting_weights("torchvision:IMAGENET1K_V1", resnet18, IMAGENET)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(stock, tmp_path / "hub" / "checkpoints" / Path(entry.url).name)
    read, weights = taken("torchvision:IMAGENET1K_V1", resnet18)
    assert equal(stock, weights)
    other = {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert "--model.mean '[0.485, 0.456, 0.406]' --model.std '[0.229, 0.224, 0.225]'" in read.fed_otherwise(other)
    assert read.fed_otherwise({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}) is None


def test_timms_weights_come_by_name_and_draw_no_random_numbers(monkeypatch, stock, resnet18):
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, []

    def fetched(name, pretrained):
        asked.append((name, pretrained))
        model = create(name, pretrained=False)
        model.load_state_dict(stock)
        return model

    monkeypatch.setattr(timm, "create_model", fetched)
    torch.manual_seed(5)
    _, weights = taken("timm:resnet18.a1_in1k", resnet18)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert asked == [("resnet18.a1_in1k", True)]
    assert equal(stock, weights)
    with pytest.raises(ValueError, match="timm has no model resnet17"):
        read_starting_weights("timm:resnet17", resnet18, IMAGENET)


def test_a_run_a_checkpoint_and_an_export_give_the_encoder_of_the_run(tmp_path):
    model = fit(tmp_path / "run", tiny_model(), max_epochs=1).lightning_module
    model.trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    export_encoder(tmp_path / "run", "safetensors", tmp_path / "out")
    settings = {"encoder": "resnet8", "stem": "small", "image_size": 16, "width": 0.25}
    for source in ("run", "run/checkpoints/last.ckpt", "out", "out/encoder.safetensors"):
        fresh = build_encoder("resnet8", image_size=16, width=0.25)
        read, weights = taken(tmp_path / source, fresh, settings)
        assert equal(model.encoder.state_dict(), weights), source
        assert read.dropped == []
    wider = build_encoder("resnet8", image_size=16)
    with pytest.raises(ValueError, match=r"it is of width=0.25 and not 1.0. Give --model.width 0.25"):
        read_starting_weights(str(tmp_path / "run"), wider, {**settings, "width": 1.0})


@pytest.mark.parametrize("name", ["convnext_tiny", "squeezenet1_1", "mobilenet_v3_small"])
def test_only_the_layer_that_was_taken_off_is_dropped(name, tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).state_dict()
    encoder = build_encoder(name)
    torch.save(theirs, tmp_path / "w.pth")
    read, weights = taken(tmp_path / "w.pth", encoder, {"encoder": name})
    assert equal(theirs, weights)
    assert set(read.dropped) == theirs.keys() - weights.keys()
    assert len(read.dropped) == 2


# Refusals, at the command line


def bad(kind: str, weights: dict) -> object:
    """A file that does not serve, made of one that does."""
    first = next(iter(weights))
    return {
        "missing": {k: v for k, v in weights.items() if k != "layer1.0.conv1.weight"},
        "unexpected": weights | {"layer9.weight": torch.ones(1)},
        "shape": weights | {"layer1.0.conv1.weight": torch.ones(3, 4, 3, 3)},
        "kind": weights | {first: torch.ones(weights[first].shape, dtype=torch.int64)},
        "nan": weights | {first: torch.full_like(weights[first], torch.nan)},
        "word": weights | {"layer9.weight": "word"},
        "prefix": {f"backbone.{k}": v for k, v in weights.items()},
        "stem": weights | {"conv1.weight": torch.ones(4, 3, 7, 7)},
        "nothing": {"epoch": 3},
        "number": 3,
        "code": {"state_dict": weights, "hook": print},
    }[kind]


FIT = "model.weights={path} does not fit encoder resnet8: "
UNREADABLE = (
    "{path} cannot be read as weights: it is damaged, no file of torch's, or holds more than weights. Where it is "
    "sound, save the weights alone in its own program: torch.save(model.state_dict(), FILE)."
)
REFUSED = {
    "missing": f"{FIT}layer1.0.conv1.weight is missing.",
    "unexpected": f"{FIT}layer9.weight is unexpected.",
    "shape": f"{FIT}layer1.0.conv1.weight is (3, 4, 3, 3) where (4, 4, 3, 3) is needed.",
    "kind": f"{FIT}conv1.weight is int64 where float32 is needed.",
    "nan": f"{FIT}conv1.weight is not finite.",
    "word": f"{FIT}layer9.weight is no tensor.",
    "prefix": f"{FIT}its names begin with backbone. Give --model.weights_prefix backbone.",
    "stem": f"{FIT}its conv1.weight is 7 x 7 where this stem has 3 x 3. Give --model.stem imagenet",
    "nothing": "{path} has no weights in it that could be found: it holds epoch.",
    "number": "{path} has no weights in it that could be found: it is no mapping.",
    "code": UNREADABLE,
    "text": UNREADABLE,
}


def refused(capsys, **settings) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *flags({**STILL, **settings})])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (BAD_INPUT, "", 1), said
    return said.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_a_line_and_leaves_no_folder(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    path.write_text("no weights") if kind == "text" else torch.save(bad(kind, tiny(0)), path)
    assert refused(capsys, **{"model.weights": "w.pt"}) == REFUSED[kind].format(path=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.weights": "no.pt"}, "model.weights={here}/no.pt: there is no such file or folder."),
        (
            {"model.weights": "IMAGENET1K_V1", "model.encoder": "resnet18", "model.width": 1},
            "model.weights={here}/IMAGENET1K_V1: there is no such file or folder. For torchvision's weights of that "
            "name: --model.weights torchvision:IMAGENET1K_V1.",
        ),
        (
            {"model.weights": "torchvision:V9", "model.encoder": "resnet18", "model.width": 1},
            "model.weights=torchvision:V9: for resnet18 torchvision has IMAGENET1K_V1, DEFAULT.",
        ),
        (
            {"model.weights": "torchvision:IMAGENET1K_V1"},
            "model.weights=torchvision:IMAGENET1K_V1: torchvision has no resnet8, width 0.25, of which these would be "
            "the weights.",
        ),
        (
            {"model.weights": "https://example.org/w.pt"},
            "model.weights=https://example.org/w.pt: nothing is downloaded from an address. Download it, give the "
            "file.",
        ),
        (
            {"model.weights": "w.pt", "model.weights_prefix": "net"},
            "model.weights_prefix=net.: no name in {here}/w.pt begins so. They begin with conv1., bn1., layer1., "
            "layer2., layer3.",
        ),
        ({"model.weights_prefix": "net"}, "weights_prefix=net needs weights, whose names begin so."),
        (
            {"model.weights": "empty"},
            "no checkpoints/last.ckpt in {here}/empty. Give a run folder that training has ...",
        ),
    ],
)
def test_a_source_that_is_not_there_is_a_line(settings, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny(0), "w.pt")
    Path("empty").mkdir()
    said, message = refused(capsys, **settings), message.format(here=tmp_path)
    assert said == message or (message.endswith("...") and said.startswith(message.removesuffix("...")))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "w.pt"]


# A run


class Begun(Callback):
    """Keeps what each rank begins with."""

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"begun{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with weights and a run that began with them; not to be changed."""
    place = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        torch.save({"state_dict": {f"net.{name}": value for name, value in tiny(3).items()}}, "w.pt")
        settings = {"model.weights": "w.pt", "model.weights_prefix": "net", "trainer.callbacks": f"{__name__}.Begun"}
        main(["train", *flags({**FAST, **settings, "run_dir": "run"})])
    return place


def test_a_run_begins_with_the_weights_and_says_and_keeps_them(begun):
    first, run = torch.load(begun / "begun0.pt"), begun / "run"
    assert equal(
        {f"encoder.{name}": value for name, value in tiny(3).items()}, {k: first[k] for k in first if k[0] == "e"}
    )
    assert equal(load_encoder(run / STARTING_ENCODER).state_dict(), tiny(3))
    read = read_checkpoint(run)
    assert read.about["starting_weights"] == {
        "source": str(begun / "w.pt"),
        "sha256": sha256_of(tiny(3)),
        "dropped": [],
    }
    assert (read.model["weights"], read.model["weights_prefix"]) == (str(begun / "w.pt"), "net")
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (config["weights"], config["weights_prefix"]) == (str(begun / "w.pt"), "net")
    assert not equal(load_encoder(run).state_dict(), tiny(3), ["conv1.weight"])  # it was trained


def test_what_begins_at_random_is_the_same_with_and_without_weights(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = {"trainer.callbacks": f"{__name__}.Begun"}
    main(["train", *flags({**FAST, **callbacks, "run_dir": "run", "trainer.max_steps": 1, "trainer.max_epochs": -1})])
    first, other = torch.load(begun / "begun0.pt"), torch.load("begun0.pt")
    assert equal(first, {name: value for name, value in other.items() if name.startswith("head.")})
    assert "starting_weights" not in read_checkpoint("run").about
    assert not Path("run", STARTING_ENCODER).exists()


def test_the_first_line_says_what_is_dropped_and_fresh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny(3) | {"fc.weight": torch.ones(2, 16)}, "w.pt")
    main(["train", *flags({**STILL, "trainer.fast_dev_run": True, "model.weights": "w.pt"})])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
    count = len(tiny(3))
    assert line == f"weights    {tmp_path}/w.pt, {count} tensors; dropped: fc.weight; the head begins at random"


def test_a_run_goes_on_to_the_same_bits_without_the_file(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(begun / "w.pt", "w.pt")
    same = {**FAST, "model.weights": "w.pt", "model.weights_prefix": "net"}
    halt = {"trainer.callbacks": "test_continue.Halt", "trainer.callbacks.epoch": 0, "trainer.callbacks.batch": 1}
    main(["train", *flags({**same, **halt, "run_dir": "cut"})])
    Path("w.pt").unlink()
    main(["train", "--ckpt_path", "cut", "--trainer.callbacks=null", "--run_dir", "on"])
    assert_same_weights(Path("on"), begun / "run")
    assert Path("on", STARTING_ENCODER).read_bytes() == Path("cut", STARTING_ENCODER).read_bytes()
    assert read_checkpoint("on").about["starting_weights"]["sha256"] == sha256_of(tiny(3))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--ckpt_path", "cut", "--model.weights", "other.pt"])
    assert "model.weights=" in (said := capsys.readouterr().err)
    assert f"but the checkpoint has {tmp_path}/w.pt" in said


def assert_same_weights(a: Path, b: Path) -> None:
    assert equal(read_checkpoint(a).state_dict, read_checkpoint(b).state_dict)


def test_a_module_of_ones_own_trainer_begins_with_them_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny(3), "w.pt")
    watch = Begun()
    model = SimCLR("resnet8", image_size=16, width=0.25, batch_size=16, warmup_epochs=0, weights="w.pt")
    assert not equal(model.encoder.state_dict(), tiny(3), ["conv1.weight"])  # a model alone needs no file
    trainer = fit(tmp_path, model, callbacks=[watch], max_epochs=1)
    assert equal(torch.load("begun0.pt"), {f"encoder.{name}": value for name, value in tiny(3).items()})
    trainer.save_checkpoint("run.ckpt")
    trained = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    Path("w.pt").unlink()
    fit(tmp_path, model, callbacks=[watch], max_epochs=1)  # the same object again: it goes on from where it is
    assert equal(torch.load("begun0.pt"), {f"encoder.{name}": value for name, value in trained.items()})
    again = SimCLR.load_from_checkpoint("run.ckpt", weights_only=True)
    assert equal(again.encoder.state_dict(), trained)
    assert again.run.began_with["source"] == "w.pt"


@pytest.mark.slow
def test_two_ranks_begin_alike(begun, tmp_path):
    shutil.copy(begun / "w.pt", tmp_path / "w.pt")
    settings = {**STILL, "trainer.devices": 2, "trainer.strategy": "ddp", "data.workers": 0, "model.weights": "w.pt"}
    settings |= {"model.weights_prefix": "net", "run_dir": "run", "trainer.callbacks": f"{__name__}.Begun"}
    command = [sys.executable, str(ROOT / "train.py"), *flags(settings)]
    path = environment(ROOT, ROOT / "tests")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr
    one, two, alone = (torch.load(p) for p in (tmp_path / "begun0.pt", tmp_path / "begun1.pt", begun / "begun0.pt"))
    assert equal(one, alone)
    assert equal(two, alone)


# The yardstick


def test_linear_eval_measures_the_starting_weights_and_shows_them(begun, tmp_path, monkeypatch, capsys):
    from simclr.eval import extract_features, linear_probe
    from simclr.eval.evaluation import linear_evaluation
    from tiny import tiny_data

    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun / "run", "run")
    data = tiny_data()
    record = linear_evaluation("run", data)
    encoder = load_encoder(Path("run", STARTING_ENCODER))
    parts = [extract_features(encoder, data.eval_loader(part)) for part in ("train", "test")]
    assert record["starting_weights_top1"] == linear_probe(*parts[0], *parts[1], max_iterations=2000).accuracy
    assert record["starting_weights"]["sha256"] == sha256_of(tiny(3))
    assert set(record["regularization_end"]) == {"linear", "random_encoder", "starting_weights", "raw_pixels"}
    capsys.readouterr()
    main(["linear-eval", "run"])
    assert "yardstick: starting weights" in capsys.readouterr().out
    kept = json.loads(Path("run/linear_eval.json").read_text())
    assert kept["starting_weights_top1"] == record["starting_weights_top1"]
    main(["report", "run"])
    page = Path("run/report.html").read_text()
    assert "the weights it began with" in page
    assert f"the run began with {begun}/w.pt" in page
    capsys.readouterr()
    main(["compare", "run", str(begun / "run")])
    assert "starting weights" in capsys.readouterr().out
    main(["export", "run"])
    assert "| random encoder | raw pixels | starting weights |" in Path("run/export/safetensors", CARD).read_text()
    before = files_of(Path("run"))
    shutil.copy(Path("run/encoder.safetensors"), Path("run", STARTING_ENCODER))  # of the run's end
    with pytest.raises(
        ValueError, match=r"starting_encoder.safetensors is not what the run began with: .*w.pt, SHA-256"
    ):
        linear_evaluation("run", data)
    assert len(files_of(Path("run"))) == len(before)
