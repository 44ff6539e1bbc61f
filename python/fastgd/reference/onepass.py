"""The one pass over the parameters of a call: the stages in order, each in a line or two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def run(jobs: Mapping[int, Job], params: Sequence[Any], ask: Ask) -> Any:
    """Take the jobs, by the index of their parameter in `params`; return what the engine's ``step`` returns.

    In two parts, for a norm needs every gradient before anything is written.
    """
    with np.errstate(all="ignore"):
        nonfinite = 0
        grads = {}
        reads_first = ask.max_norm is not None or ask.skip_nonfinite
        if reads_first or ask.stats:
            for i, job in jobs.items():
                nonfinite += int(np.count_nonzero(~np.isfinite(_widened(job.grad, job.param))))
                grads[i] = sum_of_squares(_unscaled(job, ask))
        square = total(grads.values())
        if ask.reduce is not None and reads_first:
            square, nonfinite = ask.reduce([grads.get(i, 0.0) for i in range(len(params))], nonfinite)

        skipped = ask.skip_nonfinite and nonfinite > 0
        if skipped:
            clip_factor = 1.0
            sums = {i: (0.0, nan) for i in jobs}
        else:
            clip_factor = _clip_factor(ask.max_norm, sqrt(square))
            sums = {i: _sweep(job, i, ask, clip_factor) for i, job in jobs.items()}
            for tensor, average in _tracked(jobs, params, ask):
                _blend(average, tensor, ask.ema_weight)

    if not (ask.stats or ask.skip_nonfinite):
        return True
    by_param: list[list[float]] = [[], [], []]
    if ask.stats:
        told = [(grads[i], *sums[i]) if i in jobs else (nan, nan, nan) for i in range(len(params))]
        by_param = [[row[kind] for row in told] for kind in range(3)]
    return (skipped, nonfinite, clip_factor, *by_param)


def _sweep(job: Job, index: int, ask: Ask, clip_factor: float) -> tuple[float, float]:
    """All that is done to one parameter; the sums of squares of its update and of itself, where asked for."""
    # load, unscale, clip
    flags, sign, coefficients = _read_row(job)
    p = _widened(job.param, job.param)
    g = _unscaled(job, ask)
    if ask.max_norm is not None:
        g = g * p.dtype.type(clip_factor)

    # the rule, round and store
    states = (_widened(state, job.param) for state in job.states)
    new = job.rule.update(flags, coefficients, p, sign * g, *states)
    for array, value in zip((job.param, *job.states), new, strict=True):
        array[...] = rounded(value, array.dtype)
    stored = _widened(job.param, job.param)

    if ask.ema is not None and ask.ema[index] is not None:
        _blend(ask.ema[index], job.param, ask.ema_weight)
    if ask.copies is not None:
        copy = ask.copies[index]
        copy[...] = rounded(stored, copy.dtype)
    if ask.zero_grads:
        job.grad[...] = 0
    if not ask.stats:
        return nan, nan
    return sum_of_squares(stored - p), sum_of_squares(stored)


def _tracked(jobs: Mapping[int, Job], params: Sequence[Any], ask: Ask) -> Iterator[tuple[Any, Any]]:
    """Tensors that have an average and are not stepped: parameters without a gradient, and others."""
    if ask.tracked is not None:
        if ask.ema is not None:
            pairs = zip(params, ask.ema, strict=True)
            yield from (pair for i, pair in enumerate(pairs) if i not in jobs and pair[1] is not None)
        yield from zip(*ask.tracked, strict=True)


def _blend(average: Any, tensor: Any, weight: float) -> None:
    """Take a tensor into its average, in the tensor's compute type."""
    e, x = _widened(average, tensor), _widened(tensor, tensor)
    average[...] = rounded(e + x.dtype.type(weight) * (x - e), average.dtype)


def _read_row(job: Job) -> tuple[Any, Any, Any]:
    """The rule's flags, the sign and the coefficients, in the compute type."""
    variant, *numbers = job.row
    compute = _compute(job.param)
    flags = job.rule.Flags(*(bool(variant >> bit & 1) for bit in range(len(job.rule.Flags._fields))))
    sign, *coefficients = (compute(number) for number in numbers)
    return flags, sign, job.rule.Coefficients(*coefficients)


def _unscaled(job: Job, ask: Ask) -> Any:
    """The gradient, divided by the scale of the loss."""
    g = _widened(job.grad, job.param)
    return g if ask.grad_scale == 1 else g / g.dtype.type(ask.grad_scale)


def _widened(a: Any, param: Any) -> Any:
    """An array in the compute type of its parameter, apart from its memory."""
    return a.astype(_compute(param))


def _compute(param: Any) -> Any:
    return np.float64 if param.dtype == np.float64 else np.float32


def _clip_factor(max_norm: float | None, norm: float) -> float:
    """As torch's clip_grad_norm_: NaN stays NaN."""
    if max_norm is None:
        return 1.0
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1 else factor
