"""Conversions: widening is exact, narrowing rounds once to nearest even. Checked by number theory, not by a library.

A step carries values through unchanged: the first step of SGD with momentum 0.5 and a buffer of -0.0 stores the
gradient itself in the buffer, by way of the parameter's compute type.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from bits import BF16, F16, F32, F64, MANTISSA, assert_same_bits, bits, infinity, is_nan, values

import fastgd
from fastgd import reference

MODULES = pytest.mark.parametrize("module", [fastgd, reference], ids=lambda module: module.__name__)


def carried(module: Any, x: Any, compute: np.dtype[Any], to: np.dtype[Any]) -> Any:
    """``x`` loaded into ``compute`` and stored as ``to``."""
    p, buffer = np.zeros(x.shape, compute), np.full(x.shape, -0.0, to)
    module.sgd_step(p, x, 0.1, momentum=0.5, momentum_buffers=buffer, step=1)
    return buffer


def decoded(patterns: Any, dtype: np.dtype[Any]) -> Any:
    """The numbers of non-negative bit patterns in float64, exactly; inf stands for the number that would follow."""
    m = MANTISSA[dtype]
    bias = (infinity(dtype) >> m) // 2
    exponent, fraction = patterns >> m, patterns & ((1 << m) - 1)
    exponent, fraction = np.where(exponent == 0, 1, exponent), fraction + np.where(exponent == 0, 0, 1 << m)
    return np.ldexp(fraction.astype(np.float64), (exponent - bias - m).astype(np.int32))


def all_of(dtype: np.dtype[Any]) -> Any:
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def around_ties(dtype: np.dtype[Any], source: np.dtype[Any]) -> Any:
    """Every number of a 16-bit type, every tie between two, and what lies next to both, far and near, in `source`."""
    numbers = decoded(np.arange(infinity(dtype) + 1), dtype)
    exact = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(source)
    bumps = [exact]
    for direction in (np.inf, 0):
        bumps += [np.nextafter(exact, source.type(direction))]
    if source == F64:  # beyond the digits of float32: where rounding by way of it goes wrong
        bumps += [exact * (1 + s * 2.0**-40) for s in (1, -1)]
    positive = np.concatenate([*bumps, values(5000, source)]).astype(source)
    return np.concatenate([positive, -positive])


def assert_nearest_even(x: Any, stored: Any) -> None:
    """No neighbour of what is stored is nearer to ``x``, and at a tie the stored bits are even."""
    dtype = stored.dtype
    u, wide = bits(stored).astype(np.int64), x.astype(np.float64)
    sign_bit = 1 << (8 * dtype.itemsize - 1)
    nan = np.isnan(wide)
    assert np.array_equal(is_nan(stored), nan)
    assert np.array_equal((u & sign_bit != 0)[~nan], np.signbit(wide)[~nan])
    u, wide = u[~nan] & (sign_bit - 1), np.abs(wide[~nan])
    inf = infinity(dtype)
    at = decoded(u, dtype)
    down, up = (decoded(np.clip(u + s, 0, inf), dtype) for s in (-1, 1))
    even = u % 2 == 0
    low, high = at / 2 + down / 2, np.where(u == inf, np.inf, at / 2 + up / 2)  # halves first: no overflow
    assert (np.where(even, wide >= low, wide > low) | (u == 0)).all()
    assert (np.where(even, wide <= high, wide < high) | (u == inf)).all()


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@MODULES
@pytest.mark.parametrize("to", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_widening_is_exact(module, dtype, to):
    x = all_of(dtype)
    got = carried(module, x, to, to)
    nan, inf = is_nan(x), infinity(dtype)
    assert np.array_equal(is_nan(got), nan)
    u = bits(x).astype(np.int64)
    expected = np.where(u & 0x7FFF == inf, math.inf, decoded(u & 0x7FFF, dtype)) * np.where(u & 0x8000, -1, 1)
    assert_same_bits(got[~nan], expected[~nan].astype(to))


@MODULES
@pytest.mark.parametrize("compute", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_narrowing_to_16_bits(module, dtype, compute):
    x = around_ties(dtype, compute)
    assert x.size > 1 << 18
    assert_nearest_even(x, carried(module, x, compute, dtype))


@MODULES
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_parameter_is_narrowed_too(module, dtype):
    x = around_ties(dtype, F32)
    x = x[x != 0]
    p = np.zeros(x.shape, dtype)
    module.sgd_step(p, -x, 1.0)
    assert_nearest_even(x, p)


@MODULES
@pytest.mark.parametrize("load", [False, True], ids=["store", "load"])
def test_narrowing_to_float32(module, load):
    u = np.concatenate([np.arange(k, k + 300) for k in (0, 0x7FFF00, 0x3F800000, infinity(F32) - 300)])
    u = np.concatenate([u, bits(values(20000, F32)) & 0x7FFFFFFF])
    numbers = decoded(u[u <= infinity(F32)].astype(np.int64), F32)
    ties = numbers * (1 + 2.0**-24)  # the tie above a number whose last bit has the weight of 2 ** -23; else any number
    x = np.concatenate([numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), values(50000, F64)])
    x = np.concatenate([x, -x])
    stored = carried(module, x, F32, F32) if load else carried(module, x, F64, F32)
    assert_nearest_even(x, stored)


def test_the_oracle_sees_a_double_rounding():
    """float64 to bfloat16 by way of float32, as ml_dtypes' cast goes."""
    x = around_ties(BF16, F64)
    assert_nearest_even(x.astype(F32).astype(np.float64), x.astype(F32).astype(BF16))
    with pytest.raises(AssertionError):
        assert_nearest_even(x, x.astype(F32).astype(BF16))
