"""The data of a page's curves: every value is there, a spike survives thinning, and time is that of training."""

import base64
import time

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from simclr.report.charts import Panel, Series, Times, chart_data, thinned
from simclr.report.run import read_clock


def array(data, place):
    return np.frombuffer(base64.b64decode(data["arrays"][place]), "<f4").tolist()


def test_a_thinned_curve_keeps_its_ends_and_every_spike():
    values = np.sin(np.arange(10_000) / 500)
    values[[1234, 7001]] = 9, -9
    points = np.stack((np.arange(10_000), values), axis=1)
    kept = thinned(points, 300)
    assert len(kept) <= 301
    assert (kept[0].tolist(), kept[-1].tolist()) == (points[0].tolist(), points[-1].tolist())
    assert {9.0, -9.0} <= set(kept[:, 1].tolist())
    assert (np.diff(kept[:, 0]) > 0).all()
    assert set(map(tuple, kept)) <= set(map(tuple, points))
    assert thinned(points[:300], 300) is not None
    assert len(thinned(points[:300], 300)) == 300


def test_equal_arrays_stand_in_the_page_once_and_values_are_scaled():
    points = [(1.0, 0.5), (2.0, 0.75)]
    panels = [Panel("a, %", [Series("x", points)], [(0.1, "guessing")], scale=100), Panel("b", [Series("y", points)])]
    data = chart_data(panels, [Times("run", steps=10)], legend=True)
    first, second = (panel["series"][0] for panel in data["panels"])
    assert first["x"] == second["x"]
    assert (array(data, first["x"]), array(data, first["y"]), array(data, second["y"])) == (
        [1, 2],
        [50, 75],
        [0.5, 0.75],
    )
    assert data["panels"][0]["levels"] == [{"value": 10, "name": "guessing"}]
    assert data["axes"] == ["epochs", "steps"]


def test_the_clock_is_that_of_training_without_the_pause_before_a_continuation(tmp_path, monkeypatch):
    begun = 1.7e9
    for process, (start, steps) in enumerate(((begun, (0, 9, 19)), (begun + 86_400, (19, 29, 39)))):
        monkeypatch.setattr(time, "time", lambda start=start: start)  # of the entry that begins a file
        writer = SummaryWriter(tmp_path / "tensorboard", filename_suffix=f".{process}")
        writer.add_scalar("lr", 0.1, 0, walltime=start)
        for step in steps:
            writer.add_scalar("train_loss", 1.0, step, walltime=start + 60 * (step - steps[0] + 1))
        writer.close()
    clock = read_clock(tmp_path, per_epoch=10)
    assert [epoch for epoch, _ in clock] == [0, 0.1, 1, 2, 3, 4]
    minutes = [minute for _, minute in clock]
    assert minutes == sorted(minutes)
    assert minutes[:4] == pytest.approx([0, 1, 10, 20], abs=0.1)
    assert minutes[4] < 60
    (tmp_path / "tensorboard" / "events.out.tfevents.9.broken").write_bytes(b"no events")
    assert read_clock(tmp_path, per_epoch=10) == clock
    assert read_clock(tmp_path / "nowhere", per_epoch=10) == []
