"""Image files to uint8 RGB squares.

JPEGs go through simplejpeg (libjpeg-turbo, `simclr.data.jpeg`), PNGs through kornia_rs, those of unusual kinds through
torchvision's decoder. Everything else (WebP, BMP, GIF, TIFF, AVIF, HEIC ...) and what those decoders refuse goes
through Pillow. All honour the EXIF orientation; alpha is dropped. Photographs eight times as large as is asked for, and
larger, are read by libjpeg's scaled decoding (`_reduced`).
"""

import contextlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from simclr.data import jpeg, kinds, png
from simclr.data.kinds import Refused
from simclr.data.watch import in_threads
from simclr.torch_internals import has_image_decoders, shared_storage

# The operator itself: torchvision 0.29 deprecates its Python wrapper (a warning per call), not what stands behind it.
# A torchvision without it leaves Pillow, which is slower and gives the same images.
_DECODE = torch.ops.image.decode_image if has_image_decoders() else None
_RGB = torchvision.io.ImageReadMode.RGB.value

_VERSION = 2  # of this file: to be raised with every change that gives other pixels
_PILLOW = threading.Lock()
DEEPEST = 2**16 - 1  # the largest sample of 16 bits


@dataclass(frozen=True)
class ReadingRules:
    """How image files are read.

    Attributes:
        max_pixels: a picture of more is refused before it is decoded; None for no limit. The default is what Pillow
            refuses too, twice the size of which it warns.
        sixteen_bit_max: which value of 16-bit samples is white, 1 to 65 535: value v becomes v * 256 / (this + 1).
        timeout_s: seconds that reading one file may take; None for no limit.
    """

    max_pixels: int | None = 178_956_970
    sixteen_bit_max: int = DEEPEST
    timeout_s: float | None = None


RULES = ReadingRules()


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


def decoder() -> str:
    """What decides which pixels a file gives: this code, and the libraries that decode and resize."""
    # Without the local part: 2.11.0+cu130 and 2.11.0+cpu decode and resize by the same code on the CPU.
    versions = (of.partition("+")[0] for of in (torch.__version__, torchvision.__version__, pillow_version))
    more = ("simplejpeg", "kornia-rs", *(("pillow-heif",) if kinds.has_heif() else ()))
    return f"{_VERSION} {' '.join(versions)} {_DECODE is not None} {' '.join(map(version, more))}"


