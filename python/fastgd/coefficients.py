"""Hyperparameters to coefficients: what a rule needs for one step, computed once, in float64, for every backend.

One function a rule. Each checks its hyperparameters and returns a row ``(variant, sign, c0, c1, ...)``: the rule's
compile-time flags as a bit mask, -1.0 to maximize, then the coefficients in the order of the rule's header. For step 0
it returns the hyperparameters in their place, lr first: a device that counts the steps makes coefficients of them
(``csrc/cuda/coefficients.hpp``), with the same bits.

These run at every step, so a float in range passes one inline comparison; all else goes through the functions at the
end, which convert or raise.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, sqrt
from typing import Any

Row = tuple[Any, ...]  # (int, float, float, ...)


def sgd(
    step: int | None, lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: Any, maximize: Any
) -> Row:
    """Row of sgd; ``step`` None means "not the first"."""
    if type(lr) is not float or not 0.0 <= lr < inf:
        lr = non_negative("lr", lr)
    if type(momentum) is not float or not 0.0 <= momentum < inf:
        momentum = non_negative("momentum", momentum)
    if type(dampening) is not float or not -inf < dampening < inf:
        dampening = _finite("dampening", dampening)
    if type(weight_decay) is not float or not 0.0 <= weight_decay < inf:
        weight_decay = non_negative("weight_decay", weight_decay)
    variant = 1 if weight_decay else 0
    if momentum:
        variant |= 2
    if nesterov:
        if not momentum or dampening:
            raise ValueError(
                "nesterov: expected momentum > 0 and dampening == 0 with it, "
                f"got momentum={momentum!r} and dampening={dampening!r}"
            )
        variant |= 4
    if step == 0:
        return (variant, -1.0 if maximize else 1.0, lr, momentum, dampening, weight_decay)
    gain = 1.0 if step == 1 else 1.0 - dampening
    return (variant, -1.0 if maximize else 1.0, lr, momentum, gain, weight_decay)


def adam(step: int, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: Any, maximize: Any) -> Row:
    """Row of adam."""
    lr, beta1, beta2, eps, weight_decay = _adam(lr, betas, eps, weight_decay)
    variant = (1 if weight_decay else 0) | (2 if amsgrad else 0)
    if step == 0:
        return (variant, -1.0 if maximize else 1.0, lr, beta1, beta2, eps, weight_decay)
    return (variant, -1.0 if maximize else 1.0, weight_decay, *_moments(step, lr, beta1, beta2), eps)


def adamw(step: int, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: Any, maximize: Any) -> Row:
    """Row of adamw."""
    lr, beta1, beta2, eps, weight_decay = _adam(lr, betas, eps, weight_decay)
    if step == 0:
        return (1 if amsgrad else 0, -1.0 if maximize else 1.0, lr, beta1, beta2, eps, weight_decay)
    shrink = 1.0 - lr * weight_decay
    return (1 if amsgrad else 0, -1.0 if maximize else 1.0, shrink, *_moments(step, lr, beta1, beta2), eps)


def adagrad(step: int, lr: Any, lr_decay: Any, weight_decay: Any, eps: Any, maximize: Any) -> Row:
    """Row of adagrad."""
    if type(lr) is not float or not 0.0 <= lr < inf:
        lr = non_negative("lr", lr)
    if type(lr_decay) is not float or not 0.0 <= lr_decay < inf:
        lr_decay = non_negative("lr_decay", lr_decay)
    if type(weight_decay) is not float or not 0.0 <= weight_decay < inf:
        weight_decay = non_negative("weight_decay", weight_decay)
    if type(eps) is not float or not 0.0 <= eps < inf:
        eps = non_negative("eps", eps)
    if step == 0:
        return (1 if weight_decay else 0, -1.0 if maximize else 1.0, lr, lr_decay, weight_decay, eps)
    rate = lr / (1.0 + (step - 1) * lr_decay)
    return (1 if weight_decay else 0, -1.0 if maximize else 1.0, rate, weight_decay, eps)


def rmsprop(
    lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any, centered: Any, maximize: Any, step: int = 1
) -> Row:
    """Row of rmsprop."""
    if type(lr) is not float or not 0.0 <= lr < inf:
        lr = non_negative("lr", lr)
    if type(alpha) is not float or not 0.0 <= alpha < inf:
        alpha = non_negative("alpha", alpha)
    if type(eps) is not float or not 0.0 <= eps < inf:
        eps = non_negative("eps", eps)
    if type(weight_decay) is not float or not 0.0 <= weight_decay < inf:
        weight_decay = non_negative("weight_decay", weight_decay)
    if type(momentum) is not float or not 0.0 <= momentum < inf:
        momentum = non_negative("momentum", momentum)
    variant = (1 if weight_decay else 0) | (2 if centered else 0) | (4 if momentum else 0)
    if step == 0:
        return (variant, -1.0 if maximize else 1.0, lr, alpha, weight_decay, momentum, eps)
    return (variant, -1.0 if maximize else 1.0, lr, alpha, 1.0 - alpha, weight_decay, momentum, eps)


def lion(lr: Any, betas: Any, weight_decay: Any, maximize: Any, step: int = 1) -> Row:
    """Row of lion."""
    if type(lr) is not float or not 0.0 <= lr < inf:
        lr = non_negative("lr", lr)
    if type(weight_decay) is not float or not 0.0 <= weight_decay < inf:
        weight_decay = non_negative("weight_decay", weight_decay)
    beta1, beta2 = _betas(betas)
    if step == 0:
        return (0, -1.0 if maximize else 1.0, lr, beta1, beta2, weight_decay)
    return (0, -1.0 if maximize else 1.0, 1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` by repeated squaring in float64, for libm's pow differs between systems.

    The bits are part of the promise, so this is the algorithm: the exponent's bits are read from the lowest up; at
    each set bit the result (1 at first) is multiplied by the base; between two bits the base is squared.
    """
    result = 1.0
    while True:
        if exponent & 1:
            result *= base
        exponent >>= 1
        if not exponent:
            return result
        base *= base


