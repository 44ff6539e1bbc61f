"""The one pass: what a call may ask for beside the step, checked once, as the engines take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple, TypedDict

from fastgd import devices
from fastgd.arrays import Arrays
from fastgd.coefficients import checked


class OnePass(TypedDict, total=False):
    """The keywords of the one pass, the same for every step and for ``opt.step``.

    Attributes
    ----------
    grad_scale : float, default 1.0
        The gradients are divided by it first, which undoes the scaling of a loss.
    max_norm : float, optional
        The global L2 norm to which the gradients of the call are clipped, after `grad_scale`, as
        ``torch.nn.utils.clip_grad_norm_`` does: by the factor ``min(1, max_norm / (norm + 1e-6))``.
    skip_nonfinite : bool, default False
        Where any gradient of the call holds NaN or inf, nothing changes: no parameter, state, step count, average,
        copy or gradient.
    ema : as `params`, optional
        Averages of the parameters, of any of the four dtypes, of which each takes the new parameter in:
        ``ema = ema + (1 - ema_decay) * (param - ema)``. Needs `ema_decay`.
    ema_decay : float, optional
        The share that the average keeps, in [0, 1].
    copies : as `params`, optional
        Takes the new parameters, rounded: float32, float16 or bfloat16, no wider than the parameter.
    zero_grads : bool, default False
        Afterwards the gradients are zero.
    stats : bool, default False
        The call returns a `StepStats`.
    stream : optional
        For arrays on a GPU: the stream that takes the step, CuPy's, torch's or a number; by default the one that is
        current for the arrays.
    """

    grad_scale: float
    max_norm: float | None
    skip_nonfinite: bool
    ema: Arrays | Sequence[Arrays] | None
    ema_decay: float | None
    copies: Arrays | Sequence[Arrays] | None
    zero_grads: bool
    stats: bool
    stream: Any


class Ask(NamedTuple):
    """The same as an engine takes it; the defaults ask for nothing.

    ``tracked`` and ``reduce`` are for `fastgd.torch`: with ``tracked``, tensors that are not stepped and their
    averages, an entry of ``ema`` may be None and a parameter without gradient is averaged, too; ``reduce`` takes the
    sums of squares by parameter and the count of what is not finite from a part of the model to those of the whole.
    """

    grad_scale: float = 1.0
    max_norm: float | None = None
    skip_nonfinite: bool = False
    ema: Any = None
    ema_weight: float = 0.0
    copies: Any = None
    zero_grads: bool = False
    stats: bool = False
    tracked: tuple[list[Any], list[Any]] | None = None
    reduce: Callable[[list[float], int], tuple[float, int]] | None = None
    stream: int | None = None


NOTHING = Ask()
NO_STREAM = "stream: expected none for arrays in the host's memory; only those on a GPU are stepped in streams"


def may_have_moved(result: Any) -> bool:
    """Whether what an engine returned leaves it possible that arrays have changed; no GPU is waited for."""
    return not isinstance(result, tuple) or not result[0]


def read(caller: str, one_pass: OnePass) -> Ask:
    """Check the keywords that `caller` was given, all but the arrays themselves."""
    for name in one_pass:
        if name not in OnePass.__annotations__:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    max_norm, ema, decay = (one_pass.get(name) for name in ("max_norm", "ema", "ema_decay"))
    if max_norm is not None:
        max_norm = checked("max_norm", max_norm, lambda x: x > 0.0, "a number > 0")
    if (ema is None) != (decay is None):
        given, missing = ("ema", "ema_decay") if decay is None else ("ema_decay", "ema")
        raise ValueError(f"{missing}: missing, and {given} needs it; pass both or neither")
    weight = 0.0
    if decay is not None:
        weight = 1.0 - checked("ema_decay", decay, lambda x: 0.0 <= x <= 1.0, "a number with 0 <= number <= 1")
    return Ask(
        checked("grad_scale", one_pass.get("grad_scale", 1.0), lambda x: 0.0 < x < inf, "a finite number > 0"),
        max_norm,
        bool(one_pass.get("skip_nonfinite", False)),
        ema,
        weight,
        one_pass.get("copies"),
        bool(one_pass.get("zero_grads", False)),
        bool(one_pass.get("stats", False)),
        stream=devices.handle(one_pass.get("stream")),
    )
