"""ImageData: folders of any kind, named sets, evaluation splits, and one clear line for what is wrong."""

import gc
import os
import pickle
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from simclr.cli import main
from simclr.data import FileImages, ImageData, MemoryImages, kinds
from simclr.data.sources import list_folder
from simclr.seeding import epoch_order
from tiny import fit, flags, tiny_data


def fill(root: Path, names: list[str], side: int = 8) -> Path:
    """Write one image per name; its red value counts them in the order given."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (i, 0, 0)).save(root / name, format="PNG")
    return root


def below(root: Path, paths: list[str]) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in paths]


def test_first_level_folders_are_the_classes_at_any_depth(tmp_path):
    names = ["cat/a.png", "cat/deep/er/b.JPG", "dog/c.jpeg", "dog/.hidden.png", ".cache/d.png"]
    fill(tmp_path, names)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    folder = list_folder(str(tmp_path), "data.train_dir")
    assert below(tmp_path, folder.paths) == ["cat/a.png", "cat/deep/er/b.JPG", "dog/c.jpeg"]
    assert folder.classes == ["cat", "dog"]
    assert folder.labels.tolist() == [0, 0, 1]


def test_pictures_that_are_not_read_are_told_as_a_run_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    for name in (*(f"{i}.heic" for i in range(200)), "list.txt"):
        (tmp_path / "photos" / name).touch()
    main(["train", "photos", *flags({"data.batch_size": 4, "trainer.max_steps": 1, "run_dir": "run"})])
    said = "200 of 208 pictures in photos are not read: 200 .heic. Convert them to JPEG or PNG to train on them. "
    said += "To have HEIC read: pip install 'simclr[heif]'."
    assert f"note: {said}" in capsys.readouterr().out
    assert tiny_data().notes == []


@pytest.mark.parametrize(("beside", "said"), [(["x.png"], "1 image lies"), (["x.png", "y.png"], "2 images lie")])
def test_an_image_beside_class_folders_is_told_to_take_the_labels_away(tmp_path, beside, said):
    fill(tmp_path, ["cat/1.png", "dog/1.png", *beside])
    folder = list_folder(str(tmp_path), "data.train_dir", "photos")
    assert folder.labels is None
    (note,) = folder.notes
    assert note.startswith(f"{said} beside the folders of photos, so that these are not taken for classes")


@pytest.mark.parametrize("names", [["cat/1.png", "dog/1.png"], ["1.png", "2.png"], ["1.png", "more/2.png"]])
def test_a_folder_of_classes_and_one_of_images_are_told_nothing(tmp_path, names):
    assert list_folder(str(fill(tmp_path, names)), "data.train_dir").notes == []


def test_what_is_left_out_of_a_folder_is_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    fill(tmp_path, ["cat/a.png", "cat/b.JPG", "dog/c.jpeg", "dog/.hidden.png", ".cache/d.png", ".DS_Store"])
    for name in ("notes.txt", "cat/x.TXT", "dog/y.heic", "README"):
        (tmp_path / name).touch()
    folder = list_folder(str(tmp_path), "data.train_dir")
    assert folder.left_out == {".txt": 2, ".heic": 1, "without extension": 1, "hidden": 3}
    assert folder.left_out_text == "2 .txt, 1 .heic, 1 without extension, 3 hidden"
    data = ImageData(train_dir=tmp_path, image_size=8, batch_size=2)
    assert data.left_out == folder.left_out_text
    assert ImageData(train_dir=tmp_path / "cat", test_dir=tmp_path / "dog").left_out == (
        "1 .txt in train_dir; 1 .heic, 1 hidden in test_dir"
    )
    assert ImageData().left_out == ""
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic" / "1.heic").touch()
    with pytest.raises(ValueError, match=r"holds no images\. .* There are 1 \.heic\."):
        list_folder(str(tmp_path / "heic"), "data.train_dir")


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["cat/a.png", "b.png"], ["cat/a.png", "cat/b.png"]])
def test_a_flat_mixed_or_single_folder_has_no_classes(tmp_path, names):
    folder = list_folder(str(fill(tmp_path, names)), "data.train_dir")
    assert len(folder.paths) == 2
    assert folder.classes is None
    assert folder.labels is None


def test_files_are_sorted_folder_by_folder(tmp_path):
    # As whole strings, "a-b/x.png" would come before "a/x.png" with one separator and after it with another.
    folder = list_folder(str(fill(tmp_path, ["a-b/x.png", "a/x.png", "a/B.png", "a/a.png"])), "data.train_dir")
    assert below(tmp_path, folder.paths) == ["a/B.png", "a/a.png", "a/x.png", "a-b/x.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    fill(tmp_path / "store", ["x.png"])
    fill(tmp_path / "set", ["one/a.png"])
    (tmp_path / "set" / "two").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "one" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "two" / "self").symlink_to(tmp_path / "store")
    assert list_folder(str(tmp_path / "set"), "data.train_dir").labels.tolist() == [0, 1]


def test_a_folder_is_held_in_memory_or_read_from_files_with_equal_images(tmp_path):
    names = [f"{c}/{i}.png" for c in "ab" for i in range(5)]
    fill(tmp_path, names, side=12)
    memory = ImageData(train_dir=str(tmp_path), image_size=8, batch_size=4)
    files = ImageData(train_dir=str(tmp_path), image_size=8, batch_size=4, memory_limit_gb=0, workers=0)
    for data in (memory, files):
        data.setup()
    assert isinstance(memory.train, MemoryImages)
    assert isinstance(files.train, FileImages)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(memory.train.images(index), files.train.images(index))
    assert memory.train.images(index).shape == (3, 3, 8, 8)
    assert memory.train.images(index)[:, 0, 0, 0].tolist() == [7, 0, 3]
    for (a, i), (b, j) in zip(memory.train_dataloader(), files.train_dataloader(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(i, j)
    assert memory.steps_per_epoch == len(memory.train_dataloader()) == 2
    for a, b in zip(memory.eval_loader("test", 3), files.eval_loader("test", 3), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_batches_are_made_without_a_trainer_and_after_one(tmp_path):
    fill(tmp_path / "photos", [f"{n}.png" for n in range(6)])
    settings = {"train_dir": tmp_path / "photos", "batch_size": 2, "image_size": 8}
    files = ImageData(**settings, memory_limit_gb=0).train_dataloader()  # by as many workers as there are cores
    assert len(files) == 3
    data = tiny_data()
    fit(tmp_path, data=data, max_epochs=1)
    for found, expected in zip(data.train_dataloader(), tiny_data().train_dataloader(), strict=True):
        assert torch.equal(found[1], expected[1])


def test_a_worker_is_sent_the_paths_in_memory_that_is_shared_and_finds_each_as_it_was():
    paths = [f"/top/{'x' * (i % 50)}/ü\udcff {i}.png" for i in range(1000)]  # \udcff: a byte that is no UTF-8
    sent = ForkingPickler.dumps(FileImages("files", paths, 8))
    received = pickle.loads(sent)
    assert len(sent) < 5000, "grows with the number of files"
    assert list(received.paths) == paths
    assert (received.paths[-1], len(received), received.side) == (paths[-1], 1000, 8)
    assert list(pickle.loads(pickle.dumps(received)).paths) == paths


def held_by(act) -> int:
    """Bytes that Python and NumPy hold more after `act` than before."""
    gc.collect()
    tracemalloc.start()
    try:
        act()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_file_takes_its_path_and_few_bytes_more_where_it_is_listed_and_none_in_a_worker(tmp_path):
    count = 1000
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(count // 2):
            (tmp_path / name / f"{i}.png").touch()  # only listed, never read
    data = ImageData(train_dir=str(tmp_path), batch_size=2, memory_limit_gb=0)
    list_folder(str(tmp_path), "data.train_dir")  # what the first call keeps is not of the files
    listed = held_by(data.setup)
    # Beside the path: 8 bytes for its end, and what a growing buffer has to spare. An object takes 57 more.
    assert listed - sum(map(len, data.train.paths)) < 40 * count
    sent = ForkingPickler.dumps(data.train)
    received = []

    def work() -> None:
        received.append(pickle.loads(sent))
        for i in range(count):
            received[0].paths[i]

    assert held_by(work) < 20 * count


def test_load_size_leaves_room_to_crop_above_64_pixels():
    assert [ImageData(image_size=side).load_size for side in (32, 64, 96, 224)] == [32, 64, 110, 256]
    assert ImageData(image_size=224, load_size=300).load_size == 300
    assert ImageData(source="stl10", image_size=96).load_size == 96, "no set is enlarged to be cropped"


def test_test_labels_are_numbers_of_the_training_classes(tmp_path):
    fill(tmp_path / "train", ["ant/a.png", "bee/a.png", "cat/a.png"])
    fill(tmp_path / "test", ["cat/a.png", "bee/a.png"])
    data = ImageData(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path / "test"), batch_size=2)
    data.setup()
    assert data.test.labels.tolist() == [1, 2]
    assert data.test.classes == data.train.classes == ["ant", "bee", "cat"]
    (images, labels), *rest = data.eval_loader("test")
    assert not rest
    assert (images[:, 0, 0, 0].tolist(), labels.tolist()) == ([1, 0], [1, 2])
    assert data.evaluation_note is None


def test_without_a_test_set_a_fixed_part_of_the_labelled_images_is_held_out_and_said_so(tmp_path):
    fill(tmp_path, [f"{c}/{i:02}.png" for c in "ab" for i in range(25)])
    seen = []
    for seed in (0, 1):
        data = ImageData(train_dir=str(tmp_path), batch_size=4, seed=seed)
        data.setup()
        train, test = (torch.cat([x[:, 0, 0, 0] for x, _ in data.eval_loader(s)]).tolist() for s in ("train", "test"))
        seen.append((train, test))
        assert (len(train), len(test)) == (40, 10)
        assert sorted(train + test) == list(range(50))
    assert seen[0] == seen[1], "the split must not depend on the run's seed"
    assert "10 of the 50 images" in data.evaluation_note
    assert "pretraining saw them" in data.evaluation_note


def test_about_the_holdout_of_each_class_is_test_and_every_class_keeps_an_image_for_training(tmp_path):
    sizes = {"a": 1, "b": 2, "c": 3, "d": 10, "e": 34}
    fill(tmp_path, [f"{c}/{i:02}.png" for c, size in sizes.items() for i in range(size)])
    data = ImageData(train_dir=str(tmp_path), batch_size=4)
    train, test = (data.eval_loader(split) for split in ("train", "test"))
    assert test.labels.bincount(minlength=5).tolist() == [0, 1, 1, 2, 7]
    assert train.labels.bincount().tolist() == [1, 1, 2, 8, 27]
    assert torch.cat([train.index, test.index]).sort().values.tolist() == list(range(50))
    assert test.index.tolist() == sorted(test.index.tolist())
    assert test.index[-7:].tolist() != list(range(16, 23)), "the first files of a class are no random choice"


def test_classes_of_one_image_each_leave_nothing_to_hold_out(tmp_path):
    data = ImageData(train_dir=str(fill(tmp_path, ["a/1.png", "b/2.png"])), batch_size=2)
    with pytest.raises(ValueError, match=r"no class of .* has two images: .* data\.test_dir"):
        data.eval_loader("train")
    assert not data.has_labels, "there is nothing to evaluate on"


def test_unlabelled_training_images_are_evaluated_within_a_labelled_test_set(tmp_path):
    fill(tmp_path / "train", ["a.png", "b.png"])
    fill(tmp_path / "test", [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    data = ImageData(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path / "test"), batch_size=2)
    assert data.eval_loader("train").labels.shape == (8,)
    assert data.eval_loader("test").labels.shape == (2,)
    assert "pretraining saw" not in data.evaluation_note


def test_no_labels_anywhere_is_an_error_when_they_are_asked_for(tmp_path):
    data = ImageData(train_dir=str(fill(tmp_path, ["a.png", "b.png"])), batch_size=2)
    data.setup()
    assert not data.has_labels
    with pytest.raises(ValueError, match="has no labels: evaluation needs"):
        data.eval_loader("test")


def test_eval_loader_is_sequential_and_its_limit_a_fixed_subset_of_all_classes():
    data = ImageData(shapes_train=200, shapes_test=100)
    labels = torch.cat([y for _, y in data.eval_loader("train", batch_size=64)])
    assert torch.equal(labels, data.train.labels)
    loader = data.eval_loader("train", batch_size=64, limit=90)
    some = torch.cat([y for _, y in loader])
    assert torch.equal(some, loader.labels)
    assert len(some) == 90
    assert len(loader) == 2
    assert some.unique().numel() == 10
    assert torch.equal(loader.index, epoch_order(20200619, 0, 200)[:90].sort().values)
    assert len(data.eval_loader("train", limit=1000).labels) == 200


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"train_dir": "{tmp}/imgs"}, r"does not exist\. .* exists and has no imgs\. Did you mean .*images\?"),
        ({"train_dir": "{tmp}/no/such/place"}, r"{tmp} exists and has no no\."),
        ({"train_dir": "{tmp}/file.png"}, r"is a file\. Give the folder"),
        ({"train_dir": "{tmp}/empty"}, r"holds no images\. Looked at every depth for .*jpg, .*png"),
        (
            {"train_dir": "{tmp}/images", "batch_size": 9},
            r"batch_size=9 is more than the 4 training images .* at most 4",
        ),
        ({"train_dir": "{tmp}/images", "test_dir": "{tmp}/other"}, r"classes that .* lacks: zebra\."),
        ({"train_dir": "{tmp}/images", "test_dir": "{tmp}/gone"}, r"data\.test_dir=.*gone does not exist"),
        ({"train_dir": "{tmp}/split"}, r"folders test, train, which look like splits.*train_dir={tmp}/split/train"),
        ({"source": "folder"}, r"data\.source=folder needs data\.train_dir"),
        ({"source": "shapes", "train_dir": "x"}, r"train_dir=x is not used with data\.source=shapes"),
        ({"source": "cifar10"}, r"needs data\.data_dir"),
        ({"source": "stl10", "data_dir": "{tmp}"}, r"looked for {tmp}/stl10_binary, .*data\.download=true"),
        ({"source": "imagenet", "data_dir": "{tmp}/half"}, r"{tmp}/half exists and has no train"),
        ({"image_size": 0}, r"data\.image_size=0 is not a positive number"),
        ({"batch_size": 1}, r"data\.batch_size=1 leaves no image .* Use 2 at least"),
        ({"batch_size": 0}, r"data\.batch_size=0 leaves"),
        ({"workers": -1}, r"data\.workers=-1 is negative"),
        ({"seed": -1}, r"seed=-1 is not an integer"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, options, line):
    fill(tmp_path / "images", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    fill(tmp_path / "other", ["a/1.png", "zebra/2.png"])
    fill(tmp_path / "split", ["train/1.png", "test/2.png"])
    fill(tmp_path / "half", ["val/1.png"])
    fill(tmp_path, ["file.png"])
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    filled = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in options.items()}
    problems = ImageData(**{"batch_size": 2, **filled}).problems()
    assert len(problems) == 1
    assert "\n" not in problems[0]
    with pytest.raises(ValueError, match=line.replace("{tmp}", str(tmp_path))):
        ImageData(**{"batch_size": 2, **filled}).validate()


def test_all_problems_are_listed_at_once(tmp_path):
    data = ImageData(train_dir=str(tmp_path / "a"), test_dir=str(tmp_path / "b"), batch_size=500, workers=-1)
    with pytest.raises(ValueError, match="workers") as error:
        data.validate(world_size=3)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "data.batch_size=500 does not divide over 3 devices. Use a multiple of 3, for example 498 or 501." in lines


def test_a_broken_file_stops_setup_and_is_named(tmp_path):
    fill(tmp_path, ["a/1.png", "b/2.png"])
    (tmp_path / "a" / "0.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read 1 image file: .*0\.jpg \(not an image in a known format\)"):
        ImageData(train_dir=str(tmp_path), batch_size=2).setup()


class _FakeCIFAR:
    """torchvision's CIFAR reader without the files: 6 training and 4 test images."""

    def __init__(self, root, train, download=False):
        count = 6 if train else 4
        self.data = np.arange(count * 32 * 32 * 3).reshape(count, 32, 32, 3).astype(np.uint8)
        self.targets, self.classes = list(range(count)), list("abcdefghij")


