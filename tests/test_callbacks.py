"""The callbacks watch and never change a run; what they show is what happened."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningDataModule
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

from ranks import run_ranks
from simclr import SimCLRAugmentation, load_encoder, online_accuracy
from simclr.callbacks import EpochLines, ViewGrid
from simclr.data import EvalLoader, MemoryImages, draw_shapes
from simclr.eval import extract_features, knn_accuracy
from simclr.online_accuracy import OnlineKNN
from simclr.seeding import epoch_order
from tiny import BATCH, IMAGES, fit, tiny_data, tiny_model


class Watch(Callback):
    """After the others: what was logged, and whether every module still trains."""

    def __init__(self):
        self.knn, self.training = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        metric = trainer.callback_metrics.get("knn_top1")
        self.knn.append(None if metric is None else metric.item())

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.training.append(all(module.training for module in pl_module.modules()))


def test_watching_changes_nothing(tmp_path):
    alone, watched, watch = tiny_model(), tiny_model(), Watch()
    fit(tmp_path, alone)
    fit(tmp_path, watched, callbacks=[OnlineKNN(1), ViewGrid(tmp_path), EpochLines(), watch])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert None not in watch.knn
    assert all(watch.training)
    assert all(parameter.requires_grad for parameter in watched.parameters())


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_knn_is_measured_every_n_epochs_and_at_the_end(tmp_path, monkeypatch, every, measured):
    epochs = []
    monkeypatch.setattr(OnlineKNN, "measure", lambda *args: epochs.append(trainers[0].current_epoch) or 0.5)
    trainers = []
    start = Callback()
    start.on_train_start = lambda trainer, module: trainers.append(trainer)
    fit(tmp_path, callbacks=[start, OnlineKNN(every)], max_epochs=5, limit_train_batches=1)
    assert epochs == measured


def test_knn_is_the_accuracy_of_a_fifth_of_the_training_images_as_a_user_of_the_encoder_gets_it(tmp_path):
    model, watch = tiny_model(mean=(0.1, 0.2, 0.9), std=(0.1, 0.2, 0.3)), Watch()
    data = tiny_data(shapes_train=500, batch_size=100)
    model.hparams.batch_size = 100
    fit(tmp_path, model, data, [OnlineKNN(1, k=5), watch], max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    features, labels = extract_features(load_encoder(tmp_path / "x.ckpt"), data.eval_loader("train"))
    order = epoch_order(online_accuracy._QUERIES, 0, 500)
    query, bank = order[:100], order[100:]
    expected = knn_accuracy(features[bank], labels[bank], features[query], labels[query], k=5, temperature=0.1)
    assert watch.knn == [pytest.approx(expected)]


@pytest.mark.parametrize("arrangement", ["sorted", "in turn"])
def test_knn_finds_the_class_however_the_images_are_arranged(arrangement):
    # Images of one colour a class, an encoder that averages them: every neighbour is right.
    labels = torch.arange(100) // 10 if arrangement == "sorted" else torch.arange(100) % 10
    images = (labels * 25).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    images[:, 1] = 255 - images[:, 1]
    loader = EvalLoader(MemoryImages("colours", images, labels, [str(i) for i in range(10)]), torch.arange(100), 32)
    average = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert OnlineKNN(1, k=3).measure(average, loader, torch.device("cpu")) == 1


def test_knn_never_reads_the_test_images(tmp_path, monkeypatch):
    data = tiny_data()
    data.setup()
    monkeypatch.setattr(data.test, "images", None)
    watch = Watch()
    fit(tmp_path, data=data, callbacks=[OnlineKNN(1), watch], max_epochs=1)
    assert watch.knn[0] is not None


def test_without_labels_no_knn_is_logged(tmp_path):
    data, watch = tiny_data(), Watch()
    data.setup()
    data.train = data.labelled_train = MemoryImages("no labels", data.train.pixels)
    fit(tmp_path, data=data, callbacks=[OnlineKNN(1), watch], max_epochs=1)
    assert watch.knn == [None]


class Plain(LightningDataModule):
    """Somebody else's batches."""

    def train_dataloader(self):
        return tiny_data().train_dataloader()


