"""The limits of a container, as both versions of control groups tell them."""

import os

import pytest

from simclr import container
from simclr.container import cores, cpu_quotas, memory_limits

MACHINE = "9223372036854771712\n"  # what version 1 says where there is no limit


def lay_out(root, membership, files):
    for name, text in {"proc/self/cgroup": membership, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/", {"memory.max": "1000\n"}, [1000]),
        ("0::/", {}, []),  # the machine's own group has no such file
        ("0::/a/b", {"memory.max": "max\n", "a/memory.max": "3000\n", "a/b/memory.max": "max\n"}, [3000]),
        ("0::/a/b", {"a/memory.max": "3000\n", "a/b/memory.max": "5000\n"}, [3000]),
        # In a container whose group is named from outside.
        ("0::/docker/7f", {"memory.max": "2000\n"}, [2000]),
        ("12:cpu:/x\n4:memory:/x", {"memory/memory.limit_in_bytes": MACHINE}, [int(MACHINE)]),
        (
            "12:cpu:/x\n4:hugetlb,memory:/x/y\n0::/",
            {"memory/x/memory.limit_in_bytes": "4000\n", "memory/x/y/memory.limit_in_bytes": MACHINE},
            [4000],
        ),
    ],
    ids=["v2", "v2 without", "v2 above", "v2 nested", "v2 inside", "v1 without", "v1 above, hybrid"],
)
def test_the_limits_on_memory_are_read(tmp_path, membership, files, limits):
    lay_out(tmp_path, membership, files)
    assert min(memory_limits(tmp_path), default=None) == min(limits, default=None)


@pytest.mark.parametrize(
    ("membership", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, [0.5]),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, [4.0]),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, []),
        ("4:memory:/x", {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, []),
    ],
    ids=["v2", "v2 without", "v2 above", "v1", "v1 without", "not in it"],
)
def test_the_limits_on_processor_time_are_read(tmp_path, membership, files, quotas):
    lay_out(tmp_path, membership, files)
    assert sorted(set(cpu_quotas(tmp_path))) == quotas  # a group may be named twice


def test_cores_are_those_of_the_affinity_or_of_the_quota_whichever_are_fewer(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores(tmp_path) == 8
    for quota, expected in (("150000 100000", 2), ("20000 100000", 1), ("1600000 100000", 8)):
        lay_out(tmp_path, "0::/", {"cpu.max": quota})
        assert cores(tmp_path) == expected


def test_ranks_share_the_threads_that_a_quota_feeds(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(container, "cpu_quotas", lambda root: [3.5])
    monkeypatch.setattr(container, "cores", lambda root: 4)
    assert [container.threads(processes) for processes in (1, 2, 8)] == [4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert container.threads() is None  # the user's choice
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(container, "cpu_quotas", lambda root: [])
    assert container.threads() is None