class _FakeSTL:
    """torchvision's STL-10 reader without the files."""

    classes = tuple("abcdefghij")

    def __init__(self, root, split, download=False):
        count = {"unlabeled": 9, "train": 5, "test": 3}[split]
        self.data = np.full((count, 3, 96, 96), count, dtype=np.uint8)
        self.labels = np.full(count, -1) if split == "unlabeled" else np.arange(count, dtype=np.uint8)


def test_cifar_keeps_pixels_and_labels(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", _FakeCIFAR)
    data = ImageData(source="cifar10", data_dir=str(tmp_path), batch_size=3)
    data.setup()
    original = _FakeCIFAR("", True)
    assert torch.equal(data.train.pixels.permute(0, 2, 3, 1), torch.from_numpy(original.data))
    assert data.train.labels.tolist() == original.targets
    assert data.test.name == "cifar10 (test)"
    assert len(data.test) == 4


def test_stl10_pretrains_on_the_unlabelled_images_and_evaluates_on_the_others(tmp_path, monkeypatch):
    (tmp_path / "stl10_binary").mkdir()
    monkeypatch.setattr(torchvision.datasets, "STL10", _FakeSTL)
    data = ImageData(source="stl10", data_dir=str(tmp_path), batch_size=3, image_size=64)
    data.setup()
    assert (len(data.train), data.train.labels, data.train.side) == (9, None, 64)
    assert [len(data.eval_loader(split).labels) for split in ("train", "test")] == [5, 3]
    assert next(iter(data.eval_loader("test")))[0].unique().tolist() == [3]


def test_construction_touches_no_disk_and_the_module_can_be_sent_to_another_process():
    data = ImageData(train_dir="/no/such/folder", batch_size=7)
    assert pickle.loads(pickle.dumps(data)).batch_size == 7


def test_folders_given_as_paths_stand_in_a_checkpoint_as_text(tmp_path):
    data = ImageData(train_dir=tmp_path / "a", test_dir=tmp_path / "b", data_dir=tmp_path / "c")
    torch.save(dict(data.hparams), tmp_path / "settings.pt")
    settings = torch.load(tmp_path / "settings.pt", weights_only=True)
    assert [settings[f"{name}_dir"] for name in ("train", "test", "data")] == [str(tmp_path / name) for name in "abc"]
    assert data.train_dir == str(tmp_path / "a")
    assert ImageData().hparams["train_dir"] is None


@pytest.mark.skipif(
    "SIMCLR_CIFAR10" not in os.environ, reason="SIMCLR_CIFAR10 does not name CIFAR-10 as folders of PNGs"
)
def test_cifar10_as_files():
    root = Path(os.environ["SIMCLR_CIFAR10"])
    data = ImageData(train_dir=str(root / "train"), test_dir=str(root / "test"))
    data.setup()
    assert data.train.pixels.shape == (50_000, 3, 32, 32)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # The set's published channel means (x 255), as everybody's normalisation constants have them.
    means = torch.stack([block.double().mean((0, 2, 3)) for block in data.train.pixels.split(5000)]).mean(0) / 255
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=1e-4)
