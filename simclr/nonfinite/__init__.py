"""Steps whose loss or gradient is not finite: found at once, stopped or skipped, written down, and computed again."""

from simclr.nonfinite.dump import Dump, read_dump
from simclr.nonfinite.replay import replay_step
from simclr.nonfinite.watch import FiniteSteps, NonFiniteStep, OnNonFinite

__all__ = ["Dump", "FiniteSteps", "NonFiniteStep", "OnNonFinite", "read_dump", "replay_step"]
