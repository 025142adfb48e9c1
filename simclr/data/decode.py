"""Image files to squares: uint8 RGB, or the channels and bits that are asked for (`simclr.data.rules`).

JPEGs go through simplejpeg (libjpeg-turbo, `simclr.data.jpeg`), PNGs through kornia_rs, those of unusual kinds through
torchvision's decoder. Everything else (WebP, BMP, GIF, TIFF, AVIF, HEIC ...) and what those decoders refuse goes
through Pillow. All honour the EXIF orientation; alpha is dropped. Photographs eight times as large as is asked for, and
larger, are read by libjpeg's scaled decoding (`_reduced`).

Asked for other channels than RGB, or for 16 bits, a file gives its own channels, and TIFFs with many bands or pages go
through tifffile (`simclr.data.tiff`).
"""

import contextlib
import io
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from simclr.data import jpeg, kinds, png, tiff
from simclr.data.channels import as_held, fitted, refuse_other_channels
from simclr.data.kinds import Refused
from simclr.data.rules import DEEPEST, RULES, ReadingRules
from simclr.data.watch import in_threads
from simclr.torch_internals import has_image_decoders, shared_storage

# The operator itself: torchvision 0.29 deprecates its Python wrapper (a warning per call), not what stands behind it.
# A torchvision without it leaves Pillow, which is slower and gives the same images.
_DECODE = torch.ops.image.decode_image if has_image_decoders() else None
_RGB, _OWN = torchvision.io.ImageReadMode.RGB.value, torchvision.io.ImageReadMode.UNCHANGED.value

_VERSION = 2  # of this file: to be raised with every change that gives other pixels
_PILLOW = threading.Lock()
_TRIED, _TRIAL_SECONDS = 16, 0.001  # of files read alone, to see whether threads are faster


class Unread(str):
    """A line about a file that cannot be read: its name, and the reason in brackets.

    Attributes:
        sound: whether the file may be, so that repairing it would not help; the reason says what would.
    """

    sound = False


class UnreadableError(ValueError):
    """Files that cannot be read.

    Attributes:
        lines: one for each, by its place among those that were to be read.
    """

    def __init__(self, lines: dict[int, Unread]):
        super().__init__(_refusal(list(lines.values())))
        self.lines = lines


def decoder(rules: ReadingRules = RULES) -> str:
    """What decides which pixels a file gives: this code, and the libraries that decode and resize.

    Args:
        rules: how files are read; tifffile has no part in plain RGB.
    """
    # Without the local part: 2.11.0+cu130 and 2.11.0+cpu decode and resize by the same code on the CPU.
    versions = (of.partition("+")[0] for of in (torch.__version__, torchvision.__version__, pillow_version))
    more = ["simplejpeg", "kornia-rs", *(["pillow-heif"] if kinds.has_heif() else [])]
    more += ["tifffile"] if not rules.plain and kinds.has_tifffile() else []
    return f"{_VERSION} {' '.join(versions)} {_DECODE is not None} {' '.join(map(version, more))}"


def decode(content: bytes, rules: ReadingRules = RULES) -> Tensor:
    """Decode one image file's content: any size, any colour type, the first frame of an animation.

    Returns:
        (C, H, W), C = `rules.channels`, uint8, or uint16 with 65 535 for white where `rules.bits` are 16; upright by
        its EXIF orientation, in any strides. In 8 bits 16-bit channels keep their high byte, or what
        `rules.sixteen_bit_max` makes of them.
    Raises:
        ValueError: if it cannot be read to its end, is known to be damaged, or is of a kind, size or number of channels
            that is not read.
    """
    return as_held(_decoded_samples(content, rules), rules)


def sixteen_bit_peak(content: bytes, rules: ReadingRules = RULES) -> int | None:
    """The largest sample of an image whose samples have 16 bits; None for others, which are not decoded.

    Raises:
        ValueError: as `decode`.
    """
    if content.startswith(png.SIGNATURE):
        if content[24:25] != b"\x10":  # IHDR's bit depth
            return None
    elif content.startswith((jpeg.SIGNATURE, b"RIFF", b"GIF", b"BM")):
        return None
    samples = _decoded_samples(content, rules)
    return int(samples.max()) if samples.dtype != torch.uint8 else None


def _decoded_samples(content: bytes, rules: ReadingRules) -> Tensor:
    """(C, H, W), upright: uint8, or int32 where a sample has 16 bits."""
    if rules.plain:
        return _read_as_they_are(content, rules)[0]
    return fitted(*_read_as_they_are(content, rules), rules)


