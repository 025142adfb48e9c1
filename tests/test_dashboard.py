"""Pictures and histograms: of what the network makes of its images, on rank 0 only, and nothing of the run by them."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import simclr.dashboard
from ranks import run_ranks
from simclr import distributed
from simclr.dashboard import Dashboard, _neighbours, _spectrum
from simclr.eval import extract_features
from simclr.loggers import build_loggers
from simclr.report.sample import Sample, choose_queries
from simclr.step_figures import StepFigures
from tiny import STEPS, fit, tiny_data, tiny_model


def events_of(root: Path) -> EventAccumulator:
    return EventAccumulator(str(root / "tensorboard"), size_guidance={"images": 0, "histograms": 0}).Reload()


class Watch(Callback):
    """After the others: the state of every source of random numbers, and whether every module still trains."""

    def __init__(self):
        self.states, self.training = [], []

    def on_train_batch_start(self, trainer, model, *args):
        self.training.append(all(module.training for module in model.modules()))
        self.states.append((torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(), random.getstate()))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with a dashboard and one without: (folder, its model, what was watched), twice."""
    runs = []
    for callbacks in ([], [StepFigures(), Dashboard(2, images=30)]):
        root, model, watch = tmp_path_factory.mktemp("run"), tiny_model(), Watch()
        fit(root, model, callbacks=[*callbacks, watch], logger=build_loggers(root) if callbacks else False)
        runs.append((root, model, watch))
    return runs


def test_a_dashboard_changes_nothing(watched):
    (_, alone, without), (_, model, beside) = watched
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert without.states == beside.states
    assert all(beside.training)
    assert all(p.requires_grad for p in model.parameters())


def test_it_shows_the_network_before_its_first_step_every_n_epochs_and_at_the_end(watched):
    events = events_of(watched[1][0])
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    before, second, last = 0, 2 * STEPS - 1, 3 * STEPS - 1
    assert steps == {"views": [0], "neighbours": [before, second, last], "spectrum": [last], "map": [last]}
    assert sorted(events.Tags()["histograms"]) == ["cosines/negative", "cosines/positive", "features/spectrum"]
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [before, second, last]
    assert (watched[1][0] / "tensorboard" / f"{last:05d}" / "features" / "sprite.png").is_file()


def test_the_histograms_are_of_all_pairs_of_two_views_of_its_images(watched):
    root, model, _ = watched[1]
    data = tiny_data()
    data.setup()
    index = simclr.dashboard.epoch_order(simclr.dashboard._SEED, 0, len(data.test))[:30].sort().values
    model.eval()
    with torch.no_grad():
        augment = model.views.augment
        views = [augment.view(data.test.images(index), index, 0, simclr.dashboard._SEED, view) for view in range(2)]
        z = F.normalize(torch.cat([model.head(model.encoder(view)) for view in views]), dim=1)
    positive = [float(z[i] @ z[i + 30]) for i in range(30)]
    negative = [float(z[i] @ z[j]) for i in range(60) for j in range(60) if i % 30 != j % 30]
    events = events_of(root)
    edges = np.linspace(-1, 1, 65)
    for tag, cosines in (("cosines/positive", positive), ("cosines/negative", negative)):
        found = events.Histograms(tag)[-1].histogram_value
        assert found.num == len(cosines)
        counts = np.zeros(64)
        counts[[int(np.argmin(abs(edges[1:] - limit))) for limit in found.bucket_limit]] = found.bucket
        moved = np.abs(np.cumsum(counts) - np.cumsum(np.histogram(cosines, edges)[0])).max()
        assert moved <= 2, "but for cosines at the edge of two bins, which round"


