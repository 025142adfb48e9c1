"""Images of the training folder that are never trained on: how many, which, and what of it is said and kept."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from simclr.checkpoint import read_checkpoint
from simclr.cli import main
from simclr.data import GlobalBatchSampler, ImageData
from simclr.data.held_out import held_out_count, held_out_numbers
from simclr.data.sources import list_folder
from simclr.seeding import epoch_order
from test_continue import assert_same_run, refused
from test_data_module import fill
from tiny import flags


@pytest.mark.parametrize(
    ("setting", "images", "count"),
    [
        (None, 999, 0),
        (None, 1000, 20),
        (None, 50_000, 1000),
        (None, 1_281_167, 2000),
        (0, 50_000, 0),
        (0.0, 50_000, 0),
        (7, 10, 7),
        (0.25, 10, 2),
        (300.0, 1000, 300),
    ],
)
def test_two_percent_or_2000_are_held_out_unless_they_are_few(setting, images, count):
    assert held_out_count(setting, images) == count


def names(count: int) -> list[str]:
    return [f"/here/{i}.png" for i in range(count)]


def test_the_choice_is_the_smallest_hashes_of_the_names_below_the_folder():
    def key(path: str) -> int:
        digest = hashlib.blake2b(path.removeprefix("/here/").encode(), digest_size=8, person=b"held out").digest()
        return int.from_bytes(digest, "little")

    paths = names(500)
    smallest = sorted(sorted(range(500), key=lambda i: key(paths[i]))[:20])
    assert held_out_numbers("/here", paths, None, 20).tolist() == smallest
    moved = [path.replace("/here/", "/some/where/else/") for path in paths]
    assert held_out_numbers("/some/where/else", moved, None, 20).tolist() == smallest


def test_a_folder_with_a_few_images_more_holds_out_nearly_the_same():
    before = {names(1000)[i] for i in held_out_numbers("/here", names(1000), None, 100)}
    after = {names(1050)[i] for i in held_out_numbers("/here", names(1050), None, 100)}
    assert 90 <= len(before & after) < 100


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [([500, 300, 150, 50], [10, 6, 3, 1]), ([1] * 400 + [600], [0.5] * 400 + [12]), ([5] * 200, [0.5] * 200)],
)
def test_every_class_gives_its_share(sizes, shares):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    held = held_out_numbers("/here", names(1000), labels, 20)
    assert len(held) == 20
    assert torch.equal(held, held.unique())
    found = labels[held].bincount(minlength=len(sizes))
    assert all(abs(n - share) <= max(1, share / 4) for n, share in zip(found.tolist(), shares, strict=True)), found


@pytest.mark.parametrize("held", [[0], [2, 3], [0, 1, 19], [5, 10, 15, 18]])
def test_every_image_but_those_held_out_is_visited_in_the_order_of_a_smaller_set(held):
    kept = [i for i in range(20) if i not in held]
    sampler = GlobalBatchSampler(len(kept), 2, seed=3, held_out=torch.tensor(held))
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected = [kept[place] for place in epoch_order(3, epoch, len(kept))][: len(sampler) * 2]
        assert sampler.global_batches(epoch).flatten().tolist() == expected
        assert torch.cat(list(sampler.from_step(0))).flatten().tolist() == expected
    halves = [GlobalBatchSampler(len(kept), 2, 3, rank, 2, held_out=torch.tensor(held)) for rank in range(2)]
    both = torch.stack([torch.cat(list(half.from_step(1))).flatten() for half in halves], 1)
    assert torch.equal(both, halves[0].global_batches(0)[1:])


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A folder of 1 000 images without classes, and one of 4."""
    root = tmp_path_factory.mktemp("folders")
    fill(root / "few", [f"{i}.png" for i in range(4)])
    (root / "photos").mkdir()
    picture = (root / "few" / "0.png").read_bytes()
    for i in range(1000):
        (root / "photos" / f"{i}.png").write_bytes(picture)
    return root


def of(root: Path, **settings) -> ImageData:
    data = ImageData(train_dir=root / "photos", batch_size=250, image_size=8, workers=0, **settings)
    data.validate()
    data.setup()
    return data


def test_without_test_images_a_part_of_the_folder_is_never_trained_on(thousand):
    data = of(thousand)
    images, index = data.unseen
    assert images is data.train
    assert len(index) == data.held_out == data.hparams.held_out == 20
    assert (data.training_images, data.steps_per_epoch) == (980, 3)
    trained = torch.cat([batch for _, batch in data.train_dataloader()])
    assert not torch.isin(trained, index).any()
    for seed in (0, 7):
        assert torch.equal(of(thousand, seed=seed).held_out_numbers, index), "the run's seed decides nothing"


