"""TIFFs of science, with many bands, pages or 16-bit colours, through tifffile: an extra, `simclr[tiff]`.

What the file says of its axes (OME, ImageJ, the tags of a band-interleaved image) decides what a channel is. Where it
says nothing, in a plain TIFF of several pages of one size, a page is a channel.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr.data.jpeg import upright
from simclr.data.kinds import GET_TIFF, Refused, has_tifffile
from simclr.data.rules import DEEPEST

_CHANNELS, _PAGES = "CS", "IQ"  # tifffile's letters of axes: channel, sample; images of which nothing is said
_NAMES = {"Z": "depth", "T": "time", "V": "a mosaic", "P": "phase", "H": "lifetime", "E": "spectrum", "A": "angle"}
_ALPHA = (1, 2)  # ExtraSamples: associated, unassociated
_ORIENTATION = 274


class Layout(NamedTuple):
    """What a TIFF holds.

    Attributes:
        channels: alpha included.
        alpha: whether the last of them is.
        bits: of a sample, as they are stored: 1, 8, 16, 32, 64.
        width, height: in pixels.
        pages: images in the file.
        what: for people: "a TIFF", with its pages if they are the channels.
    """

    channels: int
    alpha: bool
    bits: int
    width: int
    height: int
    pages: int
    what: str


def layout_of(content: bytes) -> Layout:
    """What a TIFF holds, before its pixels are decoded.

    Raises:
        Refused: without tifffile, and for axes of which it is not known what to take.
        ValueError: if it is damaged.
    """
    with _file(content) as file:
        return _layout(file)


def samples_of(content: bytes, check: Callable[[Layout], None]) -> tuple[Tensor, bool]:
    """All channels of a TIFF.

    Args:
        content: of a file.
        check: told what it holds before anything is decoded; raises to refuse it.
    Returns:
        (C, H, W) uint8, or int32 where samples have 16 bits, upright; and whether the last channel is alpha.
    Raises:
        Refused: as `layout_of`, and for samples that are no whole numbers of 16 bits.
        ValueError: if it is damaged.
    """
    with _file(content) as file:
        layout, series = _layout(file), file.series[0]
        check(layout)
        orientation = series.keyframe.tags.valueof(_ORIENTATION) or 1
        values = series.asarray(maxworkers=1)
        places = [series.axes.index(axis) for axis in "YX"]
        values = np.moveaxis(values, places, (-2, -1)).reshape(layout.channels, layout.height, layout.width)
    return upright(_whole_numbers(values), int(orientation)), layout.alpha


def _whole_numbers(values: np.ndarray) -> Tensor:
    if values.dtype == np.bool_:
        return torch.from_numpy(values.astype(np.uint8) * 255)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values))
    if values.dtype.kind not in "iu":
        raise Refused("floating-point pixels, which have no known range: convert it to 8 or 16 bits")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > DEEPEST:
        raise Refused(f"integers from {low} to {high}, beyond 16 bits without a sign: convert it to 8 or 16 bits")
    return torch.from_numpy(values.astype(np.int32))


def _layout(file: Any) -> Layout:
    series = file.series[0]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    if not {"Y", "X"} <= sizes.keys():
        raise Refused(f"a TIFF with the axes {series.axes}, of which none are height and width: convert it")
    others = {axis: size for axis, size in sizes.items() if axis not in "YX" and size > 1}
    of_channels = [axis for axis in others if axis in _CHANNELS + _PAGES]
    strange = [axis for axis in others if axis not in of_channels]
    if strange:
        along = ", ".join(f"{others[axis]} images along {_NAMES.get(axis, axis)}" for axis in strange)
        raise Refused(f"a TIFF of {along}, of which it is not known which is meant: save one of them")
    if len(of_channels) > 1:
        pages = next((axis for axis in of_channels if axis in _PAGES), of_channels[0])
        raise Refused(f"a TIFF of {others[pages]} images of several channels, where one is needed: save one of them")
    channels = others[of_channels[0]] if of_channels else 1
    extra = tuple(getattr(series.keyframe, "extrasamples", ()))
    alpha = "S" in of_channels and bool(extra) and int(extra[-1]) in _ALPHA
    pages = len(file.pages)
    what = f"a TIFF of {pages} pages, and so" if of_channels and of_channels[0] in _PAGES else "a TIFF"
    bits = 1 if series.dtype == np.bool_ else 8 * series.dtype.itemsize
    return Layout(channels, alpha, bits, sizes["X"], sizes["Y"], pages, what)


class _Heard(logging.Filter):
    """Keeps what tifffile logs while a thread of ours reads, and lets the rest pass."""

    def __init__(self) -> None:
        super().__init__()
        self.of = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        lines = getattr(self.of, "lines", None)
        if lines is None:
            return True
        if record.levelno >= logging.ERROR:
            lines.append(record.getMessage())
        return False


_HEARD = _Heard()


@contextmanager
def _file(content: bytes) -> Iterator[Any]:
    """A file in tifffile's hands; whatever it says or logs of damage is a `ValueError`."""
    if not has_tifffile():
        raise Refused(f"a TIFF of several bands, pages or 16-bit colours, which is read after {GET_TIFF}")
    import tifffile

    logging.getLogger("tifffile").addFilter(_HEARD)  # once: the same one is not added twice
    lines: list[str] = []
    _HEARD.of.lines = lines
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            if not file.series:
                raise ValueError("it holds no image")
            yield file
            if lines:
                raise ValueError(lines[0])
    except Refused as error:
        if lines:  # it is not what it seems
            raise ValueError(f"damaged TIFF: {lines[0]}") from error
        raise
    except Exception as error:  # of tifffile, of NumPy, of each codec
        said = " ".join(str(error).split()) or type(error).__name__
        if "imagecodecs" in said:  # which decodes what tifffile does not
            raise Refused(f"a TIFF whose compression is read after {GET_TIFF}") from error
        raise ValueError(f"damaged TIFF: {said}") from error
    finally:
        _HEARD.of.lines = None
