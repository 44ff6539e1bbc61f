"""The one pass over the parameters of a call: the stages in order, each in a line or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan, sqrt
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastgd.onepass import Ask
from fastgd.reference.round import rounded
from fastgd.reference.sums import sum_of_squares
from fastgd.stats import total


class Job(NamedTuple):
    """What there is to do for one parameter."""

    rule: ModuleType
    row: tuple[Any, ...]
    param: Any
    grad: Any
    states: Sequence[Any]


def run(jobs: Mapping[int, Job], count: int, ask: Ask) -> Any:
    """Take the jobs, by the index of their parameter among `count`; return what the engine's ``step`` returns.

    In two parts, for a norm needs every gradient before anything is written.
    """
    with np.errstate(all="ignore"):
        nonfinite = 0
        grads = {}
        if ask.max_norm is not None or ask.skip_nonfinite or ask.stats:
            for i, job in jobs.items():
                nonfinite += int(np.count_nonzero(~np.isfinite(_widened(job.grad, job))))
                grads[i] = sum_of_squares(_unscaled(job, ask))

        skipped = ask.skip_nonfinite and nonfinite > 0
        if skipped:
            clip_factor = 1.0
            sums = {i: (0.0, nan) for i in jobs}
        else:
            clip_factor = _clip_factor(ask.max_norm, sqrt(total(grads.values())))
            sums = {i: _sweep(job, i, ask, clip_factor) for i, job in jobs.items()}

    if not (ask.stats or ask.skip_nonfinite):
        return True
    by_param: list[list[float]] = [[], [], []]
    if ask.stats:
        told = [(grads[i], *sums[i]) if i in jobs else (nan, nan, nan) for i in range(count)]
        by_param = [[row[kind] for row in told] for kind in range(3)]
    return (skipped, nonfinite, clip_factor, *by_param)


def _sweep(job: Job, index: int, ask: Ask, clip_factor: float) -> tuple[float, float]:
    """All that is done to one parameter; the sums of squares of its update and of itself, where asked for."""
    # load, unscale, clip
    flags, sign, coefficients = _read_row(job)
    p = _widened(job.param, job)
    g = _unscaled(job, ask)
    if ask.max_norm is not None:
        g = g * p.dtype.type(clip_factor)

    # the rule, round and store
    states = (_widened(state, job) for state in job.states)
    new = job.rule.update(flags, coefficients, p, sign * g, *states)
    for array, value in zip((job.param, *job.states), new, strict=True):
        array[...] = rounded(value, array.dtype)
    stored = _widened(job.param, job)

    if ask.ema is not None:
        ema = ask.ema[index]
        average = _widened(ema, job)
        average = average + p.dtype.type(ask.ema_weight) * (stored - average)
        ema[...] = rounded(average, ema.dtype)
    if ask.copies is not None:
        copy = ask.copies[index]
        copy[...] = rounded(stored, copy.dtype)
    if ask.zero_grads:
        job.grad[...] = 0
    if not ask.stats:
        return nan, nan
    return sum_of_squares(stored - p), sum_of_squares(stored)


def _read_row(job: Job) -> tuple[Any, Any, Any]:
    """The rule's flags, the sign and the coefficients, in the compute type."""
    variant, *numbers = job.row
    compute = _compute(job)
    flags = job.rule.Flags(*(bool(variant >> bit & 1) for bit in range(len(job.rule.Flags._fields))))
    sign, *coefficients = (compute(number) for number in numbers)
    return flags, sign, job.rule.Coefficients(*coefficients)


def _unscaled(job: Job, ask: Ask) -> Any:
    """The gradient, divided by the scale of the loss."""
    g = _widened(job.grad, job)
    return g if ask.grad_scale == 1 else g / g.dtype.type(ask.grad_scale)


def _widened(a: Any, job: Job) -> Any:
    """An array in the compute type, apart from its memory."""
    return a.astype(_compute(job))


def _compute(job: Job) -> Any:
    return np.float64 if job.param.dtype == np.float64 else np.float32


def _clip_factor(max_norm: float | None, norm: float) -> float:
    """As torch's clip_grad_norm_: NaN stays NaN."""
    if max_norm is None:
        return 1.0
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1 else factor