def _adam(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> tuple[float, float, float, float, float]:
    """Check what adam and adamw share."""
    if type(lr) is not float or not 0.0 <= lr < inf:
        lr = non_negative("lr", lr)
    if type(eps) is not float or not 0.0 <= eps < inf:
        eps = non_negative("eps", eps)
    if type(weight_decay) is not float or not 0.0 <= weight_decay < inf:
        weight_decay = non_negative("weight_decay", weight_decay)
    beta1, beta2 = _betas(betas)
    return lr, beta1, beta2, eps, weight_decay


def _moments(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float, float, float, float]:
    """w1, beta2, w2, step_size, inv_bias2.

    No division by zero: beta < 1, so no product of betas rounds up to 1.
    """
    step_size = lr / (1.0 - power(beta1, step))
    inv_bias2 = 1.0 / sqrt(1.0 - power(beta2, step))
    return 1.0 - beta1, beta2, 1.0 - beta2, step_size, inv_bias2


def _betas(betas: Any) -> tuple[float, float]:
    try:
        beta1, beta2 = betas
    except TypeError:
        raise TypeError(f"betas: expected two numbers, got {_described(betas)}") from None
    except ValueError:
        raise ValueError(f"betas: expected two numbers, got {betas!r}") from None
    if type(beta1) is not float or not 0.0 <= beta1 < 1.0:
        beta1 = _below_one("betas[0]", beta1)
    if type(beta2) is not float or not 0.0 <= beta2 < 1.0:
        beta2 = _below_one("betas[1]", beta2)
    return beta1, beta2


def non_negative(name: str, value: Any) -> float:
    """``value`` as a float, or an error that calls it ``name``."""
    return checked(name, value, lambda x: 0.0 <= x < inf, "a finite number >= 0")


def _below_one(name: str, value: Any) -> float:
    return checked(name, value, lambda x: 0.0 <= x < 1.0, "a number with 0 <= number < 1")


def _finite(name: str, value: Any) -> float:
    return checked(name, value, isfinite, "a finite number")


def checked(name: str, value: Any, valid: Callable[[float], bool], expected: str) -> float:
    number = _real(value)
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {_described(value)}")
    if not valid(number):
        raise ValueError(f"{name}: expected {expected}, got {number!r}")
    return number


def _real(value: Any) -> float | None:
    """``value`` as a float, or None where it is not a real number: a Python or NumPy number, or a 0-d array of one."""
    if hasattr(value, "item") and getattr(value, "shape", None) == () and not hasattr(value, "mask"):
        if getattr(value.dtype, "kind", "f") in "mM":  # of a time, item gives an int
            return None
        value = value.item()
    if isinstance(value, (str, bytes, bytearray, complex)) or hasattr(value, "shape"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an int beyond float64
        return inf


def _described(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"
