"""The images of an embedded folder that are nearest to one, by the cosine of their features; and a picture of them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simclr.data.decode import RULES, ReadingRules, decode_square
from simclr.eval.features import check_finite
from simclr.eval.knn import nearest
from simclr.inputs import for_display
from simclr.use.embedded import Embedded, in_a_line

_NUMBERS = 2**25  # of a folder's features that are in memory at a time
_CELL, _PAD, _COLUMNS = 160, 8, 5
_INK, _MUTED = "#1b1f24", "#667080"


def nearest_rows(embedded: Embedded, query: Tensor, k: int) -> list[tuple[int, float]]:
    """The rows of highest cosine similarity to a query, the nearest first; of equal ones the earlier.

    Args:
        embedded: N rows, of which some are read at a time.
        query: (F,) float.
        k: how many; all if there are fewer.
    Returns:
        (row, cosine), k of them.
    Raises:
        ValueError: if features are not finite, or the query has another width.
    """
    embedded.refuse_query(query)
    found: list[tuple[float, int]] = []
    rows = max(1, _NUMBERS // embedded.features.shape[1])
    for start in range(0, len(embedded.features), rows):
        chunk = torch.from_numpy(np.array(embedded.features[start : start + rows]))
        check_finite(f"the features in {embedded.folder}", chunk)
        near = nearest(query[None], chunk, min(k, len(chunk)))[0]
        cosines = torch.nn.functional.cosine_similarity(chunk[near].double(), query[None].double())
        found += [(-cosine, start + row) for cosine, row in zip(cosines.tolist(), near.tolist(), strict=True)]
        found = sorted(found)[:k]
    return [(row, -cosine) for cosine, row in found]


def contact_sheet(query: str, hits: Sequence[tuple[str, str, float]], rules: ReadingRules = RULES) -> Image.Image:
    """A picture of the query and what was found, the squares that an encoder sees, with cosines and names.

    Args:
        query: its file.
        hits: a file, its name for people and its cosine each. A file that is gone is drawn as an empty frame.
        rules: how files are read.
    """
    cells = [(query, "query", query.rpartition("/")[2]), *((path, f"{cos:.3f}", name) for path, name, cos in hits)]
    columns = min(_COLUMNS, len(cells))
    step, height = _CELL + _PAD, _CELL + _PAD + 40
    sheet = Image.new("RGB", (columns * step + _PAD, -(-len(cells) // columns) * height + _PAD), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    for place, (path, title, name) in enumerate(cells):
        x, y = _PAD + place % columns * step, _PAD + place // columns * height
        picture = _square(path, rules)
        if picture is None:
            draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), outline=_MUTED)
            draw.text((x + _CELL / 2, y + _CELL / 2), "not there", _MUTED, small, anchor="mm")
        else:
            sheet.paste(picture, (x, y))
        if place == 0:
            draw.rectangle((x - 3, y - 3, x + _CELL + 2, y + _CELL + 2), outline=_INK, width=3)
        draw.text((x, y + _CELL + 5), title, _INK, large)
        draw.text((x, y + _CELL + 24), _fitting(in_a_line(name), draw, small), _MUTED, small)
    return sheet


def _square(path: str, rules: ReadingRules) -> Image.Image | None:
    try:
        with open(path, "rb") as file:
            pixels = for_display(decode_square(file.read(), _CELL, rules))
    except (OSError, ValueError):
        return None
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _fitting(name: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of a name as goes below a cell: its end, which tells files apart."""
    for kept in range(len(name), 0, -1):
        text = name if kept == len(name) else f"...{name[-kept:]}"
        if draw.textlength(text, font) <= _CELL:
            return text
    return ""
