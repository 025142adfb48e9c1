"""What a command line means by a device."""

import pytest
import torch

from simclr.cli.parsing import device_named


@pytest.mark.parametrize(("found", "chosen"), [(None, "cpu"), ("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_auto_is_the_accelerator_that_has_float64_or_else_the_cpu(found, chosen, monkeypatch):
    here = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: here)
    assert device_named("auto") == chosen


def test_a_device_that_is_not_here_is_refused_by_its_name():
    assert device_named("cpu") == "cpu"
    with pytest.raises(ValueError, match="device=gpu cannot be used"):
        device_named("gpu")
