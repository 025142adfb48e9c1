"""The pictures of a report: frames around what is wrong, charts that take the page's colours, names that stay text."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from simclr.report.pictures import (
    ACCENT,
    WRONG,
    class_colours,
    confusion_picture,
    data_uri,
    draw_map,
    neighbour_picture,
    save_chart,
)


def rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def test_only_wrong_neighbours_have_a_frame():
    grey = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    neighbours = grey[:, None].repeat(1, 3, 1, 1, 1)  # (2, 3, 3, 8, 8)
    wrong = torch.tensor([[False, True, False], [False, False, False]])
    picture = neighbour_picture(grey, neighbours, wrong, cell=8)
    step, gap, top = 16, 18, 26
    corners = [[picture.getpixel((gap + (k + 1) * step, top + n * step)) for k in range(3)] for n in range(2)]
    white = (255, 255, 255)
    assert corners == [[white, rgb(WRONG), white], [white] * 3]
    assert picture.size == (4 * step + gap, top + 2 * step)


def test_a_cell_of_many_classes_is_as_strong_as_its_share():
    picture = confusion_picture([[7, 1], [0, 0]], [8, 1])
    cells = [[picture.getpixel((j, i)) for j in range(2)] for i in range(2)]
    assert cells == [
        [(*rgb(ACCENT), 255 * 7 // 8), (*rgb(WRONG), 255 * 5 // 8)],  # mistakes are five times as strong
        [(*rgb(WRONG), 0), (*rgb(ACCENT), 0)],
    ]


def test_a_chart_is_a_picture_whatever_its_names(tmp_path):
    names = ["<script>alert('1')</script>", "a $ b_"]
    figure = draw_map(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2, names)
    save_chart(figure, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        levels = picture.convert("L").getextrema()
    assert levels[0] < 128 < levels[1]  # something is drawn, on something light or dark


@pytest.mark.parametrize("count", [3, 10, 40, 300])
def test_every_class_has_a_colour_of_its_own(count):
    colours = class_colours(count)
    assert len(set(colours)) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_an_address_holds_the_picture():
    picture = Image.new("RGB", (3, 2), ACCENT)
    kind, _, content = data_uri(picture).partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).tobytes() == bytes(rgb(ACCENT)) * 6
    assert data_uri(picture, "jpeg").startswith("data:image/jpeg;base64,/9j/")
