"""The built-in images: deterministic, balanced, and beyond a linear classifier on raw pixels."""

import math

import pytest
import torch

from simclr.data.shapes import _REACH, CLASSES, _outline, _polygon_distance, _templates, draw_shapes


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


def test_the_images_stay_what_they_are():
    """Results are compared across versions: a change of the images must be noticed, last bits by platform aside."""
    images, _ = draw_shapes(50, 32)
    assert images.double().mean().item() == pytest.approx(128.84, abs=0.05)
    assert images.double().std().item() == pytest.approx(52.52, abs=0.05)


def test_all_shapes_have_the_area_of_the_unit_disc():
    pixel = 2 * _REACH / _templates().shape[-1]
    for name, distance in zip(CLASSES, _templates(), strict=True):
        cover = (0.5 - distance / pixel).clamp(0, 1)
        assert cover.sum().item() * pixel**2 == pytest.approx(math.pi, rel=0.01), name
        border = torch.cat((distance[0], distance[-1], distance[:, 0], distance[:, -1]))
        assert border.min() > 0.3, f"{name} reaches the end of its template"


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
