"""PNG: whether a file is whole, and the pixels of the usual kinds.

These are decoded by kornia_rs, in Rust, in a third to a fifth of libpng's time. What torchvision's decoder is given of
the others must be sound: libpng's errors inside the pixel data end the process there (`decode_png` crosses C++ objects
by longjmp; seen with torchvision 0.26 to 0.29), so that a single flipped bit would kill a run without a word.
"""

import struct
import zlib
from typing import NamedTuple
from zlib import crc32

import numpy as np
from kornia_rs.io import decode_image_png_u8

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BEFORE, _CHECKSUM = struct.Struct(">I4s").unpack_from, struct.Struct(">I").unpack_from  # of a chunk: length and kind
_HEADER = struct.Struct(">IIBB2xB").unpack
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type (PNG specification, table 11.1)
_USUAL = {0: "mono", 2: "rgb", 6: "rgba"}  # colour types of 8 bits that are pixels as they are stored
_MORE = (b"eXIf", b"tRNS")  # chunks that say how they are to be turned, or which of them are transparent


class Header(NamedTuple):
    """What IHDR says: sizes in pixels, bits of a sample, colour type, interlacing.

    Attributes:
        more: whether other chunks say more of the pixels.
    """

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    more: bool = False

    @property
    def indexed(self) -> bool:
        """Whether pixels are numbers of a palette's colours."""
        return self.colour == 3


def check_checksums(content: bytes) -> Header:
    """Walk the chunks and compare the checksums of those that make the picture: what accidents damage is found here.

    Args:
        content: of a file.
    Raises:
        ValueError: for a file that is cut short, has a wrong checksum in a critical chunk, or is no PNG.
    """
    if not content.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    start, size, view, header, more = len(SIGNATURE), len(content), memoryview(content), None, False
    while start + 12 <= size:
        length, kind = _BEFORE(content, start)
        end = start + 12 + length
        if end > size:
            break
        # A capital letter makes a chunk critical; others libpng and Pillow leave out if they are damaged.
        if kind[0] < 0x60 and crc32(view[start + 4 : end - 4]) != _CHECKSUM(content, end - 4)[0]:
            raise ValueError(f"damaged PNG: the checksum of its {kind.decode('latin-1')} at byte {start} is wrong")
        if header is None:
            header = _header(kind, content[start + 8 : end - 4])
        elif kind == b"IEND":
            return header._replace(more=more)
        more = more or kind in _MORE
        start = end
    if header is None or start < size:
        raise ValueError("damaged PNG: it is cut short")
    return header._replace(more=more)  # all chunks are whole, only the empty last one is missing


def _header(kind: bytes, data: bytes) -> Header:
    if kind != b"IHDR" or len(data) != 13:
        raise ValueError("damaged PNG: it has no header")
    width, height, depth, colour, interlaced = _HEADER(data)
    return Header(width, height, depth, colour, bool(interlaced))


def pixels_of(content: bytes, header: Header, *, alpha: bool = False) -> np.ndarray | None:
    """The pixels of a file of 8 bits in gray, RGB or RGBA.

    What the checksums of the chunks do not cover, compressed pixels that were written wrong, is an error where it
    cannot be decompressed; zlib's own checksum is not looked at.

    Args:
        content: of a file that has passed `check_checksums`.
        header: what that has found.
        alpha: keep it.
    Returns:
        (H, W, 1, 3 or, with alpha, 4) uint8; None for kinds that are left to others, and for what cannot be decoded.
    """
    mode = _USUAL.get(header.colour)
    if mode is None or header.depth != 8 or header.more:
        return None
    try:
        pixels = decode_image_png_u8(content, (header.height, header.width), mode)
        return pixels if alpha else pixels[..., :3]
    except Exception:  # the class itself, for whatever is wrong: Pillow reads it or has the words
        return None


def has_sound_pixels(content: bytes, header: Header) -> bool:
    """Whether the compressed pixels are all there and nothing in them can be an error: right checksums do not say so.

    Costs half of libpng's decoding: 23 microseconds of 43 for a CIFAR-10 image.

    Args:
        content: of a file that has passed `check_checksums`.
        header: what that has found.
    """
    if header.interlaced or header.colour not in _CHANNELS:
        return False
    row = 1 + -(-header.width * _CHANNELS[header.colour] * header.depth // 8)  # a filter's number, then samples
    left, rows, stream = row * header.height, bytearray(), zlib.decompressobj()
    start, view = len(SIGNATURE), memoryview(content)
    try:
        while start + 12 <= len(content):
            end = start + 12 + int.from_bytes(view[start : start + 4], "big")
            if content[start + 4 : start + 8] == b"IDAT":
                rows += stream.decompress(view[start + 8 : end - 4], left + 1 - len(rows))
                if len(rows) > left or stream.unconsumed_tail:
                    return False
            start = end
    except zlib.error:
        return False
    return stream.eof and len(rows) == left and max(rows[::row], default=5) <= 4
