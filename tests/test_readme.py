"""What README and the guide show in Python runs as it stands there, only smaller, and says nothing unasked."""

import os
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision

import forked
from simclr import SimCLR
from simclr.checkpoint import save_encoder
from test_inputs import photograph

ROOT = Path(__file__).parents[1]
PAGES = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/using.md"))


def block(first: str, last: str) -> str:
    """The indented code of these pages from the line that begins so to the next that begins so, both included."""
    lines = PAGES.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"    {first}"))
    end = next(i for i in range(begin, len(lines)) if lines[i].strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def test_the_python_example_is_quiet_and_ends_in_the_encoder_it_trained(tmp_path):
    code = block("from pytorch_lightning import Trainer", "h = encoder(")
    for large, small in (
        ("batch_size=512", "batch_size=8"),
        ("image_size=64", "image_size=16"),
        ("max_epochs=200", "max_epochs=1"),
        ("resnet18", "resnet8"),
    ):
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "example.py").write_text(f"{code}\n    print(tuple(h.shape), encoder.transform)\n")
    (tmp_path / "photos").mkdir()
    for number in range(20):
        photograph(20, 24, seed=number).save(tmp_path / "photos" / f"{number}.png")
    photograph(50, 40).save(tmp_path / "photo.jpg")
    # That imports say nothing is for test_imports.py to see.
    done = forked.run(["example.py"], cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Epoch")]  # the progress bar
    assert len(said) == 1, said
    assert said[0].startswith("(1, 64) InputTransform(image_size=16")


@pytest.fixture
def trained(request, tmp_path, monkeypatch):
    """An encoder for images of the size that is asked for; in the working folder, its run as README names it."""
    model = SimCLR("resnet18", image_size=request.param)
    save_encoder(model, tmp_path / "encoder.pt")
    folder = tmp_path / "runs" / "photos_resnet18"
    folder.mkdir(parents=True)
    for file in tmp_path.glob("encoder.*"):
        file.rename(folder / file.name)
    photograph(300, 400).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return model.encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("trained", [32, 224], indirect=True)
def test_the_encoder_in_three_lines(trained):
    found = {}
    exec(block("import simclr", "h = encoder("), found)
    assert found["encoder"].transform == trained.transform
    # channels_last, as in training, sums in another order
    torch.testing.assert_close(found["h"], trained(trained.transform("photo.jpg")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("trained", "small"), [(224, False), (32, True)], indirect=["trained"])
@pytest.mark.parametrize("of", ["torchvision", "timm"])
def test_torchvision_and_timm_load_the_encoder_as_the_guide_says(trained, small, of):
    stem = block("network.conv1", "network.maxpool") if small else ""
    found = {"torch": torch, "torchvision": torchvision, "timm": pytest.importorskip("timm")}
    if of == "torchvision":
        build, load = block("network = torchvision", "network.load").rsplit("\n", 1)
    else:
        build, load = block("network = timm", "network = timm"), ""
        if small:
            build = build.split(", checkpoint_path")[0] + ")"
            load = block("network.load", "network.load")
    exec("\n".join((build, stem, load)), found)
    images = trained.transform("photo.jpg")
    torch.testing.assert_close(found["network"].eval()(images), trained(images), rtol=1e-4, atol=1e-5)