def test_beside_another_data_module_there_is_no_knn_and_one_line_says_so(tmp_path, capsys):
    images, index = map(torch.cat, zip(*tiny_data().train_dataloader(), strict=True))
    other = DataLoader(TensorDataset(images, index), batch_size=BATCH)
    for data, drawn in ((Plain(), True), (other, False), (tiny_data().train_dataloader(), True)):
        watch = Watch()
        fit(tmp_path, data=data, callbacks=[OnlineKNN(1), ViewGrid(tmp_path), EpochLines(), watch], max_epochs=2)
        assert watch.knn == [None, None]
        said = capsys.readouterr().out
        assert said.count("no online kNN: the batches are not from simclr.data.ImageData") == 1
        assert "epoch 2/2  loss" in said
        assert (tmp_path / "views.png").exists() == drawn  # of our loaders, whose images it knows
        (tmp_path / "views.png").unlink(missing_ok=True)


class Decides(Checkpoint):
    """In place of Lightning's own: notes what it would decide by, and when."""

    def __init__(self):
        self.monitor, self.seen = "knn_top1", []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, trainer.callback_metrics["knn_top1"].item()))


def test_a_callback_that_watches_the_knn_is_asked_in_the_epochs_that_measure_it(tmp_path):
    decides, watch = Decides(), Watch()
    for _ in range(2):  # the same callbacks in a second run
        fit(tmp_path, callbacks=[decides, OnlineKNN(2), watch], max_epochs=5, enable_checkpointing=True)
    assert [epoch for epoch, _ in decides.seen] == [1, 3, 4, 1, 3, 4]
    assert [knn for _, knn in decides.seen[:3]] == [watch.knn[epoch] for epoch in (1, 3, 4)]


@pytest.mark.parametrize("why", ["barebones", "every_n_epochs", "no labelled", "ImageData", "5 labelled images"])
def test_a_callback_that_would_watch_for_ever_is_refused_with_the_reason(tmp_path, why):
    data = tiny_data()
    data.setup()
    pixels = data.train.pixels
    if why == "no labelled":
        data.labelled_train = MemoryImages("no labels", pixels)
    if why == "5 labelled images":
        data.labelled_train = MemoryImages("one class", pixels, torch.zeros(len(pixels), dtype=torch.int64), ["a"])
    if why == "ImageData":
        data = data.train_dataloader()
    settings = {"barebones": True, "log_every_n_steps": None} if why == "barebones" else {}
    knn = OnlineKNN(0 if why == "every_n_epochs" else 1)
    with pytest.raises(ValueError, match=rf"EarlyStopping watches knn_top1, which this run never measures: .*{why}"):
        fit(tmp_path, data=data, callbacks=[knn, EarlyStopping("knn_top1")], **settings)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0] * 16, list(range(16))], ids=["4", "one class", "one image each"])
def test_a_sample_too_small_for_knn_ends_no_run(tmp_path, capsys, labels):
    data, watch, size = tiny_data(batch_size=4), Watch(), len(labels)
    data.setup()
    data.train = MemoryImages("few", data.train.pixels[:size], torch.tensor(labels), [str(n) for n in range(16)])
    data.labelled_train, data.test = data.train, None
    trainer = fit(tmp_path, tiny_model(batch_size=4), data, [OnlineKNN(1), EpochLines(), watch], max_epochs=2)
    assert trainer.current_epoch == 2
    assert watch.knn == [None, None]
    assert capsys.readouterr().out.count("no online kNN: ") == 1


class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


