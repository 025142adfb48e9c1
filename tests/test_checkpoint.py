"""Checkpoints: what is loaded equals what was trained, and what does not match is refused by name."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from simclr import SimCLR, build_encoder, load_encoder
from simclr.checkpoint import LAST, as_safetensors, new_encoder, read_checkpoint, save_encoder
from simclr.continuation import check_resume
from simclr.eval import encoder_sha256
from simclr.inputs import InputTransform
from tiny import BATCH, STEPS, fit, tiny_data, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, the trained module)"""
    root = tmp_path_factory.mktemp("run")
    model = tiny_model(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    fit(root, model, max_epochs=1).save_checkpoint(root / LAST)
    model.encoder.to(memory_format=torch.contiguous_format)  # as a new encoder is: channels_last sums in another order
    return root, model


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", ["the run folder", "the file", "a string"])
def test_the_loaded_encoder_is_the_trained_one(run, given):
    root, model = run
    encoder = load_encoder({"the run folder": root, "the file": root / LAST, "a string": str(root)}[given])
    assert torch.equal(encoder(images()), model.encoder.eval()(images()))
    assert not torch.equal(encoder(images()), tiny_model().encoder.eval()(images()))
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.feature_dim == encoder(images()).shape[1]
    assert (encoder.image_size, encoder.mean, encoder.std) == (16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def test_a_checkpoint_is_read_with_its_settings_and_where_it_stands(run):
    root, model = run
    read = read_checkpoint(root)
    assert (read.path, read.run_dir) == (root / LAST, root)
    assert read.model == dict(model.hparams)
    assert read.data["batch_size"] == BATCH
    assert read.global_step == STEPS
    assert read.state_dict.keys() == model.state_dict().keys()


def test_a_file_outside_checkpoints_belongs_to_its_own_folder(run, tmp_path):
    (tmp_path / "x.ckpt").write_bytes((run[0] / LAST).read_bytes())
    assert read_checkpoint(tmp_path / "x.ckpt").run_dir == tmp_path


class Bomb:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(run, tmp_path):
    content = torch.load(run[0] / LAST)
    torch.save({**content, "extra": Bomb(tmp_path / "exploded")}, tmp_path / "torch.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({**content, "extra": Bomb(tmp_path / "exploded")}))
    for name in ("torch.ckpt", "plain.ckpt"):
        with pytest.raises(ValueError, match="holds more than weights"):
            load_encoder(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_checkpoint_is_an_error_that_says_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at .*runs.nothing: {tmp_path} is as far"):
        load_encoder(tmp_path / "runs" / "nothing")
    with pytest.raises(FileNotFoundError, match="Give a run folder that training has filled"):
        load_encoder(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "epoch3.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*epoch3\.ckpt\?"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"just some text, no weights", "cannot be read as a checkpoint"),
        ([1, 2], "has no state_dict and hyper_parameters"),
        ({"state_dict": {}}, "has no state_dict and hyper_parameters"),
        (
            {"state_dict": {}, "hyper_parameters": {"lr": 1}},
            "hyper_parameters lack encoder, image_size, mean, std, seed",
        ),
        (
            {"state_dict": {}, "hyper_parameters": {"encoder": "vit", "seed": 1}},
            "another program: .* lack image_size, mean",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path, content, message):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_encoder(path)


def test_half_a_checkpoint_is_refused(run, tmp_path):
    whole = (run[0] / LAST).read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="it is damaged"):
        load_encoder(tmp_path / "x.ckpt")


def without(weights: dict, key: str) -> dict:
    return {k: v for k, v in weights.items() if k != key}


BN = "encoder.layer1.0.bn1.running_mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, BN), r"layer1\.0\.bn1\.running_mean is missing\."),
        (lambda w: w | {"encoder.layer9.weight": torch.ones(2)}, r"layer9\.weight is unexpected\."),
        (lambda w: w | {BN: w[BN][:2]}, r"layer1\.0\.bn1\.running_mean is \(2,\) where \(\d+,\) is needed\."),
        (lambda w: {k: v for k, v in w.items() if "layer" not in k}, r"is missing; .*; and \d+ more\."),
    ],
)
def test_a_weight_that_does_not_match_is_refused_by_name(run, tmp_path, change, message):
    content = torch.load(run[0] / LAST)
    assert BN in content["state_dict"]
    torch.save({**content, "state_dict": change(content["state_dict"])}, tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=rf"x\.ckpt does not fit its own encoder=resnet8, .*width=0\.25.*: .*{message}"
    ):
        load_encoder(tmp_path / "x.ckpt")


def test_a_run_of_another_architecture_is_not_continued(run):
    read = read_checkpoint(run[0])
    check_resume(read, tiny_model(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)))
    with pytest.raises(
        ValueError, match=r"another architecture \(model.width=0.5 but the checkpoint has 0.25\): encoder"
    ):
        check_resume(read, tiny_model(width=0.5))
    with pytest.raises(ValueError, match=r"model.head=linear but the checkpoint has nonlinear\): head"):
        check_resume(read, tiny_model(head="linear"))


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """(a run folder with encoder.pt, encoder.safetensors and the last checkpoint, the trained module)"""
    root, model = tmp_path_factory.mktemp("saved"), run[1]
    (root / LAST).parent.mkdir()
    shutil.copy(run[0] / LAST, root / LAST)
    save_encoder(model, root / "encoder.pt")
    return root, model


