"""Images that are not RGB, and of 16 bits: from files to views, encoders, exports, and what is refused."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from safetensors.torch import save_file

from simclr import SimCLRAugmentation, build_encoder, load_encoder
from simclr.checkpoint import read_checkpoint
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.data import ImageData, MemoryImages, decode, kinds
from simclr.data.decode import ReadingRules, decode_square, own_of, read_images, to_square
from simclr.encoders import RESNETS
from simclr.eval.protocol import OF_EVAL
from simclr.eval.suite import YARDSTICKS
from simclr.export.card import read_card
from simclr.export.counterparts import timm_counterpart, torchvision_counterpart
from simclr.export.formats import export_encoder
from simclr.inputs import InputTransform, for_display
from simclr.module import SimCLR
from simclr.starting_weights import read_starting_weights
from simclr.training.method import METHODS
from simclr.views import compiled, kernels
from test_augment import EVERYTHING
from tiny import flags, tiny_model

WHITE = 4095
BANDS = np.random.default_rng(0).integers(0, WHITE + 1, (5, 12, 16)).astype(np.uint16)
BYTES = (BANDS >> 4).astype(np.uint8)
GRAY = Image.fromarray(BYTES[0])


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


def file_of(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def last(values: np.ndarray) -> np.ndarray:
    """The channels last."""
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def pil_pages() -> bytes:
    first, *others = map(Image.fromarray, BYTES)
    return file_of(first, "TIFF", save_all=True, append_images=others)


# Files: what stands in them, and the channels that it is.

READ = {
    "bands": (tiff(last(BANDS), planarconfig="contig"), BANDS),
    "bands apart": (tiff(BANDS, planarconfig="separate"), BANDS),
    "pages": (tiff(BANDS), BANDS),
    "pages of Pillow": (pil_pages(), BYTES),
    "ImageJ's channels": (tiff(BANDS, imagej=True, metadata={"axes": "CYX"}, photometric=None), BANDS),
    "OME's channels": (tiff(BANDS, ome=True, metadata={"axes": "CYX"}), BANDS),
    "BigTIFF": (tiff(BANDS, bigtiff=True), BANDS),
    "big endian": (tiff(BANDS, byteorder=">"), BANDS),
    "LZW": (tiff(BANDS, compression="lzw", predictor=True), BANDS),
    "deflate": (tiff(last(BYTES), planarconfig="contig", compression="zlib"), BYTES),
    "RGB of 16 bits": (tiff(last(BANDS[:3]), photometric="rgb"), BANDS[:3]),
    "RGB and infrared": (tiff(last(BYTES[:4]), photometric="rgb", extrasamples=["unspecified"]), BYTES[:4]),
    "RGBA, alpha and all": (file_of(Image.fromarray(last(BYTES[:4]), "RGBA"), "PNG"), BYTES[:4]),
    "RGB without its alpha": (tiff(last(BANDS[:4]), photometric="rgb", extrasamples=["unassalpha"]), BANDS[:3]),
    "gray TIFF": (tiff(BANDS[0]), BANDS[:1]),
    "gray PNG": (file_of(Image.fromarray(BANDS[0]), "PNG"), BANDS[:1]),
    "gray without its alpha": (file_of(GRAY.convert("LA"), "PNG"), BYTES[:1]),
    "gray WebP is of colours": (file_of(GRAY.convert("RGB"), "WEBP", lossless=True), np.stack([BYTES[0]] * 3)),
    "a palette of grays": (file_of(GRAY.convert("P"), "PNG"), BYTES[:1]),
    "gray GIF": (file_of(GRAY, "GIF"), BYTES[:1]),
    "turned": (tiff(BANDS, extratags=[(274, "H", 1, 6, True)]), np.rot90(BANDS, -1, (1, 2))),
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", READ)
def test_a_file_gives_its_own_channels_in_the_bits_that_are_asked_for(name, bits):
    content, values = READ[name]
    image = decode.decode(content, ReadingRules(channels=len(values), bits=bits))
    shift = {(2, 8): lambda v: v >> 8, (1, 16): lambda v: v.astype(np.uint32) * 257}
    wanted = shift.get((values.dtype.itemsize, bits), lambda v: v)(values)
    assert image.dtype == (torch.uint8 if bits == 8 else torch.uint16)
    assert np.array_equal(image.numpy(), wanted)
    assert own_of(content) == (len(values) - (name == "RGBA, alpha and all"), 8 * values.dtype.itemsize)


def test_a_gray_jpeg_is_one_channel_also_where_it_is_read_at_an_eighth_of_its_size():
    y, x = np.mgrid[:640, :512]
    gray = Image.fromarray((127 + 100 * np.sin(x / 60) * np.cos(y / 80)).astype(np.uint8))
    content = file_of(gray, "JPEG", quality=95)
    whole = decode.decode(content, ReadingRules(channels=1))
    assert torch.equal(decode.decode(content), whole.expand(3, -1, -1))
    reduced = decode_square(content, 32, ReadingRules(channels=1))
    assert reduced.shape == (1, 32, 32)
    assert (reduced.int() - to_square(whole, 32).int()).abs().float().mean() < 1


@pytest.mark.parametrize("white", [1, 255, 4095, 10_000, 65_535])
def test_16_bits_are_kept_and_white_is_the_value_that_is_named(white):
    values = np.linspace(0, white, 600).astype(np.uint16).reshape(20, 30)
    rules = ReadingRules(channels=1, bits=16, sixteen_bit_max=white)
    held = decode.decode(file_of(Image.fromarray(values), "PNG"), rules)
    assert held[0].tolist() == [[math.floor(65_535 * int(v) / white + 0.5) for v in row] for row in values]
    assert torch.equal(held, decode.pixels_of(Image.fromarray(values), rules))
    if white > 1:
        fewer = ReadingRules(channels=1, bits=16, sixteen_bit_max=white - 1)
        with pytest.raises(ValueError, match=rf"up to {white}, above data\.sixteen_bit_max={white - 1}: raise it"):
            decode.decode(file_of(Image.fromarray(values), "PNG"), fewer)


def test_16_bits_are_resized_as_their_values_are_to_half_a_step():
    values = torch.from_numpy(BANDS[:, :, :12].astype(np.float64)) * 16
    held = to_square(values.to(torch.uint16), 5)
    wanted = torch.nn.functional.interpolate(values[None], (5, 5), mode="bilinear", antialias=True)[0]
    assert (held.double() - wanted).abs().max() <= 0.51


OTHER = "a TIFF of 5 pages, and so of 5 channels where data.channels={}: convert it, or train on such images with "
OTHER += "--data.channels 5"
REFUSED = {
    "pages for gray": (tiff(BANDS), 1, 8, OTHER.format(1)),
    "pages for others": (tiff(BANDS), 4, 8, OTHER.format(4)),
    "pages for 16-bit RGB": (tiff(BANDS), 3, 16, OTHER.format(3)),
    "bands for RGB": (tiff(last(BANDS), planarconfig="contig"), 3, 8, "convert it to 8-bit RGB or gray, or "
                      "train on its bands: --data.channels 5"),
    "colours for gray": (file_of(GRAY.convert("RGB"), "PNG"), 1, 8, "an image of 3 channels where data.channels=1: "
                         "convert it to gray, or train on such images with --data.channels 3"),
    "gray for five": (file_of(GRAY, "JPEG"), 5, 8, "an image of 1 channel where data.channels=5"),
    "alpha is no channel": (file_of(GRAY.convert("RGBA"), "PNG"), 5, 8, "of 4 channels, the last of them alpha, where"),
    "depth": (tiff(BANDS, imagej=True, metadata={"axes": "ZYX"}, photometric=None), 5, 8, "a TIFF of 5 images along "
              "depth, of which it is not known which is meant: save one of them"),
    "depth and channels": (tiff(np.stack([BANDS] * 2), ome=True, metadata={"axes": "ZCYX"}), 5, 8, "a TIFF of 2 images "
                           "along depth"),
    "time": (tiff(BANDS, ome=True, metadata={"axes": "TYX"}), 5, 8, "a TIFF of 5 images along time"),
    "pages of colours": (tiff(np.stack([last(BYTES[:3])] * 4), photometric="rgb"), 3, 16, "a TIFF of 4 images of "
                         "several channels, where one is needed"),
    "floats": (tiff(BANDS.astype(np.float32)), 5, 16, "floating-point pixels, which have no known range"),
    "signed": (tiff(BANDS.astype(np.int16) - 3000), 5, 16, "integers from -29"),
    "too deep": (tiff(BANDS.astype(np.uint32) * 100), 5, 16, "beyond 16 bits without a sign"),
    "cut off": (tiff(BANDS)[:900], 5, 8, "damaged TIFF: "),
    "bad pixels": (tiff(BANDS, compression="zlib")[:1500], 5, 8, "damaged TIFF: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_other_channels_is_refused_by_its_name(name, tmp_path):
    content, channels, bits, words = REFUSED[name]
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read 1 image file: \S+a\.tif \(.*" + re.escape(words)) as refused:
        read_images([tmp_path / "a.tif"], 8, rules=ReadingRules(channels=channels, bits=bits))
    assert ("Repair" in str(refused.value)) == words.startswith("damaged")


def test_too_many_pixels_are_refused_before_a_tiff_is_decoded(monkeypatch):
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"16 x 12 pixels are more than data\.max_pixels=100"):
        decode.decode(tiff(BANDS), ReadingRules(max_pixels=100, channels=5))
    with pytest.raises(ValueError, match="5 channels where"):
        decode.decode(tiff(BANDS), ReadingRules(channels=4))


def test_without_the_extra_a_tiff_of_bands_is_refused_with_the_line_that_helps(monkeypatch):
    for module in (kinds, decode.tiff):
        monkeypatch.setattr(module, "has_tifffile", lambda: False)
    with pytest.raises(ValueError, match=re.escape("is read after pip install 'simclr[tiff]'")):
        decode.decode(tiff(BANDS), ReadingRules(channels=5))
    assert np.array_equal(decode.decode(tiff(BANDS[0]), ReadingRules(channels=1, bits=16)).numpy(), BANDS[:1])


# Sets of images


def write(folder: Path, channels: int, count: int = 6, side: int = 20) -> None:
    """Images of two classes, 12 bits in 16, one bright and one dark: PNGs, or TIFFs of so many pages."""
    draw = np.random.default_rng(channels)
    for i in range(2 * count):
        values = (draw.integers(0, WHITE // 2, (channels, side, side)) + i % 2 * WHITE // 2).astype(np.uint16)
        path = folder / "ab"[i % 2] / f"{i}.{'png' if channels == 1 else 'tif'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if channels == 1:
            Image.fromarray(values[0]).save(path)
        else:
            tifffile.imwrite(path, values, photometric="minisblack")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("where", ["memory", "cache", "files"])
def test_sets_hold_16_bits_where_the_folder_has_some(channels, where, tmp_path):
    write(tmp_path / "images", channels)
    small = {"batch_size": 4, "image_size": 8, "workers": 0, "channels": channels, "holdout": 0.5}
    small |= {"cache": {"cache_dir": str(tmp_path / "cache")}, "files": {"memory_limit_gb": 0.0}, "memory": {}}[where]
    data = ImageData(train_dir=str(tmp_path / "images"), **small)
    data.setup()
    assert (data.bits, data.hparams.bits, data.rules.pixel_bytes) == (16, 16, 2 * channels)
    wanted = read_images(data.train.paths, 8, rules=ReadingRules(channels=channels, bits=16))
    batches = list(data.train_dataloader())
    for images, index in (*batches, *data.train_dataloader()):
        assert images.dtype == torch.uint16
        assert torch.equal(images, wanted[index])
    again = ImageData(train_dir=str(tmp_path / "images"), **{**small, "bits": 8})
    again.setup()
    assert again.train.images(torch.arange(3)).dtype == torch.uint8
    assert isinstance(data.train, MemoryImages) == (where != "files")


def test_a_worker_hands_over_16_bits_in_shared_memory(tmp_path, monkeypatch):
    write(tmp_path, 5)
    paths, rules = sorted(tmp_path.rglob("*.tif")), ReadingRules(channels=5, bits=16)
    wanted = read_images(paths, 8, rules=rules)
    monkeypatch.setattr(decode, "get_worker_info", lambda: SimpleNamespace(id=0))
    handed = read_images(paths, 8, rules=rules)
    assert handed.is_shared()
    assert handed.untyped_storage().nbytes() == wanted.nbytes
    assert torch.equal(handed, wanted)


def test_images_of_8_bits_are_held_in_8(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        GRAY.save(tmp_path / name / "x.png")
    data = ImageData(train_dir=str(tmp_path), channels=1, batch_size=2, image_size=8)
    data.setup()
    assert (data.bits, data.train.pixels.dtype, data.train.pixels.shape[1]) == (8, torch.uint8, 1)


# Views


def pictures(channels: int, count: int = 24, height: int = 20, width: int = 26) -> torch.Tensor:
    draw = torch.Generator().manual_seed(channels)
    return torch.randint(0, 2**16, (count, channels, height, width), generator=draw).to(torch.uint16)


def settings_for(channels: int) -> dict:
    """Everything that images of so many channels can have done to them."""
    whole = {**EVERYTHING, "channels": channels, "mean": (0.3,) * channels, "std": (0.5,) * channels}
    return {name: value for name, value in whole.items() if channels == 1 or not name.startswith("solarize")}


def test_brightness_and_contrast_of_gray_are_torchvisions():
    images, factors = pictures(1).float() / 65_535, torch.linspace(0, 1.8, 24)
    for ours, theirs in (
        (kernels.adjust_brightness, tv.adjust_brightness),
        (kernels.adjust_contrast, tv.adjust_contrast),
    ):
        wanted = torch.stack([theirs(x, f.item()) for x, f in zip(images, factors, strict=True)])
        torch.testing.assert_close(ours(images, factors.view(-1, 1, 1, 1)), wanted, atol=1e-6, rtol=0)


def test_contrast_of_channels_is_about_the_mean_of_all_of_them():
    image = pictures(5, 1, 3, 4).double() / 65_535
    mean = sum(float(v) for v in image.flatten()) / image.numel()
    wanted = [min(1.0, max(0.0, mean + 1.7 * (float(v) - mean))) for v in image.flatten()]
    found = kernels.adjust_contrast(image.float(), torch.full((1, 1, 1, 1), 1.7))
    torch.testing.assert_close(found.flatten().double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_compiled_views_agree_with_kornias_pipeline(channels, monkeypatch):
    monkeypatch.setattr(compiled, "compile_once", lambda function: function)
    pipeline, chain = (SimCLRAugmentation(16, **settings_for(channels), compile_views=on) for on in (False, True))
    images, index = pictures(channels), torch.arange(24)
    for view in (0, 1):
        expected = pipeline.view(images, index, 3, 7, view)
        assert expected.shape == (24, channels, 16, 16)
        close = {"atol": 1e-4, "rtol": 0}  # 5e-5, as for RGB, divided by the standard deviation
        torch.testing.assert_close(chain.view(images, index, 3, 7, view), expected, **close)
        assert torch.equal(pipeline.view(images.float() / 65_535, index, 3, 7, view), expected)
    for plain in (True, False):  # normalised in one pass, or after what follows the colours
        only = {"blur_prob": 0.5} if plain else {}
        usual = {
            "channels": channels,
            "mean": (0.1,) * channels,
            "std": (0.5,) * channels,
            "noise_prob": 0.0 + (not plain),
        }
        a, b = (SimCLRAugmentation(16, **usual, **only, compile_views=on).view(images, index) for on in (False, True))
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


def test_gray_views_are_those_of_gray_in_three_channels_but_for_the_rounding_of_luma():
    images, index = pictures(1), torch.arange(24)
    off = {"gray_prob": 0.0, "sobel_prob": 0.5, "blur_prob": 0.5, "cutout_prob": 0.5, "rotation_prob": 0.5}
    gray = SimCLRAugmentation(16, channels=1, **off).view(images, index)
    colours = SimCLRAugmentation(16, **off).view(images.expand(-1, 3, -1, -1), index)
    # Luma's weights sum to .9999, and saturation and hue leave gray as it is up to that.
    torch.testing.assert_close(gray.expand(-1, 3, -1, -1), colours, atol=2e-3, rtol=0)


def test_what_happens_to_an_image_does_not_depend_on_its_channels_but_for_its_colours():
    tables = [
        SimCLRAugmentation(16, **EVERYTHING, channels=channels).draw(torch.arange(99), 20, 26) for channels in (3, 1)
    ]
    same = {name for name in tables[0] if torch.equal(tables[0][name], tables[1][name])}
    assert set(tables[0]) - same == {"gray", "saturation", "hue"}
    assert not tables[1]["gray"].any()
    assert (tables[1]["saturation"] == 1).all()
    assert (tables[1]["hue"] == 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": 0}, "channels=0 is not 1 or more."),
        ({"channels": 5, "solarize_prob": 0.2}, "of 5 channels it is not known what they mean. Leave it out."),
        ({"channels": 5, "mean": (0.5,) * 3}, "mean=(0.5, 0.5, 0.5) does not have one number for each of 5 channels."),
        ({"channels": 1, "std": (0.5,) * 3}, "does not have one positive number for each of 1 channel."),
    ],
)
def test_what_the_channels_cannot_have_is_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SimCLRAugmentation(16, **settings)
    with pytest.raises(ValueError, match=re.escape("images of shape (1, 3, 8, 8) are not (N, 5, H, W).")):
        SimCLRAugmentation(16, channels=5).view(torch.zeros(1, 3, 8, 8), torch.arange(1))


def test_byol_leaves_solarising_out_where_it_means_nothing():
    from simclr.byol import BYOL

    small = {"encoder": "resnet8", "image_size": 16, "width": 0.25, "projection_dim": 16}
    probs = {channels: BYOL(**small, channels=channels).augment.probs["solarize"] for channels in (1, 3, 5)}
    assert probs == {1: (0.0, 0.2), 3: (0.0, 0.2), 5: (0.0,)}


# Encoders and the weights that they begin with


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(
    "name",
    ["resnet8", "mobilenet_v3_small", "squeezenet1_1", "edgenext_xx_small"],
)
def test_a_first_convolution_takes_the_channels(name, channels):
    torch.manual_seed(0)
    size = 32
    encoder = build_encoder(name, image_size=size, channels=channels).eval()
    torch.manual_seed(0)
    usual = build_encoder(name, image_size=size)
    shapes = {key: value.shape for key, value in encoder.state_dict().items()}
    differ = [key for key, value in usual.state_dict().items() if shapes.pop(key) != value.shape]
    assert not shapes
    assert len(differ) == 1
    first, theirs = encoder.state_dict()[differ[0]], usual.state_dict()[differ[0]]
    assert first.shape[1] == channels
    if name not in RESNETS and name != "edgenext_xx_small":  # others have an initialisation of their own
        assert 0.8 < first.std() * math.sqrt(channels / 3) / theirs.std() < 1.25
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, encoder.feature_dim)


def test_channels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"channels=0 must be at least 1\."):
        build_encoder("resnet8", channels=0)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_weights_of_rgb_answer_to_alike_channels_as_they_did_to_gray(name, channels, tmp_path):
    torch.manual_seed(1)
    rgb, encoder = (
        build_encoder(name, image_size=32).eval(),
        build_encoder(name, image_size=32, channels=channels).eval(),
    )
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    settings = {"encoder": name, "image_size": 32, "stem": "auto", "channels": channels}
    found = read_starting_weights(str(tmp_path / "rgb.pth"), encoder, settings)
    encoder.load_state_dict(found.weights)
    gray = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        wanted, answer = rgb(gray.expand(-1, 3, -1, -1)), encoder(gray.expand(-1, channels, -1, -1))
    torch.testing.assert_close(answer, wanted, atol=1e-4, rtol=1e-4)
    assert "adapted" in found.text
    assert found.record["adapted"] == found.adapted
    how = "the sum over" if channels == 1 else "for each of 5 channels 3/5 of the mean over"
    assert found.adapted.endswith(f"adapted: {how} red, green and blue")


def test_adapted_weights_expect_the_mean_of_their_normalisation(tmp_path):
    fit_into = tiny_model(channels=5, mean=[0.5] * 5, std=[0.25] * 5)
    settings = fit_into.hparams
    save_file({k: v.contiguous() for k, v in tiny_model().encoder.state_dict().items()}, tmp_path / "rgb.safetensors")
    found = read_starting_weights(str(tmp_path / "rgb.safetensors"), fit_into.encoder, settings)
    object.__setattr__(found, "fed", {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]})
    assert found.fed_otherwise(settings).endswith(
        "--model.mean '[0.5, 0.5, 0.5, 0.5, 0.5]' --model.std '[0.2, 0.2, 0.2, 0.2, 0.2]'"
    )


# What an encoder is fed


def values(channels: int) -> torch.Tensor:
    return torch.from_numpy(BANDS[:channels, :12, :12].copy())


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("bits", [8, 16])
def test_files_pictures_arrays_and_tensors_are_prepared_alike(channels, bits, tmp_path):
    square = values(channels)
    transform = InputTransform(8, (0.4,) * channels, (0.2,) * channels, 12, WHITE, bits)
    array = square.numpy()
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, array if channels > 1 else array[0], photometric="minisblack")
    wanted = transform(str(path))
    assert wanted.shape == (1, channels, 8, 8)
    unit = square.double() / WHITE if bits == 16 else (square.int() * 256 // 4096).double() / 255
    pixels = torch.nn.functional.interpolate(unit[None], (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(wanted.double(), (pixels - 0.4) / 0.2, atol=1e-4, rtol=0)  # a 16-bit step, times five
    given = [square, square[None], array, np.moveaxis(array, 0, -1), array[None], np.moveaxis(array[None], 1, -1)]
    given += [square[0], array[0], Image.fromarray(array[0])] if channels == 1 else []
    for one in given:
        assert torch.equal(transform(one), wanted)
    batch = torch.cat((square, square.flip(1))) if channels == 1 else torch.stack((square, square.flip(1)))
    assert torch.equal(transform(batch)[:1], wanted)
    assert len(transform(batch.numpy())) == 2
    held = read_images([path], 12, rules=transform.rules)
    assert torch.equal(transform.of_held(held), wanted)


@pytest.mark.parametrize(
    ("channels", "given", "words"),
    [
        (
            1,
            torch.zeros(2, 3, 8, 8),
            "a tensor is (2, 3, 8, 8): needed (1, H, W) or (N, 1, H, W) or, being gray, (H, W)",
        ),
        (5, torch.zeros(8, 8, 5), "a tensor is (8, 8, 5): needed (5, H, W) or (N, 5, H, W)."),
        (5, np.zeros((5, 8, 5), np.uint8), "Here both may be meant: make it a tensor, channels first."),
        (5, np.zeros((8, 8), np.uint8), "an array is (8, 8): needed (5, H, W) or (N, 5, H, W); an array may have"),
        (5, Image.new("RGB", (8, 8)), "an image of 3 channels where data.channels=5"),
        (1, Image.new("RGB", (8, 8)), "an image of 3 channels where data.channels=1: convert it to gray"),
        (5, 7, "an image is a int: needed a PIL image, a path, a tensor (5, H, W)"),
        (1, torch.full((1, 8, 8), 7.0), "float images reach from 7 to 7: needed [0, 1]"),
    ],
)
def test_what_is_no_image_of_these_channels_is_refused(channels, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        InputTransform(8, (0.5,) * channels, (0.25,) * channels)(given)


def test_what_is_shown_of_channels():
    ten = torch.arange(10, dtype=torch.uint8).view(10, 1, 1)
    assert for_display(ten[:1])[:, 0, 0].tolist() == [0, 0, 0]
    assert for_display(ten[1:3])[:, 0, 0].tolist() == [1, 2, 0]
    assert for_display(ten[4:])[:, 0, 0].tolist() == [4, 5, 6]
    assert for_display(torch.tensor([0, 257, 65_535]).to(torch.uint16).view(3, 1, 1))[:, 0, 0].tolist() == [0, 1, 255]
    assert for_display(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))[:, 0, 0].tolist() == [0, 128, 255]


# Exports


@pytest.mark.parametrize(
    ("encoder", "stem", "counterpart"),
    [
        ("resnet18", "small", timm_counterpart),
        ("resnet18", "imagenet", torchvision_counterpart),
        ("mobilenet_v3_small", "auto", torchvision_counterpart),
    ],
)
def test_other_libraries_have_a_network_for_the_channels(encoder, stem, counterpart):
    ours = build_encoder(encoder, stem=stem, channels=5).eval()
    theirs = counterpart({"encoder": encoder, "image_size": 32, "stem": stem, "channels": 5})
    theirs.network.load_state_dict(ours.state_dict())
    images, names = torch.rand(2, 5, 32, 32), {}
    exec("\n".join(theirs.lines), names)  # as a card says it
    names["network"].load_state_dict(ours.state_dict())
    with torch.no_grad():
        wanted = ours(images)
        assert torch.equal(theirs.network(images).flatten(1), wanted)
        assert torch.equal(names["network"].eval()(images).flatten(1), wanted)


@pytest.fixture(scope="module")
def gray_run(tmp_path_factory):
    """A checkpoint of a model for gray images of 8 bits, of a source of one's own."""
    folder = tmp_path_factory.mktemp("runs") / "gray"
    from simclr.checkpoint import write_checkpoint
    from simclr.training.method import record_of

    model = tiny_model(channels=1)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0, "global_step": 1}
    write_checkpoint(folder / "checkpoints" / "last.ckpt", {**content, "method": record_of(model, model.hparams)})
    return folder


