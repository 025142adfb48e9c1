"""The limit of a device is one: the rate of a product, of the best calls in a row."""

from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from simclr.profile import limit
from simclr.profile.limit import dtype_of, throughput


def test_the_limit_is_the_rate_of_a_product(monkeypatch):
    counted = []

    def in_two_seconds(job, device, seconds):
        with FlopCounterMode(display=False) as counter:
            job()
        counted.append(counter.get_total_flops())
        return 2.0

    monkeypatch.setattr(limit, "fastest", in_two_seconds)
    rates = throughput(torch.device("cpu"), torch.float32, 0.05)
    assert rates == {"matrix products": counted[0] / 2, "convolutions": counted[1] / 2}
    assert counted[0] == 2 * 1024**3
    assert [dtype_of(name) for name in ("bf16-mixed", "16-true", "32-true")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


def test_the_seconds_of_a_call_are_those_of_the_best_calls_in_a_row(monkeypatch):
    takes = iter([9, 9, 9, 9, 3, 4, 3, 2, 5, 5, 5, 5])
    now, waits = [0.0], []
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(now[0]))

    def job():
        now[0] += next(takes)

    assert limit.fastest(job, torch.device("cuda"), seconds=50, calls=4) == 3
    assert next(takes, None) is None, "it stops at the first end of a row after the time"
    assert waits == [0, 36, 36, 48, 48, 68], "before a row and after it"
