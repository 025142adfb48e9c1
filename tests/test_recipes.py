"""The recipes: found by name from any folder, in a checkout and in an installed wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simclr.cli.recipes import config_file, recipes
from strict.sitecustomize import environment

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
