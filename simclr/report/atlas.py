"""The atlas of a report: thumbnails in one picture, where they lie, and what the script says of each."""

import base64
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simclr.eval import nearest
from simclr.report.pictures import class_colours, data_uri_of, to_picture
from simclr.report.sample import Sample

# Sides of a thumbnail in pixels with a quality of JPEG, the best first; the first that fits is taken.
_TRIES = ((96, 84), (80, 84), (64, 84), (64, 76), (48, 82), (48, 72), (32, 84), (32, 72), (24, 70), (16, 70))
_MOST_BYTES = 1_400_000  # of the picture; base64 makes a third more of it
_BLOCK = 16  # pixels that JPEG codes together; a thumbnail begins at a multiple, so that none bleeds into the next
_NEAREST = 5


def atlas_data(sample: Sample, places: Tensor, said: Tensor | None, file: str) -> dict[str, Any]:
    """What `templates/atlas.html` and its script need.

    Args:
        sample: n images, fewer than 2^16.
        places: (n, 2), where they lie.
        said: (n,) int64, the class that the linear classifier gives to each; None if not known.
        file: what a saved list of images is called, without its ending.
    """
    picture, side, cell, columns = sprite(sample.pixels)
    root, names = _names(sample)
    labels = sample.labels if sample.classes is not None else None
    k = min(_NEAREST, len(names) - 1)
    data = {
        "count": len(names),
        "side": side,
        "cell": cell,
        "columns": columns,
        "places": _packed(_on_a_square(places)),
        "near": _packed(_others(sample.features, k)),
        "labels": None if labels is None else _packed(labels),
        "said": None if labels is None or said is None else _packed(said),
        "classes": None if labels is None else sample.classes,
        "colours": class_colours(len(sample.classes or ())),
        "root": root,
        "names": names,
        "file": file,
    }
    return {
        "data": data,
        "sprite": data_uri_of(picture, "jpeg"),
        "count": len(names),
        "whole": sample.whole,
        "name": sample.name,
        "classes": data["classes"],
        "has_predictions": data["said"] is not None,
    }


def sprite(pixels: Tensor) -> tuple[bytes, int, int, int]:
    """Thumbnails side by side in one JPEG, as large as a page has room for.

    Args:
        pixels: (n, C, S, S) uint8 or uint16.
    Returns:
        The file, the side of a thumbnail, the side of the cell it begins, and how many cells a row has.
    """
    own = pixels.shape[-1]
    tries = [(min(side, own), quality) for side, quality in _TRIES]
    for side, quality in dict.fromkeys(tries):
        cell = -(-side // _BLOCK) * _BLOCK
        columns = math.ceil(math.sqrt(len(pixels)))
        whole = Image.new("RGB", (columns * cell, -(-len(pixels) // columns) * cell))
        for number, image in enumerate(pixels):
            thumbnail = to_picture(image)
            if side < own:
                thumbnail = thumbnail.resize((side, side), Image.Resampling.LANCZOS)
            # Its border goes on to the end of the cell: an edge there would be seen inside.
            padded = np.pad(np.asarray(thumbnail), ((0, cell - side), (0, cell - side), (0, 0)), mode="edge")
            whole.paste(Image.fromarray(padded), (number % columns * cell, number // columns * cell))
        buffer = io.BytesIO()
        # Colours at full resolution as long as the page has room for them: they are what small images consist of.
        whole.save(buffer, "JPEG", quality=quality, subsampling=0 if side == own else 2, optimize=True)
        if buffer.tell() <= _MOST_BYTES:
            break
    return buffer.getvalue(), side, cell, columns


def _on_a_square(places: Tensor) -> Tensor:
    """(n, 2) int64, each axis from 0 to 65 535."""
    low, high = places.amin(0), places.amax(0)
    return ((places - low) / (high - low).clamp_min(1e-12) * 65535).round().long()


def _others(features: Tensor, k: int) -> Tensor:
    """(n, k) int64: the k nearest images to each, without itself."""
    if k < 1:
        return torch.empty(len(features), 0, dtype=torch.int64)
    near = nearest(features, features, k + 1).cpu()  # (n, k + 1)
    itself = near == torch.arange(len(near))[:, None]
    itself[~itself.any(1), -1] = True  # pushed out of the list by images that equal it
    return near[~itself].view(len(near), k)


def _names(sample: Sample) -> tuple[str, list[str]]:
    """The folder that all files lie in, and their names below it; an image that is of no file has a number."""
    if sample.paths is None:
        return "", [f"{sample.name} {number}" for number in sample.index.tolist()]
    root = os.path.commonpath([os.path.dirname(path) for path in sample.paths]) if sample.paths else ""
    return root, [Path(os.path.relpath(path, root)).as_posix() for path in sample.paths]


def _packed(numbers: Tensor) -> str:
    return base64.b64encode(numbers.numpy().astype(np.dtype("<u2")).tobytes()).decode()
