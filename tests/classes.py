"""The optimizer classes on either engine, and what they should do: the functions, a parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits
from cases import CASES, Case

import fastgd

FULLEST = {case.rule: case for case in CASES if not case.maximize}.values()  # all flags, all states
every_rule = pytest.mark.parametrize("case", FULLEST, ids=str)
every_engine = pytest.mark.parametrize("engine", [fastgd._core, fastgd.reference.engine], ids=["compiled", "twin"])

SHAPES = [(4, 3), (), (0,), (1500,), (2, 5)]
DTYPES = [np.float32, np.float64, np.float16, np.float32, ml_dtypes.bfloat16]


@dataclass(frozen=True)
class Tuned(Case):
    """A case with hyperparameters of its own."""

    more: dict[str, Any] = field(default_factory=dict)

    @property
    def hyper(self) -> dict[str, Any]:
        return super().hyper | self.more


def tuned(case: Case, **more: Any) -> Case:
    return Tuned(case.rule, case.flags, case.maximize, more)


def normal(seed: int, shapes: Sequence[Any] = SHAPES, dtypes: Sequence[Any] = DTYPES) -> list[Any]:
    """Arrays of ordinary values: one seed for parameters, one for the gradients of each step."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def optimizer(engine: Any, case: Case, params: Any, **more: Any) -> Any:
    """The case's class on an engine."""
    cls = getattr(fastgd, case.class_name)
    if engine is not fastgd.engine.active:
        cls = type(cls.__name__, (cls,), {"_engine": engine})
    return cls(params, **case.hyper | more)


def key_of(state: str) -> str:
    """torch's key for a step's argument: `state_sums` is `sum`."""
    return state.removeprefix("state_").removesuffix("s")


class Model:
    """Parameters that are stepped by the twin's function alone, each with its count, states and case."""

    def __init__(self, params: Sequence[Any], cases: Sequence[Case], state_dtype: Any = None) -> None:
        self.params = [p.copy() for p in params]
        self.cases = list(cases)
        self.steps = [0] * len(params)
        self.states: list[dict[str, Any]] = [{} for _ in params]
        self.state_dtype = state_dtype

    def step(self, grads: Sequence[Any]) -> None:
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self.steps[i] += 1
            case = self.cases[i]
            if callable(case.hyper["lr"]):
                case = tuned(case, **case.hyper | {"lr": float(case.hyper["lr"](self.steps[i]))})
            states = self.states[i]
            for name in case.states:
                states.setdefault(key_of(name), np.zeros(p.shape, self.state_dtype or p.dtype))
            case.step(fastgd.reference, p, g, [states[key_of(name)] for name in case.states], self.steps[i])

    def check(self, optimizer: Any) -> None:
        """The optimizer's parameters, states and counts are these."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, (p, expected) in enumerate(zip(params, self.params, strict=True)):
            assert_same_bits(p, expected, f"params[{i}]")
        assert list(optimizer.state) == [i for i, n in enumerate(self.steps) if n]
        for i, state in optimizer.state.items():
            assert (state["step"], state["step"].dtype) == (self.steps[i], np.int64)
            assert state.keys() == {"step", *self.states[i]}
            for key, expected in self.states[i].items():
                assert_same_bits(state[key], expected, f"state[{i}][{key!r}]")
