"""numba: the fused loop that one writes by hand, on all threads where the array is large enough for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import numba
import numpy as np
from numba import prange

import fastgd
from fastgd.cli.bench.case import Case
from fastgd.cli.bench.measure import Contender

# Below so many elements starting the threads takes longer than the loop.
_PARALLEL = 1 << 15


def sgd(p: Any, g: Any, lr: Any) -> None:
    for i in prange(p.size):
        p[i] -= lr * g[i]


def momentum(p: Any, g: Any, b: Any, lr: Any, mu: Any) -> None:
    for i in prange(p.size):
        b[i] = mu * b[i] + g[i]
        p[i] -= lr * b[i]


def nesterov(p: Any, g: Any, b: Any, lr: Any, mu: Any) -> None:
    for i in prange(p.size):
        b[i] = mu * b[i] + g[i]
        p[i] -= lr * (g[i] + mu * b[i])


def adamw(
    p: Any, g: Any, m: Any, v: Any, shrink: Any, w1: Any, beta2: Any, w2: Any, step_size: Any, inv_bias2: Any, eps: Any
) -> None:
    for i in prange(p.size):
        m[i] += w1 * (g[i] - m[i])
        v[i] = beta2 * v[i] + w2 * (g[i] * g[i])
        p[i] = shrink * p[i] - step_size * (m[i] / (np.sqrt(v[i]) * inv_bias2 + eps))


def adagrad(p: Any, g: Any, s: Any, lr: Any, eps: Any) -> None:
    for i in prange(p.size):
        s[i] += g[i] * g[i]
        p[i] -= lr * (g[i] / (np.sqrt(s[i]) + eps))


def rmsprop(p: Any, g: Any, v: Any, lr: Any, alpha: Any, w: Any, eps: Any) -> None:
    for i in prange(p.size):
        v[i] = alpha * v[i] + w * (g[i] * g[i])
        p[i] -= lr * (g[i] / (np.sqrt(v[i]) + eps))


def lion(p: Any, g: Any, m: Any, shrink: Any, lr: Any, beta1: Any, w1: Any, beta2: Any, w2: Any) -> None:
    for i in prange(p.size):
        p[i] = shrink * p[i] - lr * np.sign(beta1 * m[i] + w1 * g[i])
        m[i] = beta2 * m[i] + w2 * g[i]


def _adam_numbers(t: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0) -> list[float]:
    beta1, beta2 = betas
    shrink, step_size, inv_bias2 = 1 - lr * weight_decay, lr / (1 - beta1**t), (1 - beta2**t) ** -0.5
    return [shrink, 1 - beta1, beta2, 1 - beta2, step_size, inv_bias2, eps]


def _lion_numbers(t: int, lr: float, betas: tuple[float, float], weight_decay: float) -> list[float]:
    beta1, beta2 = betas
    return [1 - lr * weight_decay, lr, beta1, 1 - beta1, beta2, 1 - beta2]


# The loop, and its numbers at step t from the hyperparameters.
RULES: dict[str, tuple[Callable[..., None], Callable[..., list[float]]]] = {
    "sgd": (sgd, lambda t, lr: [lr]),
    "momentum": (momentum, lambda t, lr, momentum: [lr, momentum]),
    "nesterov": (nesterov, lambda t, lr, momentum, nesterov: [lr, momentum]),
    "adam": (adamw, _adam_numbers),
    "adamw": (adamw, _adam_numbers),
    "adagrad": (adagrad, lambda t, lr, eps: [lr, eps]),
    "rmsprop": (rmsprop, lambda t, lr, alpha, eps: [lr, alpha, 1 - alpha, eps]),
    "lion": (lion, _lion_numbers),
}


@cache
def _compiled(loop: Callable[..., None], parallel: bool) -> Any:
    # Without error_model a division checks for zero and nothing is vectorised; fastmath would be another result.
    return numba.njit(loop, parallel=parallel, error_model="numpy", fastmath=False)


def contend(case: Case) -> Contender | None:
    if case.setting.name not in RULES:
        return None
    numba.set_num_threads(min(fastgd.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    loop, numbers_at = RULES[case.setting.name]
    hyper = case.setting.hyper
    steps = count(1)
    # One kernel call an array; the arrays are flat, for a kernel of one dimension.
    calls = [
        (_compiled(loop, p.size >= _PARALLEL), [a.reshape(-1) for a in (p, *rest)])
        for p, *rest in zip(case.params, case.grads, *case.states, strict=True)
    ]

    def step() -> None:
        numbers = [np.float32(x) for x in numbers_at(next(steps), **hyper)]  # float64 would widen the arithmetic
        for kernel, arrays in calls:
            kernel(*arrays, *numbers)

    return Contender("numba", step, params=lambda: case.params)
