"""The online linear probe: whose accuracy it is, of which images, and that the run is none the wiser."""

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression

from simclr.callbacks import EpochLines
from simclr.cli import main
from simclr.data import ImageData, MemoryImages
from simclr.eval import extract_features
from simclr.eval.logreg import predict_by_logreg
from simclr.online_accuracy import _QUERIES, OnlineProbe
from simclr.seeding import epoch_order
from test_continue import refused
from test_data_module import fill
from test_eval_linear import _data
from tiny import fit, flags, tiny_data, tiny_model


class Probes(Callback):
    """What every epoch has logged."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append(trainer.callback_metrics.get("probe_top1"))


def test_watching_changes_nothing(tmp_path):
    alone, watched, probes = tiny_model(), tiny_model(), Probes()
    fit(tmp_path, alone)
    fit(tmp_path, watched, callbacks=[OnlineProbe(1), probes])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert None not in probes.found
    assert all(module.training for module in watched.modules())
    assert all(parameter.requires_grad for parameter in watched.parameters())


@pytest.mark.parametrize("regularization", [0.1, 10.0, 1000.0])
def test_the_classifier_is_scikit_learns(regularization):
    x, y, queries, _ = _data()
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    a, b = (((part.double() - mean) / std).numpy() for part in (x, queries))
    expected = LogisticRegression(C=1 / regularization, tol=1e-8, max_iter=5000).fit(a, y.numpy()).predict(b)
    found = predict_by_logreg(x, y, queries, regularization=regularization)
    assert (found.numpy() == expected).mean() > 0.99  # a query at the border of two classes may fall to either


def test_it_is_fitted_to_four_fifths_of_a_fixed_sample_and_scored_on_the_other(tmp_path):
    model, data, probes = tiny_model(), tiny_data(shapes_train=200), Probes()
    fit(tmp_path, model, data, [OnlineProbe(1, images=100), probes], max_epochs=1)
    features, labels = extract_features(model.encoder, data.eval_loader("train", limit=100))
    query, bank = epoch_order(_QUERIES, 0, 100).split([20, 80])
    predicted = predict_by_logreg(features[bank], labels[bank], features[query], regularization=10.0)
    assert probes.found[0].item() == pytest.approx((predicted == labels[query]).float().mean().item())


def test_it_never_reads_the_test_images(tmp_path, monkeypatch):
    data, probes = tiny_data(), Probes()
    data.setup()
    monkeypatch.setattr(data.test, "images", None)
    fit(tmp_path, data=data, callbacks=[OnlineProbe(1), probes], max_epochs=1)
    assert probes.found[0] is not None


def test_a_run_that_goes_on_measures_what_an_uncut_one_does(tmp_path):
    whole, cut = Probes(), Probes()
    fit(tmp_path, callbacks=[OnlineProbe(1), whole], max_epochs=3)
    fit(tmp_path, callbacks=[OnlineProbe(1), cut], max_epochs=3, max_steps=4).save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, callbacks=[OnlineProbe(1), cut], max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert [value.item() for value in cut.found] == [value.item() for value in whole.found]


def test_a_checkpoint_may_watch_it_and_the_line_of_an_epoch_shows_it(tmp_path, capsys):
    best = ModelCheckpoint(tmp_path, monitor="probe_top1", mode="max", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, callbacks=[OnlineProbe(2), EpochLines(), best], enable_checkpointing=True, max_epochs=3)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=2.ckpt"]
    first, second, _ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert "probe" not in first
    assert "  probe " in second


def test_another_labelled_folder_is_measured_on_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", [f"{i}.png" for i in range(8)])
    fill(tmp_path / "labelled", [f"{c}/{i:02}.png" for c in "ab" for i in range(20)])
    run = {"data.train_dir": "photos", "data.batch_size": 4, "trainer.max_epochs": 1}
    main(["train", *flags({**run, "run_dir": "run", "probe.every_n_epochs": 1, "probe.train_dir": "labelled"})])
    out = capsys.readouterr().out
    assert "  probe " in out
    assert "no online kNN: there are no labelled training images" in out
    assert f"train_dir: {tmp_path / 'labelled'}" in (tmp_path / "run" / "config.yaml").read_text()
    wrong = {**run, "run_dir": "other", "probe.every_n_epochs": 1}
    assert "probe.train_dir=photos has no labels: give a folder with two or more class folders" in refused(
        flags({**wrong, "probe.train_dir": "photos"}), capsys
    )
    assert "probe.train_dir=labeled does not exist. " in refused(flags({**wrong, "probe.train_dir": "labeled"}), capsys)
    assert not (tmp_path / "other").exists()


def test_without_labels_one_line_says_that_there_is_none(tmp_path, capsys):
    data = tiny_data()
    data.setup()
    data.train = data.labelled_train = MemoryImages("no labels", data.train.pixels)
    fit(tmp_path, data=data, callbacks=[OnlineProbe(1)], max_epochs=2)
    fit(tmp_path, data=data, callbacks=[OnlineProbe()], max_epochs=1)
    said = "no online linear probe: there are no labelled training images to measure it on"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"every_n_epochs": -1}, "probe needs every_n_epochs >= 0"),
        ({"images": 9}, "images >= 10"),
        ({"regularization": 0.0}, "regularization > 0"),
        ({"train_dir": "labelled"}, "probe.train_dir=labelled is not used with probe.every_n_epochs=0. Set --probe"),
    ],
)
def test_what_measures_nothing_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        OnlineProbe(**bad)


def test_data_of_the_run_decide_how_the_other_folder_is_read(tmp_path):
    fill(tmp_path / "labelled", [f"{c}/{i:02}.png" for c in "ab" for i in range(6)], side=40)
    data = ImageData(train_dir=fill(tmp_path / "photos", ["1.png", "2.png"]), batch_size=2, image_size=16, workers=0)
    data.setup()
    probe = OnlineProbe(1, images=10, train_dir=str(tmp_path / "labelled"))
    loader = probe.loader(data)
    assert next(iter(loader))[0].shape == (10, 3, 16, 16)
    assert torch.equal(loader.labels, probe.labels(data))
