"""RMSprop (Hinton, lecture 6e, 2012), centred as by Graves (arXiv 1308.0850), in torch's form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Flags(NamedTuple):
    decay: bool
    centered: bool
    momentum: bool


class Coefficients(NamedTuple):
    lr: Any
    alpha: Any
    w: Any
    weight_decay: Any
    momentum: Any
    eps: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, v: Any, *more: Any) -> tuple[Any, ...]:
    states = iter(more)  # grad_avg if centered, then buffer if momentum
    if flags.decay:
        g = g + c.weight_decay * p
    v = c.alpha * v + c.w * (g * g)
    new = [v]
    a = v
    if flags.centered:
        grad_avg = next(states)
        grad_avg = grad_avg + c.w * (g - grad_avg)
        a = v - grad_avg * grad_avg
        new.append(grad_avg)
    u = g / (np.sqrt(a) + c.eps)
    if flags.momentum:
        u = c.momentum * next(states) + u
        new.append(u)
    return p - c.lr * u, *new
