"""What is measured: a rule with its hyperparameters, on one array or on a model's list of arrays."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

import fastgd

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]

# What the rules are measured with where their defaults would be neutral, and further variants of a rule.
_HYPER: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 1e-3}),
    "momentum": ("sgd", {"lr": 1e-3, "momentum": 0.9}),
    "nesterov": ("sgd", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "adam": ("adam", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}),
    "adamw": ("adamw", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}),
    "adagrad": ("adagrad", {"lr": 1e-2, "eps": 1e-10}),
    "rmsprop": ("rmsprop", {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8}),
    "lion": ("lion", {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}),
}


@dataclass(frozen=True)
class Setting:
    """A rule as it is measured: ``nesterov`` is the rule ``sgd`` with its hyperparameters."""

    name: str
    rule: str
    hyper: Mapping[str, Any]
    states: tuple[str, ...]  # the names of the state arguments
    numbered: bool  # whether the step function asks for the number of the step


@cache
def settings() -> dict[str, Setting]:
    """Every rule of the registry, those above with hyperparameters of their own; a new rule needs no line here."""
    from fastgd._core import RULES

    wanted = _HYPER | {rule: (rule, {}) for rule in RULES if rule not in _HYPER}
    return {name: _setting(name, rule, hyper) for name, (rule, hyper) in wanted.items()}


def _setting(name: str, rule: str, hyper: Mapping[str, Any]) -> Setting:
    arguments = list(inspect.signature(getattr(fastgd, f"{rule}_step")).parameters.values())
    required = [a for a in arguments[2:] if a.default is a.empty]
    states = [a.name for a in required if a.kind is a.POSITIONAL_OR_KEYWORD and a.name != "lr"]
    if hyper.get("momentum"):
        states.append("momentum_buffers")
    return Setting(name, rule, hyper, tuple(states), any(a.name == "step" for a in required))


@cache
def workloads() -> dict[str, list[Shape]]:
    """The shapes of real models' parameters, by the model's name."""
    lists = json.loads((files("fastgd.cli") / "workloads.json").read_text())
    return {name: [tuple(shape) for shape in shapes] for name, shapes in lists.items()}


@dataclass
class Case:
    """A setting on arrays."""

    setting: Setting
    label: str
    single: bool  # one bare array, not a list
    params: list[Array]
    grads: list[Array]
    states: list[list[Array]]  # by state, then by parameter
    flat: list[Array]  # as many dense arrays of all the elements, for the memory's limit

    @property
    def elements(self) -> int:
        return sum(p.size for p in self.params)

    @property
    def bytes(self) -> int:
        """What a step must move: the gradients are read, parameters and states read and written."""
        read = sum(g.nbytes for g in self.grads)
        return read + 2 * sum(a.nbytes for arrays in (self.params, *self.states) for a in arrays)

    @property
    def slack(self) -> float:
        """By how much contenders may differ for reasons that are no rounding."""
        return 0.0

    def form(self, role: list[Any]) -> Any:
        """The arrays of a role as a step takes them."""
        return role[0] if self.single else role

    def written(self) -> list[Array]:
        """What contenders must agree on."""
        return self.params

    def reset(self) -> None:
        """Set all arrays to where every contender starts from."""
        for arrays, values in ((self.params, param_values()), (self.grads, grad_values())):
            for a in arrays:
                fill(a, values)
        for states in self.states:
            for a in states:
                a.fill(0)


class Memory:
    """The arrays of one shape or list of shapes, allocated once for all rules."""

    def __init__(self, label: str, shapes: Sequence[Shape], *, single: bool = False, roles: int = 4) -> None:
        self._label = label
        self._single = single
        self._roles = [[np.empty(shape, np.float32) for shape in shapes] for _ in range(roles)]
        if single:
            self._flat = [role[0] for role in self._roles]
        else:
            self._flat = [np.ones(sum(map(prod, shapes)), np.float32) for _ in range(roles)]

    def case(self, setting: Setting) -> Case:
        """The first arrays, as many as the rule needs."""
        params, grads, *states = self._roles[: 2 + len(setting.states)]
        return Case(setting, self._label, self._single, params, grads, states, self._flat[: 2 + len(states)])


@cache
def param_values() -> Array:
    """Of both signs, some near 0."""
    return np.random.default_rng(0).standard_normal(1 << 16, np.float32)


@cache
def grad_values() -> Array:
    """Of both signs and away from zero, where rules that place eps differently would differ."""
    rng = np.random.default_rng(1)
    grads = rng.choice([-1, 1], 1 << 16) * rng.uniform(0.01, 1, 1 << 16)
    return grads.astype(np.float32)


def fill(array: Array, values: Array) -> None:
    """The values, over and over; much quicker than new random numbers, and any array begins with the same."""
    flat = array.reshape(-1)
    whole = flat.size // values.size * values.size
    flat[:whole].reshape(-1, values.size)[:] = values
    flat[whole:] = values[: flat.size - whole]
