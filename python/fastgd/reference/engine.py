"""The twin of the compiled module: the same contract, in NumPy alone, for reading and for checking against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from fastgd.onepass import Ask
from fastgd.reference import adagrad, adam, adamw, lion, rmsprop, sgd
from fastgd.reference.onepass import Job, run

_rules: dict[str, ModuleType] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "lion": lion,
}

RULES: dict[str, dict[str, Any]] = {
    name: {"flags": rule.Flags._fields, "coefficients": len(rule.Coefficients._fields)} for name, rule in _rules.items()
}


def step(
    rule: str,
    rows: Sequence[tuple[Any, ...]],
    row_of: Sequence[int] | None,
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    checked: bool,
    one_pass: tuple[Any, ...] | None = None,
) -> Any:
    """One step over arrays that ``fastgd.arrays`` has checked and flattened; unchecked arrays are sent there."""
    if not checked:
        return False
    jobs = {
        i: Job(_rules[rule], rows[0 if row_of is None else row_of[i]], p, g, [state[i] for state in states])
        for i, (p, g) in enumerate(zip(params, grads, strict=True))
        if g is not None
    }
    return run(jobs, params, Ask(*one_pass or ()))


class Prepared:
    """The parameters of an optimizer with their step counts. Unlike the compiled one it asks for states each time."""

    def __init__(self, rule: str, steady: bool = False, capturable: bool = False) -> None:
        self._rule = rule
        self._params: list[Any] = []
        self._groups: list[int] = []
        self._steps: list[int] = []

    def add(self, group: int, params: Sequence[Any]) -> None:
        self._params += params
        self._groups += [group] * len(params)
        self._steps += [0] * len(params)

    def step(
        self,
        grads: Any,
        coefficients: Callable[[int, int], tuple[Any, ...]],
        initialise: Callable[[int, int], tuple[Any, ...]],
        checked: bool,
        one_pass: tuple[Any, ...] | None = None,
    ) -> Any:
        if not checked:
            return False
        stepping = [i for i, g in enumerate(grads) if g is not None]
        keys = {i: (self._groups[i], self._steps[i] + 1) for i in stepping}
        rows = {key: coefficients(*key) for key in dict.fromkeys(keys.values())}
        jobs = {}
        for i in stepping:
            row = rows[keys[i]]
            jobs[i] = Job(_rules[self._rule], row, self._params[i], grads[i], initialise(i, row[0]))
        result = run(jobs, self._params, Ask(*one_pass or ()))
        if result is True or not result[0]:  # not skipped
            for i in stepping:
                self._steps[i] += 1
        return result

    @property
    def steps(self) -> list[int]:
        return list(self._steps)

    def load(self, steps: Sequence[int]) -> None:
        self._steps = list(steps)


def isa() -> str:
    return "reference"


def available_isas() -> list[str]:
    return ["reference"]


def get_num_threads() -> int:
    return 1


def set_num_threads(n: int) -> None:
    """Nothing to set: NumPy's loops run on the calling thread."""
