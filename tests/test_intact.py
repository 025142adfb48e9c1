"""Damage: no flipped bit and no missing part of a checkpoint is read without a word."""

import copy
import random
import shutil
from pathlib import Path

import pytest
import torch

from simclr.checkpoint import LAST, load_encoder, read_checkpoint, save_encoder
from simclr.cli.messages import BAD_INPUT
from simclr.cli.saving import WholeCheckpoints
from simclr.cli.train import train
from simclr.continuation import check_resume
from simclr.intact import refuse_flipped_bits
from test_module import assert_same
from test_saving import run_and_code
from tiny import fit, flags, tiny_data, tiny_model


@pytest.fixture(scope="module", params=["lars", "adamw"])
def run(request, tmp_path_factory) -> Path:
    """A run folder, not to be changed."""
    root = tmp_path_factory.mktemp("run")
    trainer = fit(root, tiny_model(optimizer=request.param), max_epochs=1)
    trainer.save_checkpoint(root / LAST)
    save_encoder(trainer.lightning_module, root / "encoder.pt")
    return root


def weights_of(path: Path) -> dict:
    return load_encoder(path).state_dict()


def damaged(content: bytes, number: int) -> bytes:
    """A bit flipped, or a sector overwritten."""
    draw, content = random.Random(number), bytearray(content)
    at = draw.randrange(len(content))
    if number % 2:
        content[at] ^= 1 << draw.randrange(8)
    else:
        content[at : at + 512] = draw.randbytes(len(content[at : at + 512]))
    return bytes(content)


