"""The machine and the software that the figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastgd

_PACKAGES = ("numpy", "torch", "jax", "optax", "numba", "deepspeed")


def described() -> dict[str, Any]:
    """Date, CPU, memory, instruction set, threads, and the version of everything."""
    config = fastgd.config()
    memory = total_memory()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "memory": "unknown" if memory is None else f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "isa": config["isa"],
        "threads": config["num_threads"],
        "load": _load(),
        "python": platform.python_version(),
        "fastgd": config["version"],
        **{name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def total_memory() -> int | None:
    """The machine's memory in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """The bytes that can be had without swapping, where the system tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    total = total_memory()
    return None if total is None else total // 2


def _load() -> str:
    """What other programs did in the last minute; a benchmark wants 0."""
    try:
        return f"{os.getloadavg()[0]:.2f} before the first timing"
    except (AttributeError, OSError):
        return "unknown"


def _cpu() -> str:
    try:
        if platform.system() == "Darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout
            return name.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