def _read_as_they_are(content: bytes, rules: ReadingRules) -> tuple[Tensor, bool]:
    """(C, H, W), upright: uint8, or int32 where a sample has 16 bits; and whether the last channel is alpha.

    Plain rules give RGB whatever the file's channels are, others give those.
    """
    if not content:
        raise ValueError("the file is empty")
    own = not rules.plain
    if content.startswith(jpeg.SIGNATURE):
        header = jpeg.header_of(content)
        _refuse_too_many(header.width, header.height, rules)
        array = jpeg.pixels_of(content, header, colours="GRAY" if own and header.channels == 1 else "RGB")
        if array is not None:
            return jpeg.upright(torch.from_numpy(array).permute(2, 0, 1), header.orientation), False
        survives = not own
    elif content.startswith(png.SIGNATURE):
        of_png = png.check_checksums(content)
        _refuse_too_many(of_png.width, of_png.height, rules)
        array = png.pixels_of(content, of_png, alpha=own)
        if array is not None:
            image = torch.from_numpy(array).permute(2, 0, 1)
            return (image, len(image) == 4) if own else (image.expand(3, -1, -1), False)
        survives = png.has_sound_pixels(content, of_png)
        survives = survives and not (own and of_png.indexed)  # whose colours may all be gray
    elif own and kinds.is_tiff(content) and _needs_tifffile(content):
        return tiff.samples_of(content, lambda layout: _refuse_layout(layout, rules))
    else:
        survives = False
    if _DECODE is not None and survives:
        try:
            image = _DECODE(torch.frombuffer(bytearray(content), dtype=torch.uint8), _OWN if own else _RGB, True)
        except RuntimeError:
            pass  # Pillow reads some that libjpeg and libpng refuse, and names what is wrong with the rest
        else:
            return image if image.dtype == torch.uint8 else image.to(torch.int32), own and len(image) in (2, 4)
    try:
        with opened(content) as picture:
            _refuse_too_many(*picture.size, rules)
            if Image.MAX_IMAGE_PIXELS is not None and math.prod(picture.size) > Image.MAX_IMAGE_PIXELS:
                with _of_any_size():  # TIFFs are measured a second time as they are decoded
                    picture.load()
            if (
                (rules.sixteen_bit_max != DEEPEST or rules.bits == 16)
                and picture.mode in ("RGB", "RGBA", "LA")
                and _is_deep(content, picture)
            ):
                cannot = "they cannot be kept" if rules.bits == 16 else "data.sixteen_bit_max cannot be used"
                raise Refused(f"16-bit colours that Pillow gives 8 bits of, so that {cannot}")
            return _own_samples_of(picture) if own else (_samples_of(picture), False)
    except Refused:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        # Pillow's text for unknown content names a memory buffer, which tells the reader nothing.
        if not isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(str(error)) from error
        with _of_any_size():
            kind = kinds.kind_of(content)
        if kind:
            raise Refused(kind) from error
        raise ValueError("not an image in a known format") from error


def _needs_tifffile(content: bytes) -> bool:
    """Whether a TIFF has more in it than Pillow gives: bands, pages, or 16 bits of colours."""
    with _of_any_size():  # which silences Pillow
        tags = kinds.tiff_tags(content)
    if tags is None:  # damaged: Pillow says how
        return False
    try:
        with opened(content) as picture, _of_any_size():  # which silences it too
            bands, pages = len([b for b in picture.getbands() if b != "X"]), getattr(picture, "n_frames", 1)
    except Exception:  # of any directory that is damaged or of an unknown kind: tifffile says what is wrong
        return True
    return pages > 1 or tags.bands != bands or (bands > 1 and max(tags.bits) > 8)


def _refuse_layout(layout: tiff.Layout, rules: ReadingRules) -> None:
    _refuse_too_many(layout.width, layout.height, rules)
    refuse_other_channels(layout.channels, layout.alpha, rules, layout.what)


class Own(NamedTuple):
    """What a file has, whatever is made of it: channels without alpha, bits of a sample."""

    channels: int
    bits: int


def own_of(content: bytes) -> Own | None:
    """The channels and the bits of an image by its header; None if they cannot be told."""
    try:
        if kinds.is_tiff(content) and _needs_tifffile(content):
            if kinds.has_tifffile():
                layout = tiff.layout_of(content)
                return Own(layout.channels - layout.alpha, layout.bits)
            with _of_any_size():
                tags = kinds.tiff_tags(content)
            return tags and Own(tags.bands, max(tags.bits))
        with opened(content) as picture:
            return own_of_picture(picture, content)
    except Exception:  # of any kind of damage, of which decoding tells
        return None


