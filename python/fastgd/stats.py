"""What a step tells of itself: norms, clipping, what was not finite."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import compress
from math import sqrt
from typing import Any, NamedTuple, Protocol


class Norms(NamedTuple):
    """L2 norms of one parameter's gradient, update and value.

    Attributes
    ----------
    grad_norm : float
        Of the gradient, after `grad_scale` and before clipping.
    update_norm : float
        Of the difference that the step made to the parameter; 0 in a step that was skipped.
    param_norm : float
        Of the parameter after the step; NaN in a step that was skipped, which does not read it.
    """

    grad_norm: float
    update_norm: float
    param_norm: float


class Writer(Protocol):
    """Anything that logs a number: TensorBoard's ``SummaryWriter`` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Log one number."""


class StepStats:
    """What a step with ``stats`` or ``skip_nonfinite`` returns.

    The norms are of all parameters of the call that have a gradient, as one vector. They are None where only
    ``skip_nonfinite`` was asked for.

    Parameters
    ----------
    keys : sequence
        What the parameters are called: their keys in a dict, else their indices.
    grads : sequence
        Their gradients, of which only is read which are None.
    result : tuple or object
        What the engine returned: a tuple, or something that fetches it from a device when someone looks.
    norms : bool
        Whether that includes the norms.

    Attributes
    ----------
    skipped : bool
        Whether the step was skipped, for a gradient was not finite.
    nonfinite : int
        How many elements of the gradients are NaN or inf.
    clip_factor : float
        By what the gradients were multiplied to have ``max_norm``; 1.0 where they were not clipped.

    Examples
    --------
    >>> import fastgd, numpy as np
    >>> w = np.array([3.0, 4.0])
    >>> stats = fastgd.sgd_step(w, np.array([6.0, 8.0]), lr=0.1, max_norm=5.0, stats=True)
    >>> print(stats)
    gradient 10, clipped by 0.5; update 0.5, parameters 4.5
    """

    __slots__ = ("_keys", "_norms", "_present", "_result", "_told")

    def __init__(self, keys: Sequence[Hashable], grads: Sequence[Any], result: Any, norms: bool = True) -> None:
        # Kept by the thousand over a run: so sums of squares in one array, and nothing for the garbage collector.
        self._keys = keys
        self._norms = norms
        self._present = bytes([g is not None for g in grads]) if norms else b""
        self._result = result
        self._told: tuple[bool, int, float, array[float] | None] | None = None
        if isinstance(result, tuple):
            self._look()

    def _look(self) -> tuple[bool, int, float, array[float] | None]:
        """What the step told, waiting for the device that took it."""
        if self._told is None:
            result = self._result if isinstance(self._result, tuple) else self._result.fetch()
            skipped, nonfinite, clip_factor, of_grads, of_updates, of_params = result
            squares = array("d", of_grads + of_updates + of_params) if self._norms else None
            self._told = skipped, nonfinite, clip_factor, squares
            self._result = None
        return self._told

    def __getstate__(self) -> Any:
        self._look()
        return None, {name: getattr(self, name) for name in self.__slots__}

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped, for a gradient was not finite."""
        return self._look()[0]

    @property
    def nonfinite(self) -> int:
        """How many elements of the gradients are NaN or inf."""
        return self._look()[1]

    @property
    def clip_factor(self) -> float:
        """By what the gradients were multiplied to have ``max_norm``; 1.0 where they were not clipped."""
        return self._look()[2]

    @property
    def _squares(self) -> array[float] | None:
        return self._look()[3]

    @property
    def grad_norm(self) -> float | None:
        """Norm of the gradients, after ``grad_scale`` and before clipping."""
        return self._norm(0)

    @property
    def update_norm(self) -> float | None:
        """Norm of the difference that the step made to the parameters; 0 in a step that was skipped."""
        return self._norm(1)

    @property
    def param_norm(self) -> float | None:
        """Norm of the parameters after the step; NaN in a step that was skipped, which does not read them."""
        return self._norm(2)

    @property
    def per_param(self) -> dict[Hashable, Norms] | None:
        """The norms of each parameter that has a gradient, by its key in a dict, else by its index."""
        if self._squares is None:
            return None
        rows = zip(self._keys, *(map(sqrt, _part(self._squares, kind)) for kind in range(3)), strict=True)
        return {key: Norms(*norms) for key, *norms in compress(rows, self._present)}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values.

        Returns
        -------
        dict
            The attributes by name; ``per_param`` is a dict of dicts.
        """
        told = {name: getattr(self, name) for name in _NAMES}
        per_param = self.per_param
        told["per_param"] = None if per_param is None else {key: n._asdict() for key, n in per_param.items()}
        return told

    def log(self, writer: Writer, step: int, prefix: str = "fastgd/", *, per_param: bool = False) -> None:
        """Log every number that is known.

        Parameters
        ----------
        writer : object
            Anything with ``add_scalar(tag, value, step)``, as TensorBoard's ``SummaryWriter`` has it.
        step : int
            The number of the step, for the writer.
        prefix : str
            Put before each name: ``fastgd/grad_norm``.
        per_param : bool
            Log the norms of each parameter, too: ``fastgd/grad_norm/fc1.weight``.
        """
        for name in _NAMES:
            value = getattr(self, name)
            if value is not None:
                writer.add_scalar(prefix + name, value, step)
        if per_param:
            for key, norms in (self.per_param or {}).items():
                for name, value in norms._asdict().items():
                    writer.add_scalar(f"{prefix}{name}/{key}", value, step)

    def __repr__(self) -> str:
        return f"StepStats({', '.join(f'{name}={getattr(self, name)!r}' for name in _NAMES)})"

    def __str__(self) -> str:
        count = f"{self.nonfinite} gradient value{'' if self.nonfinite == 1 else 's'} not finite"
        if self.skipped:
            return f"skipped: {count}"
        parts = [count] if self.nonfinite or self._squares is None else []
        factor = f"{self.clip_factor:.4g}"
        clipped = "" if factor == "1" else f", clipped by {factor}"
        if self._squares is None:
            parts[0] += clipped
        else:
            parts.append(f"gradient {self.grad_norm:.4g}{clipped}")
            parts.append(f"update {self.update_norm:.4g}, parameters {self.param_norm:.4g}")
        return "; ".join(parts)

    def _norm(self, kind: int) -> float | None:
        if self._squares is None:
            return None
        return sqrt(total(compress(_part(self._squares, kind), self._present)))


_NAMES = ("grad_norm", "clip_factor", "update_norm", "param_norm", "nonfinite", "skipped")


def _part(squares: array[float], kind: int) -> array[float]:
    """Of the gradients, of the updates or of the parameters."""
    n = len(squares) // 3
    return squares[kind * n : (kind + 1) * n]


def total(sums: Iterable[float]) -> float:
    """The sums added in order: the end of the fixed tree. Python's own ``sum`` compensates since 3.12."""
    result = 0.0
    for x in sums:
        result += x
    return result
