"""Single kernels, on one thread: every rule of the registry, plain and with all its flags, by size and dtype.

Run as ``pytest bench``; what is to be compared between machines and peers is ``python -m fastgd bench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from fastgd import _core

SIZES = {"1Ki": 2**10, "100Ki": 100 * 2**10, "4Mi": 2**22}
DTYPES = {  # of parameters and gradients, of states
    "float64": (np.float64, np.float64),
    "float32": (np.float32, np.float32),
    "float16": (np.float16, np.float16),
    "bfloat16": (bfloat16, bfloat16),
    "bfloat16-float32": (bfloat16, np.float32),
}
VARIANTS = [
    pytest.param(rule, variant, id="-".join([rule, *entry["flags"]]) if variant else rule)
    for rule, entry in _core.RULES.items()
    for variant in sorted({0, 2 ** len(entry["flags"]) - 1})
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The kernel is in question, not the pool."""
    threads = _core.get_num_threads()
    _core.set_num_threads(1)
    yield
    _core.set_num_threads(threads)


@pytest.mark.benchmark(max_time=0.1, warmup=True, warmup_iterations=10)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_kernel(benchmark: Any, rule: str, variant: int, size: str, dtype: str) -> None:
    n = SIZES[size]
    narrow, wide = DTYPES[dtype]
    params, grads = np.ones(n, narrow), np.ones(n, narrow)
    states = tuple(np.ones(n, wide) for _ in range(_core.RULES[rule]["states"][variant]))
    row = (variant, 1.0, *[0.5] * _core.RULES[rule]["coefficients"])
    benchmark.group = f"{dtype}, {size}"

    taken = benchmark(_core.step, rule, [row], None, params, grads, states, False)

    assert taken
    moved = grads.nbytes + 2 * sum(a.nbytes for a in (params, *states))
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
