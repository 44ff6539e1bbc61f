"""optax: the update under ``jax.jit``, parameters and state donated, on JAX's own arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from fastgd.cli.bench.case import Case
from fastgd.cli.bench.measure import Contender

jax.config.update("jax_platforms", "cpu")

# The optimizer from our hyperparameters.
RULES: dict[str, Callable[..., Any]] = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr, momentum: optax.sgd(lr, momentum),
    "nesterov": lambda lr, momentum, nesterov: optax.sgd(lr, momentum, nesterov),
    "adam": lambda lr, betas, eps: optax.adam(lr, *betas, eps),
    "adamw": lambda lr, betas, eps, weight_decay: optax.adamw(lr, *betas, eps, weight_decay=weight_decay),
    "adagrad": lambda lr, eps: optax.adagrad(lr, 0.0, eps),
    "rmsprop": lambda lr, alpha, eps: optax.rmsprop(lr, alpha, eps, eps_in_sqrt=False),
    "lion": lambda lr, betas, weight_decay: optax.lion(lr, *betas, weight_decay=weight_decay),
}


def contend(case: Case) -> Contender | None:
    if case.setting.name not in RULES:
        return None
    optimizer = RULES[case.setting.name](**case.setting.hyper)
    params = [jax.numpy.array(p, copy=True) for p in case.params]
    grads = [jax.numpy.array(g, copy=True) for g in case.grads]
    state = optimizer.init(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(jitted(params, state, grads))

    return Contender("optax", step, params=lambda: [np.asarray(p) for p in params])
