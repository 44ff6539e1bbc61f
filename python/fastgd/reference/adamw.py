"""AdamW: Adam with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), with AMSGrad."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastgd.reference import adam


class Flags(NamedTuple):
    amsgrad: bool


class Coefficients(NamedTuple):
    shrink: Any
    w1: Any
    beta2: Any
    w2: Any
    step_size: Any
    inv_bias2: Any
    eps: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, m: Any, v: Any, x: Any = None) -> tuple[Any, ...]:
    return adam.moments(flags, c, p * c.shrink, g, m, v, x)
