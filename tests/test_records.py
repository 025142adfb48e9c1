"""What a run says of itself is what happened: summary, views.png, metrics, report, the record of an evaluation."""

import json
import re
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback

from simclr import losses
from simclr.callbacks import ViewGrid
from simclr.cli.linear_eval import linear_eval
from simclr.cli.messages import BAD_INPUT
from simclr.cli.report import report
from simclr.cli.train import train
from simclr.data import ImageData
from simclr.eval import ProbeResult, default_k, evaluation, linear_probe, logreg
from simclr.report import pictures, read_metrics
from simclr.seeding import epoch_order
from simclr.training.objective import LOSSES, LossName, objective_of
from simclr.training.views import EpochViews
from tiny import BATCH, IMAGES, STEPS, fit, flags, tiny_data, tiny_model

pytestmark = pytest.mark.usefixtures("few_lambdas")

ROOT = Path(__file__).parents[1]


def photos(folder: Path, count: int, classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0) -> Path:
    """PNGs of noise whose classes differ a little in brightness."""
    numbers = np.random.default_rng(seed)
    for number in range(count):
        place = number % len(classes)
        (folder / classes[place]).mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 200, (20, 20, 3)) + 20 * place
        Image.fromarray(pixels.astype(np.uint8)).save(folder / classes[place] / f"{number}.png")
    return folder


def refused(call, arguments, capsys) -> str:
    """The one line that a command answers with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(arguments)
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (BAD_INPUT, 1), err
    return err.removeprefix("error: ").strip()


def measured(run_dir: Path, *arguments: str) -> dict:
    """The record that `linear_eval` writes, taken away so that the next is the first again."""
    linear_eval(["--checkpoint", str(run_dir), *arguments])
    path = run_dir / "linear_eval.json"
    record = json.loads(path.read_text())
    path.unlink()
    return record


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with labelled photos, 20 of each class to train on, and a run on them."""
    root = tmp_path_factory.mktemp("place")
    photos(root / "train", 40)
    photos(root / "test", 10, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(flags({"data.train_dir": "train", "data.test_dir": "test", "run_dir": "run", "trainer.max_epochs": 1}))
    return root


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


# The loss


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "margin_triplet", "margin": 0.3}, "margin triplet, margin 0.3"),
        ({"loss": "nt_logistic", "semi_hard": "true"}, "NT-Logistic, semi-hard, temperature 0.2"),
        ({"temperature": 0.5, "views": 3}, "NT-Xent, temperature 0.5, 3 views"),
    ],
    ids=["margin_triplet", "nt_logistic", "views"],
)
def test_summary_and_report_name_the_loss_and_draw_its_own_chance(tmp_path, monkeypatch, capsys, settings, words):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(
        pictures, "_level", lambda axis, height, name: drawn.append((axis.get_title("left"), height, name))
    )
    train(flags({**{f"model.{name}": value for name, value in settings.items()}, "run_dir": "run"}))
    assert re.search(rf"^loss +{re.escape(words)}$", capsys.readouterr().out, re.MULTILINE)
    report(["--run_dir", "run"])
    page = Path("run/report.html").read_text()
    assert f"<dd>{words}</dd>" in page
    assert ("NT-Xent" in page) == words.startswith("NT-Xent")
    levels = {"margin triplet": [0.3], "NT-Logistic": [], "NT-Xent": [np.log(3 * BATCH - 1)]}
    name = words.split(",")[0]
    assert [height for title, height, what in drawn if what == "chance"] == pytest.approx(levels[name])
    assert all(title == f"{name} loss" for title, _, what in drawn if what == "chance")


def test_every_loss_has_its_words():
    assert tuple(LOSSES) == get_args(LossName)
    for name in LOSSES:
        assert LOSSES[name].scale in tiny_model().hparams


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"loss": "nt_xent"}, lambda z: losses.nt_xent(z, z, 0.2)),
        ({"loss": "dcl"}, lambda z: losses.dcl(z, z, 0.2)),
        ({"loss": "margin_triplet", "margin": 0.4}, lambda z: losses.margin_triplet(z, z, 0.4)),
        ({"loss": "nt_xent", "views": 3}, lambda z: losses.sup_con([z, z, z], 0.2)),
    ],
)
def test_chance_is_the_loss_of_projections_that_are_all_alike(settings, loss):
    z = torch.ones(BATCH, 8, dtype=torch.float64)
    assert objective_of({**settings, "batch_size": BATCH}).chance == pytest.approx(loss(z).item())


