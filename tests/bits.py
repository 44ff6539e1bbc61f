"""Values that provoke, and comparison by bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cases import CASES, Case

DTYPES = tuple(np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
F64, F32, F16, BF16 = DTYPES
MANTISSA = {F64: 52, F32: 23, F16: 10, BF16: 7}  # bits stored

# What is common in practice, and mixes in which no two operands are alike: (parameter, gradient, state).
MIXES = ((F64, F64, F64), (F32, F32, F32), (BF16, BF16, F32), (F16, F64, BF16), (F64, BF16, F16), (BF16, F16, BF16))


def uint_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def infinity(dtype: np.dtype[Any]) -> int:
    """The bits of inf, which follow those of the largest finite number."""
    exponent = 8 * dtype.itemsize - 1 - MANTISSA[dtype]
    return ((1 << exponent) - 1) << MANTISSA[dtype]


@cache
def _pool(dtype: np.dtype[Any], seed: int) -> Any:
    """Two thirds of ordinary size and mostly positive, so that roots have a value; then any bits; then the extremes."""
    n = 65537
    rng = np.random.default_rng(seed)
    uint = uint_of(dtype)
    ordinary = np.exp(rng.normal(size=n)) * rng.choice([1, 1, 1, -1], n)
    any_bits = rng.integers(0, np.iinfo(uint).max, n, uint, endpoint=True)
    m, inf = MANTISSA[dtype], infinity(dtype)
    positive = [0, 1, (1 << m) - 1, 1 << m, inf - 1, inf, inf | 1 << (m - 1), inf | 1]
    extremes = np.array([bits | sign for bits in positive for sign in (0, 1 << (8 * dtype.itemsize - 1))], uint)
    kinds = [ordinary.astype(dtype).view(uint)] * 4 + [any_bits, rng.choice(extremes, n)]
    return np.choose(rng.integers(0, len(kinds), n), kinds).view(dtype)


def values(shape: Any, dtype: np.dtype[Any], seed: int = 0) -> Any:
    """An array of its own, whose values depend on its arguments alone."""
    n = int(np.prod(shape))
    pool = _pool(dtype, seed % 64)  # which are slow to make
    return np.resize(np.roll(pool, seed // 64) if seed >= 64 else pool, n).reshape(shape)


def operands(case: Case, shape: Any, dtypes: Sequence[np.dtype[Any]], seed: int = 0) -> list[Any]:
    """Parameter, gradient and states; states beyond the dtypes given have the last of them."""
    count = 2 + len(case.states)
    dtypes = [*dtypes, *[dtypes[-1]] * count][:count]
    return [values(shape, dtype, 10 * seed + k) for k, dtype in enumerate(dtypes)]


def bits(a: Any) -> Any:
    return np.ascontiguousarray(a).view(uint_of(a.dtype)).reshape(-1)


def is_nan(a: Any) -> Any:
    """np.isnan of the bits: with ml_dtypes' type a signalling NaN would warn."""
    u = bits(a)
    return (u & (np.iinfo(u.dtype).max >> 1)) > infinity(a.dtype)


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """The same values to the last bit; where there is a NaN its payload is not compared."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    a, e = bits(actual), bits(expected)
    if np.array_equal(a, e):
        return
    wrong = np.flatnonzero((a != e) & ~(is_nan(actual) & is_nan(expected)))
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{what}: {wrong.size} of {a.size} differ, first at {i}: "
            f"got {actual.ravel()[i]!r} ({a[i]:#x}), expected {expected.ravel()[i]!r} ({e[i]:#x})"
        )


def by_role(items: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Lists of parameters, gradients and states from the operands of each parameter."""
    return [list(role) for role in zip(*items, strict=True)]


def assert_step_is_twins(case: Case, actual: Sequence[Any], expected: Sequence[Any], what: str = "") -> None:
    """Parameter, gradient and states after a step, against the twin's."""
    for name, a, e in zip(("params", "grads", *case.states), actual, expected, strict=True):
        if not (a is None and e is None):
            assert_same_bits(a, e, f"{case} {what} {name}")


def remember(placed: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Copies of views and of the memory that they lie in."""
    return [(view.copy(), base.copy()) for view, base in placed]


def assert_only_views_moved(placed: Sequence[tuple[Any, Any]], before: Sequence[tuple[Any, Any]], what: str) -> None:
    """With the old values put back into the views, all the memory that they lie in is as it was."""
    for (view, base), (old_view, old_base) in zip(placed, before, strict=True):
        if view.flags.writeable:
            view[...] = old_view
        assert base.tobytes() == old_base.tobytes(), what


def digest(module: Any) -> str:
    """A fingerprint of every case on every mix of dtypes."""
    total = hashlib.sha256()
    for case in CASES:
        for dtypes in MIXES:
            arrays = operands(case, 2311, dtypes)
            for step in (1, 2):
                case.step(module, arrays[0], arrays[1], arrays[2:], step)
            for a in arrays:
                total.update(np.where(is_nan(a), 0, bits(a)).tobytes())
    return total.hexdigest()


def run_python(code: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which can import these modules; a hang is a failure."""
    path = os.pathsep.join(p for p in (str(Path(__file__).parent), os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
