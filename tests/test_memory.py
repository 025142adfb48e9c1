"""The estimate of a step's memory against what a step is seen to take, and what is said when it cannot fit."""

import os
from pathlib import Path

import pytest
import torch

import forked
from simclr import container, memory
from simclr.profile import count_operations
from tiny import fit, tiny_data, tiny_model

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


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see a peak")
@pytest.mark.parametrize("micro_batch_size", [0, pytest.param(16, marks=pytest.mark.slow)])
def test_the_estimate_is_near_what_a_step_takes(micro_batch_size):
    done = forked.run(["-c", PEAK, Path(__file__).parent, str(micro_batch_size)])
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


def test_of_a_network_that_reads_values_nothing_is_told_before_its_step(tmp_path):
    def reads(encoder, given):
        seen.append(given[0].mean().item())

    data, model, seen = tiny_data(), tiny_model(), []
    told = memory.check_memory(model, torch.device("cpu"), 64, 1, 1, "32-true")
    model.encoder.register_forward_pre_hook(reads)
    assert told.startswith("about ")
    assert memory.check_memory(model, torch.device("cpu"), 64, 1, 1, "32-true") == ""
    assert count_operations(model, 64) is None
    fit(tmp_path, model, data, max_steps=1)
    assert seen  # it trains


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
    monkeypatch.setattr(memory, "available", lambda device: 1.4 * need)
    assert memory.check_memory(model, cpu, 64, 1, 1, "32-true").startswith("about ")
    with pytest.raises(ValueError, match=r"step of 64 images takes about .*B on a device that has .*B\.") as refused:
        memory.check_memory(model, cpu, 64, 3, 3, "32-true")  # three processes share the machine's memory
    size = int(str(refused.value).split("--model.micro_batch_size ")[1].split()[0])
    assert size in (1, 2, 4, 8, 16, 32)
    smaller, larger = (memory.estimate(model, 64, n, 3).total for n in (size, 2 * size))
    assert smaller < 0.75 * 1.4 * need / 3 < larger
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ValueError, match="smaller encoder or batch"):
        memory.check_memory(model, cpu, 64, 1, 1, "32-true")


@pytest.mark.parametrize(
    ("have", "refuse", "answer"),
    [
        (1.4, True, "fits"),
        (1.2, True, "may not fit"),
        (0.6, True, "may not fit"),
        (0.4, True, "refused"),
        (0.4, False, "may not fit"),
    ],
)
def test_what_the_estimate_cannot_tell_is_a_warning_and_only_what_is_certain_refused(monkeypatch, have, refuse, answer):
    """`have` is the memory there is, in steps as estimated: the estimate may be off by half in either direction."""
    model = tiny_model()
    need = memory.estimate(model, 64).total
    monkeypatch.setattr(memory, "available", lambda device: int(have * need))

    def check() -> str:
        return memory.check_memory(model, torch.device("cpu"), 64, 1, 1, "32-true", refuse)

    if answer == "refused":
        with pytest.raises(ValueError, match=r"To try it all the same: --check_memory false\.$"):
            check()
    elif answer == "may not fit":
        with pytest.warns(
            UserWarning,
            match=r"may not fit, as far as can be estimated\. (With --model.micro_batch_size|Use a smaller)",
        ):
            assert check().startswith("about ")
    else:
        assert check().startswith("about ")


def test_a_cpu_has_the_memory_of_the_container_or_of_the_machine_whichever_is_less(monkeypatch, tmp_path):
    assert container.memory_limits(tmp_path) == []  # another system than Linux
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limits, expected in (([], machine), ([5000, 4000], 4000), ([2**63 - 4096], machine)):
        monkeypatch.setattr(container, "memory_limits", lambda limits=limits: list(limits))
        assert memory.available(torch.device("cpu")) == expected