def test_no_chance_is_drawn_where_it_depends_on_how_alike_or_on_what_is_not_known():
    assert objective_of({"loss": "nt_logistic", "batch_size": BATCH}).chance is None
    assert objective_of({"loss": "of another version", "batch_size": BATCH}).chance is None
    assert objective_of({"loss": "nt_xent"}).chance is None
    assert objective_of({"loss": "of another version"}).text == "of another version"


# The views


@pytest.fixture
def seen(monkeypatch):
    """The views that a training makes: {(epoch, number of the image): [view, ...]}."""
    found, original = {}, EpochViews.make

    def views(self, images, index, epoch):
        made = original(self, images, index, epoch)
        for row, number in enumerate(index.tolist()):
            found[epoch, number] = [view[row] for view in made]
        return made

    monkeypatch.setattr(EpochViews, "make", views)
    return found


def cells(picture: np.ndarray, row: int, groups: list[int], cell: int, columns: int) -> list[np.ndarray]:
    """The cells of one row of views.png, with rows in groups of these sizes."""
    group = next(i for i in range(len(groups)) if row < sum(groups[: i + 1]))
    top = row * (cell + 2) + 8 * group
    return [picture[top : top + cell, 72 + i * (cell + 2) : 72 + i * (cell + 2) + cell] for i in range(columns)]