@pytest.mark.parametrize("name", [str(LAST), "encoder.pt", "encoder.safetensors"])
def test_flipped_bits_are_refused_by_name_or_change_nothing(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / name
    whole, refused, harmless = path.read_bytes(), 0, 0
    expected = torch.load(path, weights_only=True) if path.suffix != ".safetensors" else weights_of(path)
    for number in range(60):
        path.write_bytes(damaged(whole, number))
        try:
            read = read_checkpoint(path) if path.suffix == ".ckpt" else load_encoder(path)
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        harmless += 1
        if path.suffix == ".ckpt":
            assert not read.unfit
            assert_same(torch.load(path, weights_only=True), expected)
        else:
            assert_same(dict(read.state_dict()), dict(expected))
    assert refused + harmless == 60
    assert refused >= 40  # the others: padding, names of archives, dates


def test_the_same_flip_is_read_by_torch_alone(run, tmp_path):
    content = bytearray((run / LAST).read_bytes())
    weight = read_checkpoint(run).state_dict["encoder.bn1.running_var"]
    at = content.find(weight.numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"data/\d+ has other bytes than were written"):
        refuse_flipped_bits(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt is damaged: .*data/\d+ has other bytes"):
        WholeCheckpoints().load_checkpoint(tmp_path / "x.ckpt")


def test_a_sound_checkpoint_beside_a_damaged_one_is_named(run, tmp_path):
    for name in ("last.ckpt", "older.ckpt"):
        (tmp_path / name).write_bytes((run / LAST).read_bytes())
    (tmp_path / "broken.ckpt").write_bytes(b"x")
    (tmp_path / "last.ckpt").write_bytes((run / LAST).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"An earlier one beside it is sound: {tmp_path}/older.ckpt, of step 4\."):
        read_checkpoint(tmp_path / "last.ckpt")


def test_an_encoder_of_an_earlier_version_has_no_hash_and_is_read(run, tmp_path):
    import safetensors.torch
    from safetensors import safe_open

    with safe_open(run / "encoder.safetensors", framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "simclr_sha256"}
    weights = safetensors.torch.load_file(run / "encoder.safetensors")
    safetensors.torch.save_file(weights, tmp_path / "old.safetensors", metadata)
    assert_same(dict(weights_of(tmp_path / "old.safetensors")), dict(weights_of(run / "encoder.safetensors")))
    metadata["simclr"] = metadata["simclr"].replace('"small"', '"small" ')
    metadata["simclr_sha256"] = "0"
    safetensors.torch.save_file(weights, tmp_path / "new.safetensors", metadata)
    with pytest.raises(ValueError, match="not those that were written"):
        load_encoder(tmp_path / "new.safetensors")


LOOP = ("loops", "fit_loop")
# Where, and what is done there: None removes it.
DAMAGE = {
    **{f"no {name}": ((name,), None) for name in ("state_dict", "hyper_parameters", "loops", "optimizer_states")},
    **{f"no {name}": ((name,), None) for name in ("lr_schedulers", "callbacks", "epoch", "global_step")},
    **{f"no {name}": ((name,), None) for name in ("run", "method", "epoch_loss")},
    **{f"{name} a list": ((name,), []) for name in ("state_dict", "hyper_parameters", "loops", "run", "method")},
    **{f"{name} a text": ((name,), "x") for name in ("optimizer_states", "lr_schedulers", "epoch", "global_step")},
    **{f"{name} empty": ((name,), []) for name in ("optimizer_states", "lr_schedulers")},
    **{f"{name} empty": ((name,), {}) for name in ("state_dict", "hyper_parameters", "loops", "method")},
    **{f"no fit_loop {name}": ((*LOOP, name), None) for name in ("epoch_progress", "epoch_loop.batch_progress")},
    **{f"no fit_loop {name}": ((*LOOP, name), None) for name in ("epoch_loop.state_dict",)},
    "fit_loop empty": (LOOP, {}),
    "epochs not counted": ((*LOOP, "epoch_progress", "current", "processed"), None),
    "epochs a text": ((*LOOP, "epoch_progress", "current", "processed"), "1"),
    "epochs below none": ((*LOOP, "epoch_progress", "current", "ready"), -1),
    "no steps": ((*LOOP, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step"), None),
    "other steps": (("global_step",), 2),
    "momentum lost": (("optimizer_states", 0, "state"), {}),
    "momentum of one lost": (("optimizer_states", 0, "state", 3), None),
    "momentum of one empty": (("optimizer_states", 0, "state", 3), {}),
    "momentum of another shape": (("optimizer_states", 0, "state", 3), {"velocity": torch.ones(3, 1, 4, 1, 5)}),
    "momentum of no parameter": (("optimizer_states", 0, "state", 99), {"velocity": torch.ones(4)}),
    "momentum no tensor": (("optimizer_states", 0, "state", 3), {"velocity": "fast"}),
    "no groups": (("optimizer_states", 0, "param_groups"), None),
    "no learning rate": (("optimizer_states", 0, "param_groups", 0, "lr"), None),
    "no parameters": (("optimizer_states", 0, "param_groups", 0, "params"), None),
    "fewer parameters": (("optimizer_states", 0, "param_groups", 1, "params"), [1]),
    "no place in the schedule": (("lr_schedulers", 0, "last_epoch"), None),
    "a weight lost": (("state_dict", "encoder.conv1.weight"), None),
    "a weight of another shape": (("state_dict", "encoder.conv1.weight"), torch.ones(2, 2)),
    "a weight a number": (("state_dict", "encoder.conv1.weight"), 1.0),
    "a weight more": (("state_dict", "encoder.other"), torch.ones(2)),
    **{f"no {name}": (("hyper_parameters", name), None) for name in ("encoder", "image_size", "mean", "std", "seed")},
    **{f"{name} a dict": (("hyper_parameters", name), {}) for name in ("encoder", "image_size", "mean", "width")},
    **{f"no run {name}": (("run", name), None) for name in ("epochs", "steps_inside", "total_steps")},
    **{f"run {name} a text": (("run", name), "x") for name in ("epochs", "total_steps", "steps_per_epoch")},
    "no name": (("method", "name"), None),
    "no objective": (("method", "objective"), None),
}


def damage(content: dict, where: tuple, value: object) -> dict:
    content = copy.deepcopy(content)
    inside = content
    for key in where[:-1]:
        inside = inside[key]
    if value is None:
        del inside[where[-1]]
    else:
        inside[where[-1]] = value
    return content


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_part_that_is_missing_or_of_another_kind_is_refused_by_name(run, tmp_path, kind):
    content = torch.load(run / LAST, weights_only=True)
    where, value = DAMAGE[kind]
    torch.save(damage(content, where, value), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt|the checkpoint"):
        check_resume(
            read_checkpoint(tmp_path / "x.ckpt"), tiny_model(optimizer=content["hyper_parameters"]["optimizer"])
        )


def test_a_whole_checkpoint_is_fit_and_the_library_refuses_others_too(run, tmp_path):
    content = torch.load(run / LAST, weights_only=True)
    optimizer = content["hyper_parameters"]["optimizer"]
    assert read_checkpoint(run).unfit == []
    torch.save(damage(content, ("loops",), None), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be continued from, it is damaged: loops is missing"):
        fit(tmp_path, tiny_model(optimizer=optimizer), tiny_data(), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")


def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(flags({"run_dir": "run", "trainer.max_epochs": 1}))
    content = torch.load(Path("run") / LAST, weights_only=True)
    torch.save(damage(content, ("optimizer_states",), []), Path("run") / LAST)
    capsys.readouterr()
    assert run_and_code(["--ckpt_path", "run", "--trainer.max_epochs", "2"]) == BAD_INPUT
    [line] = capsys.readouterr().err.splitlines()
    assert "run/checkpoints/last.ckpt cannot be continued from, it is damaged: optimizer_states is empty" in line
