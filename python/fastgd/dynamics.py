"""Training dynamics in words: what losses and StepStats over a run say of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastgd.stats import StepStats

LOSS_GROWTH = 2.0  # from a run's first steps to its end
NORM_GROWTH = 10.0  # from the middle to the end: growth from small beginnings is healthy, growth that goes on is not
TINY_UPDATE = 1e-6  # of the parameters' norm
LEARNED = 0.5  # of the loss at first: who has lost as much has learned, or is done


def verdict(losses: Iterable[float], stats: Iterable[StepStats]) -> str:
    """Say whether the learning rate of a run was too large, far too small, or neither.

    Too large: the loss or a norm is no longer finite, or grows without bound. Far too small: updates are a millionth
    of the parameters or less, and the loss stands still.

    Parameters
    ----------
    losses : iterable of float
        The loss over the run, in order.
    stats : iterable of StepStats
        What each step returned, called with ``stats=True``.

    Returns
    -------
    str
        One sentence, and a second one if steps were skipped.
    """
    steps = list(stats)
    taken = [s for s in steps if not s.skipped]
    loss = _course([float(x) for x in losses])
    if loss is None or not steps:
        return "There is nothing to judge yet: no loss, or no step."
    sentence = _too_large(loss, steps, taken) or _by_size(loss, taken)
    if len(taken) < len(steps):
        sentence += f" Skipped, for gradients that were not finite: {len(steps) - len(taken)} of {len(steps)} steps."
    return sentence


class _Course(NamedTuple):
    """How a series goes: the largest of its first values, and the medians of a tenth in the middle and of the last."""

    start: float
    middle: float
    last: float


def _course(series: Sequence[float]) -> _Course | None:
    """The course of a series, with inf for what is not finite."""
    if not series:
        return None
    x: npt.NDArray[np.float64] = np.asarray(series, np.float64)
    x = np.where(np.isfinite(x), x, np.inf)
    n = max(1, x.size // 10)
    middle = (x.size - n) // 2
    return _Course(float(x[: min(n, 10)].max()), float(np.median(x[middle : middle + n])), float(np.median(x[-n:])))


def _too_large(loss: _Course, steps: Sequence[StepStats], taken: Sequence[StepStats]) -> str | None:
    norms = {
        "the gradients' norm": _course([_known(s.grad_norm) for s in steps]),
        "the updates' norm": _course([_known(s.update_norm) for s in taken]),
        "the parameters' norm": _course([_known(s.param_norm) for s in taken]),
    }
    courses = {"the loss": loss} | {name: course for name, course in norms.items() if course is not None}
    for name, course in courses.items():
        if not np.isfinite(course.last):
            return f"The learning rate is too large: {name} is no longer finite."
    if loss.last - loss.start > (LOSS_GROWTH - 1) * abs(loss.start):  # a loss may be negative
        return f"The learning rate is too large: the loss grew from {loss.start:.2g} to {loss.last:.2g}."
    for name, course in courses.items():
        if course.last > NORM_GROWTH * course.middle and course is not loss:
            return f"The learning rate is too large: {name} grows without bound, to {course.last:.2g} by now."
    return None


def _by_size(loss: _Course, taken: Sequence[StepStats]) -> str:
    norms = [(_known(s.update_norm), _known(s.param_norm)) for s in taken]
    ratios = [update / param for update, param in norms if param > 0]
    if not ratios:
        return "Nothing grows without bound."
    size = float(np.median(ratios))
    what = f"a step changes the parameters by {size:.1e} of their norm"
    if size <= TINY_UPDATE and loss.start - loss.last < LEARNED * abs(loss.start):
        return f"The learning rate is far too small: {what}, and the loss stands still."
    return f"The learning rate is neither too large nor far too small: {what}."


def _known(norm: float | None) -> float:
    if norm is None:
        raise ValueError("stats: expected what steps with stats=True return, got one without norms; pass stats=True")
    return norm
