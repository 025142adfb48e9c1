"""Damaged PNGs and JPEGs: an error that names the file, never the end of the process."""

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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
# SIGSEGV for each of these.
DEADLY = {
    "rows are missing": file_of(zlib.compress(ROWS[:500])),
    "no compressed data": file_of(b"\x12\x34" * 40),
    "a bit of the compressed data": file_of(STREAM[:200] + bytes([STREAM[200] ^ 0x55]) + STREAM[201:]),
    "zlib's own checksum": file_of(STREAM[:-1] + b"\0"),
    "cut compressed data": file_of(STREAM[:300]),
    "empty compressed data": file_of(b""),
    "a filter that there is not": file_of(zlib.compress(b"\x09" + ROWS[1:])),
    "interlaced in name only": file_of(interlaced=1),
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


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16"])
def test_sound_files_of_every_colour_type_go_to_the_fast_decoder(mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8))
    picture = Image.new("I;16", (21, 13), 700) if mode == "I;16" else picture.convert(mode)
    picture.save(file := io.BytesIO(), "png")
    content = file.getvalue()
    header = png.check_checksums(content)
    assert (header.width, header.height) == (21, 13)
    assert png.has_sound_pixels(content, header)


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
from simclr.data import decode as decoding
from simclr.data.decode import decode, decode_square
seed, count, kind, as_worker = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "worker"
if as_worker:
    decoding.get_worker_info = lambda: "a worker"
draw = random.Random(seed)
pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
Image.fromarray(pixels).resize((224, 160)).save(file := io.BytesIO(), kind)
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


def refused_of(count: int, kind: str, where: str, seed: int = 0) -> int:
    command = [sys.executable, "-c", FUZZ, str(seed), str(count), kind, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    return int(done.stdout)


@pytest.mark.parametrize(("kind", "where"), [("png", "worker"), ("png", "main"), ("jpeg", "main")])
def test_mutated_files_end_no_process(kind, where):
    refused = refused_of(300, kind, where)
    assert refused >= 295 if kind == "png" else refused > 0  # but for bits that mean nothing to the pixels


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_mutated_files_end_no_process(seed):
    for kind, where in (("png", "worker"), ("png", "main"), ("jpeg", "main")):
        refused_of(10_000, kind, where, seed)


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
        (
            REFUSED["a flipped bit"][0],
            "error: cannot read 1 image file: .*7.png .damaged PNG: the checksum of",
        ),
        (  # torchvision 0.26 survives this one, and says so
            DEADLY["no compressed data"],
            "error: (a process that reads images died: .*pixels of .*7.png are damaged|cannot read 1 .*7.png .broken)",
        ),
    ],
    ids=["refused", "dies"],
)
def test_a_worker_that_finds_a_damaged_file_or_dies_of_it_is_one_line_that_names_it(
    folder, capfd, monkeypatch, content, said
):
    monkeypatch.chdir(folder.parent)
    (folder / "a" / "7.png").write_bytes(content)
    settings = {"data.memory_limit_gb": 0, "data.workers": 2, "data.batch_size": 8}
    with pytest.raises(SystemExit) as stopped:
        train(["images", "--run_dir=run", *flags(settings)])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert re.search(said, err)
    assert "Traceback" not in err
