"""The built-in images: deterministic, balanced, and beyond a linear classifier on raw pixels."""

import math

import pytest
import torch

from simclr.data.shapes import _GROUND, _REACH, CLASSES, _outline, _polygon_distance, _templates, draw_shapes


def test_an_image_does_not_depend_on_how_many_are_drawn_with_it():
    many, labels = draw_shapes(600, 32)
    for count in (1, 255, 257):
        few, few_labels = draw_shapes(count, 32)
        assert torch.equal(few, many[:count])
        assert torch.equal(few_labels, labels[:count])


def test_training_and_test_images_differ_and_classes_are_balanced():
    train, labels = draw_shapes(100, 32, part=0)
    test, _ = draw_shapes(100, 32, part=1)
    assert train.dtype == torch.uint8
    assert labels.bincount().tolist() == [10] * len(CLASSES)
    images = torch.cat((train, test)).flatten(1)
    assert len(images.unique(dim=0)) == 200


PLACES = [(3, 5), (9, 20), (14, 11), (17, 26), (22, 8), (27, 18)]  # row and column in 32 pixels
PINNED = {  # (part, image): red, green and blue at these places
    (0, 0): [(134, 136, 139), (132, 135, 138), (20, 55, 110), (127, 129, 132), (116, 118, 121), (3, 44, 107)],
    (0, 1): [(124, 126, 129), (109, 111, 114), (233, 199, 142), (107, 109, 112), (127, 129, 132), (172, 157, 131)],
    (0, 6): [(107, 110, 113), (117, 120, 122), (111, 114, 116), (32, 64, 112), (110, 113, 115), (219, 190, 140)],
    (0, 257): [(131, 134, 136), (129, 132, 134), (125, 128, 130), (16, 52, 110), (118, 121, 123), (115, 117, 120)],
    (1, 0): [(131, 134, 136), (117, 120, 123), (125, 127, 130), (102, 107, 115), (32, 63, 112), (114, 116, 119)],
    (1, 4): [(113, 116, 118), (126, 128, 131), (106, 110, 116), (31, 63, 112), (106, 108, 111), (108, 111, 113)],
}


def far_from_pinned(parts: list[torch.Tensor]) -> set[tuple[int, int]]:
    """The pinned images of which a pixel is off by more than 2 of 255: sines and rounding differ by platform."""
    rows, columns = (list(axis) for axis in zip(*PLACES, strict=True))
    found = {(part, image): parts[part][image][:, rows, columns].T.int() for part, image in PINNED}
    return {key for key, pixels in found.items() if (pixels - torch.tensor(PINNED[key])).abs().max() > 2}


@pytest.fixture(scope="module")
def drawn() -> list[torch.Tensor]:
    """The first images of both parts."""
    return [draw_shapes(258, 32, part)[0] for part in (0, 1)]


def test_the_images_stay_what_they_are(drawn):
    """Results are compared across versions: a change of the images must be noticed."""
    assert far_from_pinned(drawn) == set()


CHANGES = {
    "mirrored": lambda images: images.flip(3),
    "upside down": lambda images: images.flip(2),
    "transposed": lambda images: images.mT,
    "turned": lambda images: images.rot90(1, (2, 3)),
    "blue first": lambda images: images.flip(1),
    "green first": lambda images: images.roll(-1, 1),
    "a pixel down": lambda images: images.roll(1, 2),
    "a pixel to the right": lambda images: images.roll(1, 3),
    "an image on": lambda images: images.roll(-1, 0),
    "another image of the class": lambda images: images.roll(-10, 0),
    "negative": lambda images: 255 - images,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_images_is_seen_in_those_pinned(drawn, change):
    assert len(far_from_pinned([change(images) for images in drawn])) >= len(PINNED) - 1


def test_the_mean_image_of_every_class_is_the_ground():
    """Why a linear classifier fails: amber and navy cancel. 100 images of each class, mean over places too."""
    images, labels = draw_shapes(1000, 32)
    means = torch.stack([images[labels == c].double().mean((0, 2, 3)) for c in range(len(CLASSES))]) / 255
    assert (means - _GROUND).abs().max() < 0.02


def test_shapes_are_distinct_of_similar_size_and_inside_their_templates():
    pixel = 2 * _REACH / _templates().shape[-1]
    covers = (0.5 - _templates() / pixel).clamp(0, 1)
    areas = covers.sum((1, 2)) * pixel**2
    assert areas[CLASSES.index("disc")].item() == pytest.approx(math.pi, rel=0.01)
    assert areas[CLASSES.index("ring")].item() == pytest.approx(math.pi, rel=0.01)
    assert areas.min() > math.pi / 3
    assert areas.max() < 1.2 * math.pi
    borders = torch.cat((_templates()[:, [0, -1]].flatten(1), _templates()[:, :, [0, -1]].flatten(1)), dim=1)
    assert borders.min() > 0.3, "a shape reaches the end of its template"
    overlap = (covers[:, None] * covers[None]).sum((2, 3)) / torch.maximum(covers[:, None], covers[None]).sum((2, 3))
    assert overlap.fill_diagonal_(0).max() < 0.9


def test_polygon_distance_by_hand():
    square = torch.tensor([(-1.0, -1), (1, -1), (1, 1), (-1, 1)], dtype=torch.float64)
    points = torch.tensor([(0, 0), (0.5, 0), (3, 0), (4, 5)], dtype=torch.float64)
    assert _polygon_distance(points, square).tolist() == pytest.approx([-1, -0.5, 2, 5])
    cross = _outline("cross")
    assert _polygon_distance(torch.tensor([(2, 2), (2, 0)], dtype=torch.float64), cross).tolist() == [1, -1]


def test_larger_images_show_the_same_pictures():
    small, _ = draw_shapes(20, 32)
    large, _ = draw_shapes(20, 64)
    reduced = torch.nn.functional.avg_pool2d(large.double(), 2)
    assert (reduced - small.double()).abs().mean() < 2


def test_a_linear_classifier_on_raw_pixels_does_poorly():
    train, labels = draw_shapes(2048, 32)
    test, test_labels = draw_shapes(1024, 32, part=1)
    x, y = train.flatten(1) / 255, torch.nn.functional.one_hot(labels, 10).float()
    mean = x.mean(0)
    gram = (x - mean) @ (x - mean).T  # ridge regression in its dual form: fewer images than pixels
    similar = (test.flatten(1) / 255 - mean) @ (x - mean).T
    for decay in (1e1, 1e2, 1e3):
        weight = torch.linalg.solve(gram + decay * torch.eye(len(gram)), y - y.mean(0))
        assert ((similar @ weight).argmax(1) == test_labels).double().mean() < 0.2
