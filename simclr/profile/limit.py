"""How fast a device can be at best, measured: the roof that a step is held against."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from simclr.training.method import Method


@dataclass
class Limit:
    """What the device does in the precision of the training: operations a second, and in what it reached that."""

    rate: float
    what: str


def dtype_of(precision: str) -> torch.dtype:
    """What a precision of Lightning's multiplies in."""
    names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return next((dtype for name, dtype in names.items() if precision.startswith(name)), torch.float32)


def measure_limit(device: torch.device, precision: str, seconds: float = 0.5) -> Limit:
    """The device's throughput on what it does best: a large matrix product or a wide 3 x 3 convolution.

    Args:
        device: where.
        precision: Lightning's name.
        seconds: of each of the two.
    """
    rates = throughput(device, dtype_of(precision), seconds)
    what = max(rates, key=rates.__getitem__)
    return Limit(rates[what], what)


def throughput(device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Operations a second of a matrix product and of a convolution: the best of the calls that fit into the time."""
    side, images = (8192, 256) if device.type == "cuda" else (1024, 16)
    a = torch.randn(side, side, device=device, dtype=dtype)
    convolution: Any = nn.Conv2d(128, 128, 3, padding=1, bias=False)  # torch types no `to` with a memory format
    convolution = convolution.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(images, 128, 16, 16, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    jobs = {
        "matrix products": (lambda: a @ a, 2 * side**3),
        "convolutions": (lambda: convolution(x), 2 * x.numel() * 128 * 9),
    }
    rates = {}
    for name, (job, operations) in jobs.items():
        with torch.no_grad():
            rates[name] = operations / fastest(job, device, seconds)
    return rates


def synchronize(device_type: str) -> None:
    """Wait until the device has done all that was asked of it; a CPU has."""
    if device_type != "cpu":
        torch.accelerator.synchronize()


def fastest(job: Callable[[], Any], device: torch.device, seconds: float, calls: int = 4) -> float:
    """Seconds of a call, the best of so many in a row, repeated until the time is over."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device.type)
        start = time.perf_counter()
        for _ in range(calls):
            job()
        synchronize(device.type)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def gain_of_bf16(model: Method, views: int, rounds: int = 3) -> float:
    """How many times as fast encoder and head are forward and backward under bf16-mixed as in float32, on this device.

    Tried with weights of their own on so many views of noise, in turn: what a device multiplies faster it may still
    have to convert, and small networks do little else.
    """
    device, side = next(model.parameters()).device, model.views.size(0)
    network = nn.Sequential(*(copy.deepcopy(part) for part in model.networks)).train()
    x = torch.randn(views, model.hparams.get("channels", 3), side, side, device=device)
    if model.hparams.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def step(enabled: bool) -> float:
        def job() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                z = network(x)
            z.float().sum().backward()

        return fastest(job, device, 0, calls=1)

    step(True), step(False)
    times = [(step(False), step(True)) for _ in range(rounds)]
    return min(plain for plain, _ in times) / min(mixed for _, mixed in times)
