"""SGD with momentum, plain or Nesterov's (Sutskever et al., ICML 2013), in torch's form."""

from __future__ import annotations

from typing import Any, NamedTuple


class Flags(NamedTuple):
    decay: bool
    momentum: bool
    nesterov: bool


class Coefficients(NamedTuple):
    lr: Any
    momentum: Any
    gain: Any
    weight_decay: Any


def update(flags: Flags, c: Coefficients, p: Any, g: Any, buffer: Any = None) -> tuple[Any, ...]:
    if flags.decay:
        g = g + c.weight_decay * p
    if not flags.momentum:
        return (p - c.lr * g,)
    buffer = c.momentum * buffer + c.gain * g
    g = g + c.momentum * buffer if flags.nesterov else buffer
    return p - c.lr * g, buffer
