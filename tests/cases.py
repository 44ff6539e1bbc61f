"""The one table of the tests, a line a rule: all that is tested for every rule is generated from it and the registry.

A line gives hyperparameters, nowhere neutral (no zero or one behind which a mistake could hide), what turns each flag
of the rule on, the step's arguments for its states, and the oracle that the mathematics is checked against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import fastgd

RULES = fastgd.engine.active.RULES


@dataclass(frozen=True)
class Case:
    """A variant of a rule: its flags, and whether it maximizes."""

    rule: str
    flags: tuple[str, ...]
    maximize: bool = False

    def __str__(self) -> str:
        return "-".join((self.rule, *self.flags, *["maximize"] * self.maximize))

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyperparameters by the names of the class and of torch's."""
        line = TABLE[self.rule]
        hyper = line.hyper | {"maximize": True} if self.maximize else dict(line.hyper)
        for flag in self.flags:
            hyper |= line.flags[flag]
        return hyper

    @property
    def states(self) -> list[str]:
        """The step's arguments for the states, in the rule's order."""
        return [name for name, flag in TABLE[self.rule].states.items() if flag is None or flag in self.flags]

    @property
    def class_name(self) -> str:
        return next(name for name in fastgd.__all__ if name.lower() == self.rule)

    def step(self, module: Any, params: Any, grads: Any, states: Sequence[Any], step: Any = 3) -> None:
        """One step of ``fastgd`` or ``fastgd.reference``."""
        hyper = {name: value for name, value in self.hyper.items() if name != "amsgrad"}  # seen by its state
        if TABLE[self.rule].counts:
            hyper["step"] = step
        getattr(module, f"{self.rule}_step")(params, grads, **dict(zip(self.states, states, strict=True)), **hyper)


def torch_plain(case: Case, p: Any, grads: Sequence[Any]) -> list[Any]:
    """Parameter and states after steps of torch.optim's class of the same name: its plain loop over single tensors."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(p, requires_grad=True)
    # foreach=False keeps torch from its fused and foreach paths alike.
    optimizer = getattr(torch.optim, case.class_name)([x], **case.hyper, foreach=False)
    for g in grads:
        x.grad = torch.tensor(g)
        optimizer.step()
    keys = [name.removeprefix("state_").removesuffix("s") for name in case.states]
    return [x.detach().numpy(), *(optimizer.state[x][key].numpy() for key in keys)]


def textbook_lion(case: Case, p: Any, grads: Sequence[Any]) -> list[Any]:
    """Algorithm 2 of arXiv 2302.06675, element by element."""
    lr, (beta1, beta2), decay = (case.hyper[name] for name in ("lr", "betas", "weight_decay"))
    new_p, new_m = np.empty_like(p), np.empty_like(p)
    for i in np.ndindex(p.shape):
        theta, m = float(p[i]), 0.0
        for g in grads:
            gradient = -float(g[i]) if case.maximize else float(g[i])
            c = beta1 * m + (1 - beta1) * gradient
            theta -= lr * ((c > 0) - (c < 0) + decay * theta)
            m = beta2 * m + (1 - beta2) * gradient
        new_p[i], new_m[i] = theta, m
    return [new_p, new_m]


@dataclass(frozen=True)
class Line:
    """What the tests must know of a rule."""

    hyper: dict[str, Any]
    states: dict[str, str | None]  # the flag that calls for it; None: always there
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)  # what turns it on, in the registry's order
    needs: dict[str, str] = field(default_factory=dict)  # flags that are only allowed with another
    counts: bool = True  # whether the step takes its number
    oracle: Callable[[Case, Any, Sequence[Any]], list[Any]] = torch_plain


_decay = {"weight_decay": 0.07}
_adam = {"lr": 0.017, "betas": (0.83, 0.957), "eps": 0.003}
_adam_states = {"exp_avgs": None, "exp_avg_sqs": None, "max_exp_avg_sqs": "amsgrad"}

TABLE = {
    "sgd": Line(
        {"lr": 0.017},
        {"momentum_buffers": "momentum"},
        flags={
            "decay": _decay,
            "momentum": {"momentum": 0.83, "dampening": 0.31},
            "nesterov": {"nesterov": True, "dampening": 0.0},
        },
        needs={"nesterov": "momentum"},
    ),
    "adam": Line(_adam, _adam_states, flags={"decay": _decay, "amsgrad": {"amsgrad": True}}),
    "adamw": Line(_adam | _decay, _adam_states, flags={"amsgrad": {"amsgrad": True}}),
    "adagrad": Line(
        {"lr": 0.017, "lr_decay": 0.023, "eps": 0.003},
        {"state_sums": None},
        flags={"decay": _decay},
    ),
    "rmsprop": Line(
        {"lr": 0.017, "alpha": 0.93, "eps": 0.003},
        {"square_avgs": None, "grad_avgs": "centered", "momentum_buffers": "momentum"},
        flags={"decay": _decay, "centered": {"centered": True}, "momentum": {"momentum": 0.83}},
        counts=False,
    ),
    "lion": Line(
        {"lr": 0.017, "betas": (0.83, 0.957)} | _decay,
        {"exp_avgs": None},
        counts=False,
        oracle=textbook_lion,
    ),
}


def _variants(rule: str) -> list[Case]:
    """Every combination of the rule's flags that its arguments can name, and the fullest of them maximizing."""
    names, needs = RULES[rule]["flags"], TABLE[rule].needs
    chosen = (tuple(itertools.compress(names, mask)) for mask in itertools.product((0, 1), repeat=len(names)))
    flags = [c for c in chosen if all(needs.get(flag, flag) in c for flag in c)]
    return [*(Case(rule, f) for f in flags), Case(rule, flags[-1], maximize=True)]


CASES = [case for rule in RULES if rule in TABLE for case in _variants(rule)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
