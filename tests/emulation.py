"""The CUDA module without a GPU: bodies and binding compiled for the host, where NumPy's arrays are its arrays."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "tests/cuda/device.cpp"] + [
    ROOT / "csrc" / f"{name}.cpp"
    for name in (
        "cuda/call",
        "bind/arrays",
        "bind/cuda",
        "bind/module_cuda",
        "bind/prepared",
        "bind/registry",
        "bind/step",
        "cpu/pool",
        "pass/layout",
    )
]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall"]


@cache
def module() -> Any:
    """``_emulated``, compiled once for these sources; the build folder keeps it."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX", "c++")
    texts = sorted([*ROOT.glob("csrc/**/*.?pp"), *ROOT.glob("tests/cuda/*")])
    key = hashlib.sha256(repr([compiler, sys.version, FLAGS]).encode() + b"".join(p.read_bytes() for p in texts))
    folder = ROOT / "build" / "emulated" / key.hexdigest()[:16]
    library = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        include = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        options = [*FLAGS, "-DFASTGD_MODULE=_emulated", *(f"-I{path}" for path in include)]

        def compiled(source: Path) -> Path:
            to = folder / f"{source.stem}.o"
            subprocess.run([compiler, *options, "-c", source, "-o", to], check=True)
            return to

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, SOURCES))
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-shared", *objects, "-o", unfinished, "-pthread"], check=True)
        unfinished.replace(library)
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None and spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated
