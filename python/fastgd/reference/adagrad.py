"""Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), in torch's form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Flags(NamedTuple):
    decay: bool


class Coefficients(NamedTuple):
    rate: Any
    weight_decay: Any
    eps: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, s: Any) -> tuple[Any, ...]:
    if flags.decay:
        g = g + c.weight_decay * p
    s = s + g * g
    return p - c.rate * (g / (np.sqrt(s) + c.eps)), s