def test_a_graph_with_its_preprocessing_takes_bytes_of_one_channel(gray_run, tmp_path):
    done = export_encoder(gray_run, "torch-export", tmp_path / "out", preprocessing="inside")
    head, graph, encoder = read_card(done.card), load_encoder(done.file), load_encoder(gray_run)
    assert (head["input"]["shape"], head["input"]["channels"]) == ("(N, 1, H, W), any H and W", 1)
    assert head["input"]["values"] == "uint8, gray"
    picture = Image.fromarray(BYTES[0])
    with torch.no_grad():
        wanted = encoder(encoder.transform(picture))
        torch.testing.assert_close(graph(torch.from_numpy(BYTES[None, :1])), wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(graph(graph.transform(picture)), wanted, atol=1e-3, rtol=1e-3)


# Whole runs


def run(*typed: object) -> None:
    main([str(word) for word in typed])


@pytest.mark.usefixtures("few_lambdas")
@pytest.mark.parametrize("channels", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_whole_run_from_a_folder_to_an_encoder_that_is_used(channels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("images"), channels)
    write(Path("test"), channels, 3)
    own = {
        "data.train_dir": "images",
        "data.test_dir": "test",
        "data.channels": channels,
        "data.sixteen_bit_max": WHITE,
    }
    own |= {"run_dir": "run", "trainer.max_epochs": 1, "data.batch_size": 6, "dashboard.every_n_epochs": channels // 5}
    run("train", *(flag for flag in flags(own) if "shapes" not in flag))
    said = " ".join(capsys.readouterr().out.split())
    many = "gray" if channels == 1 else "5 channels"
    assert f"12 images ({many}, 16 bits), 2 classes" in said
    assert said.count(f"images of {many} have no colours") == 1
    run("linear-eval", "run")
    record = json.loads(Path("run/linear_eval.json").read_text())
    assert record["data"]["settings"]["channels"] == channels
    assert record["data"]["settings"]["bits"] == 16
    run("report", "run")
    page = Path("run/report.html").read_text()
    assert f"{'1 channel' if channels == 1 else '5 channels'}, 16 bits, 4095 white" in page
    format = "safetensors" if channels == 1 else "onnx"
    run("export", "run", "--format", format)
    head = read_card(Path("run/export", format, "card.md"))
    assert (head["input"]["channels"], head["input"]["bits"], head["input"]["sixteen_bit_max"]) == (channels, 16, WHITE)
    run("embed", "test", "--encoder", "run", "--out", "features")
    encoder, graph = load_encoder("run"), load_encoder(f"run/export/{format}")
    paths = [Path("test", name) for name in Path("features/paths.txt").read_text().splitlines()]
    assert (encoder.transform.channels, encoder.transform.bits, encoder.transform.sixteen_bit_max) == (
        channels,
        16,
        WHITE,
    )
    rows = torch.from_numpy(np.load("features/features.npy"))
    with torch.no_grad():
        wanted = encoder(encoder.transform(paths))
        torch.testing.assert_close(graph(graph.transform(paths)), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)  # in another memory format
    run("search", paths[0], "--in", "features", "--k", 2)
    with Image.open("features/search.png") as sheet, Image.open("run/views.png") as grid:
        assert sheet.mode == "RGB"
        views = np.asarray(grid)
    assert views.shape[2] == 3
    if channels == 1:  # all that is drawn is gray
        assert (views == views[..., :1]).all()
    run("train", "--ckpt_path", "run", "--run_dir", "longer", "--trainer.max_epochs", 2)
    assert read_checkpoint("longer").epochs == 2
    _refused(channels, capsys)


def _refused(channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run of these channels is not."""
    other, kind = 6 - channels, "1 channel" if channels == 1 else "5 channels"
    tiny = flags({"data.train_dir": "images", "data.batch_size": 6, "data.channels": other})
    begin = f"train {' '.join(flag for flag in tiny if 'shapes' not in flag)}"
    Image.new("RGB", (20, 20)).save("colours.png")
    typed = {
        f"{begin} --model.weights run": f"/run is of images of {kind}, where data.channels={other}. Give "
        f"--data.channels {channels}, or weights of RGB, which can be adapted.",
        begin: f"of {kind} where data.channels={other}: convert it, or train on such images with --data.channels "
        f"{channels}",
        f"train --data.channels {other} --ckpt_path run": f"channels={other} but the checkpoint has {channels}",
        "train --data.bits 8 --ckpt_path run": "data.bits=8 but the checkpoint has 16",
        "linear-eval run --data.channels 3": "data.channels",
        "export run --format torch-export --preprocessing inside": "preprocessing=inside takes bytes, and this",
        "search colours.png --in features": f"an image of 3 channels where data.channels={channels}",
    }
    for line, words in typed.items():
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        found = capsys.readouterr().err
        assert (stopped.value.code, found.count("\n")) == (BAD_INPUT, 1), (line, found)
        assert words in found, (line, found)


@pytest.fixture(scope="module")
def gray_runs(tmp_path_factory):
    """A run of every method that has a name, on gray images of a folder; where they lie."""
    place = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write(Path("images"), 1)
        write(Path("test"), 1, 3)
        for method in METHODS:
            own = {"data.train_dir": place / "images", "data.test_dir": place / "test", "data.channels": 1}
            own |= {"run_dir": method, "trainer.max_epochs": 1, "data.batch_size": 6, "method": method}
            own |= {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0}
            without = ("shapes", *(["projection_dim"] if method == "supervised" else []))
            run("train", *(flag for flag in flags(own) if not any(word in flag for word in without)))
    return place


def test_small_crops_are_of_the_images_channels(gray_runs, tmp_path):
    own = {"data.train_dir": gray_runs / "images", "data.channels": 1, "run_dir": tmp_path / "run"}
    own |= {"trainer.max_epochs": 1, "data.batch_size": 6, "model.small_crops": 2}
    run("train", *(flag for flag in flags(own) if "shapes" not in flag))
    with Image.open(tmp_path / "run" / "views.png") as grid:
        views = np.asarray(grid.convert("RGB"))
    assert (views == views[..., :1]).all()  # all that is drawn is gray


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_encoder_of_one_channel(method, gray_runs):
    encoder = load_encoder(gray_runs / method)
    assert encoder.transform.channels == 1
    first = next(p for p in encoder.parameters() if p.ndim == 4)
    assert first.shape[1] == 1
    assert read_checkpoint(gray_runs / method).model["channels"] == 1


EVERY_PROTOCOL = {  # as short as each can be
    "knn": ["--knn.k", 1],
    "logreg": [],
    "linear": ["--linear.epochs", 1, "--linear.batch_size", 6],
    "heads": ["--heads.epochs", 1, "--heads.batch_size", 6],
    "semi": ["--semi.fractions", "[0.5]", "--semi.draws", 1],
    "label_efficiency": ["--label_efficiency.per_class", "[1]", "--label_efficiency.draws", 1],
    "finetune": ["--finetune.epochs", 1, "--finetune.batch_size", 6],
    "semi_finetune": ["--semi_finetune.fractions", "[0.5]", "--semi_finetune.draws", 1, "--semi_finetune.epochs", 1],
    "distill": ["--distill.epochs", 1, "--distill.teacher_epochs", 1, "--distill.student", "resnet8"],
}


def test_every_protocol_and_yardstick_takes_one_channel(gray_runs, monkeypatch, capsys):
    monkeypatch.chdir(gray_runs)
    assert EVERY_PROTOCOL.keys() == OF_EVAL.keys()
    few = [word for words in EVERY_PROTOCOL.values() for word in words]
    run("eval", "simclr", "--protocols", ",".join(EVERY_PROTOCOL), "--supervised", "supervised", *few)
    record = json.loads(Path("simclr/eval.json").read_text())
    assert {result["protocol"] for result in record["results"]} == EVERY_PROTOCOL.keys()
    assert set(record["yardsticks"]) == set(YARDSTICKS) - {"starting_weights"}
    assert all(0 <= result["top1"] <= 1 and result["n_test"] == 6 for result in record["results"])
    capsys.readouterr()


def test_an_encoder_of_one_channel_is_measured_on_other_images(gray_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(gray_runs)
    write(tmp_path / "other" / "train", 1, 4)
    write(tmp_path / "other" / "test", 1, 2)
    run("eval", "simclr", "--protocols", "knn", "--knn.k", 1, "--on", tmp_path / "other", "--csv", tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("train --data.channels 0", "channels=0 is not 1 or more."),
        ("train images --data.channels 2000", "data.channels=2000 is not between 1 and 1,024."),
        ("train --data.channels 1", "data.channels=1 is for a folder of images (data.train_dir): those of"),
        (
            "train --data.bits 16",
            "data.bits=16 is not used with data.source=shapes, whose images have 8. Leave it out.",
        ),
        ("train images --data.channels 1 --model.mean [0.5,0.5]", "does not have one number for each of 1 channel."),
        ("train images --data.channels 5 --model.solarize_prob 0.1", "it is not known what they mean. Leave it out."),
        ("train images --data.channels 5", "cannot read 12 image files: "),
        ("check-data images --channels 0", "channels=0 is not a positive number."),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(typed, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("images"), 1)
    name, *args = typed.split()
    small = [flag for flag in flags({"data.batch_size": 6}) if "images" not in args or "shapes" not in flag]
    with pytest.raises(SystemExit) as stopped:
        main([name, *args, *(small if name == "train" else [])])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (BAD_INPUT, "", 1), said.err
    assert words in said.err
    assert not Path("runs").exists()


def test_check_data_counts_channels_and_bits_and_measures_the_channels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("images"), 5, side=32)
    run("check-data", "images", "--channels", 5, "--load_size", 32, "--sixteen_bit_max", WHITE, "--json", "found.json")
    part = json.loads(Path("found.json").read_text())["folders"]["train"]
    assert (part["channels"], part["bit_depths"], part["unreadable"]) == ({"5": 12}, {"16": 12}, [])
    stack = np.stack([tifffile.imread(path) for path in sorted(Path("images").rglob("*.tif"))]) / WHITE
    assert np.allclose(part["mean"], stack.mean((0, 2, 3)), atol=1e-3)
    assert np.allclose(part["std"], stack.std((0, 2, 3)), atol=1e-3)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"channels 5 bit depths 16 mean 0\.\d+, 0", said)
    with contextlib.suppress(SystemExit):  # some releases of tifffile write such bands as pages, whose first is read
        run("check-data", "images", "--load_size", 32, "--json", "found.json")
    part = json.loads(Path("found.json").read_text())["folders"]["train"]
    assert part["channels"] == {"5": 12}  # of what cannot be read as RGB too, or is read by its first page


def test_a_method_that_says_nothing_of_channels_is_for_rgb():
    from simclr.training.method import takes

    class Own:
        def __init__(self, encoder: str = "resnet8"): ...

    assert takes(SimCLR, "channels")
    assert not takes(Own, "channels")
