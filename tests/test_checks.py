"""Checks that several rooms share: what is out of a range, what a name stands for, and the words for it."""

import math

import pytest

from simclr.checks import find_named, listed, out_of_range, refuse

INSIDE = {"epochs": 1, "lr": 1e-9, "decay": 0, "loss": "a", "unnamed": -1, "left_open": None}
RANGES = {"counts": ("epochs", "left_open"), "positive": ("lr", "absent"), "not_negative": ("decay",)}


def problems(**changed):
    return out_of_range({**INSIDE, **changed}, **RANGES, choices={"loss": ("a", "b")})


def test_the_ends_of_the_ranges_what_is_left_open_and_what_has_no_range_are_fine():
    assert problems() == []


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("epochs", 0, "is not 1 or more"),
        ("epochs", math.nan, "is not 1 or more"),
        ("lr", 0, "is not positive"),
        ("lr", math.nan, "is not positive"),
        ("lr", math.inf, "is not positive"),
        ("decay", -0.1, "is negative"),
        ("decay", math.nan, "is negative"),
        ("loss", "c", "is none of a, b"),
    ],
)
def test_what_is_outside_is_named_with_its_value(name, value, wrong):
    assert problems(**{name: value}) == [f"{name}={value} {wrong}"]


def test_all_problems_are_one_error():
    with pytest.raises(ValueError, match=r"^epochs=0 is not 1 or more; lr=-1 is not positive\.$"):
        refuse(problems(epochs=0, lr=-1))
    refuse([])


def test_a_name_is_one_of_those_known_or_a_path():
    known = {"root": "math.sqrt"}
    assert find_named("function", "root", known, "a function") is math.sqrt
    assert find_named("function", "math.floor", known, "a function") is math.floor


@pytest.mark.parametrize("name", ["", "cube", "math.cube", "no.such.module", ".sqrt"])
def test_a_name_of_nothing_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=r"^function=.* is none of root, nor the path of a function: .*\.$"):
        find_named("function", name, {"root": "math.sqrt"}, "a function")


def test_a_list_ends_with_how_many_more_there_are():
    assert listed("abc", 3) == "a, b, c"
    assert listed((i for i in range(5)), 3) == "0, 1, 2 and 2 more"
    assert listed([]) == ""