def copy(folder: Path, to: Path, *names: str) -> Path:
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, to / name)
    return to


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["encoder.safetensors"], "encoder.safetensors"),
        (["encoder.safetensors"], ""),
        (["encoder.pt", "encoder.safetensors"], "encoder.pt"),
        (["encoder.pt", LAST], "encoder.pt"),
        (["encoder.pt", "encoder.safetensors", LAST], ""),
    ],
    ids=["safetensors alone", "its folder", "pt beside it", "pt beside a checkpoint", "a run folder"],
)
def test_every_file_that_holds_the_encoder_gives_the_same_encoder(saved, tmp_path, names, given):
    encoder = load_encoder(copy(saved[0], tmp_path, *map(str, names)) / given)
    assert encoder_sha256(encoder) == encoder_sha256(saved[1].encoder)
    assert torch.equal(encoder(images()), saved[1].encoder.eval()(images()))
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.transform == InputTransform(16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert (encoder.image_size, encoder.mean, encoder.std) == (16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert encoder.feature_dim == saved[1].encoder.feature_dim


def test_a_path_may_begin_with_a_tilde(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved[0].parent))
    encoder = load_encoder(f"~/{saved[0].name}/encoder.safetensors")
    assert encoder_sha256(encoder) == encoder_sha256(saved[1].encoder)


def test_the_safetensors_file_says_everything_that_the_encoder_needs(saved):
    with safetensors.safe_open(saved[0] / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    settings = json.loads(metadata["simclr"])
    assert settings.pop("simclr_version")
    assert settings == {
        "encoder": "resnet8",
        "stem": "small",  # what auto meant
        "width": 0.25,
        "depth": 1.0,
        "phi": None,
        "shortcut": "B",
        "norm": "batch",
        "zero_init": True,
        "channels": 3,
        "image_size": 16,
        "load_size": 16,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "feature_dim": saved[1].encoder.feature_dim,
        "epochs": 1,
        "global_step": STEPS,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "resnet18", "width": 0.25, "stem": "small_stride2"},
        {"encoder": "resnet8", "shortcut": "A", "norm": "none"},
        {"encoder": "resnet50", "width": 0.125, "stem": "imagenet", "shortcut": "C", "image_size": 80},
        {"encoder": "mobilenet_v3_small", "image_size": 32},
        {"encoder": "resnet8", "depth": 2.0},
        {"encoder": "efficientnet", "phi": 0, "width": 1.0, "image_size": 32},
        {"encoder": "efficientnet", "depth": 0.5, "width": 0.25, "image_size": 32},
        {"encoder": "resnet10t", "image_size": 32},  # timm's
    ],
    ids=lambda settings: settings["encoder"],
)
def test_every_kind_of_encoder_comes_back_from_its_file(tmp_path, settings):
    torch.manual_seed(0)
    model = SimCLR(**settings)
    save_encoder(model, tmp_path / "encoder.pt")
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    assert encoder_sha256(encoder) == encoder_sha256(model.encoder)
    assert encoder.transform == model.encoder.transform


