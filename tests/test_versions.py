"""What pyproject.toml declares, what `make test-oldest` installs and what is installed here are of one mind."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["timm"])]
FAST_MOVING = {"torch", "torchvision", "kornia", "pytorch-lightning", "jsonargparse", "wandb", "numpy", "timm", "ruff"}


def bound(requirement: Requirement, operator: str) -> Version | None:
    return next((Version(s.version) for s in requirement.specifier if s.operator == operator), None)


def test_the_oldest_versions_are_the_lower_bounds():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(number) for name, number in pinned.items()} == {r.name: bound(r, ">=") for r in REQUIRED}


def test_what_moves_fast_has_an_upper_bound():
    assert {r.name for r in REQUIRED if bound(r, "<")} >= FAST_MOVING


@pytest.mark.parametrize("requirement", REQUIRED, ids=lambda requirement: requirement.name)
def test_what_is_installed_is_within_the_bounds(requirement):
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_the_annotations_ship_with_the_package():
    assert (ROOT / "simclr" / "py.typed").is_file()
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "py.typed" in tool["setuptools"]["package-data"]["simclr"]