def test_the_neighbours_are_the_nearest_of_the_others_also_where_images_are_there_twice(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 4, generator=generator)
    features[7] = features[3]  # equal: either might stand first
    pixels = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    labels = torch.arange(20) % 3
    sample = Sample("set", torch.arange(20), pixels, features, labels, ["a", "b", "c"], 20)
    given = []
    monkeypatch.setattr(simclr.dashboard, "neighbour_picture", lambda *args, **kwargs: given.append((args, kwargs)))
    monkeypatch.setattr(simclr.dashboard, "choose_queries", lambda *args: torch.tensor([3, 7, 11]))
    _neighbours(sample)
    (queries, near, wrong), words = given[0]
    assert queries[:, 0, 0, 0].tolist() == [3, 7, 11]
    for row, query in enumerate([3, 7, 11]):
        others = [i for i in range(20) if i != query]
        cosine = {i: float(F.cosine_similarity(features[query], features[i], dim=0)) for i in others}
        expected = sorted(others, key=lambda i: (-cosine[i], i))[:8]
        assert near[row, :, 0, 0, 0].tolist() == expected
        assert wrong[row].tolist() == [bool(i % 3 != query % 3) for i in expected]
    assert words["title"] == "the nearest of 20 images of set; framed: of another class"


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_the_spectrum_is_that_of_the_covariance(shape):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.eigvalsh(torch.cov(h.double().T)).flip(0)[: min(shape)].float()
    assert torch.allclose(_spectrum(h), expected, atol=1e-5)


def test_neighbours_are_found_by_the_features_that_an_evaluation_takes():
    model, data = tiny_model(mean=(0.1, 0.2, 0.9), std=(0.1, 0.2, 0.3)), tiny_data()
    data.setup()
    dashboard = Dashboard(1, images=20)
    sample = dashboard._images(data)
    h, _ = dashboard._features(model, sample)
    expected, _ = extract_features(model.encoder, [(data.test.images(sample.index), sample.index)])
    assert torch.allclose(h, expected, atol=1e-5)
    assert len(choose_queries(sample, 8)) == 8


def test_views_are_shown_again_in_each_epoch_that_changes_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Dashboard, "_look", lambda *args: simclr.dashboard.Shown({}, {}, {}))
    model = tiny_model(start_size=8, grow_epochs=2)  # 8, 12, 16, 16
    fit(tmp_path, model, callbacks=[Dashboard(9)], max_epochs=4, logger=build_loggers(tmp_path))
    assert [event.step for event in events_of(tmp_path).Images("views")] == [0, STEPS - 1, 2 * STEPS - 1]


@pytest.mark.parametrize("why", ["never", "fast_dev_run", "no dashboard", "other data"])
def test_where_there_is_nothing_to_show_it_on_nothing_is_looked_at(tmp_path, monkeypatch, why):
    looks = []
    monkeypatch.setattr(Dashboard, "_look", lambda *args: looks.append(args))
    data = tiny_data()
    data.setup()
    settings = {"fast_dev_run": True} if why == "fast_dev_run" else {"max_epochs": 1}
    if why != "no dashboard":
        settings["logger"] = TensorBoardLogger(str(tmp_path))
    other = data.train_dataloader() if why == "other data" else data
    trainer = fit(tmp_path, data=other, callbacks=[Dashboard(0 if why == "never" else 1)], **settings)
    assert trainer.global_step > 0
    assert looks == []


@pytest.mark.parametrize("bad", [{"every_n_epochs": -1}, {"images": 1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="dashboard needs every_n_epochs >= 0 and images >= 2; got"):
        Dashboard(**bad)


def watched_by_two(root: str) -> int:
    """How many times this rank has looked."""
    os.environ |= {"LOCAL_RANK": str(distributed.rank()), "NODE_RANK": "0"}  # as Lightning tells those it launches
    looks, look = [], Dashboard._look
    Dashboard._look = lambda *args: looks.append(1) or look(*args)
    simclr.dashboard.tsne = lambda h: h[:, :2]
    run = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "logger": build_loggers(Path(root))}
    fit(Path(root), callbacks=[StepFigures(), Dashboard(1, images=20)], **run)
    return len(looks)


def test_of_two_ranks_the_first_looks_and_writes(tmp_path):
    assert run_ranks(watched_by_two, 2, str(tmp_path)) == [2, 0]
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1
    assert "neighbours" in events_of(tmp_path).Tags()["images"]
