"""JPEGs: what libjpeg knows to be damaged is refused, and what is sound has the bits of another decoder."""

import io
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from simclr.data import decode as decoding
from simclr.data.decode import decode, decode_square
from test_data_decode import photograph

needs_torchvision = pytest.mark.skipif(decoding._DECODE is None, reason="this torchvision has no decoders")


def file_of(picture: Image.Image, **settings) -> bytes:
    picture.save(file := io.BytesIO(), "jpeg", **settings)
    return file.getvalue()


def by_torchvision(content: bytes) -> torch.Tensor:
    return decoding._DECODE(torch.frombuffer(bytearray(content), dtype=torch.uint8), decoding._RGB, True)


@needs_torchvision
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "settings",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"optimize": True}],
    ids=str,
)
def test_the_bits_are_those_of_torchvision(mode, settings):
    for size in ((67, 45), (8, 8), (1, 3)):
        content = file_of(photograph(*size).convert(mode), quality=90, **settings)
        assert torch.equal(decode(content), by_torchvision(content))


@needs_torchvision
def test_what_libjpeg_warns_of_is_refused_and_what_it_does_not_is_read(capfd):
    draw = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    whole = [file_of(Image.fromarray(pixels).resize((224, 160)), progressive=progressive) for progressive in (0, 1)]
    warned = read = 0
    for i in range(300):
        content = bytearray(whole[i % 2])
        for _ in range(draw.choice((1, 1, 1, 3, 20))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        capfd.readouterr()
        try:
            by_torchvision(bytes(content))
        except RuntimeError:
            continue  # refused there
        knows = re.search("Corrupt JPEG|Premature end|Inconsistent progression", capfd.readouterr().err)
        try:
            decode(bytes(content))
        except ValueError as error:
            said = str(error)
            assert knows or "data.max_pixels" in said or "cut off" in said, said
        else:
            assert not knows, knows
            read += 1
        warned += bool(knows)
    assert warned > 50
    assert read > 50


@pytest.mark.parametrize("side", [8, 64])
def test_damaged_pixels_are_refused_in_libjpegs_words_in_small_and_in_large_pictures(side):
    content = bytearray(file_of(photograph(300, 400)))
    del content[-3000:-2000]
    with pytest.raises(ValueError, match=r"damaged JPEG: .*, says libjpeg"):
        decode_square(bytes(content), side)


def test_zeros_with_which_a_camera_fills_up_are_no_damage():
    content = file_of(photograph(40, 50))
    assert torch.equal(decode(content[:-2] + bytes(40) + content[-2:]), decode(content))
    with pytest.raises(ValueError, match="extraneous bytes before marker 0xd9"):
        decode(content[:-2] + b"\x80\x81\x82\x83" * 9 + content[-2:])


def test_a_warning_about_the_header_is_none_about_the_pixels():
    content = bytearray(file_of(photograph(40, 50)))
    at = content.index(b"JFIF\0") + 5
    content[at] = 9  # revision 9.01 of JFIF
    assert torch.equal(decode(bytes(content)), decode(file_of(photograph(40, 50))))


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_an_exif_that_is_cut_anywhere_leaves_the_picture_as_it_is_stored(order, cut):
    exif = Image.Exif()
    exif.endian = "<" if order == "II" else ">"
    exif[0x0112] = 6
    segment = exif.tobytes()
    content = file_of(photograph(20, 30), exif=segment[: 6 + cut] if cut < len(segment) - 6 else segment)
    assert decode(content).shape in ((3, 20, 30), (3, 30, 20))
