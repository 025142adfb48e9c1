"""`simclr eval --on` and `--suite`: other labelled images by a word, the same pixels and labels by every way there."""

import csv
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.data import ImageData
from simclr.data.labelled import SETS, LabelledData, labelled_data, read_table
from simclr.eval.metrics import mean_per_class
from simclr.eval.predictions import unpacked
from simclr.eval.transfer import read_suite
from tiny import flags

pytestmark = pytest.mark.usefixtures("few_lambdas")

HELD = {"image_size": 16, "batch_size": 2, "workers": 0, "held_out": 0}


def draw(path: Path, *seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, and the same photographs as class folders, as tables, and as torchvision keeps some of its sets."""
    root = tmp_path_factory.mktemp("transfer")
    sizes = {"train": {"bee": 9, "ant": 7, "cat": 5}, "test": {"ant": 4, "bee": 6, "cat": 2}}
    rows = []
    for part, counts in sizes.items():
        for name, count in counts.items():
            for i in range(count):
                draw(root / "photos" / part / name / f"{i}.png", len(name), ord(name[0]), i, part == "test")
                rows.append((f"photos/{part}/{name}/{i}.png", name, part))
    (root / "with_split.csv").write_text("label,path,split\n" + "".join(f"{n},{p},{s}\n" for p, n, s in rows))
    for part in ("train", "test"):
        (root / f"{part}.csv").write_text("".join(f"{p},{n}\n" for p, n, s in rows if s == part))
    sets = root / "sets"
    for kind in ("River", "Forest"):
        for i in range(5):
            draw(sets / "eurosat" / "2750" / kind / f"{kind}_{i}.jpg", ord(kind[0]), i)
    pets = sets / "oxford-iiit-pet"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, name in enumerate(("Abyssinian", "beagle"), 1):
        for i in range(6):
            draw(pets / "images" / f"{name}_{i}.jpg", number, i, mode="L" if i == 3 else "RGB")
            lines["test" if i > 3 else "trainval"].append(f"{name}_{i} {number} 1 1\n")
    (pets / "annotations").mkdir(parents=True)
    for part, text in lines.items():
        (pets / "annotations" / f"{part}.txt").write_text("".join(text))
    for number in range(102):
        (sets / "caltech101" / "101_ObjectCategories" / f"kind{number:03}").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        off = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "trainer.max_epochs": 1}
        train(flags({"run_dir": "run", **off}))
    return root


def shown(data: ImageData) -> dict[str, tuple[list, list, list]]:
    data.setup()
    found = {}
    for split in ("train", "test"):
        loader = data.eval_loader(split)
        pixels = torch.cat([images for images, _ in loader])
        names = [loader.source.classes[label] for label in loader.labels.tolist()]
        order = sorted(range(len(names)), key=lambda i: pixels[i].flatten().tolist())  # two ways may have two orders
        found[split] = [pixels[i].tolist() for i in order], [names[i] for i in order], loader.source.classes
    return found


def test_folder_and_tables_are_the_same_images_and_labels(place, monkeypatch):
    monkeypatch.chdir(place)
    plain = shown(ImageData(train_dir="photos/train", test_dir="photos/test", **HELD))
    assert shown(labelled_data("photos", **HELD)) == plain
    assert shown(labelled_data("photos/train", "photos/test", **HELD)) == plain
    assert shown(labelled_data("with_split.csv", **HELD)) == plain
    assert shown(labelled_data("train.csv", "test.csv", **HELD)) == plain
    assert plain["train"][2] == ["ant", "bee", "cat"]


def test_a_set_of_torchvision_is_what_it_gives_itself(place, monkeypatch):
    monkeypatch.chdir(place)
    data = labelled_data("torchvision:OxfordIIITPet", root="sets", **HELD)
    data.setup()
    assert data.metric == "mean_per_class"
    for split, part in (("train", "trainval"), ("test", "test")):
        own = torchvision.datasets.OxfordIIITPet("sets", part)
        loader = data.eval_loader(split)
        [pixels] = [images for images, _ in loader]
        assert loader.labels.tolist() == [label for _, label in own]
        assert loader.source.classes == own.classes
        for mine, (theirs, _) in zip(pixels, own, strict=True):
            square = theirs.convert("RGB").crop((2, 0, 18, 16))  # 20 x 16: the central square
            assert np.array_equal(mine.permute(1, 2, 0).numpy(), np.asarray(square))
    files = labelled_data("torchvision:EuroSAT", root="sets", **HELD)
    plain = ImageData(train_dir="sets/eurosat/2750", **HELD)
    assert shown(files) == shown(plain)  # no test set: the same part of each class is held back
    assert files.evaluation_note.endswith("kept from the probe, are the test")
    assert "pretraining saw them" in plain.evaluation_note


@pytest.mark.parametrize("name", SETS)
def test_every_named_set_takes_its_options_and_fetches_nothing(name, tmp_path, monkeypatch):
    kind = getattr(torchvision.datasets, name)

    def refuse(*args, **kwargs):
        raise AssertionError("something would have been fetched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for options in (*SETS[name].train, *SETS[name].test):
        inspect.signature(kind).bind(str(tmp_path), **options)
    with pytest.raises(ValueError, match=rf"torchvision:{name} .*Nothing is fetched without --data.download true"):
        labelled_data(f"torchvision:{name}", root=str(tmp_path), **HELD).setup()


def test_caltech_takes_thirty_of_each_class_and_tests_on_the_others(tmp_path, monkeypatch):
    class Caltech:
        categories = ("a", "b")

        def __init__(self, root, download=False):
            self.labels = [0] * 33 + [1] * 31

        def __len__(self):
            return 64

        def __getitem__(self, i):
            return Image.new("RGB", (16, 16), (i, 0, 0)), self.labels[i]

    monkeypatch.setattr(torchvision.datasets, "Caltech101", Caltech)
    data = labelled_data("torchvision:Caltech101", root=str(tmp_path), **HELD)
    parts = {}
    for split in ("train", "test"):
        loader = data.eval_loader(split)
        parts[split] = {int(pixel) for images, _ in loader for pixel in images[:, 0, 0, 0]}
        assert loader.source.classes == ["a", "b"]
        assert loader.labels.bincount().tolist() == ([30, 30] if split == "train" else [3, 1])
    assert parts["train"] | parts["test"] == set(range(64))
    assert not parts["train"] & parts["test"]


def test_eval_on_other_images_has_their_numbers_and_verifies(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("run", tmp_path / "run")
    run = str(tmp_path / "run")
    less = ["--protocols", "knn", "--knn.k", "3", "--yardsticks", "raw_pixels"]
    main(
        ["eval", run, *less, "--data.source", "folder", "--data.train_dir=photos/train", "--data.test_dir=photos/test"]
    )
    own = json.loads((tmp_path / "run" / "eval.json").read_text())
    for word, test in (("photos", None), ("with_split.csv", None), ("train.csv", "test.csv")):
        main(["eval", run, *less, "--on", word, *(["--on_test", test] if test else [])])
        name = Path(word).stem
        record = json.loads((tmp_path / "run" / "transfer" / f"{name}.json").read_text())
        [a], [b] = own["results"], record["results"]
        assert (a["top1"], a["yardsticks"]) == (b["top1"], b["yardsticks"])
        assert f"/on={name}/" in b["id"]
        if word == "photos":
            assert a["hash"] == b["hash"]
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # its paths are from the root
    main(["verify", "run"])
    said = capsys.readouterr().out
    assert "transfer/with_split.json: " in said
    assert said.splitlines()[-1] == "equal"


SUITE = """
root: sets
protocols: [knn]
datasets:
  - photos
  - {data: torchvision:OxfordIIITPet, name: pets, protocols: [knn, semi]}
  - {data: train.csv, test: test.csv, metric: mean_per_class}
"""


def test_a_suite_is_one_table_and_one_csv(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (place / "suite.yaml").write_text(SUITE)
    less = ["--knn.k", "3", "--semi.fractions", "[0.5]", "--semi.draws", "2", "--yardsticks", "raw_pixels"]
    main(["eval", "run", "--suite", str(place / "suite.yaml"), *less, "--csv", "all.csv"])
    said = capsys.readouterr().out
    assert sorted(path.name for path in Path("run/transfer").glob("*.json")) == [
        "pets.json",
        "photos.json",
        "train.json",
    ]
    table = [line for line in Path("run/transfer.md").read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[1:4] for line in table[2:]] == [
        [" photos ", " knn k=3 ", " top-1 "],
        [" pets ", " knn k=3 ", " mean per class "],
        [" pets ", " semi labels=50% ", " mean per class "],
        [" train ", " knn k=3 ", " mean per class "],
    ]
    with open("all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["dataset"] for row in rows] == ["photos", "pets", "pets", "pets", "train"]
    assert [row["metric"] for row in rows] == ["top1", *["mean_per_class"] * 4]
    record = json.loads(Path("run/transfer/train.json").read_text())
    [result] = record["results"]
    value = mean_per_class(unpacked(result["predictions"]), unpacked(record["labels"]))
    assert result["mean_per_class"] == value
    assert f"{100 * value:.1f}" in table[-1].split("|")[4]
    assert all(line.split("|")[2].strip() in said for line in table[2:])
    main(["verify", "run"])
    assert capsys.readouterr().out.splitlines()[-1] == "equal"


def test_words_of_a_suite_are_from_its_folder(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "root: sets\ndatasets:\n - torchvision:DTD\n - a/train\n - {data: b.csv, test: c.csv}\n"
    )
    dtd, a, b = read_suite(tmp_path / "s.yaml")
    assert (dtd.name, dtd.data, dtd.root) == ("DTD", "torchvision:DTD", str(tmp_path / "sets"))
    assert (a.name, a.data) == ("a", str(tmp_path / "a" / "train"))
    assert (b.name, b.test) == ("b", str(tmp_path / "c.csv"))
    assert read_suite(tmp_path / "s.yaml", "elsewhere")[0].root == "elsewhere"


def test_classes_of_a_table_that_are_numbers_stand_in_their_order(tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text("0.png,10\n1.png,9\n2.png,100\n")
    assert read_table(tmp_path / "t.csv").names == ["9", "10", "100"]
    data = LabelledData(str(tmp_path / "t.csv"), **HELD)
    data.setup()
    assert data.train.labels.tolist() == [1, 0, 2]


TABLES = {
    "gone.csv": None,
    "empty.csv": b"",
    "head.csv": b"path,label\n",
    "binary.csv": bytes(range(256)),
    "lost.csv": b"a.png,x\nnot/here.png,y\n",
    "blank.csv": b"path,label\na.png,\n",
    "twice.csv": b"a.png,x\na.png,y\n",
    "cells.csv": b"path,label\na.png,x,1\n",
    "wide.csv": b"a.png,x,train,1\n",
    "part.csv": b"path,label,split\na.png,x,maybe\n",
    "only_test.csv": b"path,label,split\na.png,x,test\n",
    "new_class.csv": b"path,label,split\na.png,x,train\nb.png,x,train\ngood/a/0.png,y,test\n",
    "one_class.csv": b"a.png,x\nb.png,x\n",
    "one_each.csv": b"a.png,x\nb.png,y\n",
}
SUITES = {
    "no_list.yaml": "a: 1\n",
    "yaml.yaml": "datasets: [\n",
    "key.yaml": "datasets: [good]\nprotocol: knn\n",
    "inside.yaml": "datasets:\n - {data: good, mtric: top1}\n",
    "metric.yaml": "datasets:\n - {data: good, metric: map}\n",
    "same.yaml": "datasets: [good, good]\n",
    "number.yaml": "datasets: [3]\n",
    "second.yaml": "datasets: [good, flat]\n",
    "unknown.yaml": "datasets:\n - {data: good, protocols: [knm]}\n",
    "lost.yaml": "datasets: [good, torchvision:CIFAR10]\n",
    "name.yaml": "datasets:\n - {data: good, name: ../../x}\n",
}
BAD = {
    "--on gone.csv": "gone.csv is neither a folder, nor a table of path,label, nor torchvision:NAME.",
    "--on CIFAR10": "CIFAR10 is a set of torchvision. Use torchvision:CIFAR10.",
    "--on torchvision:Cifar10 --root .": "Did you mean torchvision:CIFAR10?",
    "--on torchvision:CIFAR10": "torchvision:CIFAR10 needs --root, the folder where torchvision's sets are kept.",
    "--on torchvision:CIFAR10 --root gone": "gone does not exist. Nothing is fetched without --data.download true.",
    "--on torchvision:CIFAR10 --root .": "torchvision:CIFAR10 in",
    "--on torchvision:CIFAR10 --root . --on_test flat": "has test images of its own: leave flat out.",
    "--on flat": "flat has no labels: evaluation needs an image set with two or more class folders",
    "--on good --on_test a.png": "good is a folder, and so must be its test images: a.png is none.",
    "--on good --suite key.yaml": "on is given beside suite, which names the data sets itself.",
    "--on good --data.train_dir good": "data.train_dir is given beside on. Give one of them.",
    "--on_test good": "on_test=good is for other images: give --on or --suite too.",
    "--on good --knn.k 500": "knn.k=500 is more than the 4 training images.",
    "--on empty.csv": "empty.csv holds no rows: needed path,label.",
    "--on head.csv": "head.csv holds a header and no rows.",
    "--on binary.csv": "binary.csv cannot be read as a table of path,label",
    "--on lost.csv": "row 2 names not/here.png, which is not there.",
    "--on blank.csv": "row 2 has no label for a.png.",
    "--on twice.csv": "row 2 names a.png again.",
    "--on cells.csv": "row 2 has 3 cells, not 2.",
    "--on wide.csv": "wide.csv has 4 columns and no header with path and label.",
    "--on part.csv": "row 2 has split maybe, which is neither train nor test.",
    "--on only_test.csv": "has no row whose split is train.",
    "--on new_class.csv": "has classes of which",
    "--on one_class.csv": "one_class.csv has images of 1 class: evaluation needs two or more.",
    "--on one_each.csv": "has two images: none can be held out as test.",
    "--on one_each.csv --on_test twice.csv": "row 2 names a.png again.",
    "--on one_each.csv --on_test one_class.csv": "share 2 images:",
    "--suite gone.yaml": "suite=gone.yaml is not a file: a YAML file with a list of datasets is needed.",
    "--suite no_list.yaml": "suite=no_list.yaml has no list of datasets.",
    "--suite yaml.yaml": "suite=yaml.yaml is not valid YAML",
    "--suite key.yaml": "unknown key protocol, there are root, protocols, datasets. Did you mean protocols?",
    "--suite inside.yaml": "good: unknown key mtric, there are name, data, test, protocols, metric. Did you "
    "mean metric?",
    "--suite metric.yaml": "good: metric=map is none of top1, mean_per_class.",
    "--suite same.yaml": "has several data sets called good. Give each a name of its own.",
    "--suite number.yaml": "3 is no data set. Write a word, or {data: WORD, test: WORD}.",
    "--suite second.yaml": "flat: ",
    "--suite unknown.yaml": "good: protocol=knm is none of",
    "--suite lost.yaml": "CIFAR10: torchvision:CIFAR10 needs --root",
    "--suite name.yaml": "the name '../../x' is that of a file.",
}


@pytest.fixture(scope="module")
def wrong(place, tmp_path_factory) -> Path:
    """A folder with everything that is given wrongly; no row may change it."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "run").symlink_to(place / "run")
    for number, name in enumerate(("a.png", "b.png", "flat/a.png", "flat/b.png")):
        draw(root / name, number)
    for number in range(6):
        draw(root / "good" / "ab"[number % 2] / f"{number}.png", number)
    for name, content in TABLES.items():
        if content is not None:
            (root / name).write_bytes(content)
    for name, content in SUITES.items():
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(typed, wrong, place, monkeypatch, capsys):
    monkeypatch.chdir(wrong)
    before = sorted([*wrong.rglob("*"), *(place / "run").rglob("*")])
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "run", "--protocols", "knn", "--cache", "false", *typed.split()])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT, said
    assert said.err.count("\n") == 1, said.err
    assert BAD[typed] in said.err
    assert sorted([*wrong.rglob("*"), *(place / "run").rglob("*")]) == before
