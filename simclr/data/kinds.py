"""Kinds of image files: which are read here, and what those are that are not."""

import functools
import importlib.util
import io
import struct
from typing import NamedTuple

from PIL import Image, TiffImagePlugin, features

_ALWAYS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
HEIF, AVIF = frozenset((".heic", ".heif", ".hif")), frozenset((".avif",))
# Pictures by their names, of kinds that are not read, or not everywhere.
PICTURES = (
    HEIF | AVIF | frozenset((".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"))
)
GET_HEIF, GET_AVIF = "pip install 'simclr[heif]'", "pip install --upgrade pillow"
GET_TIFF = "pip install 'simclr[tiff]'"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # and BigTIFF
_SAMPLES = {
    1: "unsigned integers",
    2: "signed integers",
    3: "floating-point numbers",
    5: "complex integers",
    6: "complex",
}
_WIDTH, _BITS, _BANDS, _FORMAT, _COMPRESSION = 256, 258, 277, 339, 259  # tags of TIFF 6.0
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_MAGIC = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "a Photoshop document"),
    (b"%PDF", "a PDF"),
    (b"<?xml", "an XML or SVG text"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)


class Refused(ValueError):
    """A file that may be sound and is not read all the same; the text says what would help."""


@functools.cache
def has_heif() -> bool:
    """Whether HEIC files can be read: the extra `simclr[heif]` is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def has_tifffile() -> bool:
    """Whether TIFFs of many bands and pages can be read: the extra `simclr[tiff]` is installed."""
    return importlib.util.find_spec("tifffile") is not None


@functools.cache
def has_avif() -> bool:
    """Whether AVIF files can be read: Pillow was built with a decoder for them, as its wheels are since 11.3."""
    return "avif" in features.modules and bool(features.check("avif"))


def extensions() -> frozenset[str]:
    """Ends of the names, in small letters, of the files that are read here."""
    return _ALWAYS | (HEIF if has_heif() else frozenset()) | (AVIF if has_avif() else frozenset())


def is_tiff(content: bytes) -> bool:
    """Whether a file is a TIFF by its first bytes, whatever its name."""
    return content.startswith(_TIFF)


def is_heif(content: bytes) -> bool:
    """Whether a file is HEIC by its first bytes, whatever its name."""
    return content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS and b"avif" not in content[8:64]


def open_heif(content: bytes) -> Image.Image:
    """A HEIC file as Pillow opens others.

    Raises:
        Refused: without the extra.
        OSError, SyntaxError, ValueError: if it cannot be read.
    """
    if not has_heif():
        raise Refused(f"HEIC, which is read after {GET_HEIF}")
    from pillow_heif import HeifImageFile

    return HeifImageFile(io.BytesIO(content))


def kind_of(content: bytes) -> str | None:
    """What a file is that no decoder here knows, and what to do with it; None if that cannot be told."""
    if is_tiff(content):
        return _tiff(content)
    if content[4:8] == b"ftyp":
        if b"avif" in content[8:64]:
            return None if has_avif() else f"AVIF, which is read after {GET_AVIF}"
        return None if is_heif(content) else "a video, no image: remove it"
    start = content[:64].lstrip().lower()
    for magic, kind in _MAGIC:
        if start.startswith(magic.lower()):
            what = "is not read: convert it to JPEG or PNG" if kind[0] != "a" else "is no image of pixels: remove it"
            return f"{kind}, which {what}"
    return None


class TiffTags(NamedTuple):
    """What the first directory of a TIFF says of its samples: bits of each, bands, kinds, compression."""

    bits: tuple[int, ...]
    bands: int
    form: tuple[int, ...]
    compression: int


def tiff_tags(content: bytes) -> TiffTags | None:
    """The samples of a TIFF; None for a damaged one."""
    try:
        with io.BytesIO(content) as file:
            # Of a BigTIFF the offset of its first directory is in the second 8 bytes.
            header = file.read(16 if content[2:3] == b"+" or content[3:4] == b"+" else 8)
            directory = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(directory.next)
            directory.load(file)
            tags = {tag: directory.get(tag) for tag in (_WIDTH, _BITS, _BANDS, _FORMAT, _COMPRESSION)}
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError, struct.error, MemoryError):
        return None
    if not tags[_WIDTH]:
        return None
    bits, form = tags[_BITS] or (1,), tags[_FORMAT] or (1,)
    bits, form = (value if isinstance(value, tuple) else (value,) for value in (bits, form))
    return TiffTags(bits, tags[_BANDS] or 1, form, tags[_COMPRESSION] or 1)


def _tiff(content: bytes) -> str | None:
    """The samples of a TIFF for people, whose kinds are many more than those that Pillow reads."""
    tags = tiff_tags(content)
    if tags is None:
        return None
    each = f"{tags.bits[0]}-bit" if len(set(tags.bits)) == 1 else "-, ".join(map(str, tags.bits)) + "-bit"
    samples = _SAMPLES.get(tags.form[0], "samples") if len(set(tags.form)) == 1 else "mixed samples"
    many = "1 band" if tags.bands == 1 else f"{tags.bands} bands"
    whole = set(tags.form) <= {1, 2} and max(tags.bits) <= 16
    bands = f", or train on its bands: --data.channels {tags.bands}" if whole and tags.bands not in (1, 3) else ""
    return (
        f"a TIFF with {many} of {each} {samples} (compression {tags.compression}), a kind that is not read: "
        f"convert it to 8-bit RGB or gray{bands}"
    )
