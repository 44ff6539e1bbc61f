"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), with AMSGrad (Reddi et al., arXiv 1904.09237)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Flags(NamedTuple):
    decay: bool
    amsgrad: bool


class Coefficients(NamedTuple):
    weight_decay: Any
    w1: Any
    beta2: Any
    w2: Any
    step_size: Any
    inv_bias2: Any
    eps: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, m: Any, v: Any, x: Any = None) -> tuple[Any, ...]:
    if flags.decay:
        g = g + c.weight_decay * p
    return moments(flags, c, p, g, m, v, x)


def moments(flags: Any, c: Any, p: Any, g: Any, m: Any, v: Any, x: Any) -> tuple[Any, ...]:
    """What Adam and AdamW share."""
    m = m + c.w1 * (g - m)
    v = c.beta2 * v + c.w2 * (g * g)
    if not flags.amsgrad:
        return p - c.step_size * (m / (np.sqrt(v) * c.inv_bias2 + c.eps)), m, v
    x = np.where((x > v) | np.isnan(x), x, v)
    return p - c.step_size * (m / (np.sqrt(x) * c.inv_bias2 + c.eps)), m, v, x
