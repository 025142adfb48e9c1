"""The atlas: each image has its own cell, its place, its path and its neighbours, in as many bytes as a page has."""

import base64
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from simclr.report.alike import CORRELATION, COSINE, find_alike
from simclr.report.atlas import atlas_data, sprite
from simclr.report.sample import Sample


def sample_of(pixels, features, labels=None, classes=None, paths=None):
    return Sample("set", torch.arange(len(pixels)), pixels, features, labels, classes, len(pixels), paths)


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbers(text):
    return np.frombuffer(base64.b64decode(text), "<u2").astype(int)


def test_each_image_lies_in_its_own_cell():
    colours = noise(50, 3, 1, 1)
    file, side, cell, columns = sprite(colours.expand(50, 3, 20, 20))
    picture = Image.open(io.BytesIO(file))
    assert (side, cell, picture.size) == (20, 32, (8 * 32, 7 * 32))
    for number, colour in enumerate(colours.flatten(1).tolist()):
        x, y = number % columns * cell, number // columns * cell
        for corner in ((x, y), (x + side - 1, y + side - 1)):
            assert max(abs(a - b) for a, b in zip(picture.getpixel(corner), colour, strict=True)) < 12


def test_large_images_become_as_small_as_the_page_needs():
    file, side, _, _ = sprite(noise(600, 3, 160, 160))  # noise, which no JPEG makes small
    assert len(file) <= 1_400_000
    assert 16 <= side < 96


def test_the_data_say_where_each_image_lies_and_which_are_near():
    features = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    features[7] = features[3]  # equal ones push an image out of its own list
    features[9] = features[3]
    paths = [os.path.join(os.sep, "data", "c", f"{i}.png") for i in range(40)]
    places = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    labels, said = torch.arange(40) % 2, torch.zeros(40, dtype=torch.int64)
    found = atlas_data(sample_of(noise(40, 3, 8, 8), features, labels, ["a", "b"], paths), places, said, "out")
    data = found["data"]
    near = numbers(data["near"]).reshape(40, 5)
    for i in range(40):
        cosine = [-float(features[i].double() @ features[j].double()) if j != i else 9 for j in range(40)]
        expected = np.sort(cosine)[:5]
        assert i not in near[i]
        assert len(set(near[i].tolist())) == 5
        assert np.sort(np.array(cosine)[near[i]]) == pytest.approx(expected, abs=1e-6)
    at = numbers(data["places"]).reshape(40, 2) / 65535
    assert at.min(0).tolist() == [0, 0]
    assert at.max(0).tolist() == [1, 1]
    spans = places.amax(0) - places.amin(0)
    assert torch.allclose(torch.from_numpy(at).float() * spans, places - places.amin(0), atol=1e-3)
    assert (data["root"], data["names"][3]) == (os.path.join(os.sep, "data", "c"), "3.png")
    assert (numbers(data["labels"]).tolist(), found["has_predictions"]) == (labels.tolist(), True)


def test_images_without_files_and_labels_have_numbers():
    found = atlas_data(sample_of(noise(3, 3, 8, 8), torch.eye(3)), torch.randn(3, 2), None, "out")
    assert found["data"]["names"] == ["set 0", "set 1", "set 2"]
    assert (found["data"]["labels"], found["classes"], found["has_predictions"]) == (None, None, False)


def test_copies_mirrored_copies_and_images_that_only_look_alike_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    test, bank = noise(6, 3, 24, 24, seed=1), noise(30, 3, 24, 24, seed=2)
    bank[4] = test[2]  # the same pixels
    bank[11] = test[3].flip(-1)  # mirrored
    bank[12] = (test[5].float() * 0.9 + 10).byte()  # another contrast
    features = [torch.randn(n, 32, generator=generator) for n in (6, 30)]
    features[1][4] = features[0][2]
    for i, j in ((3, 11), (5, 12)):
        features[1][j] = features[0][i] + 0.02
    features[1][20] = features[1][21]  # near by their features alone
    found = find_alike([sample_of(test, features[0]), sample_of(bank, features[1])])
    pairs = {(pair.a, pair.b): pair for pair in found.pairs}
    assert set(pairs) == {((0, 2), (1, 4)), ((0, 3), (1, 11)), ((0, 5), (1, 12))}
    assert [pair.same for pair in found.pairs] == [True, False, False]
    assert (found.images, found.same, found.same_across, found.near) == (36, 1, 1, 2)
    assert found.pairs[1].cosine >= found.pairs[2].cosine >= COSINE
    assert CORRELATION < 1


def test_images_of_one_colour_are_no_near_duplicates_and_equal_ones_are_a_group():
    flat = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8) * 40
    equal = noise(1, 3, 8, 8).expand(4, 3, 8, 8)
    pixels = torch.cat((flat, equal))
    found = find_alike([sample_of(pixels, torch.ones(9, 4))])
    assert (found.same, found.near) == (3, 0)
    assert [(pair.a[1], pair.b[1]) for pair in found.pairs] == [(5, 6), (5, 7), (5, 8)]
