"""A profile in numbers: what a clock has measured, beside what the device can do."""

from dataclasses import dataclass

import torch

from simclr.profile.clock import PARTS, StepClock
from simclr.profile.limit import Limit, dtype_of, gain_of_bf16, measure_limit
from simclr.profile.operations import count_operations
from simclr.training.method import Method


@dataclass
class Profile:
    """A step in numbers; seconds are the mean over the steps timed.

    Attributes:
        parts: seconds by part, `rest` last: Lightning, logging, Python.
        timed, untouched: seconds of a step, timed in parts and untouched.
        spread: slowest block of untouched steps over the fastest, minus 1.
        repeated: the part of the forward passes that micro-batches make a second time.
        operations: of the encoder in a step, forward and backward; None if unknown.
        limit: of the device.
        bf16: see `gain_of_bf16`; None where the training is not in float32.
        steps: timed of either kind.
    """

    parts: dict[str, float]
    timed: float
    untouched: float
    spread: float
    repeated: float
    operations: tuple[float, float] | None
    limit: Limit
    bf16: float | None
    steps: int

    def of_limit(self, part: str) -> float | None:
        """What fraction of the limit a part (or `untouched`) reaches."""
        if self.operations is None:
            return None
        forward, backward = self.operations
        work = {"encoder": forward, "backward": backward, "untouched": forward + backward}.get(part)
        taken = self.untouched if part == "untouched" else self.parts.get(part)
        return work / taken / self.limit.rate if work and taken else None

    def share(self, part: str) -> float:
        """Of a step timed in parts."""
        return self.parts[part] / self.timed


def summarise(clock: StepClock, model: Method, images: int, precision: str) -> Profile:
    """What a clock has measured, beside what the device can do, which is measured here.

    Args:
        clock: after the training.
        model: that was trained, on its device.
        images: in a step, of this device.
        precision: Lightning's name.
    """
    size = model.hparams.micro_batch_size or images
    limit = measure_limit(next(model.parameters()).device, precision)
    is_float32 = dtype_of(precision) == torch.float32
    bf16 = gain_of_bf16(model, model.views.large * size) if is_float32 else None
    steps = clock.steps_of_a_kind
    timed, untouched = sum(clock.timed) / steps, sum(clock.untouched) / steps
    parts = {name: clock.profiler.seconds[name] / steps for name in PARTS}
    parts["rest"] = timed - sum(parts.values())
    passes = clock.profiler.calls["encoder"] / steps
    counted = count_operations(model, size)
    operations = counted and (counted[0] * passes, counted[1] * images / size)
    return Profile(
        parts,
        timed,
        untouched,
        max(clock.untouched) / min(clock.untouched) - 1,
        1 - images / size / passes,
        operations,
        limit,
        bf16,
        steps,
    )
