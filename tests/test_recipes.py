"""The recipes: found by name from any folder, in a checkout and in an installed wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from simclr.byol import BYOL
from simclr.cli.recipes import config_file, recipes
from simclr.data import ImageData
from simclr.module import SimCLR
from strict.sitecustomize import environment
from tiny import fit

ROOT = Path(__file__).parents[1]


def test_a_recipe_is_found_by_name_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("shapes_resnet8", "pretrain") == ROOT / "configs" / "pretrain" / "shapes_resnet8.yaml"
    (tmp_path / "shapes_resnet8").mkdir()  # a folder of that name is in nobody's way
    assert config_file("shapes_resnet8", "pretrain").is_file()
    (tmp_path / "shapes_resnet8").rmdir()
    (tmp_path / "shapes_resnet8").write_text("model: {temperature: 0.3}\n")
    assert config_file("shapes_resnet8", "pretrain") == Path("shapes_resnet8")
    assert set(recipes("linear_eval")) == {"cifar10"}
    with pytest.raises(ValueError, match=r"Did you mean --config cifar10_cpu\? Recipes: cifar10_cpu, "):
        config_file("cifar10cpu", "pretrain")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pip's and setuptools' own, of each other
def test_the_wheel_holds_every_file_and_finds_its_recipes(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in ("simclr", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(tmp_path / "installed")
    ours = (path for path in (ROOT / "simclr").rglob("*") if path.is_file() and path.suffix != ".pyc")
    expected = {path.relative_to(ROOT).as_posix() for path in ours}
    assert "simclr/report/templates/page.html" in expected
    expected |= {f"simclr/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert held == expected
    program = "from simclr.cli.recipes import config_file; print(config_file('shapes_resnet8', 'pretrain'))"
    env = environment(tmp_path / "installed")
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == tmp_path / "installed" / "simclr/configs/pretrain/shapes_resnet8.yaml", found


def patient(name: str, path: Path) -> object:
    """A recipe's name; at 128 pixels and more a step takes a CPU seconds."""
    size = yaml.safe_load(path.read_text())["model"].get("image_size", 32)
    return pytest.param(name, marks=pytest.mark.slow if size >= 128 else ())


@pytest.mark.parametrize("name", [patient(*recipe) for recipe in recipes("pretrain").items()])
def test_a_recipe_builds_and_takes_a_step(name, tmp_path):
    settings = yaml.safe_load(recipes("pretrain")[name].read_text())
    method = BYOL if settings.get("method") == "byol" else SimCLR
    of_model = {key: value for key, value in settings["model"].items() if key != "micro_batch_size"}
    model = method(**of_model, batch_size=4)
    before = [weight.clone() for weight in model.parameters()]
    data = ImageData(shapes_train=8, batch_size=4, image_size=of_model.get("image_size", 32), workers=0)
    # Of two steps: with warm-up the first one's rate is zero.
    fit(tmp_path, model, data, max_epochs=settings["trainer"].get("max_epochs", 100), max_steps=2)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert any(not torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", recipes("pretrain"))
def test_a_recipe_says_what_it_needs_and_what_came_of_it(name):
    text = recipes("pretrain")[name].read_text()
    head = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    assert "--config" in head
    assert "Hardware:" in head
    assert "easured" in head
    if "Published" in head:
        assert re.search(r"(linear|kNN)[^.]*\.\d|around \d\d %", head), "by which protocol, and how much"


def test_the_recipe_for_a_cpu_costs_no_more_multiply_adds_than_fifteen_epochs_of_whole_views():
    settings = yaml.safe_load(recipes("pretrain")["cifar10_cpu"].read_text())
    model = SimCLR(**settings["model"])

    def multiply_adds(side: int) -> int:
        with FlopCounterMode(display=False) as counter:
            model.encoder(torch.zeros(1, 3, side, side))
        return counter.get_total_flops() // 2

    costs = [multiply_adds(model.views.size(epoch)) for epoch in range(settings["trainer"]["max_epochs"])]
    assert min(costs) < max(costs) < multiply_adds(32)
    assert sum(costs) <= 15 * 12_279_808  # of a ResNet-8 of twice the width behind a stride-2 stem, at 32 pixels
