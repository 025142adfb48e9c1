"""simclr.pyramid: maps of the stages are those that torchvision takes out, and a detector learns on them."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models._utils import IntermediateLayerGetter

from simclr import build_encoder, load_encoder
from simclr.module import SimCLR
from simclr.pyramid import FeaturePyramid
from tiny import fit, tiny_data

PAGE = Path(__file__).parents[1] / "docs" / "detection.md"


@pytest.mark.parametrize(
    ("name", "stem", "strides"),
    [
        ("resnet18", "imagenet", (4, 8, 16, 32)),
        ("resnet50", "small", (1, 2, 4, 8)),
        ("resnet8", "small_stride2", (2, 4, 8)),
    ],
)
def test_maps_are_the_outputs_of_the_stages(name, stem, strides):
    encoder = build_encoder(name, stem=stem, width=0.25).eval()
    pyramid = FeaturePyramid(encoder).eval()
    layers = {f"layer{i + 1}": f"c{i + 2}" for i in range(len(strides))}
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, wanted = pyramid(images), IntermediateLayerGetter(encoder, layers)(images)
    assert list(maps) == list(wanted) == list(pyramid.channels)
    for name, stride in zip(maps, strides, strict=True):
        assert torch.equal(maps[name], wanted[name])
        assert maps[name].shape == (2, pyramid.channels[name], 64 // stride, 96 // stride)
        assert pyramid.strides[name] == stride
    assert torch.equal(list(maps.values())[-1].mean((2, 3)), encoder(images).detach())


def test_other_networks_have_none(tmp_path):
    with pytest.raises(ValueError, match="not of a MobileNetV2"):
        FeaturePyramid(build_encoder("mobilenet_v2"))
    with pytest.raises(ValueError, match="features=maps is none of mean, pyramid"):
        load_encoder(tmp_path, features="maps")


@pytest.mark.slow
def test_the_detector_of_the_page_learns(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = SimCLR("resnet18", image_size=96, width=0.25, batch_size=16, warmup_epochs=0)
    fit(tmp_path, model, tiny_data(image_size=96), max_epochs=1).save_checkpoint(
        tmp_path / "runs" / "photos_resnet18" / "checkpoints" / "last.ckpt"
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    detector, draw = names["detector"].train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for _ in range(60):
        images, targets = [], []
        for _ in range(4):
            x, y, w, h = (
                int(torch.randint(*bounds, (1,), generator=draw)) for bounds in ((5, 60), (5, 60), (25, 60), (25, 60))
            )
            image = torch.rand(3, 128, 128, generator=draw) * 0.3
            image[:, y : y + h, x : x + w] += 0.7
            images.append(image)
            targets.append({"boxes": torch.tensor([[x, y, x + w, y + h]]).float(), "labels": torch.tensor([1])})
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10]), losses
