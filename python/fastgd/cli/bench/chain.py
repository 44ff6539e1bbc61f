"""A case with all that the one pass can do beside the step: what a training loop does between backward and forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any

import numpy as np

from fastgd.cli.bench.case import Array, Case, Memory, Setting, Shape, fill, grad_values
from fastgd.cli.bench.measure import sample

# A power of two, as loss scales are: to divide by it and to multiply by its inverse is the same.
GRAD_SCALE = 1024.0
# Far from 1, so that an average of the wrong parameters is seen in the check.
EMA_DECAY = 0.9


@dataclass
class Chain(Case):
    """Also averages of the parameters, and copies of them in bfloat16."""

    ema: list[Array]
    copies: list[Any]

    @property
    def bytes(self) -> int:
        """What the pass must move.

        The gradients are read for the norm, which must be known before the first of them is used, then read again and
        set to zero; parameters, states and averages are read and written; copies are written. What a cache fetches
        before it can write a copy is not counted: there are stores that do without.
        """
        rewritten = (self.params, self.grads, *self.states, self.ema)
        norm = sum(g.nbytes for g in self.grads)
        copies: int = sum(c.nbytes for c in self.copies)
        return norm + 2 * sum(a.nbytes for role in rewritten for a in role) + copies

    @property
    def slack(self) -> float:
        """torch adds the squares of a norm in float32, and loses up to 1e-10 of the norm with each element.

        Measured: 1e-5 of it at 1 Mi elements, 0.4 % at 64 Mi, 1.1 % at 128 Mi. The clipped gradients are off by as
        much, and so are two steps of SGD, at most 3e-3; the other rules divide by the gradients' own size.
        """
        return 3e-3 * 1e-10 * self.elements if self.setting.rule == "sgd" else 0.0

    @property
    def max_norm(self) -> float:
        """About half of the gradients' norm."""
        return 0.3 * sqrt(self.elements)

    def asked(self) -> dict[str, Any]:
        """The keywords of the one pass."""
        return {
            "grad_scale": GRAD_SCALE,
            "max_norm": self.max_norm,
            "skip_nonfinite": True,
            "ema": self.form(self.ema),
            "ema_decay": EMA_DECAY,
            "copies": self.form(self.copies),
            "zero_grads": True,
        }

    def written(self) -> list[Array]:
        """Parameters, averages and gradients, and by how much the copies are not the parameters rounded.

        Copies of two contenders cannot be compared: a difference in the last bit of a parameter may be one in the last
        bit of its copy, which is large. But each copy must be its own parameter, rounded, exactly.
        """
        wrong = [
            sample(c).astype(np.float32) - sample(p).astype(c.dtype).astype(np.float32)
            for c, p in zip(self.copies, self.params, strict=True)
        ]
        return [*self.params, *self.ema, *self.grads, *wrong]

    def reset(self) -> None:
        super().reset()
        self.refill()
        for e in self.ema:
            fill(e, grad_values())
        for c in self.copies:
            c.fill(0)

    def refill(self) -> None:
        """Gradients as they come from a scaled loss, for the next step; the last one has set them to zero."""
        for g in self.grads:
            fill(g, _scaled())


@cache
def _scaled() -> Array:
    return grad_values() * np.float32(GRAD_SCALE)


class ChainMemory(Memory):
    """The arrays of one shape or list of shapes, averages and copies among them."""

    def __init__(self, label: str, shapes: Sequence[Shape], copy_dtype: Any, *, single: bool = False) -> None:
        super().__init__(label, shapes, single=single, roles=5)
        self._copies = [np.empty(shape, copy_dtype) for shape in shapes]

    def chain(self, setting: Setting) -> Chain:
        """The first arrays, as many as the rule needs, the next for the averages, and the copies."""
        case = self.case(setting)
        taken = 2 + len(case.states)
        flat = self._flat[: taken + 1]
        return Chain(
            setting,
            case.label,
            case.single,
            case.params,
            case.grads,
            case.states,
            flat,
            self._roles[taken],
            self._copies,
        )
