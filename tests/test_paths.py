"""Folders mean the same from everywhere: `~` is a home, a run keeps its folders from the root, messages name them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from simclr import load_encoder
from simclr.callbacks import ViewGrid
from simclr.checkpoint import read_checkpoint
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.cli.saving import SaveOnInterrupt
from simclr.data import ImageData
from simclr.loggers import build_loggers
from simclr.paths import expanded, shown, stored
from tiny import flags

pytestmark = pytest.mark.usefixtures("few_lambdas")


def photos(root: Path, count: int = 32, seed: int = 0) -> None:
    """PNGs of two classes that differ in brightness."""
    numbers = np.random.default_rng(seed)
    for number in range(count):
        path = root / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 128, (16, 16, 3)) + 100 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with photos in it, and another folder to stand in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    photos(tmp_path / "home" / "photos")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run on `photos/train` and `photos/test`, named from where it stood."""
    root = tmp_path_factory.mktemp("trained")
    photos(root / "photos" / "train")
    photos(root / "photos" / "test", 12, seed=1)
    folders = {"data.train_dir": "photos/train", "trainer.max_epochs": 1}
    folders["data.test_dir"] = f"../{root.name}/photos/test"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["train", *flags({**folders, "run_dir": "run", "knn.every_n_epochs": 0})])
    return root


def test_a_home_is_expanded_and_an_unknown_one_refused(home):
    assert expanded("~/photos") == home / "photos"
    assert expanded(Path("~") / "a") == home / "a"
    assert expanded("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="~nobody_here/x begins with a home folder that is not known"):
        expanded("~nobody_here/x")


def test_a_path_is_stored_from_the_root(home):
    assert stored("~/photos") == str(home / "photos")
    assert stored("a/b") == str(home.parent / "work" / "a" / "b")
    assert stored("../home/./photos") == str(home / "photos")
    assert stored(home / "photos") == str(home / "photos")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_above_a_link_is_above_what_it_points_to(home):
    Path("link").symlink_to(home / "photos" / "cat")
    assert stored("link/../dog") == str(home / "photos" / "dog")
    assert stored("link") == str(home.parent / "work" / "link")  # which may point elsewhere tomorrow


def test_a_path_below_the_current_folder_is_shown_from_there(home):
    assert shown(Path.cwd() / "a" / "b") == str(Path("a/b"))
    assert shown(home / "photos") == str(home / "photos")
    assert shown("a/b") == str(Path("a/b"))


@pytest.mark.parametrize("name", ["train_dir", "test_dir", "data_dir", "cache_dir"])
def test_every_folder_of_images_may_be_in_a_home_and_is_kept_from_the_root(home, name):
    data = ImageData(**{"train_dir": "~/photos", "image_size": 16, "batch_size": 4, name: "~/photos"})
    assert data.hparams[name] == str(home / "photos")
    assert ImageData(**{name: "photos"}).hparams[name] == str(Path.cwd() / "photos")


def test_images_are_found_from_a_home_and_after_a_change_of_folder(home, monkeypatch):
    data = ImageData(train_dir="~/photos", cache_dir="~/cache", image_size=16, batch_size=4)
    data.setup()
    assert len(data.train) == 32
    assert data.train.name == "~/photos"
    assert list((home / "cache").glob("photos-16px-*.npy"))
    monkeypatch.chdir(home)
    data = ImageData(train_dir="photos", image_size=16, batch_size=4)
    monkeypatch.chdir(home.parent)
    data.setup()
    assert data.train.name == "photos"


def test_a_run_in_a_home_and_all_that_follows_it(home):
    (home / "recipe.yaml").write_text("model: {temperature: 0.3}\n")
    place = {"run_dir": "~/run", "data.train_dir": "~/photos", "trainer.max_epochs": 1, "config": "~/recipe.yaml"}
    main(["train", *flags({**place, "data.cache_dir": "~/cache"})])
    assert (home / "run" / "config.yaml").is_file()
    assert load_encoder("~/run").feature_dim > 0
    assert load_encoder("~/run/checkpoints/last.ckpt").feature_dim > 0
    assert read_checkpoint("~/run").model["temperature"] == 0.3
    main(["linear-eval", "--checkpoint=~/run"])
    assert (home / "run" / "linear_eval.json").is_file()
    main(["report", "--run_dir=~/run"])
    assert (home / "run" / "report.html").is_file()
    main(["train", "--ckpt_path=~/run/checkpoints/last.ckpt", "--trainer.max_epochs=2"])
    assert read_checkpoint("~/run").epoch == 1
    assert not list(Path.cwd().iterdir())  # no folder named ~


def test_what_python_code_gives_a_run_folder_to_expands_it(home):
    assert ViewGrid("~/run").run_dir == home / "run"
    assert SaveOnInterrupt("~/run").path.is_relative_to(home / "run")
    loggers = build_loggers("~/run")
    assert [logger.save_dir for logger in loggers] == [str(home / "run")] * len(loggers)


def test_a_run_is_measured_reported_and_continued_from_another_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["linear-eval", "--checkpoint", str(trained / "run")])
    record = json.loads((trained / "run" / "linear_eval.json").read_text())
    assert record["data"]["test"] == str(trained / "photos" / "test")
    assert record["data"]["settings"]["test_dir"] == str(trained / "photos" / "test")
    main(["report", "--run_dir", str(trained / "run")])
    assert "no images to show" not in capsys.readouterr().out
    main(["train", "--ckpt_path", str(trained / "run"), "--trainer.max_epochs=2"])
    assert read_checkpoint(trained / "run").epoch == 1
    assert not list(tmp_path.iterdir())
    stated = yaml.safe_load((trained / "run" / "config.yaml").read_text())["data"]
    assert (stated["train_dir"], stated["test_dir"]) == tuple(str(trained / "photos" / p) for p in ("train", "test"))


def test_results_name_folders_from_where_one_stands(trained, monkeypatch):
    monkeypatch.chdir(trained)
    main(["linear-eval", "--checkpoint", "run"])
    record = json.loads(Path("run/linear_eval.json").read_text())
    assert record["data"]["train"] == str(Path("photos/train"))
    assert record["checkpoint"] == str(trained / "run" / "checkpoints" / "last.ckpt")


def test_a_message_tells_the_runs_folder_from_one_typed_here(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gone = trained / "photos" / "test"
    gone.rename(trained / "moved")
    run = str(trained / "run")
    try:
        for command in (["linear-eval", "--checkpoint", run], ["train", "--ckpt_path", run]):
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code == BAD_INPUT
            assert f"error: the run's own data.test_dir={gone} does not exist" in capsys.readouterr().err
        main(["report", "--run_dir", run])
        assert f"the run's own data.test_dir={gone} does not exist" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["linear-eval", "--checkpoint", run, "--data.test_dir", "photo"])
        assert "error: data.test_dir=photo does not exist" in capsys.readouterr().err
    finally:
        (trained / "moved").rename(gone)
