"""The estimate of a step's memory against what a step is seen to take, and what is said when it cannot fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr import memory
from tiny import tiny_model

PEAK = """
import ctypes
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tiny import fit, tiny_data, tiny_model
from simclr.memory import estimate

def status(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

torch.set_num_threads(1)
data = tiny_data(image_size=32, batch_size=64, shapes_train=64)
data.setup()
fit("/", max_steps=1)  # what libraries take for themselves
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
size = {"encoder": "resnet18", "image_size": 32, "width": 0.5, "projection_dim": 128}
model = tiny_model(**size, batch_size=64, micro_batch_size=int(sys.argv[2]) or None)
fit("/", model, data, max_steps=1)
print(status("VmHWM") - before, estimate(model, 64, int(sys.argv[2]) or None).total)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see a peak")
@pytest.mark.parametrize("micro_batch_size", [0, 16])
def test_the_estimate_is_near_what_a_step_takes(micro_batch_size):
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(Path(__file__).parent), str(micro_batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, estimated = map(int, done.stdout.splitlines()[-1].split())
    print(f"peak {peak / 1e6:.0f} MB, estimated {estimated / 1e6:.0f} MB")
    assert 0.6 < estimated / peak < 1.6


def test_micro_batches_shrink_the_activations_in_proportion():
    model = tiny_model()
    whole, part = memory.estimate(model, 64), memory.estimate(model, 64, 16)
    assert part.activations == pytest.approx(whole.activations / 4, rel=0.01)
    assert part.weights == whole.weights
    assert part.loss == whole.loss


def test_half_precision_halves_the_activations():
    model = tiny_model()
    full, half, double = (memory.estimate(model, 64, precision=p) for p in ("32-true", "bf16-mixed", "64-true"))
    assert half.activations == pytest.approx(full.activations / 2, rel=0.01)
    assert half.weights == full.weights
    assert double.activations == pytest.approx(2 * full.activations, rel=0.01)
    assert double.weights == 2 * full.weights


def test_the_estimate_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory.estimate(model, 8)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for name, value in model.state_dict().items():
        assert value.equal(before[name])


def test_a_batch_that_cannot_fit_is_refused_with_the_setting_that_would(monkeypatch):
    model, cpu = tiny_model(), torch.device("cpu")
    need = memory.estimate(model, 64).total
    monkeypatch.setattr(memory, "available", lambda device: 2 * need)
    assert memory.check_memory(model, cpu, 64, 1, 1, "32-true").startswith("about ")
    with pytest.raises(ValueError, match=r"step of 64 images takes about .*B on a device that has .*B\.") as refused:
        memory.check_memory(model, cpu, 64, 3, 3, "32-true")  # three processes share the machine's memory
    size = int(str(refused.value).split("--model.micro_batch_size ")[1].split()[0])
    assert size in (1, 2, 4, 8, 16, 32)
    assert (
        memory.estimate(model, 64, size, 3).total < 0.8 * 2 * need / 3 < memory.estimate(model, 64, 2 * size, 3).total
    )
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ValueError, match="smaller encoder or batch"):
        memory.check_memory(model, cpu, 64, 1, 1, "32-true")
