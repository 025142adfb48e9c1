"""Image files to uint8 RGB squares.

JPEG and PNG go through torchvision's C++ decoders, which release the interpreter's lock. Everything else (WebP, BMP,
GIF, TIFF ...) and what those decoders refuse goes through Pillow. Both honour the EXIF orientation; alpha is dropped.
Photographs eight times as large as is asked for, and larger, are read by libjpeg's scaled decoding (`_reduced`).
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from simclr.data import png
from simclr.torch_internals import has_image_decoders, shared_storage

# The operator itself: torchvision 0.29 deprecates its Python wrapper (a warning per call), not what stands behind it.
# A torchvision without it leaves Pillow, which is slower and gives the same images.
_DECODE = torch.ops.image.decode_image if has_image_decoders() else None
_RGB = torchvision.io.ImageReadMode.RGB.value
_JPEG = b"\xff\xd8\xff"  # the first bytes of a file
_END_OF_JPEG = b"\xff\xd9"  # a marker that compressed pixels cannot hold

_VERSION = 2  # of this file: to be raised with every change that gives other pixels

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


def decoder() -> str:
    """What decides which pixels a file gives: this code, and the libraries that decode and resize."""
    # Without the local part: 2.11.0+cu130 and 2.11.0+cpu decode and resize by the same code on the CPU.
    versions = (version.partition("+")[0] for version in (torch.__version__, torchvision.__version__, pillow_version))
    return f"{_VERSION} {' '.join(versions)} {_DECODE is not None}"


def decode(content: bytes) -> Tensor:
    """Decode one image file's content: any size, any colour type, the first frame of an animation.

    Returns:
        (3, H, W) uint8 RGB, upright by its EXIF orientation. 16-bit channels keep their high byte.
    Raises:
        ValueError: if neither decoder can read it to its end.
    """
    if not content:
        raise ValueError("the file is empty")
    if _DECODE is not None and content.startswith((_JPEG, png.SIGNATURE)) and _decoder_survives(content):
        try:
            image = _DECODE(torch.frombuffer(bytearray(content), dtype=torch.uint8), _RGB, True)
        except RuntimeError:
            pass  # Pillow reads some that libjpeg and libpng refuse, and names what is wrong with the rest
        else:
            return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return pixels_of(picture)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's text for unknown content names a memory buffer, which tells the reader nothing.
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise ValueError("not an image in a known format" if unknown else str(error)) from error


def _decoder_survives(content: bytes) -> bool:
    """Whether torchvision's decoder may have a file's content; where it may not, Pillow reads it or says what is wrong.

    Raises:
        ValueError: for a damaged PNG, a cut off JPEG, and for more pixels than Pillow opens.
    """
    if content.startswith(_JPEG):
        _refuse_too_many(*_size_of_jpeg(content))
        return True
    header = png.check_checksums(content)
    _refuse_too_many(header.width, header.height)
    # Only what was damaged on purpose, or by the program that wrote it, has right checksums. A worker process may die
    # of it: the run does not, and says which file it was.
    return get_worker_info() is not None or png.has_sound_pixels(content, header)


def kills_its_reader(path: str | os.PathLike) -> bool:
    """Whether a file is a PNG with right checksums and damaged pixels, of which a worker process dies."""
    try:
        content = Path(path).read_bytes()
        png.check_checksums(content)
    except (OSError, ValueError):
        return False
    try:
        decode(content)
    except ValueError:
        return True
    return False


def _refuse_too_many(width: int, height: int) -> None:
    """By the rule, and up to the limit, of Pillow: a picture of a few kB may ask for all memory."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise ValueError(
            f"{width} x {height} pixels are more than {2 * limit:,}, which may be meant to exhaust the memory; "
            "twice PIL.Image.MAX_IMAGE_PIXELS is the limit"
        )


def _size_of_jpeg(content: bytes) -> tuple[int, int]:
    """Width and height in the frame's header; 0 and 0 if there is none to be found.

    Raises:
        ValueError: for a picture that is cut off: libjpeg would make up the rest of it, in gray, and say so to nobody.
    """
    start, size = 2, (0, 0)
    while start + 9 < len(content):
        if content[start] != 0xFF:
            break
        kind = content[start + 1]
        if kind == 0xFF:  # fill
            start += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # frames; tables and a reserved one are not
            height, width = (int.from_bytes(content[start + at : start + at + 2], "big") for at in (5, 7))
            size = width, height
        elif kind == 0xDA:  # the first scan: pixels, up to the end of the picture
            if content.rfind(_END_OF_JPEG, start) < 0:
                raise ValueError("cut off JPEG: it has no end of image")
            break
        start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    return size


def pixels_of(picture: Image.Image) -> Tensor:
    """The pixels of a Pillow image of any mode, as `decode` gives those of a file.

    Returns:
        (3, H, W) uint8 RGB, upright by its EXIF orientation. 16-bit channels keep their high byte.
    Raises:
        ValueError: for floating-point pixels, which have no known range.
    """
    return torch.from_numpy(_rgb(ImageOps.exif_transpose(picture))).permute(2, 0, 1).contiguous()