def test_images_are_held_for_the_transform_as_they_were_for_the_run(run, tmp_path):
    read = read_checkpoint(run[0])
    for data, held in (
        ({}, 16),
        ({"source": "folder", "load_size": None}, 16),
        ({"source": "auto", "load_size": 40}, 40),
    ):
        assert new_encoder(replace(read, data=data)).transform.load_size == held
    stl10 = {"source": "stl10", "load_size": None}
    large = replace(read, model={**read.model, "image_size": 96}, data=stl10)
    assert new_encoder(large).transform.load_size == 96
    assert new_encoder(replace(large, data={})).transform.load_size == 110
    model = tiny_model()
    fit(tmp_path, model, tiny_data(load_size=20), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    save_encoder(model, tmp_path / "encoder.pt")
    for name in ("x.ckpt", "encoder.safetensors"):
        assert load_encoder(tmp_path / name).transform.load_size == 20


def test_weights_alone_are_not_guessed_at(saved, tmp_path):
    copy(saved[0], tmp_path, "encoder.pt")
    with pytest.raises(
        ValueError,
        match=r"encoder\.pt holds weights alone, and neither encoder\.safetensors nor checkpoints/last\.ckpt beside it "
        r"says of what network\. Give encoder\.safetensors or a checkpoint",
    ):
        load_encoder(tmp_path / "encoder.pt")
    other = torch.load(tmp_path / "encoder.pt")
    other["conv1.weight"] = torch.ones(8, 3, 3, 3)
    copy(saved[0], tmp_path, "encoder.safetensors")
    torch.save(other, tmp_path / "encoder.pt")
    with pytest.raises(
        ValueError, match=r"encoder\.pt does not fit its own encoder=resnet8, .*conv1\.weight is \(8, 3"
    ):
        load_encoder(tmp_path / "encoder.pt")


def test_an_encoder_alone_is_no_run_to_evaluate_or_continue(saved):
    for name in ("encoder.pt", "encoder.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} holds an encoder alone\. Give the run's folder, or its checkp"):
            read_checkpoint(saved[0] / name)


def test_a_safetensors_file_that_is_not_ours_or_not_whole_is_refused(saved, tmp_path):
    path = tmp_path / "x.safetensors"
    whole = (saved[0] / "encoder.safetensors").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be read: it is damaged, or no safetensors file"):
            load_encoder(path)
    weights = {"conv1.weight": torch.ones(2)}
    for metadata in (None, {"simclr": "null"}, {"simclr": "{}"}, {"simclr": "[1]"}, {"simclr": '{"encoder": "vit"}'}):
        safetensors.torch.save_file(weights, path, metadata)
        with pytest.raises(
            ValueError, match=r"is not of simclr: its metadata lack .*image_size, mean, std\. Of another"
        ):
            load_encoder(path)
    safetensors.torch.save_file(weights, path, {"simclr": "{"})
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.safetensors"):
        load_encoder(tmp_path / "nothing.safetensors")


def test_weights_that_share_memory_are_saved_each(tmp_path):
    model = tiny_model()
    model.encoder.layer1[0].bn2.weight = model.encoder.layer1[0].bn1.weight
    save_encoder(model, tmp_path / "encoder.pt")
    block = load_encoder(tmp_path / "encoder.safetensors").layer1[0]
    for name in ("bn1", "bn2"):
        assert torch.equal(getattr(block, name).weight, model.encoder.layer1[0].bn1.weight)


def test_what_lightning_saves_by_itself_is_opened_by_file_and_by_folder(tmp_path, recwarn):
    model = tiny_model()
    fit(tmp_path, model, max_epochs=1, logger=True, enable_checkpointing=True)
    version = tmp_path / "lightning_logs" / "version_0"
    (path,) = version.glob("checkpoints/*.ckpt")
    for given in (path, version):
        assert encoder_sha256(load_encoder(given)) == encoder_sha256(model.encoder)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_saved_encoder_is_torchvisions_and_timms_without_their_classifier(tmp_path, depth):
    timm = pytest.importorskip("timm")
    model = SimCLR(f"resnet{depth}", image_size=224)  # the ImageNet stem
    save_encoder(model, tmp_path / "encoder.pt")
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert all(value.is_contiguous() for value in weights.values())
    assert weights.keys() == safetensors.torch.load_file(tmp_path / "encoder.safetensors").keys()
    theirs = torchvision.models.get_model(f"resnet{depth}")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = torch.nn.Identity()
    x, expected = images(2, 64), model.encoder.eval()(images(2, 64))
    # channels_last sums in another order
    torch.testing.assert_close(theirs.eval()(x), expected, rtol=1e-4, atol=1e-5)
    for name in ("encoder.pt", "encoder.safetensors"):
        timms = timm.create_model(f"resnet{depth}", num_classes=0, checkpoint_path=str(tmp_path / name))
        torch.testing.assert_close(timms.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_saved_encoder_fits_build_encoder_strictly(saved):
    encoder = build_encoder("resnet8", image_size=16, width=0.25)
    encoder.load_state_dict(torch.load(saved[0] / "encoder.pt", weights_only=True))
    assert torch.equal(encoder.eval()(images()), saved[1].encoder.eval()(images()))


def test_a_safetensors_file_has_one_form_whatever_the_order_of_its_metadata():
    tensors, metadata = {"weight": torch.arange(3.0), "bias": torch.ones(1)}, {"b": "\u00fc", "a": "2", "c": ""}
    forms = {as_safetensors(tensors, dict(order)) for order in (metadata.items(), reversed(metadata.items()))}
    [written] = forms
    assert (8 + int.from_bytes(written[:8], "little")) % 8 == 0  # where tensors begin
    opened = safetensors.torch.load(written)
    assert {name: tensor.tolist() for name, tensor in opened.items()} == {"weight": [0.0, 1.0, 2.0], "bias": [1.0]}
