"""Lion (Chen et al., arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Flags(NamedTuple):
    pass


class Coefficients(NamedTuple):
    shrink: Any
    lr: Any
    beta1: Any
    w1: Any
    beta2: Any
    w2: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, m: Any) -> tuple[Any, ...]:
    u = sign(c.beta1 * m + c.w1 * g)
    return p * c.shrink - c.lr * u, c.beta2 * m + c.w2 * g


def sign(x: Any) -> Any:
    """1 or -1, else x itself: NaN stays NaN and -0.0 stays -0.0, where np.sign gives 0.0."""
    one = x.dtype.type(1)
    return np.where(x > 0, one, np.where(x < 0, -one, x))
