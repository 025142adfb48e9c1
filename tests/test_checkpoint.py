"""Checkpoints: what is loaded equals what was trained, and what does not match is refused by name."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from simclr import SimCLR, build_encoder, load_encoder
from simclr.checkpoint import LAST, check_resume, read_checkpoint, save_encoder, write_atomically
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
    check_resume(read, tiny_model(temperature=0.9))
    with pytest.raises(
        ValueError, match=r"another architecture \(model.width=0.5 but the checkpoint has 0.25\): encoder"
    ):
        check_resume(read, tiny_model(width=0.5))
    with pytest.raises(ValueError, match=r"model.head=linear but the checkpoint has nonlinear\): head"):
        check_resume(read, tiny_model(head="linear"))


def test_a_run_is_not_continued_with_another_optimizer(run):
    with pytest.raises(ValueError, match=r"model\.optimizer=adamw but the checkpoint has lars\. Restore the setting"):
        check_resume(read_checkpoint(run[0]), tiny_model(optimizer="adamw"))


def test_a_run_is_not_continued_on_other_images(run, tmp_path):
    read = read_checkpoint(run[0])
    for same in (None, tiny_data(), tiny_data(source="shapes"), tiny_data(workers=2, shapes_test=7)):
        check_resume(read, tiny_model(), same)
    with pytest.raises(
        ValueError, match=r"data\.batch_size=8 .* has 16, data\.seed \(seed_everything\)=3 but the checkpoint has 0\."
    ):
        check_resume(read, tiny_model(), tiny_data(batch_size=8, seed=3))
    photos = replace(read, data=dict(tiny_data(train_dir="photos").hparams))
    with pytest.raises(ValueError, match=r"data\.source=shapes but the checkpoint has folder\."):
        check_resume(photos, tiny_model(), tiny_data())
    check_resume(photos, tiny_model(), tiny_data(train_dir="moved/photos", shapes_train=7))
    check_resume(replace(read, data={}), tiny_model(), tiny_data(batch_size=8))


def test_a_saved_encoder_is_torchvisions_without_its_classifier(tmp_path):
    model = SimCLR("resnet18", image_size=224)  # the ImageNet stem
    save_encoder(model.encoder, tmp_path / "encoder.pt")
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = torch.nn.Identity()
    x = images(2, 64)
    # channels_last sums in another order
    torch.testing.assert_close(theirs.eval()(x), model.encoder.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(value.is_contiguous() for value in weights.values())


def test_a_saved_encoder_fits_build_encoder_strictly(run, tmp_path):
    save_encoder(run[1].encoder, tmp_path / "encoder.pt")
    encoder = build_encoder("resnet8", image_size=16, width=0.25)
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    assert torch.equal(encoder.eval()(images()), run[1].encoder.eval()(images()))


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
