"""Every image of a folder, decoded once as training would, and what each is."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr.data import png
from simclr.data.ahead import in_processes
from simclr.data.alike import picture_hash
from simclr.data.decode import RULES, ReadingRules, decode_square, opened, own_of, own_of_picture, sixteen_bit_peak
from simclr.data.fingerprint import pixel_digest
from simclr.data.kinds import is_tiff
from simclr.data.rules import DEEPEST

_RUN = 32  # files of a task: one task a file would cost as much as decoding a small one
_ALONE = 5.0  # seconds in which this process decodes alone: others would still be importing torch
_ORIENTATION = 0x0112  # EXIF
_SEEN = 64  # pixels of a side, for the mean of the channels


class Scanned(NamedTuple):
    """What a file is.

    Attributes:
        error: why it cannot be read; None if it can.
        digest: `pixel_digest` of the pixels that training sees; empty if it cannot be read.
        blank: whether all these pixels are equal in every channel.
        kind, mode: the file's format and colour mode in Pillow's words, `16 bit` after it where samples are.
        width, height: in pixels, as stored; 0 where Pillow does not know.
        turned: whether EXIF says that the picture is not stored upright.
        frames: of an animation; 1 for others.
        picture: `picture_hash` of what training sees.
        peak: the largest sample, where samples have 16 bits.
        channels, bits: of the file, alpha not counted, also of one that cannot be read; 0 where they are not known.
        mean, square: of each channel that training sees, the mean of some 64 x 64 pixels and of their squares, 0 to 1.
    """

    error: str | None
    digest: bytes = b""
    blank: bool = False
    kind: str = "unknown"
    mode: str = "unknown"
    width: int = 0
    height: int = 0
    turned: bool = False
    frames: int = 1
    picture: int = 0
    peak: int | None = None
    channels: int = 0
    bits: int = 0
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()


def scan_file(path: str, side: int, rules: ReadingRules = RULES) -> Scanned:
    """Decode one file as `read_images` does, and look at its header."""
    content = b""
    try:
        with open(path, "rb") as file:
            content = file.read()
        image = decode_square(content, side, rules)
    except (OSError, ValueError) as error:
        own = own_of(content) if content else None
        return Scanned(str(error), **(own._asdict() if own else {}))
    pixels = image.permute(1, 2, 0).contiguous()  # (side, side, C): as decoded, so that nothing is copied
    some = pixels[::32, ::32]  # tells all but a few images, and those are looked at whole
    blank = bool((some == pixels[0, 0]).all()) and bool((pixels == pixels[0, 0]).all())
    found = Scanned(None, pixel_digest(pixels.numpy()), blank, picture=picture_hash(image))
    step = max(1, side // _SEEN)
    seen = pixels[::step, ::step].numpy().reshape(-1, len(image)) / np.float32(255 if rules.bits == 8 else DEEPEST)
    found = found._replace(mean=tuple(seen.mean(0).tolist()), square=tuple((seen**2).mean(0).tolist()))
    found = _with_header(found, content)
    return found._replace(peak=sixteen_bit_peak(content, rules)) if found.mode.endswith("16 bit") else found


def _with_header(found: Scanned, content: bytes) -> Scanned:
    try:
        with opened(content) as picture:
            # Pillow shows colours of 16 bits a sample as RGB: IHDR has the truth, at byte 24.
            deep = picture.mode.startswith("I") or (content.startswith(png.SIGNATURE) and content[24] == 16)
            own = own_of(content) if is_tiff(content) else own_of_picture(picture, content)
            found = found._replace(**(own._asdict() if own else {}))
            return found._replace(
                kind=picture.format or "unknown",
                mode=f"{picture.mode.partition(';')[0]} 16 bit" if deep else picture.mode,
                width=picture.width,
                height=picture.height,
                turned=picture.getexif().get(_ORIENTATION, 1) != 1,
                frames=getattr(picture, "n_frames", 1),
            )
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, Image.DecompressionBombError):
        own = own_of(content)
        return found._replace(**(own._asdict() if own else {}))  # torchvision or tifffile has read it all the same


def scan(paths: Sequence[str], side: int, processes: int, rules: ReadingRules = RULES) -> Iterator[Scanned]:
    """What N files are, in their order.

    Args:
        paths: N files.
        side: of the squares that training would hold, in pixels.
        processes: how many decode at once; with 1, and for the first seconds, this one alone.
        rules: how files are read.
    Raises:
        concurrent.futures.process.BrokenProcessPool: if a process dies, of too little memory for example.
    """
    begun, done = time.monotonic(), 0
    while done < len(paths) and (processes <= 1 or time.monotonic() - begun < _ALONE):
        yield scan_file(paths[done], side, rules)
        done += 1
    if done == len(paths):
        return
    runs = ([paths[i] for i in range(start, min(start + _RUN, len(paths)))] for start in range(done, len(paths), _RUN))
    for found in in_processes(partial(_scan_files, side=side, rules=rules), runs, processes):
        yield from found


def _scan_files(paths: list[str], side: int, rules: ReadingRules) -> list[Scanned]:
    return [scan_file(path, side, rules) for path in paths]
