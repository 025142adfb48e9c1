"""Every page at the top and in docs/: links lead somewhere, files that are named are there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_project(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert not broken, broken


def test_the_architecture_names_files_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:simclr/|tests/)?[\w/]+\.py|[\w/]+/)`", text))
    homes = (ROOT, ROOT / "simclr", ROOT / "simclr" / "training")
    missing = [name for name in named if not any((home / name).exists() for home in homes)]
    # In a row on cli/.
    assert set(missing) <= {"unset.py", "refusals.py", "internals.py"}, missing


def test_every_room_of_the_package_is_on_the_page():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "simclr").glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}/`" not in text and f"{room}/" not in text] == []


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/test.yml"])
def test_what_tools_read_is_yaml(name):
    assert yaml.safe_load((ROOT / name).read_text())


def test_the_citation_and_the_hooks_have_the_versions_of_the_project():
    import tomllib
    from importlib.metadata import version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"] == version("simclr")
    [ruff] = [r for r in project["optional-dependencies"]["dev"] if r.startswith("ruff")]
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [hooks] = [repository for repository in repositories if repository["repo"] != "local"]
    lowest, highest = (tuple(map(int, part.split("."))) for part in re.findall(r"\d+\.\d+", ruff))
    assert lowest <= tuple(map(int, hooks["rev"].removeprefix("v").split(".")[:2])) < highest
