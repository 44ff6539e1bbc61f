"""The steps as functions: each computes its coefficients and makes one call into an engine."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastgd import arrays, coefficients, devices, onepass, tensors
from fastgd.arrays import Arrays, Gradients
from fastgd.onepass import OnePass
from fastgd.stats import StepStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

Step: TypeAlias = int | Sequence[int] | Mapping[Any, int] | npt.NDArray[Any]


class Steps:
    """Every step over one engine: the compiled module or the twin.

    Parameters
    ----------
    engine : module
        ``fastgd._core`` or ``fastgd.reference.engine``.

    Notes
    -----
    A small step is mostly overhead, so each method asks the engine at once. Only where that says no does it come
    back to check the arrays, and raise or go on with plain lists.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def sgd_step(
        self,
        params: Arrays,
        grads: Gradients,
        lr: float,
        *,
        momentum_buffers: Arrays | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        step: Step | None = None,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of gradient descent, with plain or Nesterov momentum, in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        lr : float
            Learning rate, >= 0.
        momentum_buffers : as `params`, optional
            Needed with `momentum`, untouched without it; zeros before the first step. Updated in place.
        momentum : float
            Momentum factor, >= 0.
        dampening : float
            The share of the gradient kept out of the buffer, from the second step on.
        weight_decay : float
            L2 penalty, >= 0.
        nesterov : bool
            Nesterov momentum; needs `momentum` and no `dampening`.
        maximize : bool
            Step up the gradient instead of down.
        step : int, or one per parameter, optional
            The 1-based number of this step. It matters with `dampening` only; None means "not the first".
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning",
        ICML 2013, in the form of ``torch.optim.SGD``::

            g = g + weight_decay * p
            b = momentum * b + (1 - dampening) * g       # the first step: b = momentum * b + g
            p = p - lr * (g + momentum * b  if nesterov else b)

        Examples
        --------
        >>> import fastgd, numpy as np
        >>> w = np.array([5.0])
        >>> fastgd.sgd_step(w, 2 * (w - 2), lr=0.1)
        >>> w
        array([4.4])
        """
        if step is None or (type(step) is int and 0 < step < _STEPS):
            row_of = None
            rows = [coefficients.sgd(step, lr, momentum, dampening, weight_decay, nesterov, maximize)]
        else:
            numbers, row_of = _numbers(step, params)
            rows = [coefficients.sgd(n, lr, momentum, dampening, weight_decay, nesterov, maximize) for n in numbers]
        states: tuple[Any, ...] = ()
        if rows[0][0] & 2:
            if momentum_buffers is None:
                raise _missing("momentum_buffers", "momentum")
            states = (momentum_buffers,)
        if one_pass:
            return self._one_pass("sgd", rows, row_of, params, grads, states, ("momentum_buffers",), one_pass)
        if not self._engine.step("sgd", rows, row_of, params, grads, states, False):
            self._check_and_step("sgd", rows, row_of, params, grads, states, ("momentum_buffers",))
        return None

    def adam_step(
        self,
        params: Arrays,
        grads: Gradients,
        exp_avgs: Arrays,
        exp_avg_sqs: Arrays,
        *,
        step: Step,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_exp_avg_sqs: Arrays | None = None,
        maximize: bool = False,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of Adam, or with `max_exp_avg_sqs` of AMSGrad, in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        exp_avgs, exp_avg_sqs : as `params`
            Averages of the gradient and of its square; zeros before the first step. Updated in place.
        step : int, or one per parameter
            The 1-based number of this step.
        lr : float
            Learning rate, >= 0.
        betas : (float, float)
            Decay rates of the two averages, each in [0, 1).
        eps : float
            Added to the denominator, >= 0.
        weight_decay : float
            L2 penalty, >= 0.
        max_exp_avg_sqs : as `params`, optional
            Largest average of squares so far: passing it makes this AMSGrad. Updated in place.
        maximize : bool
            Step up the gradient instead of down.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Kingma and Ba, "Adam: a method for stochastic optimization", arXiv 1412.6980, algorithm 1; Reddi, Kale and
        Kumar, "On the convergence of Adam and beyond", arXiv 1904.09237; in the form of ``torch.optim.Adam``::

            g = g + weight_decay * p
            m = m + (1 - beta1) * (g - m)
            v = beta2 * v + (1 - beta2) * g * g
            d = v, or x = max(x, v) with AMSGrad
            p = p - lr / (1 - beta1**step) * m / (sqrt(d) / sqrt(1 - beta2**step) + eps)
        """
        amsgrad = max_exp_avg_sqs is not None
        if type(step) is int and 0 < step < _STEPS:
            row_of = None
            rows = [coefficients.adam(step, lr, betas, eps, weight_decay, amsgrad, maximize)]
        else:
            numbers, row_of = _numbers(step, params)
            rows = [coefficients.adam(n, lr, betas, eps, weight_decay, amsgrad, maximize) for n in numbers]
        states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
        if one_pass:
            return self._one_pass("adam", rows, row_of, params, grads, states, _ADAM_STATES, one_pass)
        if not self._engine.step("adam", rows, row_of, params, grads, states, False):
            self._check_and_step("adam", rows, row_of, params, grads, states, _ADAM_STATES)
        return None

    def adamw_step(
        self,
        params: Arrays,
        grads: Gradients,
        exp_avgs: Arrays,
        exp_avg_sqs: Arrays,
        *,
        step: Step,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_exp_avg_sqs: Arrays | None = None,
        maximize: bool = False,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of AdamW, or with `max_exp_avg_sqs` of its AMSGrad variant, in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        exp_avgs, exp_avg_sqs : as `params`
            Averages of the gradient and of its square; zeros before the first step. Updated in place.
        step : int, or one per parameter
            The 1-based number of this step.
        lr : float
            Learning rate, >= 0.
        betas : (float, float)
            Decay rates of the two averages, each in [0, 1).
        eps : float
            Added to the denominator, >= 0.
        weight_decay : float
            Decoupled decay, >= 0: each step shrinks the parameters by ``lr * weight_decay``.
        max_exp_avg_sqs : as `params`, optional
            Largest average of squares so far: passing it makes this AMSGrad. Updated in place.
        maximize : bool
            Step up the gradient instead of down.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101, algorithm 2, in the form of
        ``torch.optim.AdamW``: ``p = p * (1 - lr * weight_decay)``, then as `adam_step` without decay.
        """
        amsgrad = max_exp_avg_sqs is not None
        if type(step) is int and 0 < step < _STEPS:
            row_of = None
            rows = [coefficients.adamw(step, lr, betas, eps, weight_decay, amsgrad, maximize)]
        else:
            numbers, row_of = _numbers(step, params)
            rows = [coefficients.adamw(n, lr, betas, eps, weight_decay, amsgrad, maximize) for n in numbers]
        states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
        if one_pass:
            return self._one_pass("adamw", rows, row_of, params, grads, states, _ADAM_STATES, one_pass)
        if not self._engine.step("adamw", rows, row_of, params, grads, states, False):
            self._check_and_step("adamw", rows, row_of, params, grads, states, _ADAM_STATES)
        return None

    def adagrad_step(
        self,
        params: Arrays,
        grads: Gradients,
        state_sums: Arrays,
        *,
        step: Step,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
        maximize: bool = False,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of Adagrad in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        state_sums : as `params`
            Sums of the squared gradients; zeros, or a value >= 0, before the first step. Updated in place.
        step : int, or one per parameter
            The 1-based number of this step.
        lr : float
            Learning rate, >= 0.
        lr_decay : float
            Decay of the learning rate with the steps, >= 0.
        weight_decay : float
            L2 penalty, >= 0.
        eps : float
            Added to the denominator, >= 0.
        maximize : bool
            Step up the gradient instead of down.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR
        12 (2011), in the form of ``torch.optim.Adagrad``::

            g = g + weight_decay * p
            s = s + g * g
            p = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(s) + eps)
        """
        if type(step) is int and 0 < step < _STEPS:
            row_of = None
            rows = [coefficients.adagrad(step, lr, lr_decay, weight_decay, eps, maximize)]
        else:
            numbers, row_of = _numbers(step, params)
            rows = [coefficients.adagrad(n, lr, lr_decay, weight_decay, eps, maximize) for n in numbers]
        if one_pass:
            return self._one_pass("adagrad", rows, row_of, params, grads, (state_sums,), ("state_sums",), one_pass)
        if not self._engine.step("adagrad", rows, row_of, params, grads, (state_sums,), False):
            self._check_and_step("adagrad", rows, row_of, params, grads, (state_sums,), ("state_sums",))
        return None

    def rmsprop_step(
        self,
        params: Arrays,
        grads: Gradients,
        square_avgs: Arrays,
        *,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        momentum_buffers: Arrays | None = None,
        centered: bool = False,
        grad_avgs: Arrays | None = None,
        maximize: bool = False,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of RMSprop, plain or centred, with or without momentum, in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        square_avgs : as `params`
            Averages of the squared gradient; zeros before the first step. Updated in place.
        lr : float
            Learning rate, >= 0.
        alpha : float
            Decay rate of the averages, >= 0.
        eps : float
            Added to the denominator, >= 0.
        weight_decay : float
            L2 penalty, >= 0.
        momentum : float
            Momentum factor, >= 0.
        momentum_buffers : as `params`, optional
            Needed with `momentum`, untouched without it; zeros before the first step. Updated in place.
        centered : bool
            Divide by the gradient's deviation instead of its mean square.
        grad_avgs : as `params`, optional
            Averages of the gradient, needed with `centered`, untouched without it; zeros before the first step.
            Updated in place.
        maximize : bool
            Step up the gradient instead of down.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Hinton, "Neural networks for machine learning", lecture 6e (2012); centred: Graves, "Generating sequences with
        recurrent neural networks", arXiv 1308.0850; in the form of ``torch.optim.RMSprop``::

            g = g + weight_decay * p
            v = alpha * v + (1 - alpha) * g * g
            a = v, or with centered  ga = ga + (1 - alpha) * (g - ga);  a = v - ga * ga
            u = g / (sqrt(a) + eps)
            b = momentum * b + u
            p = p - lr * (b  if momentum else u)
        """
        row = coefficients.rmsprop(lr, alpha, eps, weight_decay, momentum, centered, maximize)
        states: tuple[Any, ...] = (square_avgs,)
        names: tuple[str, ...] = ("square_avgs",)
        if row[0] & 2:
            if grad_avgs is None:
                raise _missing("grad_avgs", "centered")
            states += (grad_avgs,)
            names += ("grad_avgs",)
        if row[0] & 4:
            if momentum_buffers is None:
                raise _missing("momentum_buffers", "momentum")
            states += (momentum_buffers,)
            names += ("momentum_buffers",)
        if one_pass:
            return self._one_pass("rmsprop", [row], None, params, grads, states, names, one_pass)
        if not self._engine.step("rmsprop", [row], None, params, grads, states, False):
            self._check_and_step("rmsprop", [row], None, params, grads, states, names)
        return None

    def lion_step(
        self,
        params: Arrays,
        grads: Gradients,
        exp_avgs: Arrays,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        **one_pass: Unpack[OnePass],
    ) -> StepStats | None:
        """Take a step of Lion in place.

        Parameters
        ----------
        params : array, list, tuple or dict of arrays
            Updated in place. float64, float32, float16 or bfloat16, of any shape and strides.
        grads : as `params`
            Of the same shapes, each of any of the four dtypes. None skips its parameter and state.
        exp_avgs : as `params`
            Averages of the gradient; zeros before the first step. Updated in place.
        lr : float
            Learning rate, >= 0.
        betas : (float, float)
            Weights of the average in the step taken and in its own update, each in [0, 1).
        weight_decay : float
            Decoupled decay, >= 0: each step shrinks the parameters by ``lr * weight_decay``.
        maximize : bool
            Step up the gradient instead of down.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, an unsupported dtype, an immutable or masked array; a hyperparameter that is no number.
        ValueError
            Shapes, lengths or forms that differ, a read-only array that would be written, written memory that
            overlaps, a missing state, a hyperparameter out of range or NaN. Nothing has changed then.

        Notes
        -----
        Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675::

            p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
            m = beta2 * m + (1 - beta2) * g
        """
        rows = [coefficients.lion(lr, betas, weight_decay, maximize)]
        if one_pass:
            return self._one_pass("lion", rows, None, params, grads, (exp_avgs,), ("exp_avgs",), one_pass)
        if not self._engine.step("lion", rows, None, params, grads, (exp_avgs,), False):
            self._check_and_step("lion", rows, None, params, grads, (exp_avgs,), ("exp_avgs",))
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _over, (self._engine.__name__,)  # so that a step can be copied and pickled: a module cannot

    def _check_and_step(
        self,
        rule: str,
        rows: list[coefficients.Row],
        row_of: list[int] | None,
        params: Any,
        grads: Any,
        states: tuple[Any, ...],
        names: Sequence[str],
        ask: onepass.Ask = onepass.NOTHING,
    ) -> Any:
        """What the engine did not take as it came: raise what is wrong with it, or step it as plain lists."""
        module = devices.engine_of(params, self._engine)
        on_gpu = module is not self._engine
        if tensors.learn_types([params, grads, *states, ask.ema, ask.copies], module) or on_gpu:
            result = module.step(rule, rows, row_of, params, grads, states, False, ask)
            if result is not False:
                return result
        checked = arrays.check(names, params, grads, states, ask.ema, ask.copies, ask.zero_grads, on_gpu)
        plain = ask._replace(ema=checked.ema, copies=checked.copies)
        if on_gpu:
            plain = plain._replace(stream=devices.stream_for(checked.params[0], ask.stream))
        result = module.step(rule, rows, row_of, checked.params, checked.grads, checked.states, True, plain)
        if result is False:
            raise RuntimeError(f"{rule}: the engine refused arrays that were checked; please report this")
        if onepass.may_have_moved(result):
            form = arrays.Form(params)
            written = [params, *states, ask.ema, ask.copies, *[grads] * ask.zero_grads]
            stepped = [g is not None for g in checked.grads]
            tensors.wrote([*compress(form.flatten("", x), stepped)] for x in written if x is not None)
        return result

    def _one_pass(
        self,
        rule: str,
        rows: list[coefficients.Row],
        row_of: list[int] | None,
        params: Any,
        grads: Any,
        states: tuple[Any, ...],
        names: Sequence[str],
        one_pass: OnePass,
    ) -> StepStats | None:
        """A step with more than the step asked of it."""
        ask = onepass.read(f"{rule}_step", one_pass)
        if ask.stream is not None and devices.engine_of(params, self._engine) is self._engine:
            raise ValueError(onepass.NO_STREAM)
        result = self._engine.step(rule, rows, row_of, params, grads, states, False, ask)
        if result is False:
            result = self._check_and_step(rule, rows, row_of, params, grads, states, names, ask)
        if result is True:
            return None
        if isinstance(params, Mapping):
            return StepStats(list(params), [grads[key] for key in params], result, ask.stats)
        if isinstance(params, (list, tuple)):
            return StepStats(range(len(params)), grads, result, ask.stats)
        return StepStats([0], [grads], result, ask.stats)


_ADAM_STATES = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
_STEPS = 2**63  # steps are 64-bit


def _over(engine: str) -> Steps:
    return Steps(import_module(engine))


def _missing(name: str, because: str) -> ValueError:
    return ValueError(
        f"{name}: missing, and {because} needs it; pass zeros of the parameters' form before the first step"
    )


def _numbers(step: Any, params: Any) -> tuple[list[int], list[int] | None]:
    """The distinct step numbers of a call, and which of them is each parameter's (None: all have the first)."""
    if isinstance(step, np.ndarray) and step.ndim:
        step = list(step)
    if not isinstance(step, (list, tuple, Mapping)):
        return [_number("step", step)], None
    form = arrays.Form(params)
    if form.kind == "array":
        form = arrays.Form([params])
    entries = zip(form.labels("step"), form.flatten("step", step), strict=True)
    rows: dict[int, int] = {}
    row_of = [rows.setdefault(_number(label, n), len(rows)) for label, n in entries]
    return list(rows) or [1], row_of


def _number(label: str, n: Any) -> int:
    try:
        if isinstance(n, (bool, np.bool_)):
            raise TypeError
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{label}: expected an int >= 1, got {n!r} of type {type(n).__name__}") from None
    if not 0 < number < _STEPS:
        raise ValueError(f"{label}: expected an int >= 1, got {number}")
    return number
