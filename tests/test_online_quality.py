"""Figures without labels while a run trains: of which images, of which views, and that the run is none the wiser."""

import math

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from ranks import run_ranks
from simclr import distributed
from simclr.callbacks import EpochLines
from simclr.data import MemoryImages
from simclr.eval import instance_retrieval, rank_me
from simclr.losses import nt_xent
from simclr.online_quality import BEFORE, FIGURES, OnlineQuality
from tiny import BATCH, fit, tiny_data, tiny_model


class Logged(Callback):
    """What is logged at the end of every epoch; stands after what it looks at."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_watching_changes_nothing(tmp_path):
    alone, watched = tiny_model(), tiny_model()
    fit(tmp_path, alone)
    fit(tmp_path, watched, callbacks=[OnlineQuality(1)])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert all(module.training for module in watched.modules())


def test_the_figures_are_those_of_two_views_of_the_test_images(tmp_path):
    model, data, logged = tiny_model(), tiny_data(), Logged()
    fit(tmp_path, model, data, [OnlineQuality(1), logged], max_epochs=1)
    model.eval()
    index = torch.arange(32)
    with torch.no_grad():
        views = [model.augment.view(data.test.images(index), index, 0, 20221005, view) for view in range(2)]
        h = [model.encoder(view) for view in views]
        z = [model.head(part) for part in h]
        losses = [nt_xent(*(part[batch] for part in z), 0.2) for batch in index.split(BATCH)]
    found = logged.epochs[0]
    assert found["retrieval_top1"] == pytest.approx(instance_retrieval(*h))
    assert found["rankme"] == pytest.approx(rank_me(h[0]), rel=1e-4)
    assert found["heldout_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert 0 <= found["heldout_top1"] <= 1


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_held_out_loss_and_top1_are_the_double_loop_of_the_paper_in_float64(tmp_path):
    model, data = tiny_model(), tiny_data()
    data.setup()
    found = OnlineQuality(1).measure(data, model)
    model.eval()
    index = torch.arange(32)
    with torch.no_grad():
        views = [model.augment.view(data.test.images(index), index, 0, 20221005, view) for view in range(2)]
        z1, z2 = (torch.nn.functional.normalize(model.head(model.encoder(view)).double(), dim=1) for view in views)
    losses, right = [], []
    for batch in index.split(BATCH):
        z = torch.cat((z1[batch], z2[batch])).tolist()
        for i, anchor in enumerate(z):
            own = (i + BATCH) % (2 * BATCH)
            logits = {j: dot(anchor, other) / 0.2 for j, other in enumerate(z) if j != i}
            losses.append(math.log(sum(map(math.exp, logits.values()))) - logits[own])
            right.append(max(logits, key=logits.get) == own)
    assert found["heldout_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert found["heldout_top1"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def _figures() -> dict[str, float]:
    data, quality = tiny_data(), OnlineQuality(1)
    data.setup()
    return distributed.from_rank_0(lambda: quality.measure(data, tiny_model()))


def test_the_figures_are_alike_on_one_rank_and_on_three():
    alone = _figures()
    assert alone.keys() == {*FIGURES} - {BEFORE}
    for on_a_rank in run_ranks(_figures, 3):
        assert on_a_rank == pytest.approx(alone, abs=1e-6)


def test_the_network_before_its_first_step_stands_beside_also_in_a_run_that_is_continued(tmp_path):
    untrained, data = tiny_model(), tiny_data()
    data.setup()
    expected = OnlineQuality(1).measure(data, untrained)["retrieval_top1"]
    logged = Logged()
    fit(tmp_path, callbacks=[OnlineQuality(1), logged], max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, callbacks=[OnlineQuality(1), logged], max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert [found["retrieval_top1_before"] for found in logged.epochs] == [pytest.approx(expected)] * 2


def test_labels_play_no_part(tmp_path):
    data, logged = tiny_data(), Logged()
    data.setup()
    data.test = MemoryImages("no labels", data.test.pixels)
    fit(tmp_path, data=data, callbacks=[OnlineQuality(1), logged], max_epochs=1)
    assert "retrieval_top1" in logged.epochs[0]


def test_without_test_images_one_line_says_that_there_are_no_figures(tmp_path, capsys):
    data, logged = tiny_data(), Logged()
    data.setup()
    data.test = None
    fit(tmp_path, data=data, callbacks=[OnlineQuality(1), logged], max_epochs=2)
    assert "retrieval_top1" not in logged.epochs[-1]
    said = "no figures of images never trained on: there are no test images (--data.test_dir)"
    assert capsys.readouterr().out.count(said) == 1


def test_the_line_of_an_epoch_has_the_retrieval_where_it_was_measured(tmp_path, capsys):
    fit(tmp_path, callbacks=[OnlineQuality(2), EpochLines()], max_epochs=2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert "retrieval" not in first
    assert "  retrieval " in second


@pytest.mark.parametrize("bad", [{"every_n_epochs": -1}, {"images": 1}])
def test_what_measures_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="quality needs every_n_epochs >= 0 and images >= 2"):
        OnlineQuality(**bad)


def test_a_callback_that_watches_a_figure_decides_in_the_epochs_that_measure_it(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="heldout_loss", save_top_k=-1, filename="{epoch}")
    settings = {"enable_checkpointing": True, "max_epochs": 5}
    fit(tmp_path, callbacks=[OnlineQuality(2), best], **settings)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"epoch={epoch}.ckpt" for epoch in (1, 3, 4)]


def test_one_that_watches_what_is_never_measured_is_refused(tmp_path):
    data = tiny_data()
    data.setup()
    data.test = None
    watch = EarlyStopping("rankme")
    with pytest.raises(
        ValueError, match="EarlyStopping watches rankme, which this run never measures: there are no test"
    ):
        fit(tmp_path, data=data, callbacks=[OnlineQuality(1), watch])
