"""How it is measured: contenders in interleaved rounds, after a check that they compute the same thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from timeit import Timer
from typing import Any

import numpy as np

from fastgd.cli.bench.case import Array

OURS, LIMIT = "fastgd", "limit"

# A timing shorter than this repeats the step until it lasts as long.
_TIMING = 4e-3
# Threads of one library keep spinning for a while after their step, and must not spin into the next one's timing.
_SETTLE = 2e-3
# Steps longer than this need neither a pause nor a step to warm the caches.
_LONG = 20e-3
# Float32 rounds a parameter near 4 by 2.4e-7 a step, and a step (at most 1e-2) by parts in 1e5, for some peers take
# 1 - beta**step in float32. What is neglected entirely, weight decay the smallest of it, is off by 1e-5 or more.
_TOLERANCE = 2e-6
_STEPS = 2


@dataclass
class Contender:
    """Something that takes the step of a case, again and again."""

    name: str
    step: Callable[[], object] | str  # a statement where the call of a function would count
    names: dict[str, Any] = field(default_factory=dict)  # the statement's variables
    params: Callable[[], Sequence[Array]] | None = None  # what it has stepped; None: nothing to check
    restore: Callable[[], None] | None = None  # for who spoils its gradients: brings them back, in the check only
    prepare: Callable[[], None] | None = None  # called before every step and outside its timing, which is of one step

    def __post_init__(self) -> None:
        setup = ", ".join(self.names)  # as local variables: a statement such as w -= g makes them so
        self._timer = Timer(self.step, f"{setup} = names.values()" if setup else "pass", globals={"names": self.names})

    def seconds(self, steps: int) -> float:
        """The seconds that so many steps take."""
        return self._timer.timeit(steps)


@dataclass
class Result:
    """The seconds of one step, of every contender in every round."""

    label: str
    elements: int
    arrays: int
    bytes: int  # that a step must move; 0 where the call is in question and not the memory
    times: Mapping[str, Sequence[float]]

    def seconds(self, name: str = OURS) -> float:
        return median(self.times[name])

    def ratio(self, name: str) -> float:
        """A contender's time over ours: the median over the rounds of the ratio in a round."""
        return median(theirs / ours for theirs, ours in zip(self.times[name], self.times[OURS], strict=True))

    def rate(self, name: str = OURS) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds(name)

    def peers(self) -> dict[str, float]:
        """The ratio of everyone who is neither ours nor the limit."""
        return {name: self.ratio(name) for name in self.times if name != LIMIT and not name.startswith(OURS)}


def steps_taken(contender: Contender) -> list[Array]:
    """Take some steps and return a sample of the parameters."""
    for _ in range(_STEPS):
        for before in (contender.restore, contender.prepare):
            if before is not None:
                before()
        contender.seconds(1)
    assert contender.params is not None
    return [sample(p) for p in contender.params()]


def difference(ours: Sequence[Array], theirs: Sequence[Array], slack: float = 0.0) -> float | None:
    """The largest difference between two samples; None where they agree, with so much slack beside rounding."""
    pairs = zip(ours, theirs, strict=True)
    worst = float(np.max([np.max(np.abs(a - b) / (1 + np.abs(a)), initial=0) for a, b in pairs]))
    return None if worst <= _TOLERANCE + slack else worst


def sample(array: Array) -> Array:
    """Some thousand elements, the last ones among them."""
    flat = np.asarray(array).reshape(-1)
    return np.concatenate([flat[:: max(1, flat.size // 4096)], flat[-64:]])


def compete(contenders: Sequence[Contender], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time every contender once a round, in an order that rotates and turns round.

    Parameters
    ----------
    contenders : sequence of Contender
        They have run before, so that nothing is compiled and no page touched for the first time here.
    rounds : int
        How many rounds at most.
    seconds : float
        After so many seconds, and three rounds, no further round begins.

    Returns
    -------
    dict
        The seconds of one step, by contender and round.
    """
    short = [c.seconds(1) <= _LONG for c in contenders]
    repeats = [_repeats(c) if s and c.prepare is None else 1 for c, s in zip(contenders, short, strict=True)]
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > end:
            break
        order = [(i + k) % len(contenders) for k in range(len(contenders))]
        for k in order if i % 2 == 0 else reversed(order):
            contender = contenders[k]
            if short[k]:
                time.sleep(_SETTLE)
                contender.seconds(1)
            if contender.prepare is not None:
                contender.prepare()
            times[contender.name].append(contender.seconds(repeats[k]) / repeats[k])
    return times


def _repeats(contender: Contender) -> int:
    """How many short steps make one timing."""
    steps = 1
    while True:
        spent = contender.seconds(steps)
        if spent > _TIMING / 4:
            return max(2, round(_TIMING / spent * steps))
        steps *= 4
