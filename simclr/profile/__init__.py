"""Where the time of a training step goes, and how near it comes to the limit of the device, both measured.

`clock` times the parts of a step, `operations` counts what the encoder has to do, `limit` measures what the device
can do, `measured` holds the three together, `table` and `advice` say it to people.
"""

from simclr.profile.advice import advice
from simclr.profile.clock import PARTS, StepClock, StepParts
from simclr.profile.limit import Limit, dtype_of, throughput
from simclr.profile.measured import Profile, summarise
from simclr.profile.operations import count_operations
from simclr.profile.table import draw

__all__ = [
    "PARTS",
    "Limit",
    "Profile",
    "StepClock",
    "StepParts",
    "advice",
    "count_operations",
    "draw",
    "dtype_of",
    "summarise",
    "throughput",
]