def _rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image, where Image.convert alone would clip or warn."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255
        return np.repeat((np.array(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # as Pillow asks for
    return np.array(picture.convert("RGB"))


def to_square(image: Tensor, side: int) -> Tensor:
    """The central square of an image, resized (antialiased bilinear); an image that is side x side is left bit for bit.

    Args:
        image: (3, H, W) uint8.
    Returns:
        (3, side, side) uint8.
    """
    height, width = image.shape[-2:]
    if height == width == side:
        return image
    short = min(height, width)
    image = F.center_crop(image, [short, short])
    return image if short == side else F.resize(image, [side, side], antialias=True)


def decode_square(content: bytes, side: int) -> Tensor:
    """The central square of one image file's content, as `to_square` of `decode`, large JPEGs faster.

    Returns:
        (3, side, side) uint8.
    Raises:
        ValueError: as `decode`.
    """
    image = _reduced(content, side) if content.startswith(_JPEG) else None
    return to_square(decode(content), side) if image is None else image


def _reduced(content: bytes, side: int) -> Tensor | None:
    """The central square of a JPEG whose short side is 8 * side or more; None of others and of damaged ones.

    libjpeg gives such a picture at a quarter or an eighth of its size, still twice as large as is needed, from the low
    frequencies of its blocks, which takes half the time or less. What is resized from it differs from what is resized
    from all pixels by about half a level of 255 on average (tests/test_data_decode.py).
    """
    if len(content) < 4 * side**2:  # no photograph of 64 * side^2 pixels is: half a bit a pixel
        return None
    try:
        _size_of_jpeg(content)
        with JpegImageFile(io.BytesIO(content)) as picture:
            width, height = picture.size
            short = min(width, height)
            scale = 8 if short >= 16 * side else 4
            if short < 2 * scale * side:
                return None
            picture.draft("RGB", (width // scale, height // scale))
            # In fractions of the reduced picture's pixels, so that the square is the same one to a hair; and before the
            # picture is turned upright, because what fills its last pixels up is at the right and at the bottom.
            left, top, reach = (width - short) / 2 / scale, (height - short) / 2 / scale, short / scale
            box = (left, top, left + reach, top + reach)
            square = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box)
            return torch.from_numpy(np.array(ImageOps.exif_transpose(square))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, EOFError):
        return None  # the decoder of whole pictures says what is wrong, or reads it after all


def read_images(paths: Sequence[str | os.PathLike], side: int, out: Tensor | None = None, threads: int = 1) -> Tensor:
    """Read image files, each as the central square of the picture.

    Args:
        paths: N files.
        side: the side of the squares in pixels.
        out: (N, 3, side, side) uint8 to write into; made here if not given, in a worker process of a DataLoader in
            memory that it shares with the process it works for.
        threads: how many decode at once.
    Returns:
        (N, 3, side, side) uint8.
    Raises:
        ValueError: naming the files that cannot be read, after all have been tried. None is skipped.
    """
    if out is None:
        out = torch.empty(0, dtype=torch.uint8)
        if get_worker_info() is not None:  # else the batch would be copied there, as torch's default_collate knows too
            out.set_(shared_storage(len(paths) * 3 * side**2))
        out = out.resize_(len(paths), 3, side, side)
    refuse_unreadable(try_images(paths, side, out, threads))
    return out


def try_images(paths: Sequence[str | os.PathLike], side: int, out: Tensor, threads: int = 1) -> list[str]:
    """As `read_images`, into the first rows of `out`; returns a line for each file that cannot be read."""
    return list(_decoded(paths, side, out.__setitem__, threads).values())


def unreadable(paths: Sequence[str | os.PathLike], side: int, threads: int = 1) -> dict[int, str]:
    """The places of the files that `read_images` could not read, and a line for each; every one is decoded."""
    return _decoded(paths, side, lambda i, image: None, threads)


def _decoded(
    paths: Sequence[str | os.PathLike], side: int, take: Callable[[int, Tensor], None], threads: int
) -> dict[int, str]:
    """Hand every image to `take`, with its place; a line for each that cannot be read."""

    def read(first: int, last: int) -> dict[int, str]:
        bad = {}
        for i in range(first, last):
            try:
                with open(paths[i], "rb") as file:
                    content = file.read()
                take(i, decode_square(content, side))
            except (OSError, ValueError) as error:
                bad[i] = f"{paths[i]} ({error})"
        return bad

    # Of the files alone: torch would share the copying of each small image among its own threads too, those that start
    # below included, and wait for them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # Runs of files, because one task per 32-pixel image costs as much as decoding it.
    run = max(1, min(64, -(-len(paths) // (4 * threads))))
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        if pool is None:
            return read(0, len(paths))
        starts = range(0, len(paths), run)
        found: dict[int, str] = {}
        for bad in pool.map(lambda i: read(i, min(i + run, len(paths))), starts):
            found |= bad
        return found
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files at hand, not for all that remain
        torch.set_num_threads(before)


def refuse_unreadable(lines: Sequence[str]) -> None:
    """Raise one ValueError for files that cannot be read, if there are any."""
    if lines:
        others = f", and {len(lines) - 3} others" if len(lines) > 3 else ""
        many = "1 image file" if len(lines) == 1 else f"{len(lines)} image files"
        raise ValueError(f"cannot read {many}: {'; '.join(lines[:3])}{others}. Repair or remove them.")