@pytest.mark.parametrize("end", ["max_steps", "should_stop"])
def test_the_last_epoch_is_measured_also_where_it_ends_early(tmp_path, end):
    # A run that stops early still does its one epoch at least.
    by_steps = {"max_steps": 6} if end == "max_steps" else {"max_epochs": 9}
    watch = Watch()
    stop = [Stop()] if end == "should_stop" else []
    fit(tmp_path, callbacks=[*stop, OnlineKNN(5), watch], **{"max_epochs": -1, **by_steps})
    assert watch.knn[:-1] == [None] * (len(watch.knn) - 1)
    assert watch.knn[-1] is not None


def warnings_under_ddp(root: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(Path(root), callbacks=[OnlineKNN(1)], max_epochs=1, strategy="ddp")
    assert "knn_top1" in trainer.callback_metrics
    return [str(warning.message) for warning in caught]


def test_logging_on_one_rank_alone_draws_no_warning_from_lightning(tmp_path):
    (messages,) = run_ranks(warnings_under_ddp, 1, str(tmp_path))
    assert not [message for message in messages if "sync_dist" in message]


@pytest.mark.parametrize("bad", [{"every_n_epochs": -1}, {"images": 9}, {"k": 0}, {"temperature": 0}])
def test_bad_knn_settings_are_refused(bad):
    with pytest.raises(ValueError, match="knn needs every_n_epochs >= 0, images >= 10, k >= 1 and temperature > 0"):
        OnlineKNN(**bad)


def test_the_picture_shows_exactly_the_views_of_training(tmp_path):
    seed, columns, epochs, size = 3, 4, 2, 16
    model, data = tiny_model(seed=seed, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)), tiny_data(seed=seed)
    fit(tmp_path, model, data, [ViewGrid(tmp_path, images=columns)], max_epochs=epochs)
    picture = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    scale = 96 // size
    cell, gap, left = size * scale, 2, 72
    tops = [0] + [8 * (1 + (row - 1) // 2) + row * (cell + gap) for row in range(1, 1 + 2 * epochs)]
    # The middle pixel of each block of scale x scale equal ones.
    rows = [
        [picture[top + scale // 2 : top + cell : scale, x + scale // 2 : x + cell : scale] for x in range(
            left, left + columns * (cell + gap), cell + gap)]
        for top in tops
    ]  # fmt: skip
    index = epoch_order(seed, 0, IMAGES)[:columns]
    images = draw_shapes(IMAGES, 16)[0][index]
    expected = [images]
    augment = SimCLRAugmentation(size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    for epoch in range(epochs):
        views = augment(images, index, epoch=epoch, seed=seed)
        expected += [((view * std + mean).clamp(0, 1) * 255).round().byte() for view in views]
    for row, tiles in zip(rows, expected, strict=True):
        for cut, tile in zip(row, tiles, strict=True):
            # 1 of 255: the picture rounds after undoing the normalisation
            assert np.abs(cut.astype(int) - tile.permute(1, 2, 0).numpy()).max() <= 1


def test_a_picture_that_is_there_stays(tmp_path):
    (tmp_path / "views.png").write_bytes(b"the first run's")
    fit(tmp_path, callbacks=[ViewGrid(tmp_path)], max_steps=1)
    assert (tmp_path / "views.png").read_bytes() == b"the first run's"


def test_a_line_per_epoch_with_loss_knn_and_seconds(tmp_path, capsys):
    trainer = fit(tmp_path, callbacks=[OnlineKNN(2), EpochLines()], max_epochs=2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert re.fullmatch(r"epoch 1/2  loss \d\.\d{4}  +\d+\.\d s", first)
    assert re.fullmatch(r"epoch 2/2  loss \d\.\d{4}  +\d+\.\d s  kNN +\d+\.\d %", second)
    metrics = trainer.callback_metrics
    assert f"loss {metrics['train_loss_epoch'].item():.4f}" in second
    assert f"kNN {100 * metrics['knn_top1'].item():5.1f} %" in second


def test_a_run_by_steps_has_lines_too(tmp_path, capsys):
    fit(tmp_path, callbacks=[EpochLines()], max_epochs=-1, max_steps=2)
    assert re.search(r"epoch 1  loss \d", capsys.readouterr().out)