def test_with_test_images_or_where_none_is_wanted_all_are_trained_on(thousand):
    tested = of(thousand, test_dir=thousand / "few")
    assert (tested.held_out, tested.unseen[0]) == (0, tested.test)
    assert tested.unseen[1].tolist() == [0, 1, 2, 3]
    both = of(thousand, test_dir=thousand / "few", held_out=30)
    assert (both.held_out, both.unseen[0]) == (30, both.train)
    none = of(thousand, held_out=0)
    assert (none.training_images, none.unseen) == (1000, None)
    shapes = ImageData(shapes_train=5000, shapes_test=4)
    shapes.setup()
    assert (shapes.held_out, shapes.training_images) == (0, 5000)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"held_out": -1}, "data.held_out=-1 is neither a number of images nor a fraction below 1. Use 0 for none."),
        ({"held_out": 2.5}, "data.held_out=2.5 is neither a number of images nor a fraction"),
        ({"held_out": float("nan")}, "data.held_out=nan is neither a number"),
        ({"held_out": 1}, "data.held_out=1 of 4 images has none to be told from. Use 2 or more, or 0."),
        ({"held_out": 3}, "data.held_out=3 leaves 1 of the 4 images in .*few to train on. Use fewer."),
        ({"held_out": 0.999}, "data.held_out=4 leaves 0 of the 4 images"),
        ({"held_out": 2, "batch_size": 4}, "=4 is more than the 2 training images in .*few, beside 2 held out. Use at"),
        ({"held_out": 9, "source": "shapes", "train_dir": None}, "=9 is not used with data.source=shapes, which has"),
    ],
)
def test_what_cannot_be_held_out_is_refused_in_one_line(thousand, settings, line):
    data = ImageData(**{"train_dir": thousand / "few", "batch_size": 2, **settings})
    (problem,) = data.problems()
    assert re.search(line, problem)
    assert data.problems() == [problem]


RUN = {"data.train_dir": "photos", "data.batch_size": 240, "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 0}
RUN |= {"quality.every_n_epochs": 1, "trainer.max_epochs": 2}


def test_a_run_says_and_keeps_what_it_holds_out_and_measures_it(thousand, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(thousand)
    runs = tmp_path
    main(["train", *flags({**RUN, "run_dir": runs / "run"})])
    out = capsys.readouterr().out
    assert re.search(r"data +photos: 1,000 images, no labels, .*; 20 of the images are held out, never trained", out)
    assert "20 of the 980 images sit out each epoch" in out
    assert yaml.safe_load((runs / "run" / "config.yaml").read_text())["data"]["held_out"] == 20
    assert read_checkpoint(runs / "run").data["held_out"] == 20
    assert "retrieval_top1_before" in (runs / "run" / "metrics.csv").read_text().splitlines()[0]
    message = refused(["--ckpt_path", str(runs / "run"), "--data.held_out", "0", "--trainer.max_epochs", "3"], capsys)
    assert "cannot be continued: data.held_out=0 but the checkpoint has 20. Restore the setting" in message
    # The same in two parts.
    main(["train", *flags({**RUN, "run_dir": runs / "cut", "trainer.max_steps": 3})])
    main(["train", "--ckpt_path", str(runs / "cut"), "--trainer.max_steps", "-1"])
    assert_same_run(runs / "cut", runs / "run")


def test_a_run_from_before_there_was_the_setting_goes_on_with_all_images(thousand, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(thousand)
    runs = tmp_path
    settings = {**RUN, "data.batch_size": 250, "quality.every_n_epochs": 0, "trainer.max_epochs": 1}
    main(["train", *flags({**settings, "data.held_out": 0, "run_dir": runs / "whole"})])
    main(["train", *flags({**settings, "data.held_out": 0, "run_dir": runs / "old", "trainer.max_steps": 2})])
    path, config = runs / "old" / "checkpoints" / "last.ckpt", runs / "old" / "config.yaml"
    content = torch.load(path, weights_only=True)
    del content["datamodule_hyper_parameters"]["held_out"]
    torch.save(content, path)
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "held_out" not in line))
    message = refused(["--ckpt_path", str(runs / "old"), "--data.held_out", "20"], capsys)
    assert "data.held_out=20 but the checkpoint has 0" in message
    main(["train", "--ckpt_path", str(runs / "old"), "--trainer.max_steps", "-1"])
    assert "held out" not in capsys.readouterr().out
    assert_same_run(runs / "old", runs / "whole")


def test_a_folder_too_small_to_spare_any_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    few = {"data.train_dir": "photos", "data.batch_size": 4, "trainer.max_steps": 1, "run_dir": "run"}
    main(["train", *flags(few)])
    said = "there are no test images (--data.test_dir), and none is held out of the 8 training images, too few to spare"
    assert f"no figures of images never trained on: {said} 2% unasked (--data.held_out)" in capsys.readouterr().out


def test_evaluation_takes_the_whole_folder_as_if_nothing_were_held_out(tmp_path):
    fill(tmp_path, [f"{c}/{i:02}.png" for c in "ab" for i in range(25)])
    held, all_of_it = (ImageData(train_dir=tmp_path, batch_size=4, held_out=count) for count in (10, 0))
    for split in ("train", "test"):
        assert torch.equal(held.eval_loader(split).index, all_of_it.eval_loader(split).index)
    assert held.evaluation_note == f"{all_of_it.evaluation_note}, but for 10 of the folder that it held out"
    labels = list_folder(str(tmp_path), "").labels
    assert labels[held.held_out_numbers].bincount().tolist() == [5, 5]
