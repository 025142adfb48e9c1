"""simclr fit and simclr predict: the classifier that scikit-learn fits, its accuracy on what it has not seen."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.use.classify import Classifier, features_of, fit_classifier, read_classifier, save_classifier
from simclr.use.source import open_source
from tiny import fit, tiny_model

COLOURS = {"blue": (30, 40, 200), "green [x]": (20, 190, 40), "red": (200, 30, 30)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(folder, tiny_model(), max_epochs=1).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled") / "colours"
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir(parents=True)
        for seed in range(12):
            noise = np.random.default_rng(100 * number + seed).integers(-30, 30, (20, 24, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def fitted(run, labelled):
    return fit_classifier(str(labelled), open_source(run))[0]


def test_the_classifier_is_scikit_learns(fitted, run, labelled):
    files = sorted(labelled.rglob("*.png"))
    features, kept, skipped = features_of([str(file) for file in files], open_source(run))
    assert (kept.tolist(), skipped) == (list(range(36)), [])
    labels = np.array([sorted(COLOURS).index(file.parent.name) for file in files])
    x = features.double().numpy()
    std = x.std(0)
    varies = std > 1e-6 * np.abs(x.mean(0))
    z = (x[:, varies] - x[:, varies].mean(0)) / std[varies]
    theirs = LogisticRegression(C=1 / fitted.about["regularization"], max_iter=10_000, tol=1e-10).fit(z, labels)
    found = fitted.predict(features)
    assert found.classes.tolist() == theirs.predict(z).tolist()
    np.testing.assert_allclose(found.probability, theirs.predict_proba(z).max(1), atol=2e-3)


def test_distance_and_quantile_are_those_of_loops(fitted, run, labelled):
    features, _, _ = features_of(sorted(map(str, labelled.rglob("*.png"))), open_source(run))
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    own = sorted(1 - max(float(cosines[i, j]) for j in range(36) if j != i) for i in range(36))
    np.testing.assert_allclose(fitted.spacing, own, atol=1e-6)
    queries = torch.cat([features[:5], -features[:2], torch.randn(4, features.shape[1])])
    found = fitted.predict(queries)
    for query, distance, quantile in zip(queries.double(), found.distance, found.quantile, strict=True):
        wanted = 1 - max(float(row @ query / query.norm()) for row in unit)
        assert abs(wanted - distance) < 1e-6
        assert quantile == pytest.approx(
            sum(spacing < float(distance) - 1e-9 for spacing in fitted.spacing.tolist()) / 36, abs=0.03
        )
    assert (found.distance[:5] < 1e-6).all()  # training images themselves
    assert (found.quantile[5:7] == 1).all()


def test_the_accuracy_is_of_images_that_neither_fit_nor_choice_has_seen(run, labelled, monkeypatch):
    from simclr.use import classify

    seen = []
    real = classify.linear_probe
    monkeypatch.setattr(classify, "linear_probe", lambda *a, **k: seen.append(a) or real(*a, **k))
    found, _ = fit_classifier(str(labelled), open_source(run))
    (train, _, held, _), (everything, *_) = seen
    rows = {tuple(row) for row in train.tolist()}
    assert len(held) == found.about["held_out"]["images"] == 6
    assert not rows & {tuple(row) for row in held.tolist()}
    assert len(everything) == len(train) + len(held) == 36


def test_a_file_gives_back_what_was_written_and_damage_is_refused(fitted, tmp_path):
    save_classifier(fitted, tmp_path / "c.safetensors")
    found = read_classifier(tmp_path / "c.safetensors")
    assert found.about == json.loads(json.dumps(fitted.about))
    assert all(torch.equal(getattr(found, n), getattr(fitted, n)) for n in ("weight", "bias", "reference", "spacing"))
    content = bytearray((tmp_path / "c.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_classifier(tmp_path / "c.safetensors")
    save_classifier(
        Classifier(**{**vars(fitted), "about": {**fitted.about, "simclr_classifier": 9}}), tmp_path / "c.safetensors"
    )
    with pytest.raises(ValueError, match="of version 9"):
        read_classifier(tmp_path / "c.safetensors")


def test_the_same_classifier_is_the_same_file(fitted, tmp_path):
    for number in range(20):  # chance would have to be alike twenty times
        save_classifier(fitted, tmp_path / f"{number}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    tensors = safetensors.torch.load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(tensors[name], getattr(fitted, name)) for name in ("weight", "bias", "reference", "spacing"))


def test_fit_and_predict_from_folders_to_a_csv(run, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((30, 30, 3), COLOURS["red"], np.uint8)).save("new,one.png")
    Path("broken.jpg").write_bytes(b"no image")
    main(["fit", str(run), "--data.train_dir", str(labelled), "--out", "c.safetensors"])
    assert "3 classes, 36 images; accuracy on 6 held-out images" in capsys.readouterr().out
    main(
        [
            "predict",
            "new,one.png",
            str(labelled),
            "broken.jpg",
            "--classifier",
            "c.safetensors",
            "--csv",
            "p.csv",
            "--on_error=skip",
        ]
    )
    said = capsys.readouterr().out
    with open("p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37
    assert list(rows[0]) == ["path", "class", "probability", "distance", "quantile"]
    assert rows[0]["path"] == "new,one.png"
    right = sum(Path(row["path"]).parent.name == row["class"] for row in rows[1:])
    assert right >= 34
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    assert "1 could not be read: " in said
    assert "green [x]" in said


REFUSED = {
    "fit RUN --data.train_dir flat": "data.train_dir=flat has no labels",
    "fit RUN --data.train_dir nowhere": "data.train_dir=nowhere does not exist",
    "fit RUN --data.train_dir few": "a class needs three images or more, to fit, to choose and to measure by: b (1)",
    "fit RUN --data.train_dir broken": "cannot read",
    "fit RUN --data.train_dir broken --on_error skip": "none of the 6 images can be read",
    "fit RUN --data.train_dir LABELLED --out taken.safetensors": "out=taken.safetensors is there already",
    "fit RUN --data.train_dir LABELLED --out no/where.safetensors": "cannot be written",
    "fit torchvision:resnet18 --data.train_dir LABELLED": "needs weights, and none are downloaded",
    "predict flat --classifier nowhere": "classifier=nowhere is no file",
    "predict flat --classifier taken.safetensors": "is damaged, or no safetensors file",
    "predict nowhere.png --classifier c.safetensors": "images=nowhere.png is neither a file nor a folder",
    "predict broken --classifier c.safetensors": "cannot read",
    "predict flat --classifier c.safetensors --encoder other.safetensors": "is not the encoder that these features",
    "predict flat --classifier other.safetensors": "is no classifier: simclr fit writes one",
    "predict flat --classifier c.safetensors --csv no/where.csv": "csv=no/where.csv cannot be written",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(typed, run, labelled, fitted, tmp_path, monkeypatch, capsys):
    from simclr.checkpoint import save_encoder

    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for file in ("flat/1.png", "few/a/1.png", "few/a/2.png", "few/a/3.png", "few/b/1.png"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    for file in (f"broken/{name}/{n}.png" for name in "ab" for n in range(3)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(b"no image")
    Path("taken.safetensors").write_text("mine")
    if "c.safetensors" in typed:
        save_classifier(fitted, Path("c.safetensors"))
    if "other" in typed:
        trainer = fit(tmp_path / "t", tiny_model(base_lr=0.5), max_epochs=1)
        save_encoder(trainer.lightning_module, Path("other.pt"))
    before = {path: path.read_bytes() for path in (*tmp_path.rglob("*"), *run.rglob("*")) if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(typed.replace("RUN", str(run)).replace("LABELLED", str(labelled)).split())
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert REFUSED[typed] in said
    assert said.count("\n") == 1, said
    after = {path: path.read_bytes() for path in (*tmp_path.rglob("*"), *run.rglob("*")) if path.is_file()}
    assert after == before
