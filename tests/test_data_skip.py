"""data.on_error=skip: unreadable files are left out, counted, listed and limited; a run is that of the others."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from simclr.cli import main
from simclr.data import ImageData
from simclr.data.decode import unreadable
from tiny import flags


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """20 images of two classes, three of them damaged: text, cut off, and with a wrong checksum."""
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        path = Path("photos", "ab"[i % 2], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (12 * i, 255 - 12 * i, 90)).save(path)
    Path("photos/a/04.png").write_text("no image")
    cut = Path("photos/b/07.png")
    cut.write_bytes(cut.read_bytes()[:-20])
    flipped = Path("photos/a/10.png")
    content = bytearray(flipped.read_bytes())
    content[-14] ^= 1
    flipped.write_bytes(content)
    return Path("photos")


BAD = ["a/04.png", "a/10.png", "b/07.png"]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_files_that_cannot_be_read_are_found_by_their_places(photos, threads):
    paths = sorted(photos.rglob("*.png"))
    found = unreadable(paths, 16, threads)
    assert [paths[i].relative_to(photos).as_posix() for i in sorted(found)] == BAD
    assert found[paths.index(photos / "a/04.png")] == "photos/a/04.png (not an image in a known format)"


@pytest.mark.parametrize("held", [4.0, 0.0])
def test_the_images_are_those_of_a_folder_without_them(photos, held):
    settings = {"batch_size": 4, "image_size": 16, "workers": 0, "memory_limit_gb": held}
    skipping = ImageData(train_dir=str(photos), on_error="skip", **settings)
    skipping.setup()
    for name in BAD:
        (photos / name).unlink()
    without = ImageData(train_dir=str(photos), **settings)
    without.setup()
    assert len(skipping.train) == len(without.train) == 17
    index = torch.arange(17)
    assert torch.equal(skipping.train.images(index), without.train.images(index))
    assert torch.equal(skipping.train.labels, without.train.labels)
    assert [line.split(" (")[0].split("photos/")[1] for line in skipping.skipped] == BAD


def test_a_run_says_lists_and_goes_on_without_them(photos, capsys):
    run = {"data.batch_size": 8, "data.on_error": "skip", "trainer.max_epochs": 1, "run_dir": "run"}
    main(["train", "photos", *flags(run)])
    out = capsys.readouterr().out
    assert "17 images, 2 classes" in out
    assert re.search(
        r"note: left out, because unreadable: 3 images, listed in skipped_images\.txt; the first is .*04", out
    )
    listed = Path("run/skipped_images.txt").read_text().splitlines()
    assert [line.split(" (")[0].split("photos/")[1] for line in listed] == BAD
    main(["train", "--ckpt_path", "run", "--trainer.max_epochs", "2"])  # the images are those of before
    assert "epoch 2/2" in capsys.readouterr().out


def test_without_it_they_are_an_error(photos, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "photos", *flags({"data.batch_size": 8, "run_dir": "run"})])
    assert stopped.value.code == 2
    assert "cannot read 3 image files" in capsys.readouterr().err
    assert not Path("run").exists()


def test_more_than_a_few_are_refused_with_the_first_named(photos):
    for i in range(12):
        (photos / "a" / f"x{i:02}.png").write_text("no image")
    data = ImageData(train_dir=str(photos), on_error="skip", image_size=16)
    said = (
        "data.train_dir=photos: 15 of 32 images cannot be read, more than the 1 % or 10 that data.on_error=skip leaves"
    )
    with pytest.raises(ValueError, match=said + " out: .*04.png"):
        data.setup()


# data.leave_out


def images(**settings) -> ImageData:
    data = ImageData(train_dir="photos", image_size=16, batch_size=4, workers=0, **settings)
    data.setup()
    return data


def test_a_list_leaves_out_what_it_names_below_the_folder_or_from_the_root(photos):
    lines = ["a/04.png", "", str((photos / "a/10.png").absolute()), "b/07.png", "a/02.png"]
    Path("list.txt").write_text("\r\n".join(lines) + "\r\n")
    data = images(leave_out="list.txt")
    for line in filter(None, lines):
        (photos / line).unlink()
    without = images()
    index = torch.arange(16)
    assert len(data.train) == len(without.train) == 16
    assert torch.equal(data.train.images(index), without.train.images(index))
    assert torch.equal(data.train.labels, without.train.labels)
    assert sorted(data.left_out_names) == sorted(filter(None, lines))
    assert data.notes == [
        "left out, as data.leave_out=list.txt says: 4 images, listed in left_out_images.txt; the first is a/02.png."
    ]


def test_images_of_the_test_folder_are_left_out_by_their_whole_paths_only(photos):
    for name in ("a/01.png", "b/02.png"):
        path = Path("tests") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
        if not (photos / name).exists():
            Image.new("RGB", (16, 16)).save(photos / name)
    Path("list.txt").write_text("\n".join([*BAD, "a/01.png", str(Path("tests/b/02.png").absolute())]))
    data = images(leave_out="list.txt", test_dir="tests")
    assert len(data.test) == 1
    assert [Path(path).name for path in data.test.paths] == ["01.png"]
    assert not any(path.endswith("a/01.png") for path in data.train.paths)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a/04.png", "a/none.png"], "list.txt names 1 file that is not among the images of photos: a/none.png. Name"),
        (
            ["x", "y", "z", "w"],
            "names 4 files that are not among the images of photos: x, y, z and 1 more. Name them by",
        ),
        (None, "data.leave_out=list.txt is not a file: it has to list images, one a line."),
        ("all", "data.leave_out=list.txt names all images of photos."),
    ],
    ids=["one", "many", "no file", "all"],
)
def test_a_list_that_does_not_fit_is_refused(photos, lines, said):
    if lines == "all":
        lines = [path.relative_to(photos).as_posix() for path in photos.rglob("*.png")]
    if lines is not None:
        Path("list.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(said)):
        images(leave_out="list.txt")


def test_a_list_is_refused_where_there_are_no_files():
    found = ImageData(source="shapes", leave_out="list.txt").problems()
    assert found == ["data.leave_out is not used with data.source=shapes, which has no files of yours."]


def test_a_run_records_what_the_list_says_and_continues_with_it_alone(photos, capsys):
    Path("list.txt").write_text("\n".join(BAD))
    run = {"data.batch_size": 8, "data.leave_out": "list.txt", "trainer.max_epochs": 1, "run_dir": "run"}
    main(["train", "photos", *flags(run)])
    assert "note: left out, as data.leave_out=list.txt says: 3 images" in capsys.readouterr().out
    assert Path("run/left_out_images.txt").read_text().splitlines() == BAD
    assert re.search("leave_out: .*/list.txt", Path("run/config.yaml").read_text())
    Path("list.txt").write_text("\n".join([*BAD, "a/02.png"]))
    with pytest.raises(SystemExit):
        main(["train", "--ckpt_path", "run", "--trainer.max_epochs", "2"])
    assert "17 then, 16 now; 0 added, 1 removed" in capsys.readouterr().err
