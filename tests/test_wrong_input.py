"""Images, encoders and outputs that cannot serve an evaluation or a use: one line from each command, no file left."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simclr.cli import main
from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.train import train
from simclr.eval.verify import records_of
from tiny import flags

OFF = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "trainer.max_epochs": 1, "model.base_lr": 1.0}


def photos(root: Path, counts: dict[str, int]) -> None:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            pixels = np.random.default_rng([number, image]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{image}.png")


def changed(source: Path, target: Path, change) -> None:
    """A run whose checkpoint is another."""
    (target / "checkpoints").mkdir(parents=True)
    content = torch.load(source / "checkpoints" / "last.ckpt", weights_only=True)
    change(content["state_dict"])
    torch.save(content, target / "checkpoints" / "last.ckpt")


def rename(weights):
    weights["encoder.conv1.wieght"] = weights.pop("encoder.conv1.weight")


def take_gray(weights):
    weights["encoder.conv1.weight"] = weights["encoder.conv1.weight"].sum(1, keepdim=True)


def overflow(weights):
    last = max(name for name in weights if name.startswith("encoder.") and name.endswith("bn2.weight"))
    for name in (last, last.replace("weight", "bias")):  # finite weights, and one feature of many that is not
        weights[name][0] = 3e38


def wrong_features(root: Path) -> None:
    """Copies of what `simclr embed` has written: with a NaN, and of another version."""
    for name in ("nan_features", "later_features"):
        shutil.copytree(root / "embedded", root / name)
    features = np.load(root / "embedded" / "features.npy")
    features[1, 0] = np.nan
    np.save(root / "nan_features" / "features.npy", features)
    about = root / "later_features" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "simclr_embed": 9}))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, what is wrong with others, and folders that do not serve. No row may change it."""
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(flags({**OFF, "run_dir": "run"}))
        main(["export", "run", "--out", "exported"])
    photos(root / "two", {"a": 3, "b": 3})
    photos(root / "three", {"a": 2, "b": 2, "c": 2})
    photos(root / "single", {"a": 1, "b": 1})
    photos(root / "one", {"a": 4})
    photos(root / "flat", {"": 3})
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"):
        (root / "fakes" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fakes" / name).write_bytes(b"no image")
    (root / "empty").mkdir()
    (root / "taken.safetensors").write_bytes(b"mine")
    (root / "taken").mkdir()
    (root / "taken" / "mine.txt").write_text("mine")
    (root / "taken.txt").write_bytes(b"mine\0")
    changed(root / "run", root / "renamed", rename)
    changed(root / "run", root / "gray", take_gray)
    changed(root / "run", root / "nan", overflow)
    shutil.copytree(root / "exported", root / "later")
    card = root / "later" / "card.md"
    card.write_text(card.read_text().replace("simclr_export: 1", "simclr_export: 9"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["embed", "two", "--encoder", "run", "--out", "embedded"])
        main(["fit", "run", "--data.train_dir", "two", "--out", "classifier.safetensors"])
        main(["eval", "run", "--on", "two", "--protocols", "knn", "--yardsticks", "none", "--cache", "false"])
    wrong_features(root)
    for name in ("nan", "gray"):  # whose numbers were measured, and whose weights are others by now
        shutil.copytree(root / "run" / "transfer", root / name / "transfer")
    shutil.copytree(root / "run", root / "schema")
    record = root / "schema" / "transfer" / "two.json"
    record.write_text(record.read_text().replace("simclr.eval/1", "simclr.eval/9"))
    shutil.rmtree(root / "run" / "transfer")
    shutil.copytree(root / "exported", root / "gray_export")
    file = root / "gray_export" / next((root / "exported").glob("*.safetensors")).name
    weights = load_file(file)
    save_file({k: v.sum(1, keepdim=True) if k == "conv1.weight" else v for k, v in weights.items()}, file)
    return root


UNLABELLED = "flat has no labels: evaluation needs an image set with two or more class folders"
ONE_CLASS = "one has no labels: evaluation needs an image set with two or more class folders"
GRAY = "conv1.weight is (4, 1, 3, 3) where (4, 3, 3, 3) is needed"
RENAMED = "conv1.weight is missing; conv1.wieght is unexpected"
LATER = "card.md is of version 9 of the card; this simclr reads version 1. Export the run again."
NAN = "are NaN or infinite"
SOMETHING_ELSE = "is there already and holds something else. Name another file."
ROWS = {
    # Labels where there are none, or too few
    "eval run --on flat": UNLABELLED,
    "eval run --data.source folder --data.train_dir flat": UNLABELLED,
    "linear-eval run --data.source folder --data.train_dir flat": UNLABELLED,
    "fit run --data.train_dir flat --out new.safetensors": "flat",
    "eval run --on one": ONE_CLASS,
    "linear-eval run --data.source folder --data.train_dir one": ONE_CLASS,
    "fit run --data.train_dir one --out new.safetensors": "one",
    "eval run --on single": "no class of single has two images: none can be held out as test.",
    "linear-eval run --data.source folder --data.train_dir single": "no class of single has two images: none can be",
    "fit run --data.train_dir single --out new.safetensors": "single",
    "eval run --on two --on_test three": "has classes that data.train_dir=two lacks: c.",
    "linear-eval run --data.source folder --data.train_dir two --data.test_dir three": "two lacks: c.",
    "eval run --on two --protocols knn --knn.k 5": "knn.k=5 is more than the 4 training images. Use fewer",
    "linear-eval run --data.source folder --data.train_dir two --knn_k 5": "knn_k=5 is more than the 4 training",
    "eval run --on two --on_test one": ONE_CLASS,
    "eval run --on two --on_test flat": UNLABELLED,
    "verify schema --train_dir flat": "two.json has schema simclr.eval/9, this version reads simclr.eval/1.",
    "verify nan --train_dir flat": UNLABELLED,
    "verify two": "no eval.json and no linear_eval.json in two.",
    "search two/a/0.png --in embedded --k 7": "k=7 is more than the 6 images in embedded. Use fewer.",
    # Folders of nothing
    "eval run --on empty": "holds no images.",
    "linear-eval run --data.source folder --data.train_dir empty": "holds no images.",
    "fit run --data.train_dir empty --out new.safetensors": "holds no images.",
    "embed empty --encoder run --out new": "holds no images.",
    "eval run --on fakes": "cannot read 6 image files",
    "linear-eval run --data.source folder --data.train_dir fakes": "cannot read 6 image files",
    "fit run --data.train_dir fakes --out new.safetensors": "cannot read",
    "embed fakes --encoder run --out new": "cannot read",
    "eval run --on fakes --data.on_error skip": "6 of 6 images cannot be read, more than the 1 % or 10",
    "predict empty --classifier classifier.safetensors": "holds no images.",
    "predict fakes --classifier classifier.safetensors --csv new.csv": "cannot read",
    "predict fakes --classifier classifier.safetensors --csv new.csv --on_error skip": "none of the 6 images can be",
    "duplicates empty --json new.json": "holds no images.",
    "duplicates fakes --json new.json": "none of the 6 images in fakes can be read: not an image in a known format.",
    "duplicates fakes --encoder run --json new.json": "none of the 6 images in fakes can be read: not an image in a",
    "search fakes/a/0.png --in embedded": "cannot read 1 image file",
    "search two/a/0.png --in empty": "empty holds no features: it has no about.json. Use simclr embed first.",
    "verify nan --train_dir empty": "holds no images.",
    # Encoders
    "eval renamed --protocols knn": RENAMED,
    "linear-eval renamed": RENAMED,
    "fit renamed --data.train_dir two --out new.safetensors": RENAMED,
    "embed two --encoder renamed --out new": RENAMED,
    "export renamed --out new": RENAMED,
    "eval gray --protocols knn": GRAY,
    "linear-eval gray": GRAY,
    "fit gray --data.train_dir two --out new.safetensors": GRAY,
    "embed two --encoder gray --out new": GRAY,
    "export gray --out new": GRAY,
    "embed two --encoder gray_export --out new": GRAY,
    "embed two --encoder later --out new": LATER,
    "fit later --data.train_dir two --out new.safetensors": LATER,
    "search two/a/0.png --in new --encoder later": "new",
    "eval nan --protocols knn --cache false": NAN,
    "linear-eval nan": NAN,
    "fit nan --data.train_dir two --out new.safetensors": NAN,
    "embed two --encoder nan --out new": NAN,
    "predict two --classifier classifier.safetensors --encoder gray": GRAY,
    "predict two --classifier classifier.safetensors --encoder nan": "is not the encoder that these features are of",
    "predict two --classifier classifier.safetensors --encoder later": LATER,
    "search two/a/0.png --in embedded --encoder gray": GRAY,
    "search two/a/0.png --in embedded --encoder later": LATER,
    "search two/a/0.png --in later_features": "is of version 9, this simclr reads version 1. Embed the images again",
    "search two/a/0.png --in nan_features": NAN,
    "duplicates two --in later_features --json new.json": "is of version 9, this simclr reads version 1. Embed the",
    "duplicates two --in nan_features --json new.json": NAN,
    "duplicates two --encoder gray --json new.json": GRAY,
    "duplicates two --encoder later --json new.json": LATER,
    "duplicates two --encoder nan --json new.json": NAN,
    "duplicates two --encoder renamed --json new.json": RENAMED,
    "export later --out new": LATER,
    "export nan --out new": NAN,
    "export nan --format onnx --out new": NAN,
    "verify gray": GRAY,
    "verify nan": NAN,
    # Students of a distillation
    "eval run --protocols distill --distill.phi 1": "the student of distill: resnet8 has no phi=1. These options are",
    "eval run --protocols distill --distill.student efficientnet --distill.phi 1 --distill.depth 2": "phi=1 means",
    "eval run --protocols distill --distill.student efficientnet --distill.phi 8": "phi=8 is not a whole number from 0",
    "eval run --protocols distill --distill.student efficientnet_b0 --distill.width 2": "Give student=efficientnet",
    "eval run --protocols distill --distill.student resnet8 --distill.depth 0": "the student of distill:",
    "eval run --protocols distill --distill.student resnet99": "Unknown encoder 'resnet99'.",
    # Outputs
    "export run --out taken": "is there already. Name another folder.",
    "fit run --data.train_dir two --out taken.safetensors": "out=taken.safetensors is there already.",
    "embed two --encoder run --out taken": "out=taken holds other files, mine.txt for one",
    "eval run --csv taken.safetensors": "csv=taken.safetensors has other columns than an evaluation.",
    "predict two --classifier classifier.safetensors --csv classifier.safetensors": SOMETHING_ELSE,
    "search two/a/0.png --in embedded --png two/a/0.png": SOMETHING_ELSE,
    "search two/a/0.png --in embedded --json two/a/0.png": SOMETHING_ELSE,
    "duplicates two --json taken.safetensors": SOMETHING_ELSE,
    "duplicates two --copies two/a/0.png": SOMETHING_ELSE,
    "check-data two --bad two/a/0.png": SOMETHING_ELSE,
    "check-data two --copies taken.txt": SOMETHING_ELSE,
    "check-data two --json taken.txt": SOMETHING_ELSE,
    "supervised run --run_dir taken": "run_dir=taken is taken. Choose another.",
    "train two --run_dir taken": "run_dir=taken is taken. Choose another.",
}


def everything(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("typed", ROWS)
def test_it_is_one_line_and_nothing_is_written(typed, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = everything(place)
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT, said
    assert said.count("\n") == 1, said
    assert ROWS[typed] in said
    assert everything(place) == before


def test_labels_that_were_shuffled_after_a_record_are_named(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", "run")
    photos(tmp_path / "mine", {"a": 6, "b": 6})
    main(["eval", "run", "--on", "mine", "--protocols", "knn", "--knn.k", "3", "--yardsticks", "none"])
    main(["verify", "run"])
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
    for name in ("0.png", "1.png", "2.png"):  # each class has half of the other's
        a, b = Path("mine/a") / name, Path("mine/b") / name
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "run"])
    said = capsys.readouterr().out
    assert stopped.value.code == FAILED
    assert "transfer/mine.json" in said
    assert re.search(r"  (train|test) images and labels: recorded ", said)
    assert "knn k=3, hash: recorded" in said
    assert "encoder: recorded" not in said
    assert json.loads(json.dumps(records_of("run")))  # the record itself is as it was