def assert_shows(shown: np.ndarray, view: torch.Tensor) -> None:
    """The view (normalised with mean 0.5 and std 0.25) is in the middle of the cell, each pixel a square."""
    side = view.shape[-1]
    scale = len(shown) // side
    inset = (len(shown) - scale * side) // 2
    inner = shown[inset : inset + scale * side, inset : inset + scale * side].astype(int)
    expected = ((view * 0.25 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)
    expected = expected.repeat(scale, 0).repeat(scale, 1)
    assert np.abs(inner - expected).max() <= 1  # of 255: rounding after the normalisation is undone


def test_views_png_shows_all_views_at_the_size_of_their_epoch(tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    growing = {"model.image_size": 20, "model.start_size": 8, "model.grow_epochs": 2, "model.views": 4}
    train(flags({**growing, "run_dir": "run", "model.mean": "[0.5,0.5,0.5]", "model.std": "[0.25,0.25,0.25]"}))
    picture = np.asarray(Image.open("run/views.png").convert("RGB"))
    groups, cell = [1, 4, 4], 80  # the images, then four views of each of two epochs
    assert len(picture) == sum(groups) * (cell + 2) + 2 * 8 + 2
    index = epoch_order(0, 0, IMAGES)[:10].tolist()
    sizes = set()
    for row in range(1, 9):
        epoch, view = divmod(row - 1, 4)
        for shown, number in zip(cells(picture, row, groups, cell, 10), index, strict=True):
            tile = seen[epoch, number][view]
            sizes.add((epoch, tile.shape[-1]))
            assert_shows(shown, tile)
    assert sizes == {(0, 8), (1, 12)}


def test_views_png_shows_no_image_in_an_epoch_that_leaves_it_out(tmp_path, seen):
    model = tiny_model(mean=(0.5,) * 3, std=(0.25,) * 3)
    fit(tmp_path, model, tiny_data(shapes_train=24), [ViewGrid(tmp_path, images=4)], max_epochs=2)
    picture = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    common = [number for number in epoch_order(0, 0, 24)[:BATCH].tolist() if (1, number) in seen][:4]
    assert (len(picture) - 2 - 2 * 8) // 98 == 5  # of the two epochs there are
    assert common != epoch_order(0, 0, 24)[:4].tolist()
    for row in range(1, 5):
        epoch, view = divmod(row - 1, 2)
        for shown, number in zip(cells(picture, row, [1, 2, 2], 96, 4), common, strict=True):
            assert_shows(shown, seen[epoch, number][view])


# The images


@pytest.mark.parametrize("start", [{}, {"start_size": 16, "grow_epochs": 1}])
def test_images_held_for_another_size_are_refused(tmp_path, start):
    with pytest.raises(ValueError, match=r"SimCLR has image_size=32, the data module 16\. Give both the same\."):
        fit(tmp_path, tiny_model(image_size=32, **start), tiny_data())
    with pytest.raises(ValueError, match="SimCLR has batch_size=16, the data module 8; SimCLR has image_size=32, the"):
        fit(tmp_path, tiny_model(image_size=32), tiny_data(batch_size=8))


@pytest.mark.parametrize(
    ("train_dir", "test_dir", "message"),
    [
        ("photos", "photos", "data.test_dir=photos is the same folder as data.train_dir=photos"),
        ("photos", "photos/", "is the same folder as"),
        ("photos/cat/..", "./photos", "is the same folder as"),
        ("photos", "link", "data.test_dir=link is the same folder as data.train_dir=photos"),
        ("~/photos", "photos", "is the same folder as"),
        ("photos", "photos/cat", "data.test_dir=photos/cat lies inside data.train_dir=photos"),
        ("link", "photos/cat", "data.test_dir=photos/cat lies inside data.train_dir=link"),
        ("photos/cat", "photos", "data.test_dir=photos holds data.train_dir=photos/cat"),
    ],
)
def test_one_folder_for_training_and_test_is_refused(tmp_path, monkeypatch, capsys, train_dir, test_dir, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    photos(tmp_path / "photos", 2 * BATCH)
    (tmp_path / "link").symlink_to("photos")
    found = refused(train, flags({"data.train_dir": train_dir, "data.test_dir": test_dir}), capsys)
    assert message in found
    assert "test images must not be trained on" in found
    assert not (tmp_path / "runs").exists()


def test_the_folder_that_a_run_was_trained_on_is_no_test_folder(here, capsys):
    message = refused(linear_eval, ["--checkpoint", "run", "--data.test_dir", str(here / "train")], capsys)
    assert "is the same folder as the run's own data.train_dir=train" in message


def copied(source: Path, target: Path) -> Path:
    """The same pixels in a file of other bytes."""
    Image.open(source).save(target)
    return target


@pytest.mark.parametrize("held", [[], ["--data.memory_limit_gb", "0", "--data.workers", "0"]], ids=["memory", "files"])
def test_test_images_that_are_training_images_are_counted_named_and_left_out_beside(here, tmp_path, capsys, held):
    test = photos(tmp_path / "copies", 10, seed=1)
    pairs = [("cat/4.png", "cat/copy.bmp"), ("dog/7.png", "dog/copy.bmp"), ("dog/9.png", "cat/mislabelled.bmp")]
    for source, target in pairs:
        copied(here / "train" / source, test / target)
    copied(test / "cat" / "0.png", test / "cat" / "within.bmp")  # twice in the test set is another matter
    capsys.readouterr()
    record = measured(here / "run", "--data.test_dir", str(test), *held)
    out = " ".join(capsys.readouterr().out.split())
    named = {(pair["test"], pair["train"]) for pair in record["duplicates"]["examples"]}
    assert named == {(str(test / target), f"train/{source}") for source, target in pairs}
    assert record["duplicates"]["test_images"] == 3
    assert "note: 3 of the 14 test images are among the training images, pixel for pixel (" in out
    assert f"{test / 'cat/copy.bmp'} is train/cat/4.png" in out
    for _, target in pairs:
        (test / target).unlink()
    without = measured(here / "run", "--data.test_dir", str(test), *held)
    assert record["duplicates"]["linear_top1_without"] == without["linear_top1"]
    assert record["duplicates"]["ci95_without"] == without["ci95"]
    assert record["duplicates"]["knn_top1_without"] == without["knn_top1"]
    linear, knn = (100 * without[key] for key in ("linear_top1", "knn_top1"))
    assert f"without them: linear classifier {linear:.1f} %, kNN {knn:.1f} %" in out
    assert (without["duplicates"]["test_images"], without["duplicates"]["examples"]) == (0, [])
    assert without["duplicates"]["linear_top1_without"] == without["linear_top1"]
    assert "among the training images" not in " ".join(capsys.readouterr().out.split())


def test_copies_on_both_sides_of_a_split_folder_are_found_too(here, tmp_path, capsys):
    folder = photos(tmp_path / "doubled", 20)
    for path in list(folder.rglob("*.png")):
        copied(path, path.with_name(f"{path.stem} copy.bmp"))
    arguments = ["--data.train_dir", str(folder), "--data.test_dir", "null"]
    record = measured(here / "run", *arguments)
    data = ImageData(train_dir=str(folder), image_size=16)
    kept, held = ({folder / data.train.paths[i] for i in data.eval_loader(part).index} for part in ("train", "test"))
    twins = [path for path in held if {path.with_name(f"{path.stem} copy.bmp"), path.with_name(
        path.name.replace(" copy.bmp", ".png"))} - {path} & kept]  # fmt: skip
    assert record["duplicates"]["test_images"] == len(twins) > 0


def test_built_in_images_are_named_by_number_and_a_test_set_of_copies_has_no_number_without(here, monkeypatch):
    data = tiny_data()
    data.setup()
    data.test = data.train
    record = evaluation.linear_evaluation("run", data)
    found = record["duplicates"]
    assert found["test_images"] == IMAGES
    assert found["examples"][3] == {"test": "shapes (train) 3", "train": "shapes (train) 3"}
    assert (found["linear_top1_without"], found["ci95_without"], found["knn_top1_without"]) == (None, None, None)
    assert "no test image is left without them" in " ".join(evaluation.remarks(record))


def test_the_report_warns_of_test_images_that_are_training_images(here, tmp_path):
    test = photos(tmp_path / "copies", 10, seed=1)
    copied(here / "train" / "cat" / "4.png", test / "cat" / "copy.bmp")
    linear_eval(["--checkpoint", "run", "--data.test_dir", str(test)])
    report(["--run_dir", "run"])
    Path("run/linear_eval.json").unlink()
    assert (
        "1 of the 11 test images is among the training images, pixel for pixel" in Path("run/report.html").read_text()
    )


# Numbers of a run


@pytest.mark.parametrize(
    ("settings", "words", "steps"),
    [
        ({}, "4 steps an epoch, 2 epochs", 8),
        ({"limit_train_batches": 3}, "3 steps an epoch, 2 epochs", 6),
        pytest.param({"limit_train_batches": 0.5}, "2 steps an epoch, 2 epochs", 4, marks=pytest.mark.slow),
        ({"overfit_batches": 1}, "1 step an epoch, 2 epochs", 2),
        pytest.param(
            {"accumulate_grad_batches": 3},
            "4 batches and 2 optimiser steps an epoch, 2 epochs",
            4,
            marks=pytest.mark.slow,
        ),
        (
            {"accumulate_grad_batches": 3, "max_steps": 3},
            "4 batches and 2 optimiser steps an epoch, 3 optimiser steps",
            3,
        ),
        ({"max_steps": 5, "max_epochs": -1}, "4 steps an epoch, 5 steps in all", 5),
        pytest.param({"max_steps": 100}, "4 steps an epoch, 2 epochs", 8, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_the_summary_has_the_steps_that_are_taken(tmp_path, monkeypatch, capsys, settings, words, steps):
    monkeypatch.chdir(tmp_path)
    train(flags({**{f"trainer.{name}": value for name, value in settings.items()}, "run_dir": "run"}))
    assert f"16 images, {words}" in capsys.readouterr().out
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps


class Numbers(Callback):
    """The numbers of the images of each epoch's batches."""

    def __init__(self):
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self, *args):
        self.epochs.append([])


@pytest.mark.parametrize("batches", [1, 2])
def test_overfitting_trains_on_the_same_images_in_every_epoch(tmp_path, monkeypatch, batches):
    numbers, original = Numbers(), EpochViews.make

    def views(self, images, index, epoch):
        numbers.epochs[-1].append(index.tolist())
        return original(self, images, index, epoch)

    monkeypatch.setattr(EpochViews, "make", views)
    fit(tmp_path, callbacks=[numbers], overfit_batches=batches, max_epochs=3)
    assert [len(epoch) for epoch in numbers.epochs] == [batches] * 3
    assert numbers.epochs[0] == numbers.epochs[1] == numbers.epochs[2]
    numbers.epochs.clear()
    fit(tmp_path, callbacks=[numbers], limit_train_batches=batches, max_epochs=2)
    assert numbers.epochs[0] != numbers.epochs[1]


def test_what_is_logged_by_the_step_is_read_by_the_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(flags({"run_dir": "run", "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 1}))
    history = read_metrics(Path("run"))
    by_step = [(step + 1) / STEPS for step in range(2 * STEPS)]
    for name in ("train_loss", "lr", "contrast_top1", "positive_cosine", "negative_cosine"):
        assert [time for time, _ in history[name]] == by_step, name
    for name in ("train_loss_epoch", "knn_top1"):
        assert [time for time, _ in history[name]] == [1, 2], name


def test_an_epoch_cut_short_stands_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut = {"trainer.max_steps": STEPS + 2, "trainer.log_every_n_steps": 1}
    train(flags({"run_dir": "run", **cut}))
    history = read_metrics(Path("run"))
    assert [time for time, _ in history["train_loss_epoch"]] == [1, 1 + 2 / STEPS]
    assert history["train_loss"][-1][0] == 1 + 2 / STEPS


# Numbers of an evaluation


def test_two_classes_have_no_top_5(here, capsys):
    capsys.readouterr()
    record = measured(here / "run")
    assert record["linear_top5"] is None
    assert "top-5" not in capsys.readouterr().out


def test_k_follows_from_the_sizes_of_the_classes_unless_it_is_given(here, capsys):
    capsys.readouterr()
    assert measured(here / "run")["knn_k"] == 20
    assert "kNN (k = 20)" in capsys.readouterr().out
    assert measured(here / "run", "--knn_k", "33")["knn_k"] == 33
    assert "kNN (k = 33)" in capsys.readouterr().out
    message = refused(linear_eval, ["--checkpoint", "run", "--knn_k", "41"], capsys)
    assert message.startswith("knn_k=41 is more than the 40 training images.")


@pytest.mark.parametrize(
    ("sizes", "k"),
    [([5000] * 10, 200), ([100] * 10, 100), ([100, 100, 2], 100), ([0, 7, 0, 7], 7), ([1, 1], 1)],
)
def test_the_default_k_is_the_size_of_the_median_class_up_to_200(sizes, k):
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    assert default_k(labels) == k


def test_a_regularisation_at_the_end_of_its_grid_is_said_to_be(here, monkeypatch, capsys):
    # Of two lambdas either is an end.
    for place in (evaluation, logreg):
        monkeypatch.setattr(place, "linear_probe", partial(linear_probe, regularization=(100.0, 1.0)))
    capsys.readouterr()
    record = measured(here / "run")
    out = " ".join(capsys.readouterr().out.split())
    end = {100.0: "strongest", 1.0: "weakest"}[record["regularization"]]
    assert record["regularization_end"]["linear"] == end
    assert f"end of its grid, beyond which a better one may lie: linear classifier (the {end})" in out
    assert all(record["regularization_end"].values())
    for place in (evaluation, logreg):
        monkeypatch.setattr(place, "linear_probe", partial(linear_probe, regularization=1.0))  # nothing to choose
    record = measured(here / "run")
    assert record["regularization_end"] == {"linear": None, "random_encoder": None, "raw_pixels": None}
    assert "end of its grid" not in capsys.readouterr().out


@pytest.mark.parametrize(("chosen", "end"), [(10.0, "strongest"), (1.0, None), (0.1, "weakest"), (None, None)])
def test_the_end_of_the_grid_is_by_the_lambdas_tried(chosen, end):
    tried = {10.0: 0.5, 1.0: 0.5, 0.1: 0.5} if chosen else {}
    nothing = torch.zeros(0)
    probe = ProbeResult(0.5, None, (0, 1), 2, "lbfgs", nothing, nothing, nothing, 1, chosen, tried)
    assert probe.regularization_end == end


def test_the_demo_takes_as_long_in_every_text():
    said = []
    for name in ("README.md", "Makefile", "notebooks/quickstart.ipynb"):
        text = (ROOT / name).read_text()
        said += re.findall(r"about (\w+)(?: minutes)? on two CPU cores", text[text.index("demo") :])[:1]
    assert said == ["three"] * 3
