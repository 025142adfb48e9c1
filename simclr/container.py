"""The processor, and what a container allows: memory and cores of the control groups of this process (Linux)."""

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, as far as the platform tells: its affinity, and its container's quota.

    Args:
        root: below it lie `proc` and `sys`.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *(math.ceil(quota) for quota in cpu_quotas(root))]))


def threads(processes: int = 1, root: Path = Path("/")) -> int | None:
    """Threads for each of some processes that share a container's quota; None where there is none, or the user chose.

    Args:
        processes: how many compute at a time here.
        root: below it lie `proc` and `sys`.
    """
    if os.environ.get("OMP_NUM_THREADS") or not cpu_quotas(root):
        return None
    return max(1, cores(root) // processes)


def cpu_quotas(root: Path = Path("/")) -> list[float]:
    """The limits on processor time, in cores, of the groups; nested ones each."""
    quotas = []
    for folder, version in _groups(root, "cpu"):
        if version == 2:
            words = (_read(folder / "cpu.max") or "").split()  # "max 100000", or microseconds of each period
        else:
            words = [_read(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]  # -1: no limit
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def memory_limits(root: Path = Path("/")) -> list[int]:
    """The limits on memory, in bytes, of the groups; nested ones each.

    Both versions of control groups say "no limit" too, the first by a number beyond all memory.
    """
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    found = [_read(folder / names[version]) or "" for folder, version in _groups(root, "memory")]
    return [int(limit) for limit in found if limit.isdigit()]


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders that may hold a controller's limits for this process, and the version of control groups of each."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            top, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        folder = Path(group.lstrip("/"))
        # Inside a container the group may be named from outside of it, and its own files lie at the top.
        for path in (top, *(top / part for part in (folder, *folder.parents))):
            yield path, version


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def processor() -> str:
    """The name of the CPU, as well as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
