"""Every kind of image file is read, or refused before it is decoded, in words that say what would help."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simclr.data import ImageData, kinds
from simclr.data import decode as decoding
from simclr.data.decode import ReadingRules, decode, decode_square, pixels_of, read_images, sixteen_bit_peak
from simclr.data.depth import low_range
from simclr.data.sources import list_folder
from test_data_decode import picture, pixels
from test_data_png import file_of as png_of


def file_of(image: Image.Image, kind: str, **settings) -> bytes:
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


def tiff_of(samples: np.ndarray, bits: int, form: int) -> bytes:
    """A TIFF in one strip (TIFF 6.0): (height, width, bands) samples of so many bits and of a SampleFormat."""
    height, width, bands = samples.shape
    data, lists = samples.tobytes(), struct.pack(f"<{2 * bands}H", *[bits] * bands, *[form] * bands)  # from `after` on
    after = 8 + 2 + 12 * 11 + 4

    def at(place: int) -> tuple[int, int]:
        """Two shorts and fewer stand in the entry itself."""
        return (bands, after + 2 * bands * place) if bands > 2 else (bands, (bits, form)[place])

    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, *at(0)), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, after + len(lists)), (277, 3, 1, bands), (278, 3, 1, height), (279, 4, 1, len(data)),
        (284, 3, 1, 1), (339, 3, *at(1)),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + lists + data


# The size of a picture


KINDS = ["png", "jpeg", "webp", "tiff", "gif", "bmp", "ppm"]


@pytest.mark.parametrize("kind", KINDS)
def test_more_pixels_than_are_allowed_are_refused_before_they_are_decoded(kind, monkeypatch):
    content = file_of(picture(20, 30), kind)
    whole = decode(content)
    assert torch.equal(decode(content, ReadingRules(max_pixels=600)), whole)
    assert torch.equal(decode(content, ReadingRules(max_pixels=None)), whole)
    for module, name in ((decoding, "_DECODE"), (decoding, "_samples_of"), (decoding.jpeg, "pixels_of")):
        monkeypatch.setattr(module, name, pytest.fail)
    for read in (decode, lambda content, rules: decode_square(content, 1, rules)):
        with pytest.raises(ValueError, match=r"30 x 20 pixels are more than data.max_pixels=599, .*: raise it for"):
            read(content, ReadingRules(max_pixels=599))


@pytest.mark.parametrize("kind", KINDS)
def test_pillows_own_limit_neither_refuses_nor_warns_and_is_left_as_it_is(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the pictures have six times as many
    decode(file_of(picture(20, 30), kind), ReadingRules(max_pixels=600))
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.slow
def test_a_tiff_of_182_megapixels_is_refused_and_can_be_allowed():
    content = file_of(Image.new("L", (14_000, 13_000), 77), "tiff", compression="tiff_lzw")
    with pytest.raises(ValueError, match=r"14000 x 13000 pixels are more than data\.max_pixels=178956970"):
        decode_square(content, 32)
    square = decode_square(content, 32, ReadingRules(max_pixels=200_000_000))
    assert (square == 77).all()


def test_the_setting_of_a_run_is_named_and_holds(tmp_path):
    picture(20, 30).save(tmp_path / "a.tif")
    picture(8, 8).save(tmp_path / "b.png")
    few = ImageData(train_dir=str(tmp_path), image_size=8, max_pixels=599)
    with pytest.raises(ValueError, match=r"a\.tif \(30 x 20 pixels .* data.max_pixels=599[^)]*\)\.$"):
        few.setup()
    ImageData(train_dir=str(tmp_path), image_size=8, max_pixels=None).setup()


# Kinds


FIVE = tiff_of(np.zeros((4, 6, 5), np.uint8), 8, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (FIVE, "a TIFF with 5 bands of 8-bit unsigned integers (compression 1), a kind that is not read: convert it"),
        (tiff_of(np.zeros((4, 6, 1), np.uint64), 64, 1), "a TIFF with 1 band of 64-bit unsigned integers"),
        (tiff_of(np.zeros((4, 6, 3), np.float64), 64, 3), "a TIFF with 3 bands of 64-bit floating-point numbers"),
        (tiff_of(np.full((4, 6, 1), 70_000, np.uint32), 32, 1), "integers from 70000 to 70000, beyond 16 bits"),
        (tiff_of(np.full((4, 6, 1), -3, np.int16), 16, 2), "integers from -3 to -3, beyond 16 bits without a sign"),
        (tiff_of(np.zeros((4, 6, 1), np.float32), 32, 3), "floating-point pixels, which have no known range"),
        (b"\xff\x0a" + bytes(40), "JPEG XL, which is not read: convert it to JPEG or PNG"),
        (b"<!DOCTYPE html><html>", "a web page, which is no image of pixels: remove it"),
        (b"\0\0\0\x18ftypmp42" + bytes(40), "a video, no image: remove it"),
    ],
    ids=["five bands", "64-bit integers", "64-bit floats", "32-bit", "signed", "float", "JPEG XL", "HTML", "video"],
)
def test_what_is_sound_and_not_read_is_told_by_its_kind(tmp_path, content, words):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read_images([tmp_path / "a.tif"], 4)
    assert "Repair" not in str(refused.value)
    (tmp_path / "b.tif").write_bytes(b"II*\0 nothing")
    with pytest.raises(ValueError, match="Repair or remove them"):
        read_images([tmp_path / "a.tif", tmp_path / "b.tif"], 4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_tiff_is_an_error_or_can_be_read_whatever_is_damaged():
    refused, draw = 0, np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(FIVE)
        for place in draw.integers(0, len(content), 3):
            content[place] = draw.integers(256)
        try:
            decode(bytes(content[: draw.integers(8, len(content))]))
        except ValueError:
            refused += 1
    assert refused > 250


def test_heic_is_read_upright_whatever_its_name(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra simclr[heif]")
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(picture(64, 96)).save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content)
    assert len(list_folder(str(tmp_path), "data.train_dir").paths) == 2
    image = decode(content)
    picture(64, 96).save(turned := io.BytesIO(), "png", exif=exif)
    with Image.open(turned) as stored:
        upright = pixels(ImageOps.exif_transpose(stored))
    assert image.shape == upright.shape
    assert (image.int() - upright.int()).abs().float().mean() < 4
    with pytest.raises(ValueError, match=r"64 pixels are more than data.max_pixels=6143|96 pixels are more"):
        decode(content, ReadingRules(max_pixels=6143))
    for cut in (30, 200, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match=r"\w"):
            decode(content[:cut])


def test_without_the_extra_heic_is_refused_with_the_line_that_helps(monkeypatch):
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    with pytest.raises(kinds.Refused, match=re.escape("HEIC, which is read after pip install 'simclr[heif]'")):
        decode(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40))


def test_kinds_that_can_be_read_here_are_in_the_folder_and_others_are_counted(tmp_path, monkeypatch):
    for name in ("a.png", "b.heic", "c.avif", "d.HIF"):
        (tmp_path / name).touch()
    for heif in (False, True):
        for avif in (False, True):
            monkeypatch.setattr(kinds, "has_heif", lambda has=heif: has)
            monkeypatch.setattr(kinds, "has_avif", lambda has=avif: has)
            folder = list_folder(str(tmp_path), "data.train_dir", "photos")
            assert len(folder.paths) == 1 + 2 * heif + avif
            notes = " ".join(folder.notes)
            assert ("pip install 'simclr[heif]'" in notes) == (not heif)
            assert ("pip install --upgrade pillow" in notes) == (not avif)
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.avif").unlink()
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    with pytest.raises(
        ValueError, match=r"There are 1 \.heic, 1 \.hif\. To have HEIC read: pip install 'simclr\[heif\]'\."
    ):
        list_folder(str(tmp_path), "data.train_dir")


@pytest.mark.skipif(not kinds.has_avif(), reason="this Pillow has no decoder of AVIF")
def test_avif_is_read():
    image = decode(file_of(picture(64, 96), "avif", quality=90))
    assert (image.int() - pixels(picture(64, 96)).int()).abs().float().mean() < 4


# 16 bits


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, of (height, width, 3)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(zlib.compress(rows), size=values.shape[1::-1], depth=16)


@pytest.mark.parametrize("maximum", [1, 255, 4095, 10_000, 65_535])
@pytest.mark.parametrize("kind", ["png", "tiff", "colour", "pillow"])
def test_the_range_of_16_bits_is_the_one_that_is_named(kind, maximum):
    values = np.linspace(0, maximum, 30 * 20).astype(np.uint16).reshape(20, 30)
    if kind == "colour":
        content = deep_png(np.stack([values] * 3, axis=-1))
    elif kind != "pillow":
        content = file_of(Image.fromarray(values), kind)
    rules = ReadingRules(sixteen_bit_max=maximum)
    image = pixels_of(Image.fromarray(values), rules) if kind == "pillow" else decode(content, rules)
    wanted = [[int(value) * 256 // (maximum + 1) for value in row] for row in values]
    assert image.tolist() == [wanted] * 3
    if kind != "pillow":
        assert sixteen_bit_peak(content) == maximum
        if maximum > 1:
            with pytest.raises(
                ValueError, match=f"up to {maximum}, above data.sixteen_bit_max={maximum - 1}: raise it"
            ):
                decode(content, ReadingRules(sixteen_bit_max=maximum - 1))


def test_8_bits_have_no_other_range():
    content = file_of(picture(), "png")
    assert torch.equal(decode(content, ReadingRules(sixteen_bit_max=3)), decode(content))
    assert sixteen_bit_peak(content) is None


def test_colours_that_pillow_would_have_cut_to_8_bits_are_refused(monkeypatch):
    content = deep_png(np.full((4, 4, 3), 4000))
    monkeypatch.setattr(decoding, "_DECODE", None)
    assert decode(content).unique().tolist() == [4000 >> 8]
    with pytest.raises(ValueError, match=r"data\.sixteen_bit_max cannot be used"):
        decode(content, ReadingRules(sixteen_bit_max=4095))


@pytest.mark.parametrize(("peak", "whole"), [(3950, 4095), (1023, 1023), (16_383, 16_383), (16_384, None), (0, 1)])
def test_a_folder_of_12_bit_images_is_told_so_as_a_run_starts(tmp_path, peak, whole):
    for i in range(3):
        Image.fromarray(np.full((8, 8), peak - i if peak > 2 else peak, np.uint16)).save(tmp_path / f"{i}.png")
    picture().save(tmp_path / "other.png")
    (tmp_path / "bad.png").touch()
    said = low_range(list_folder(str(tmp_path), "data.train_dir", "photos"), ReadingRules())
    if whole is None:
        assert said is None
        return
    assert said is not None
    assert f"reach {peak} of 65535, and so {peak >> 8} of 255" in said
    assert said.endswith(f"--data.sixteen_bit_max {whole}.")
    assert "(3 looked at)" in said
    (tmp_path / "bad.png").unlink()
    data = ImageData(train_dir=str(tmp_path), image_size=8)
    assert any("sixteen_bit_max" in note for note in data.notes)
    assert ImageData(train_dir=str(tmp_path), image_size=8, sixteen_bit_max=whole).notes == []