def decode(content: bytes, rules: ReadingRules = RULES) -> Tensor:
    """Decode one image file's content: any size, any colour type, the first frame of an animation.

    Returns:
        (3, H, W) uint8 RGB, upright by its EXIF orientation, in any strides. 16-bit channels keep their high byte, or
        what `rules.sixteen_bit_max` makes of them.
    Raises:
        ValueError: if it cannot be read to its end, is known to be damaged, or is of a kind or size that is not read.
    """
    return _eight_bits(_decoded_samples(content, rules), rules)


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
    """(3, H, W), upright: uint8, or int32 where a sample has 16 bits."""
    if not content:
        raise ValueError("the file is empty")
    if content.startswith(jpeg.SIGNATURE):
        header = jpeg.header_of(content)
        _refuse_too_many(header.width, header.height, rules)
        array = jpeg.pixels_of(content, header)
        if array is not None:
            return jpeg.upright(torch.from_numpy(array).permute(2, 0, 1), header.orientation)
        survives = True
    elif content.startswith(png.SIGNATURE):
        of_png = png.check_checksums(content)
        _refuse_too_many(of_png.width, of_png.height, rules)
        array = png.pixels_of(content, of_png)
        if array is not None:
            return torch.from_numpy(array).permute(2, 0, 1).expand(3, -1, -1)
        survives = png.has_sound_pixels(content, of_png)
    else:
        survives = False
    if _DECODE is not None and survives:
        try:
            image = _DECODE(torch.frombuffer(bytearray(content), dtype=torch.uint8), _RGB, True)
        except RuntimeError:
            pass  # Pillow reads some that libjpeg and libpng refuse, and names what is wrong with the rest
        else:
            return image if image.dtype == torch.uint8 else image.to(torch.int32)
    try:
        with opened(content) as picture:
            _refuse_too_many(*picture.size, rules)
            if Image.MAX_IMAGE_PIXELS is not None and math.prod(picture.size) > Image.MAX_IMAGE_PIXELS:
                with _of_any_size():  # TIFFs are measured a second time as they are decoded
                    picture.load()
            if (
                rules.sixteen_bit_max != DEEPEST
                and picture.mode in ("RGB", "RGBA", "LA")
                and _is_deep(content, picture)
            ):
                raise Refused("16-bit colours that Pillow gives 8 bits of, so that data.sixteen_bit_max cannot be used")
            return _samples_of(picture)
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
        (3, H, W) uint8 RGB, upright by its EXIF orientation. 16-bit channels keep their high byte, or what
        `rules.sixteen_bit_max` makes of them.
    Raises:
        ValueError: for pixels of no known range: floating-point numbers, and integers beyond 16 bits.
    """
    return _eight_bits(_samples_of(picture), rules)


def _samples_of(picture: Image.Image) -> Tensor:
    """(3, H, W) of a Pillow image, upright: uint8, or int32 where a sample has 16 bits."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise Refused("floating-point pixels, which have no known range: convert it to 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255
        values = np.array(picture).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > DEEPEST:
            raise Refused(f"integers from {low} to {high}, beyond 16 bits without a sign: convert it to 8 or 16 bits")
        return torch.from_numpy(values.astype(np.int32)).expand(3, -1, -1)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # as Pillow asks for
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def _eight_bits(samples: Tensor, rules: ReadingRules) -> Tensor:
    """uint8 of what may have 16 bits, by multiplying with 256 / (sixteen_bit_max + 1): at 65 535 the high byte.

    Raises:
        ValueError: for a sample above that maximum, which would have been cut off.
    """
    if samples.dtype == torch.uint8:
        return samples
    if (peak := int(samples.max())) > rules.sixteen_bit_max:
        raise Refused(f"16-bit values up to {peak}, above data.sixteen_bit_max={rules.sixteen_bit_max}: raise it")
    return (samples * 256 // (rules.sixteen_bit_max + 1)).to(torch.uint8).contiguous()


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


def decode_square(content: bytes, side: int, rules: ReadingRules = RULES) -> Tensor:
    """The central square of one image file's content, as `to_square` of `decode`, large JPEGs faster.

    Returns:
        (3, side, side) uint8.
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
    _refuse_too_many(header.width, header.height, rules)
    width, height, short = header.width, header.height, min(header.width, header.height)
    scale = 8 if short >= 16 * side else 4
    if short < 2 * scale * side:
        return None
    array = jpeg.pixels_of(content, header, scale)
    try:
        picture = Image.fromarray(array) if array is not None else _drafted(content, scale)
        # In fractions of the reduced picture's pixels, so that the square is the same one to a hair; and before the
        # picture is turned upright, because what fills its last pixels up is at the right and at the bottom.
        left, top, reach = (width - short) / 2 / scale, (height - short) / 2 / scale, short / scale
        box = (left, top, left + reach, top + reach)
        square = picture.resize((side, side), Image.Resampling.BILINEAR, box)
        return jpeg.upright(torch.from_numpy(np.array(square)).permute(2, 0, 1), header.orientation)
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
        out: (N, 3, side, side) uint8 to write into; made here if not given, in a worker process of a DataLoader in
            memory that it shares with the process it works for.
        threads: how many decode at once.
        rules: how they are read. In a worker process the process that it works for has to watch the time.
        begun: called with the place of each file before it is opened.
        read: called with the place of each file that was read, and with what it was as it was opened.
    Returns:
        (N, 3, side, side) uint8.
    Raises:
        UnreadableError: naming the files that cannot be read, after all have been tried. None is skipped.
        ValueError: naming the files that reading takes longer of than the rules allow.
    """
    if out is None:
        out = torch.empty(0, dtype=torch.uint8)
        if get_worker_info() is not None:  # else the batch would be copied there, as torch's default_collate knows too
            out.set_(shared_storage(len(paths) * 3 * side**2))
        out = out.resize_(len(paths), 3, side, side)
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
        else:
            in_threads(one, len(paths), threads, rules.timeout_s, lambda late: _too_slow(paths, late, rules))
    finally:
        torch.set_num_threads(before)
    return dict(sorted(bad.items()))


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
