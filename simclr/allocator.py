"""How a process holds the memory that it frees. A process decides it about itself; no function of the library does."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Freed memory stays with this process, for the next part of the views and for the next training step.

    glibc gives large blocks back to the system as they are freed, and a page taken anew costs more than the arithmetic
    on it: up to a quarter of a step on a CPU. So a process keeps as much as it needed at its peak.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)
