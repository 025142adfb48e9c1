"""Damaged PNGs and JPEGs: an error that names the file, never the end of the process."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import forked
from simclr.cli.train import train
from simclr.data import decode as decoding
from simclr.data import png
from simclr.data.decode import decode, read_images
from tiny import flags

ROWS = b"".join(b"\0" + np.random.default_rng(i).integers(0, 256, 96, dtype=np.uint8).tobytes() for i in range(32))
STREAM = zlib.compress(ROWS)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file_of(stream=STREAM, size=(32, 32), depth=8, colour=2, interlaced=0, before=b"") -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return png.SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


# With right checksums: damaged on purpose, or by the program that wrote them. torchvision's decoder ends the process by
# SIGSEGV for each of these, and for those below.
DEADLY = {
    "rows are missing": file_of(zlib.compress(ROWS[:500])),
    "no compressed data": file_of(b"\x12\x34" * 40),
    "cut compressed data": file_of(STREAM[:300]),
    "empty compressed data": file_of(b""),
    "a filter that there is not": file_of(zlib.compress(b"\x09" + ROWS[1:])),
    "interlaced in name only": file_of(interlaced=1),
}
# What their decompression does not stumble over is read as it was written.
READ_ANYHOW = {
    "a bit of the compressed data": file_of(STREAM[:200] + bytes([STREAM[200] ^ 0x55]) + STREAM[201:]),
    "zlib's own checksum": file_of(STREAM[:-1] + b"\0"),
}
READABLE = {
    "sound": file_of(),
    "too many rows": file_of(zlib.compress(ROWS + ROWS)),
    "bytes after the end": file_of() + b"junk",
    "no end": file_of()[:-12],
    "a damaged comment": file_of(before=chunk(b"tEXt", b"a\0b")[:-1] + b"\0"),
}
REFUSED = {
    "a flipped bit": (
        file_of()[:90] + bytes([file_of()[90] ^ 4]) + file_of()[91:],
        "the checksum of its IDAT at byte 33",
    ),
    "cut short": (file_of()[:900], "it is cut short"),
    "no header": (png.SIGNATURE + chunk(b"IDAT", STREAM) + chunk(b"IEND", b""), "it has no header"),
    "too large": (file_of(size=(20_000, 20_000)), "20000 x 20000 pixels are more than data.max_pixels=178956970"),
    "beyond all sizes": (file_of(size=(2**31 - 1, 2**31 - 1)), "pixels are more than"),
}


@pytest.mark.parametrize("name", DEADLY)
def test_what_would_kill_the_process_is_an_error(name):
    assert png.check_checksums(DEADLY[name])
    with pytest.raises(ValueError, match=r"truncated|broken data stream|unrecognized data stream"):
        decode(DEADLY[name])


@pytest.mark.parametrize("name", READ_ANYHOW)
def test_what_would_kill_the_process_and_can_be_decompressed_does_not(name):
    header = png.check_checksums(READ_ANYHOW[name])
    assert not png.has_sound_pixels(READ_ANYHOW[name], header)
    assert decode(READ_ANYHOW[name]).shape == (3, 32, 32)


@pytest.mark.parametrize("name", READABLE)
def test_what_is_whole_is_read(name):
    pixels = np.frombuffer(ROWS, np.uint8).reshape(32, 97)[:, 1:].reshape(32, 32, 3)
    assert torch.equal(decode(READABLE[name]), torch.from_numpy(pixels.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_refused_in_words_before_it_is_decoded(name, monkeypatch):
    content, reason = REFUSED[name]
    monkeypatch.setattr(decoding, "_DECODE", None if decoding._DECODE is None else pytest.fail)
    with pytest.raises(ValueError, match=re.escape(reason)):
        decode(content)


def pillows(mode: str, **how) -> tuple[Image.Image, bytes]:
    """A picture, and its file."""
    channels = {"L": (), "RGBA": (4,), "LA": (2,)}.get(mode, (3,))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 21, *channels), dtype=np.uint8))
    if mode not in ("L", "RGB", "RGBA", "LA"):
        picture = Image.new("I;16", (21, 13), 700) if mode == "I;16" else picture.convert(mode)
    picture.save(file := io.BytesIO(), "png", **how)
    return picture, file.getvalue()


@pytest.mark.parametrize("mode", ["LA", "P", "1", "I;16"])
def test_sound_files_of_unusual_colour_types_go_to_torchvision(mode):
    _, content = pillows(mode)
    header = png.check_checksums(content)
    assert (header.width, header.height) == (21, 13)
    assert png.has_sound_pixels(content, header)
    assert png.pixels_of(content, header) is None


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_usual_kinds_have_the_pixels_that_pillow_and_torchvision_read(mode):
    picture, content = pillows(mode)
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert png.pixels_of(content, png.check_checksums(content)) is not None
    assert torch.equal(decode(content), pixels)
    if decoding._DECODE is not None:
        assert torch.equal(decoding._DECODE(torch.frombuffer(bytearray(content), dtype=torch.uint8), 3, True), pixels)


def test_a_picture_that_says_how_it_is_turned_and_one_with_a_transparent_colour_are_left_to_others():
    turned = Image.Exif()
    turned[0x0112] = 6
    for how in ({"exif": turned}, {"transparency": (1, 2, 3)}):
        _, content = pillows("RGB", **how)
        header = png.check_checksums(content)
        assert header.more
        assert png.pixels_of(content, header) is None
        shape = (3, 21, 13) if "exif" in how else (3, 13, 21)
        assert decode(content).shape == shape


def test_a_jpeg_that_asks_for_all_memory_is_refused_by_its_header():
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "jpeg")
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="65535 x 65535 pixels are more than"):
        decode(bytes(content))


FUZZ = """
import io, random, sys
import numpy as np
from PIL import Image
from simclr.data.decode import decode_square
seed, count, kind, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
draw = random.Random(seed)
pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
Image.fromarray(pixels).resize((224, 160)).convert(mode).save(file := io.BytesIO(), kind)
whole, refused = file.getvalue(), 0
for _ in range(count):
    content = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.2:
        del content[draw.randrange(len(content)) :]
    try:
        decode_square(bytes(content), 32)
    except ValueError:
        refused += 1
