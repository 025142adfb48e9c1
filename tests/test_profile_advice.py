"""Advice says only what the numbers of a profile say."""

from types import SimpleNamespace

import pytest
import torch

from simclr.profile import PARTS, Limit, Profile, advice
from tiny import tiny_model

GRAPHS, COMPILE = "--model.compile_encoder reduce-overhead", "--model.compile_encoder true"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, GRAPHS),
        ({"setting": True}, GRAPHS),
        ({"setting": "max-autotune-no-cudagraphs"}, GRAPHS),
        ({"setting": "reduce-overhead"}, "nothing stands out"),
        ({"setting": "max-autotune"}, "nothing stands out"),
        ({"seconds": 0.016}, COMPILE),
        ({"seconds": 0.016, "setting": True}, "nothing stands out"),
        ({"devices": 8}, COMPILE),
        ({"rate": 1.5e11}, "nothing stands out"),
        ({"device": "cpu"}, "nothing stands out"),
    ],
    ids=str,
)
def test_short_steps_on_one_gpu_are_advised_cuda_graphs(changed, expected):
    values = {"seconds": 0.014, "setting": False, "devices": 1, "rate": 1e12, "device": "cuda"} | changed
    parts = dict.fromkeys(PARTS, 0.0) | {"encoder": 0.3, "backward": 0.6, "rest": 0.05, "loss": 0.05}
    limit = Limit(values["rate"], "matrix products")
    seconds = values["seconds"]
    measured = Profile(
        {name: share * seconds for name, share in parts.items()}, seconds, seconds, 0, 0, (5e8, 1e9), limit, None, 20
    )
    strategy = SimpleNamespace(root_device=torch.device(values["device"]))
    trainer = SimpleNamespace(strategy=strategy, world_size=values["devices"], datamodule=None, log_every_n_steps=25)
    (line,) = advice(measured, tiny_model(compile_encoder=values["setting"]), trainer, 16)
    assert expected in line
    assert "14.0 ms are short" in line or expected is not GRAPHS
