"""What an encoder is fed, however an image comes, is what evaluation feeds it; the rest is refused in words."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder

from simclr import SimCLR, build_encoder
from simclr.checkpoint import load_encoder, save_encoder
from simclr.data import EvalLoader, ImageData
from simclr.eval import extract_features
from simclr.inputs import InputTransform, attach_transform, fit_to_size
from tiny import fit, tiny_data, tiny_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse detail and grain, nothing symmetric."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(
        (np.array(coarse) + generator.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def save_every_kind(folder: Path, size: int) -> None:
    """Files of this size, of others, and of every mode and orientation, in two class folders."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    native = photograph(size, size)
    for mode in ("RGB", "L", "LA", "RGBA", "P", "1"):
        native.convert(mode).save(folder / "a" / f"{mode}.png")
    native.convert("P").save(folder / "a" / "see-through.png", transparency=bytes([0, 128] * 8))
    Image.fromarray(np.arange(size * size, dtype=np.uint16).reshape(size, size) * 7).save(folder / "a" / "16bit.png")
    native.save(folder / "a" / "whole.webp", lossless=True)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        photograph(size, size + 9).save(folder / "b" / f"turned{orientation}.png", exif=exif)
        photograph(2 * size, 3 * size).save(folder / "b" / f"turned{orientation}.jpg", exif=exif, quality=95)
    for number, sides in enumerate(((size // 2, size // 3), (3 * size, size), (5 * size + 3, 4 * size + 1))):
        photograph(*sides).save(folder / "b" / f"other{number}.png")


def tiny_encoder(image_size: int, load_size: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder("resnet8", image_size=image_size, width=0.25).eval()
    attach_transform(encoder, InputTransform(image_size, MEAN, STD, load_size))
    return encoder


@pytest.mark.parametrize("come_as", ["PIL images", "paths"])
@pytest.mark.parametrize(("image_size", "load_size"), [(16, None), (16, 24), (80, None), (80, 80), (40, 20)])
def test_what_the_transform_prepares_has_the_features_that_evaluation_extracts(
    tmp_path, come_as, image_size, load_size
):
    save_every_kind(tmp_path, load_size or image_size)
    data = ImageData(train_dir=tmp_path, image_size=image_size, load_size=load_size, workers=0)
    data.setup()
    encoder = tiny_encoder(image_size, load_size)
    expected, _ = extract_features(encoder, EvalLoader(data.train, torch.arange(len(data.train)), 7, 0))
    paths = sorted(tmp_path.glob("*/*"), key=str)
    assert len(paths) == len(data.train) == 28
    with torch.no_grad():
        for row, path in zip(expected, paths, strict=True):
            h = encoder(encoder.transform(Image.open(path) if come_as == "PIL images" else path))
            torch.testing.assert_close(h[0], row, rtol=0, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}")
        whole = encoder(encoder.transform([str(path) for path in paths]))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)


def test_a_large_jpeg_is_read_reduced_from_a_file_and_in_full_from_pillow_and_both_are_near(tmp_path):
    photograph(400, 500).save(tmp_path / "a.jpg", quality=90)
    transform = InputTransform(16, (0, 0, 0), (1, 1, 1))
    difference = 255 * (transform(tmp_path / "a.jpg") - transform(Image.open(tmp_path / "a.jpg"))).abs()
    assert 0 < difference.mean() < 1
    assert difference.max() < 8


def test_an_image_of_the_right_size_is_only_normalised():
    image = photograph(16, 16)
    expected = (np.array(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    got = InputTransform(16, MEAN, STD)(image)
    assert (got.shape, got.dtype) == ((1, 3, 16, 16), torch.float32)
    torch.testing.assert_close(got[0], torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)


def test_other_sizes_are_what_pillow_resizes_and_crops():
    image = photograph(300, 200)
    square = image.crop((0, 50, 200, 250)).resize((110, 110), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(square.crop((7, 7, 103, 103)))).permute(2, 0, 1) / 255
    torch.testing.assert_close(InputTransform(96, (0, 0, 0), (1, 1, 1)).single(image), expected, rtol=0, atol=1.1 / 255)


def test_every_way_an_image_can_come_gives_the_same_and_a_list_may_mix_them(tmp_path):
    image, transform = photograph(30, 50), InputTransform(16, MEAN, STD)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    read_only = array.copy()
    read_only.flags.writeable = False
    ways = [image, tmp_path / "a.png", os.fspath(tmp_path / "a.png"), tensor, tensor.contiguous(), tensor[None], array]
    ways += [array[None], array[..., ::-1].copy()[..., ::-1], read_only, tv_tensors.Image(tensor)]
    expected = transform(image)
    for way in ways:
        got = transform(way)
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    assert torch.equal(transform(ways), expected.expand(len(ways), -1, -1, -1))
    other = photograph(16, 16, seed=1)
    batch = torch.stack([tensor[:, :30, :30], tensor[:, :30, 20:]])
    mixed = transform((other, batch, tensor / 255))
    assert torch.equal(mixed[0], transform.single(other))
    assert torch.equal(mixed[1:3], torch.cat([transform(one) for one in batch]))
    # Floats are resized without rounding to whole levels, as uint8 is in each of two directions.
    torch.testing.assert_close(mixed[3:], expected, rtol=0, atol=1 / 255 / min(STD))
    native = torch.from_numpy(np.array(other)).permute(2, 0, 1)
    assert torch.equal(transform(native / 255), transform(other))
    assert torch.equal(transform(native.double() / 255), transform(other))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 8, 8), 200.0), r"float images reach from 200 to 200: needed \[0, 1\]; divide them by 255\."),
        (torch.full((3, 8, 8), -0.5), r"from -0\.5 to -0\.5: needed \[0, 1\]; do not normalise them"),
        (torch.full((3, 8, 8), float("nan")), r"from nan to nan: needed \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"images are torch\.int64: needed uint8, or float in \[0, 1\]\."),
        (torch.zeros(8, 8, 3), r"a tensor is \(8, 8, 3\): needed \(3, H, W\) or .*Use \.movedim\(-1, -3\)\."),
        (torch.zeros(2, 8, 8, 3), r"Use \.movedim\(-1, -3\)\."),
        (torch.zeros(8, 8), r"\(8, 8\): .* by \.expand\(3, -1, -1\)\."),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\): .* by \.expand\(3, -1, -1\)\."),
        (torch.zeros(2, 1, 8, 8), r" by \.expand\(-1, 3, -1, -1\)\."),
        (torch.zeros(4, 8, 8), r"Leave alpha out: \[\.\.\., :3, :, :\]\."),
        (torch.zeros(5, 8, 8), r"a tensor is \(5, 8, 8\): needed .*, RGB\.$"),
        (torch.zeros(0, 3, 8, 8), r"a tensor is \(0, 3, 8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"an array is \(3, 8, 8\): needed \(H, W, 3\) or \(N, H, W, 3\), RGB\."),
        (np.zeros((8, 8, 3), dtype=np.int16), r"images are torch\.int16: needed uint8"),
        (Image.new("F", (8, 8)), "floating-point pixels, which have no known range"),
        (7, r"an image is a int: needed a PIL image, a path, a tensor"),
        ([], "an empty list: needed one image or more"),
        ("nowhere.png", r"cannot read 1 image file: nowhere\.png \(.*No such file"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_do(image, message):
    with pytest.raises(ValueError, match=message):
        InputTransform(8, MEAN, STD)(image)


def test_the_hints_of_refused_shapes_lead_to_images():
    transform = InputTransform(8, MEAN, STD)
    for image in (
        torch.zeros(8, 8, 3).movedim(-1, -3),
        torch.zeros(2, 8, 8, 3).movedim(-1, -3),
        torch.zeros(8, 8).expand(3, -1, -1),
        torch.zeros(1, 8, 8).expand(3, -1, -1),
        torch.zeros(2, 1, 8, 8).expand(-1, 3, -1, -1),
        torch.zeros(4, 8, 8)[..., :3, :, :],
    ):
        assert transform(image).shape[1:] == (3, 8, 8)


def test_a_transform_is_a_value_that_says_what_it_does():
    transform = InputTransform(224, MEAN, STD)
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform == InputTransform(224, list(MEAN), STD, 256)
    assert transform != InputTransform(224, MEAN, STD, 300)
    texts = {
        (224, None): "load_size=256, crop='central square, of 256 px the central 224', "
        "interpolation='bilinear to 256 px, antialiased'",
        (224, 300): "load_size=300, crop='central square, of 256 px the central 224', "
        "interpolation='bilinear to 300 px, then bicubic to 256, antialiased'",
        (32, None): "load_size=32, crop='central square', interpolation='bilinear to 32 px, antialiased'",
        (64, 256): "load_size=256, crop='central square', "
        "interpolation='bilinear to 256 px, then bicubic to 64, antialiased'",
        (96, 96): "load_size=96, crop='central square', interpolation='bilinear to 96 px, antialiased'",
    }
    for (image_size, load_size), text in texts.items():
        assert repr(InputTransform(image_size, MEAN, STD, load_size)) == (
            f"InputTransform(image_size={image_size}, {text}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))"
        )


def test_a_data_set_takes_single_images_and_its_loader_makes_the_batches(tmp_path):
    save_every_kind(tmp_path, 16)
    encoder = tiny_encoder(16)
    data_set = ImageFolder(tmp_path, loader=encoder.transform.single)  # it gives its loader a path
    prepared = [images for images, _ in DataLoader(data_set, batch_size=10, num_workers=1)]
    assert [len(batch) for batch in prepared] == [10, 10, 8]
    prepared = torch.cat(prepared)
    assert torch.equal(prepared, encoder.transform([path for path, _ in data_set.samples]))
    assert encoder(prepared).shape == (28, encoder.feature_dim)
    # Its own loader clips 16 bits and warns of palettes; what it opens well, the transform takes from it.
    own = ImageFolder(tmp_path, transform=encoder.transform.single)
    for i, (path, _) in enumerate(own.samples):
        if not path.endswith(("16bit.png", "see-through.png")):
            assert torch.equal(own[i][0], prepared[i]), path
    with pytest.raises(ValueError, match="2 images where one is needed"):
        encoder.transform.single(torch.zeros(2, 3, 8, 8))


def test_the_encoder_of_a_module_carries_its_transform_before_and_after_training(tmp_path):
    assert SimCLR("resnet8", image_size=80, mean=MEAN, std=STD).encoder.transform == InputTransform(80, MEAN, STD, 91)
    model = tiny_model()
    fit(tmp_path, model, tiny_data(load_size=20), max_epochs=1)
    assert model.encoder.transform == InputTransform(16, model.augment.mean, model.augment.std, 20)


def test_small_images_keep_their_border_and_large_ones_lose_an_eighth():
    def width_seen(source, image_size):  # how much of a horizontal ramp is left
        ramp = torch.linspace(0, 1, source).expand(1, 3, source, source)
        out = fit_to_size(ramp, image_size)
        assert out.shape == (1, 3, image_size, image_size)
        slope = (out[..., -3] - out[..., 2]).mean() / (image_size - 5)
        return float(slope) * image_size

    assert width_seen(512, 224) == pytest.approx(0.875, abs=0.01)
    assert width_seen(100, 224) == pytest.approx(0.875, abs=0.02)
    assert width_seen(224, 64) == pytest.approx(1, abs=0.01)
    assert fit_to_size(torch.rand(1, 3, 40, 60), 32).shape == (1, 3, 32, 32)


def test_shrinking_is_antialiased_and_stays_in_range():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert fit_to_size(noise, 16).std() < 0.4 * noise.std()  # sixteen pixels averaged; picked ones keep their spread
    step = (torch.arange(20) >= 10).float().expand(1, 3, 20, 20)
    out = fit_to_size(step, 32)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_encoder_keeps_which_value_of_16_bits_is_white(tmp_path, kind):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    transform = InputTransform(8, (0.0,) * 3, (1.0,) * 3, sixteen_bit_max=4095)
    wanted = torch.from_numpy((values >> 4).astype(np.float32)).expand(1, 3, 8, 8) / 255
    for image in (tmp_path / f"a.{kind}", Image.fromarray(values)):
        assert torch.equal(transform(image), wanted)
    assert "sixteen_bit_max=4095" in repr(transform)
    assert "sixteen" not in repr(InputTransform(8, (0.0,) * 3, (1.0,) * 3))


def test_a_saved_encoder_has_the_white_of_the_images_it_was_trained_on(tmp_path):
    for i in range(16):
        Image.fromarray(np.full((16, 16), 200 * i, np.uint16)).save(tmp_path / f"{i}.png")
    data = ImageData(train_dir=str(tmp_path), image_size=16, batch_size=8, sixteen_bit_max=4095, workers=0)
    trainer = fit(tmp_path, tiny_model(batch_size=8), data, max_epochs=1)
    save_encoder(trainer.lightning_module, tmp_path / "encoder.pt")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    assert loaded.transform.sixteen_bit_max == trainer.lightning_module.encoder.transform.sixteen_bit_max == 4095
