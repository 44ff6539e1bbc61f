"""No byte outside an array is touched, and sizes are 64-bit."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import BF16, F16, F32, F64, assert_step_is_twins, operands
from cases import every_case

import fastgd
from fastgd import reference

if not hasattr(os, "memfd_create"):
    pytest.skip("needs Linux's mmap", allow_module_level=True)

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, 3
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mapped(address: int | None, size: int, protection: int, flags: int, file: int = -1) -> int:
    at = libc.mmap(address, size, protection, flags, file, 0)
    assert at not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return at


def array_at(address: int, n: int, dtype: np.dtype[Any]) -> Any:
    return np.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(address), np.uint8).view(dtype)


SIZES = range(301)
PERIOD = 32771 * PAGE
ISLAND = 2 * PAGE  # holds 300 float64 two strides apart


@pytest.fixture(scope="module")
def islands() -> Iterator[list[list[int]]]:
    """Memory for each of five operands and each size; the pages around every piece can't be touched."""
    total = 5 * len(SIZES) * (PAGE + ISLAND) + PAGE
    base = mapped(None, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS)
    starts = range(base + PAGE, base + total, PAGE + ISLAND)
    for start in starts:
        mapped(start, ISLAND, PROT_READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    yield [list(starts[k::5]) for k in range(5)]
    libc.munmap(base, total)


PLACES: dict[str, Callable[[Any, int], Any]] = {
    "begin": lambda memory, n: memory[:n],
    "end": lambda memory, n: memory[memory.size - n :],
    "backward": lambda memory, n: memory[memory.size - n :][::-1],
    "spread": lambda memory, n: memory[memory.size - max(2 * n - 1, 0) :: 2],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "dtypes",
    [(F64, F64, F64), (F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16), (F32, BF16, F16), (BF16, F64, F32)],
    ids=lambda dtypes: "-".join(d.name for d in dtypes),
)
@every_case
def test_guard_pages(case, dtypes, place, islands):
    """Every size from 0 to 300 next to a page that can't be touched: one element beyond would be a crash."""
    whole, expected = (operands(case, SIZES[-1], dtypes) for _ in "ab")
    roles = []
    for a, starts in zip(whole, islands[: len(whole)], strict=True):
        views = [PLACES[place](array_at(at, ISLAND // a.itemsize, a.dtype), n) for n, at in enumerate(starts)]
        for n, view in enumerate(views):
            view[...] = a[:n]
        roles.append(views)
    case.step(fastgd, roles[0], roles[1], roles[2:])
    case.step(reference, expected[0], expected[1], expected[2:])
    actual = [np.concatenate(views) for views in roles]
    assert_step_is_twins(case, actual, [np.concatenate([e[:n] for n in SIZES]) for e in expected], place)


@pytest.fixture(params=[(1 << 31) + 4321, (1 << 32) + 4321], ids=["2**31", "2**32"])
def endless(request) -> Iterator[Callable[[np.dtype[Any]], Any]]:
    """Makes arrays of that many elements in little memory: a file mapped again and again.

    The file is no power of two long, so that an index that wraps round misses its place in it too.
    """
    n: int = request.param
    size = PERIOD
    made = []

    def make(dtype: np.dtype[Any]) -> Any:
        file = os.memfd_create("endless")
        os.ftruncate(file, size)
        total = -(-n * dtype.itemsize // size) * size
        base = mapped(None, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        for at in range(base, base + total, size):
            mapped(at, size, PROT_READ_WRITE, MAP_SHARED | MAP_FIXED, file)
        os.close(file)
        made.append((base, total))
        return array_at(base, n, dtype)

    yield make
    for base, total in made:
        libc.munmap(base, total)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_element_of_an_endless_array_is_stepped_once(endless, dtype, set_threads):
    """Each place of the file counts how many elements of the array it is: 1.0 is taken from it as often."""
    set_threads(1)  # elements share memory here
    p, g = endless(dtype), endless(dtype)
    period = PERIOD // dtype.itemsize
    g[:period] = -1
    fastgd.sgd_step(p, g, 1.0)
    times, more = divmod(p.size, period)
    assert times < 256, "bfloat16 counts no further"
    assert (p[:more] == times + 1).all() and (p[more:period] == times).all()


@pytest.mark.slow
def test_more_than_2_31_elements(set_threads):
    """4.3 GB, parts of it beyond 2**31; the gradient is one number broadcast."""
    available = int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10
    n = (1 << 31) + 12345
    if available < 3 * n:
        pytest.skip(f"needs {3 * n >> 30} GiB of memory, {available >> 30} are free")
    set_threads(3)
    p = np.zeros((n // 5, 5), BF16)
    fastgd.sgd_step(p, np.broadcast_to(np.array([1, 2, 3, 4, 5], BF16), p.shape), 0.5)
    expected = np.array([-0.5, -1, -1.5, -2, -2.5], BF16)
    for block in np.array_split(p, 64):
        assert np.array_equal(block.view(np.uint16), np.broadcast_to(expected.view(np.uint16), block.shape))
