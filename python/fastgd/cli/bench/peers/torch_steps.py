"""torch: its functional steps on the same memory, fused, foreach and compiled; without the overhead of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

import fastgd
from fastgd.cli.bench.case import Case
from fastgd.cli.bench.measure import Contender

Step = Callable[[], object]


def _sgd(form: dict[str, bool], params: Any, grads: Any, states: Any, hyper: dict[str, Any]) -> Step:
    hyper = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "dampening": 0.0, "maximize": False} | hyper
    return partial(sgd, params, grads, *(states or [[None] * len(params)]), **form, **hyper)


def _adam(decoupled: bool, form: dict[str, bool], params: Any, grads: Any, states: Any, hyper: dict[str, Any]) -> Step:
    beta1, beta2 = hyper.pop("betas")
    hyper = {"weight_decay": 0.0, "amsgrad": False, "maximize": False, "beta1": beta1, "beta2": beta2} | hyper
    hyper["decoupled_weight_decay"] = decoupled
    return partial(adam, params, grads, *states, [], _numbers(params), **form, **hyper)


def _adagrad(form: dict[str, bool], params: Any, grads: Any, states: Any, hyper: dict[str, Any]) -> Step:
    hyper = {"lr_decay": 0.0, "weight_decay": 0.0, "maximize": False} | hyper
    return partial(adagrad, params, grads, *states, _numbers(params), **form, **hyper)


def _rmsprop(form: dict[str, bool], params: Any, grads: Any, states: Any, hyper: dict[str, Any]) -> Step:
    hyper = {"momentum": 0.0, "centered": False, "weight_decay": 0.0} | hyper
    return partial(rmsprop, params, grads, *states, [], [], _numbers(params), **form, **hyper)


def _lion(form: dict[str, bool], params: Any, grads: Any, states: Any, hyper: dict[str, Any]) -> Step:
    """torch has no Lion: this is the one that a user of its foreach operations writes."""
    (exp_avgs,) = states
    lr, (beta1, beta2), weight_decay = hyper["lr"], hyper["betas"], hyper["weight_decay"]

    def step() -> None:
        updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)

    return step


def _numbers(params: Any) -> Any:
    """Return torch's counters of the steps, one tensor a parameter."""
    return [torch.tensor(0.0) for _ in params]


RULES: dict[str, Callable[..., Step]] = {
    "sgd": _sgd,
    "momentum": _sgd,
    "nesterov": _sgd,
    "adam": partial(_adam, False),
    "adamw": partial(_adam, True),
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "lion": _lion,
}


UNFUSED = ("rmsprop", "lion")


def fused(case: Case) -> Contender | None:
    return None if case.setting.name in UNFUSED else _contender("torch fused", case, fused=True)


def foreach(case: Case) -> Contender | None:
    if not case.setting.hyper.get("nesterov"):
        return _contender("torch foreach", case, foreach=True)
    # This one adds the momentum to the gradients in place, so it gets arrays of its own.
    params, grads, *states = ([a.copy() for a in role] for role in (case.params, case.grads, *case.states))
    contender = _contender("torch foreach", replace(case, params=params, grads=grads, states=states), foreach=True)

    def restore() -> None:
        for own, original in zip(grads, case.grads, strict=True):
            own[:] = original

    if contender is not None:
        contender.restore = restore
    return contender


def compiled(case: Case) -> Contender | None:
    """Compiled from the plain loop over the parameters: inductor takes foreach apart, and cannot take all of them."""
    contender = _contender("torch.compile", case, foreach=False)
    if contender is None:
        return None
    torch.compiler.reset()  # else the eighth case runs into the limit of recompilations and is not compiled
    step: Any = contender.step
    return Contender(
        contender.name, torch.compile(lambda: step(), dynamic=False, fullgraph=True), params=contender.params
    )


def _contender(name: str, case: Case, **form: bool) -> Contender | None:
    if case.setting.name not in RULES:
        return None
    torch.set_num_threads(fastgd.get_num_threads())
    params, grads, *states = ([torch.from_numpy(a) for a in role] for role in (case.params, case.grads, *case.states))
    step = RULES[case.setting.name](form, params, grads, states, dict(case.setting.hyper))
    return Contender(name, step, params=lambda: case.params)