print(refused)
"""


def refused_of(count: int, kind: str, mode: str, seed: int = 0) -> int:
    done = forked.run(["-c", FUZZ, str(seed), str(count), kind, mode], timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    return int(done.stdout)


@pytest.mark.parametrize(("kind", "mode"), [("png", "RGB"), ("png", "P"), ("jpeg", "RGB")])
def test_mutated_files_end_no_process(kind, mode):
    refused = refused_of(100, kind, mode)
    assert refused >= 99 if kind == "png" else refused > 0  # but for bits that mean nothing to the pixels


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_mutated_files_end_no_process(seed):
    for kind, mode in (("png", "RGB"), ("png", "P"), ("jpeg", "RGB")):
        refused = refused_of(10_000, kind, mode, seed)
        assert refused >= 9_900 if kind == "png" else refused > 0


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(file_of())
    return tmp_path / "images"


def test_a_damaged_file_is_named_by_the_process_that_reads_it(folder):
    bad = folder / "a" / "7.png"
    bad.write_bytes(REFUSED["a flipped bit"][0])
    with pytest.raises(ValueError, match=f"cannot read 1 image file: {re.escape(str(bad))} \\(damaged PNG"):
        read_images(sorted(folder.rglob("*.png")), 16)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # of one core
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (REFUSED["a flipped bit"][0], ".damaged PNG: the checksum of"),
        (DEADLY["no compressed data"], ".*(broken data stream|unrecognized data stream)"),
    ],
    ids=["refused", "deadly"],
)
def test_a_damaged_file_that_a_worker_finds_is_one_line_that_names_it(folder, capfd, monkeypatch, content, said):
    monkeypatch.chdir(folder.parent)
    (folder / "a" / "7.png").write_bytes(content)
    settings = {"data.memory_limit_gb": 0, "data.workers": 2, "data.batch_size": 8}
    with pytest.raises(SystemExit) as stopped:
        train(["images", "--run_dir=run", *flags(settings)])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert re.search(f"error: cannot read 1 image file: .*7.png {said}", err)
    assert "Traceback" not in err
