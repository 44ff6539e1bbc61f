"""How many threads a step may use, unless told otherwise."""

from __future__ import annotations

import operator
import os
from math import ceil
from pathlib import Path
from typing import Any

MOST = 1024  # parts that a step is cut into


def checked(n: Any, name: str = "n") -> int:
    """`n` as a count of threads."""
    try:
        if isinstance(n, bool):
            raise TypeError
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{name}: expected an int >= 1, got {n!r} of type {type(n).__name__}") from None
    if not 1 <= number <= MOST:
        raise ValueError(f"{name}: expected an int from 1 to {MOST}, got {number}")
    return number


def default() -> int:
    """FASTGD_NUM_THREADS, else the CPUs that affinity and the cgroup's quota leave to this process."""
    asked = os.environ.get("FASTGD_NUM_THREADS")
    if asked:
        if not (asked.isascii() and asked.strip().isdigit()):
            raise ValueError(f"FASTGD_NUM_THREADS: expected an integer >= 1, got {asked!r}; unset it for the default")
        return checked(int(asked), "FASTGD_NUM_THREADS")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ceil(min(cpus, _quota(Path("/")))))


def _quota(root: Path) -> float:
    """CPUs by the tightest quota among this process's control groups (version 2, then 1) and their parents."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = mount / group.lstrip("/")
        for folder in (inner, *(p for p in inner.parents if p == mount or mount in p.parents)):
            if controllers:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _text(folder / "cpu.max").partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=float("inf"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
