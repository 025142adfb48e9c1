"""JPEG: what the markers of a file say, and its pixels where libjpeg has nothing to say against them.

libjpeg makes something of almost anything and writes what it found wrong to standard error, without a name. simplejpeg
hands its word on, and takes less time for the same bits.
"""

import re
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from torch import Tensor

SIGNATURE = b"\xff\xd8\xff"  # the first bytes of a file
_END = b"\xff\xd9"  # a marker that compressed pixels cannot hold
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
# libjpeg's warnings of pixels that it has made up (jerror.h). Its others, of headers, do not touch them.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression sequence")


class Header(NamedTuple):
    """What the markers say: sizes in pixels as stored, 0 where there is no frame; channels; EXIF's orientation."""

    width: int = 0
    height: int = 0
    channels: int = 0
    orientation: int = 1


def header_of(content: bytes) -> Header:
    """Walk the markers up to the compressed pixels.

    Raises:
        ValueError: for a picture that is cut off: libjpeg would make up the rest of it, in gray, and say so to nobody.
    """
    start, header, turned = 2, Header(), None
    while start + 9 < len(content):
        if content[start] != 0xFF:
            break
        kind = content[start + 1]
        if kind == 0xFF:  # fill
            start += 1
            continue
        length = int.from_bytes(content[start + 2 : start + 4], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # frames; tables and a reserved one are not
            height, width = (int.from_bytes(content[start + at : start + at + 2], "big") for at in (5, 7))
            header = Header(width, height, content[start + 9])
        elif kind == 0xE1 and turned is None and content.startswith(_EXIF, start + 4):
            turned = _orientation(content[start + 10 : start + 2 + length])
        elif kind == 0xDA:  # the first scan: pixels, up to the end of the picture
            if content.rfind(_END, start) < 0:
                raise ValueError("cut off JPEG: it has no end of image")
            break
        start += 2 + length
    return header._replace(orientation=turned or 1)


def _orientation(exif: bytes) -> int:
    """How the picture is turned, 1 to 8, by the first directory of its EXIF (a TIFF's); 1 if that does not say."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif) - 11), 12):
        if number(entry, 2) == _ORIENTATION:
            return value if 1 <= (value := number(entry + 8, 2)) <= 8 else 1
    return 1


def pixels_of(
    content: bytes, header: Header, scale: int = 1, colours: Literal["RGB", "GRAY"] = "RGB"
) -> np.ndarray | None:
    """The pixels of a file, as they are stored.

    Args:
        content: of a file that begins as a JPEG does.
        header: what `header_of` has found.
        scale: 1, 2, 4 or 8: by how much smaller, in libjpeg's own scaled decoding.
        colours: of what is given: RGB, or GRAY for a picture of one channel.
    Returns:
        (H, W, 3) or (H, W, 1) uint8; None for kinds that are left to others: CMYK, odd subsampling, and what cannot be
        decoded.
    Raises:
        ValueError: with libjpeg's words for damaged compressed pixels.
    """
    if header.channels not in (1, 3):
        return None
    least = {"min_height": -(-header.height // scale), "min_width": -(-header.width // scale)} if scale > 1 else {}
    try:
        return simplejpeg.decode_jpeg(content, colours, **least)
    except ValueError as error:
        said = str(error).strip()
    if said.startswith(_DAMAGE) and not _is_padding(content, said):
        raise ValueError(f"damaged JPEG: {said.removeprefix('Corrupt JPEG data: ')}, says libjpeg")
    try:
        return simplejpeg.decode_jpeg(content, colours, **least, strict=False)
    except ValueError:
        return None


def _is_padding(content: bytes, said: str) -> bool:
    """Whether what libjpeg found too many are zeros before the end, with which some cameras fill a file up."""
    found = re.search(r"(\d+) extraneous bytes before marker 0xd9", said)
    end = content.rfind(_END)
    return found is not None and not any(content[end - int(found[1]) : end])


def upright(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as EXIF's orientation, 1 to 8, says that it is to be looked at."""
    if orientation >= 5:
        image = image.mT
    flipped = {2: (-1,), 3: (-1, -2), 4: (-2,), 6: (-1,), 7: (-1, -2), 8: (-2,)}.get(orientation)
    return image.flip(flipped) if flipped else image
