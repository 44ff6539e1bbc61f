"""NumPy, in place, as one writes it."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np

from fastgd.cli.bench.case import Array, Case
from fastgd.cli.bench.measure import Contender


def sgd(p: Array, g: Array, t: int, *, lr: float) -> None:
    p -= lr * g


def momentum(p: Array, g: Array, b: Array, t: int, *, lr: float, momentum: float) -> None:
    b *= momentum
    b += g
    p -= lr * b


def nesterov(p: Array, g: Array, b: Array, t: int, *, lr: float, momentum: float, nesterov: bool) -> None:
    b *= momentum
    b += g
    p -= lr * (g + momentum * b)


def adam(p: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, betas: tuple[float, float], eps: float) -> None:
    beta1, beta2 = betas
    m += (1 - beta1) * (g - m)
    v *= beta2
    v += (1 - beta2) * np.square(g)
    d = np.sqrt(v)
    d /= (1 - beta2**t) ** 0.5
    d += eps
    np.divide(m, d, out=d)
    d *= lr / (1 - beta1**t)
    p -= d


def adamw(p: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, weight_decay: float, **rest: Any) -> None:
    p *= 1 - lr * weight_decay
    adam(p, g, m, v, t, lr=lr, **rest)


def adagrad(p: Array, g: Array, s: Array, t: int, *, lr: float, eps: float) -> None:
    s += np.square(g)
    d = np.sqrt(s)
    d += eps
    np.divide(g, d, out=d)
    d *= lr
    p -= d


def rmsprop(p: Array, g: Array, v: Array, t: int, *, lr: float, alpha: float, eps: float) -> None:
    v *= alpha
    v += (1 - alpha) * np.square(g)
    d = np.sqrt(v)
    d += eps
    np.divide(g, d, out=d)
    d *= lr
    p -= d


def lion(p: Array, g: Array, m: Array, t: int, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    beta1, beta2 = betas
    u = np.sign(beta1 * m + (1 - beta1) * g)
    p *= 1 - lr * weight_decay
    p -= lr * u
    m *= beta2
    m += (1 - beta2) * g


RULES = {f.__name__: f for f in (sgd, momentum, nesterov, adam, adamw, adagrad, rmsprop, lion)}


def contend(case: Case) -> Contender | None:
    update: Any = RULES.get(case.setting.name)
    if update is None:
        return None
    hyper = case.setting.hyper
    numbers = count(1)
    arrays = list(zip(case.params, case.grads, *case.states, strict=True))

    def step() -> None:
        t = next(numbers)
        for of_one in arrays:
            update(*of_one, t, **hyper)

    return Contender("numpy", step, params=lambda: case.params)