def own_of_picture(picture: Image.Image, content: bytes) -> Own:
    """The channels and the bits of an image that Pillow reads all of.

    Args:
        picture: as it was opened.
        content: of its file.
    """
    deep = picture.mode.startswith("I") or _is_deep(content, picture)
    bands = [band for band in picture.getbands() if band not in ("A", "a", "X")]
    coloured = picture.mode in ("P", "PA") and not _is_gray(picture)
    return Own(3 if coloured else len(bands), 16 if deep else 1 if picture.mode == "1" else 8)


def opened(content: bytes) -> Image.Image:
    """A file in Pillow's hands, of any size: the limit is ours, and has to be, because Pillow's is one for all."""
    if kinds.is_heif(content):
        return kinds.open_heif(content)
    with _of_any_size():
        return Image.open(io.BytesIO(content))


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Where Pillow has no limit and no warnings, one thread at a time: for headers, and for pictures above its limit.

    What it warns of comes without a name, and what matters of it is an error.
    """
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_deep(content: bytes, picture: Image.Image) -> bool:
    """Whether colours have 16 bits in a file, of which Pillow keeps the high byte."""
    if content.startswith(png.SIGNATURE):
        return content[24] == 16
    bits = getattr(picture, "tag_v2", {}).get(258, ())  # TIFF's BitsPerSample
    return 16 in (bits if isinstance(bits, tuple) else (bits,))


def _refuse_too_many(width: int, height: int, rules: ReadingRules) -> None:
    """A picture of a few kB may ask for all memory."""
    if rules.max_pixels is not None and width * height > rules.max_pixels:
        raise Refused(
            f"{width} x {height} pixels are more than data.max_pixels={rules.max_pixels}, the limit for what may be "
            "meant to exhaust the memory: raise it for a sound picture"
        )


def pixels_of(picture: Image.Image, rules: ReadingRules = RULES) -> Tensor:
    """The pixels of a Pillow image of any mode, as `decode` gives those of a file.

    Returns:
        (C, H, W), upright by its EXIF orientation, as `decode` gives it.
    Raises:
        ValueError: for pixels of no known range: floating-point numbers, and integers beyond 16 bits; and for other
            channels than those asked for.
    """
    if rules.plain:
        return as_held(_samples_of(picture), rules)
    return as_held(fitted(*_own_samples_of(picture), rules), rules)


def _samples_of(picture: Image.Image) -> Tensor:
    """(3, H, W) of a Pillow image, upright: uint8, or int32 where a sample has 16 bits."""
    picture = ImageOps.exif_transpose(picture)
    if (deep := _deep_samples_of(picture)) is not None:
        return deep.expand(3, -1, -1)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # as Pillow asks for
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def _own_samples_of(picture: Image.Image) -> tuple[Tensor, bool]:
    """(C, H, W) of a Pillow image, upright, its own channels; and whether the last of them is alpha."""
    picture = ImageOps.exif_transpose(picture)
    if (deep := _deep_samples_of(picture)) is not None:
        return deep, False
    if picture.mode in ("P", "PA"):
        gray = _is_gray(picture)
        picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "PA" else "RGB")
        picture = picture.getchannel(0) if gray else picture
    known = {"1": "L", "La": "LA", "RGBa": "RGBA", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "RGBX": "RGB"}
    picture = picture.convert(known[picture.mode]) if picture.mode in known else picture
    values = np.array(picture)
    samples = torch.from_numpy(values[None] if values.ndim == 2 else values.transpose(2, 0, 1)).contiguous()
    return samples, picture.mode in ("LA", "RGBA")


def _is_gray(picture: Image.Image) -> bool:
    """Whether all colours of a palette are gray."""
    palette = picture.convert("P").getpalette("RGB") if picture.mode == "PA" else picture.getpalette("RGB")
    return palette is not None and palette[::3] == palette[1::3] == palette[2::3]


def _deep_samples_of(picture: Image.Image) -> Tensor | None:
    """(1, H, W) int32 of an image whose samples are no bytes; None of others."""
    if picture.mode == "F":
        raise Refused("floating-point pixels, which have no known range: convert it to 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return None
    values = np.array(picture).astype(np.int64)  # 16 bits: convert("RGB") would clip at 255
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > DEEPEST:
        raise Refused(f"integers from {low} to {high}, beyond 16 bits without a sign: convert it to 8 or 16 bits")
    return torch.from_numpy(values.astype(np.int32))[None]


def to_square(image: Tensor, side: int) -> Tensor:
    """The central square of an image, resized (antialiased bilinear); an image that is side x side is left bit for bit.

    Args:
        image: (C, H, W) uint8 or uint16; floating point too.
    Returns:
        (C, side, side) of the same type.
    """
    height, width = image.shape[-2:]
    if height == width == side:
        return image
    short = min(height, width)
    image = F.center_crop(image, [short, short])
    if short == side:
        return image
    if image.dtype != torch.uint16:
        return F.resize(image, [side, side], antialias=True)
    resized = F.resize(image.float(), [side, side], antialias=True)  # which has no kernel for them
    return resized.round().clamp(0, DEEPEST).to(torch.uint16)


def decode_square(content: bytes, side: int, rules: ReadingRules = RULES) -> Tensor:
    """The central square of one image file's content, as `to_square` of `decode`, large JPEGs faster.

    Returns:
        (C, side, side), as `decode` gives it.
    Raises:
        ValueError: as `decode`.
    """
    image = _reduced(content, side, rules) if content.startswith(jpeg.SIGNATURE) else None
    return to_square(decode(content, rules), side) if image is None else image


def _reduced(content: bytes, side: int, rules: ReadingRules) -> Tensor | None:
    """The central square of a JPEG whose short side is 8 * side or more; None of others.

    libjpeg gives such a picture at a quarter or an eighth of its size, still twice as large as is needed, from the low
    frequencies of its blocks, which takes half the time or less. What is resized from it differs from what is resized
    from all pixels by about half a level of 255 on average (tests/test_data_decode.py).
    """
    if len(content) < 4 * side**2:  # no photograph of 64 * side^2 pixels is: half a bit a pixel
        return None
    header = jpeg.header_of(content)
    if not rules.plain and (rules.bits != 8 or header.channels != rules.channels):
        return None
    _refuse_too_many(header.width, header.height, rules)
    width, height, short = header.width, header.height, min(header.width, header.height)
    scale = 8 if short >= 16 * side else 4
    if short < 2 * scale * side:
        return None
    gray = rules.channels == header.channels == 1
    array = jpeg.pixels_of(content, header, scale, "GRAY" if gray else "RGB")
    try:
        picture = (
            Image.fromarray(array.squeeze(2) if gray else array) if array is not None else _drafted(content, scale)
        )
        # In fractions of the reduced picture's pixels, so that the square is the same one to a hair; and before the
        # picture is turned upright, because what fills its last pixels up is at the right and at the bottom.
        left, top, reach = (width - short) / 2 / scale, (height - short) / 2 / scale, short / scale
        box = (left, top, left + reach, top + reach)
        square = picture.resize((side, side), Image.Resampling.BILINEAR, box)
        return jpeg.upright(torch.from_numpy(np.atleast_3d(np.array(square))).permute(2, 0, 1), header.orientation)
    except (OSError, SyntaxError, ValueError, EOFError):
        return None  # the decoder of whole pictures says what is wrong, or reads it after all


def _drafted(content: bytes, scale: int) -> Image.Image:
    """A JPEG of a kind that `jpeg.pixels_of` leaves to others, by so much smaller."""
    with JpegImageFile(io.BytesIO(content)) as picture:
        width, height = picture.size
        picture.draft("RGB", (width // scale, height // scale))
        return picture.convert("RGB")


def read_images(
    paths: Sequence[str | os.PathLike],
    side: int,
    out: Tensor | None = None,
    threads: int = 1,
    rules: ReadingRules = RULES,
    begun: Callable[[int], None] | None = None,
    read: Callable[[int, os.stat_result], None] | None = None,
) -> Tensor:
    """Read image files, each as the central square of the picture.

    Args:
        paths: N files.
        side: the side of the squares in pixels.
        out: (N, C, side, side) of `rules.dtype` to write into; made here if not given, in a worker process of a
            DataLoader in memory that it shares with the process it works for.
        threads: how many decode at once.
        rules: how they are read. In a worker process the process that it works for has to watch the time.
        begun: called with the place of each file before it is opened.
        read: called with the place of each file that was read, and with what it was as it was opened.
    Returns:
        (N, C, side, side), uint8 or uint16, as `decode` gives each.
    Raises:
        UnreadableError: naming the files that cannot be read, after all have been tried. None is skipped.
        ValueError: naming the files that reading takes longer of than the rules allow.
    """
    if out is None:
        out = torch.empty(0, dtype=rules.dtype)
        if get_worker_info() is not None:  # else the batch would be copied there, as torch's default_collate knows too
            out.set_(shared_storage(len(paths) * rules.pixel_bytes * side**2))
        out = out.resize_(len(paths), rules.channels, side, side)
    if found := _decoded(paths, side, out.__setitem__, threads, rules, begun, read):
        raise UnreadableError(found)
    return out


def try_images(
    paths: Sequence[str | os.PathLike], side: int, out: Tensor, threads: int = 1, rules: ReadingRules = RULES
) -> list[Unread]:
    """As `read_images`, into the first rows of `out`; returns a line for each file that cannot be read."""
    return list(_decoded(paths, side, out.__setitem__, threads, rules).values())


def unreadable(
    paths: Sequence[str | os.PathLike], side: int, threads: int = 1, rules: ReadingRules = RULES
) -> dict[int, Unread]:
    """The places of the files that `read_images` could not read, and a line for each; every one is decoded."""
    return _decoded(paths, side, lambda i, image: None, threads, rules)


def _decoded(
    paths: Sequence[str | os.PathLike],
    side: int,
    take: Callable[[int, Tensor], None],
    threads: int,
    rules: ReadingRules,
    begun: Callable[[int], None] | None = None,
    read: Callable[[int, os.stat_result], None] | None = None,
) -> dict[int, Unread]:
    """Hand every image to `take`, with its place; a line for each that cannot be read, by its place."""
    bad: dict[int, Unread] = {}

    def one(i: int) -> None:
        if begun is not None:
            begun(i)
        try:
            with open(paths[i], "rb") as file:
                status = os.fstat(file.fileno()) if read is not None else None
                content = file.read()
            take(i, decode_square(content, side, rules))
        except (OSError, ValueError) as error:
            bad[i] = Unread(f"{paths[i]} ({error})")
            bad[i].sound = isinstance(error, Refused)
        else:
            if read is not None and status is not None:
                read(i, status)

    # Of the files alone: torch would share the copying of each small image among its own threads too, those that start
    # below included, and wait for them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if get_worker_info() is not None or (threads <= 1 and rules.timeout_s is None):
            for i in range(len(paths)):
                one(i)
        elif rules.timeout_s is not None:
            in_threads(one, len(paths), threads, rules.timeout_s, lambda late: _too_slow(paths, late, rules))
        else:
            _alone_or_in_threads(one, len(paths), threads)
    finally:
        torch.set_num_threads(before)
    return dict(sorted(bad.items()))


def _alone_or_in_threads(read: Callable[[int], object], count: int, threads: int) -> None:
    """Call `read` with each of 0 ... count - 1, as is faster: some alone and some by all threads show it.

    Threads pay where a disk keeps them waiting, or where they decode without Python's lock. Not all decoders give it
    up, and of small files most of the work is Python's: two threads took twice one's time for PNGs of 32 pixels.
    """
    trial = max(_TRIED, threads)
    if count < 4 * trial:
        in_threads(read, count, threads, None, _never_late)
        return
    began = time.perf_counter()
    in_threads(read, trial, threads, None, _never_late)  # first: what comes first finds the caches cold
    middle, done = time.perf_counter(), trial
    while done < trial + _TRIED and (done == trial or time.perf_counter() - middle < _TRIAL_SECONDS):
        read(done)
        done += 1
    together, alone = (middle - began) / trial, (time.perf_counter() - middle) / (done - trial)
    if alone <= together:
        for i in range(done, count):
            read(i)
    else:
        in_threads(lambda i: read(done + i), count - done, threads, None, _never_late)


def _never_late(late: Sequence[int]) -> Exception:
    raise AssertionError(late)  # without a limit


def too_slow(paths: Sequence[str | os.PathLike], timeout_s: float | None) -> ValueError:
    """The error for files that take too long to read."""
    others = f" and {len(paths) - 3} others" if len(paths) > 3 else ""
    return ValueError(
        f"reading {', '.join(os.fspath(path) for path in paths[:3])}{others} takes more than "
        f"data.read_timeout_s={timeout_s:g} seconds: does the disk or the network file system answer?"
    )


def _too_slow(paths: Sequence[str | os.PathLike], late: Sequence[int], rules: ReadingRules) -> ValueError:
    return too_slow([paths[i] for i in late], rules.timeout_s)


def refuse_unreadable(lines: Sequence[str]) -> None:
    """Raise one ValueError for files that cannot be read, if there are any."""
    if lines:
        raise ValueError(_refusal(lines))


def _refusal(lines: Sequence[str]) -> str:
    others = f", and {len(lines) - 3} others" if len(lines) > 3 else ""
    many = "1 image file" if len(lines) == 1 else f"{len(lines)} image files"
    todo = "" if all(getattr(line, "sound", False) for line in lines) else " Repair or remove them."
    return f"cannot read {many}: {'; '.join(lines[:3])}{others}.{todo}"
