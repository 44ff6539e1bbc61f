"""Rounding of what is stored: once, to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np


def rounded(x: Any, dtype: np.dtype[Any]) -> Any:
    """``x``, float32 or float64, rounded once to ``dtype``."""
    if x.dtype == np.float64 and dtype.name == "bfloat16":  # ml_dtypes would round twice, the first time to float32
        x = round_to_odd(x)
    return x.astype(dtype, copy=False)


def round_to_odd(x: Any) -> Any:
    """float64 to float32: toward zero, with the last bit set where that was inexact.

    The set bit remembers the digits that were cut off, so that a further rounding to at most 22 bits comes out as if
    it were the only one (Boldo and Melquiond, 2008).
    """
    x = np.asarray(x)
    nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    bits -= np.abs(back) > np.abs(x)
    bits |= (back != x) & ~np.isnan(x)
    return nearest
