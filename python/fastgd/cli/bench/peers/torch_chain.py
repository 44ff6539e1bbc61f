"""torch: what the one pass does, in its separate calls and on the same memory; nothing of a class, no statistics.

The step is the functional one, which the class calls after gathering its arguments. The finite check comes in two
ways, the quickest that torch has; ``isfinite(g).all()`` takes many times longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

import fastgd
from fastgd.cli.bench.chain import EMA_DECAY, GRAD_SCALE, Chain
from fastgd.cli.bench.measure import Contender
from fastgd.cli.bench.peers.torch_steps import RULES, UNFUSED


def check_apart(chain: Chain) -> Contender | None:
    """Unscale and check in one sweep, as a ``GradScaler`` does, then clip."""
    found, inverse = torch.zeros(()), torch.tensor(1 / GRAD_SCALE)

    def ready(params: Any, grads: Any) -> bool:
        found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
        if found.item():
            return False
        clip_grad_norm_(params, chain.max_norm, foreach=True)
        return True

    return _contender("torch, check apart", chain, ready)


def check_by_norm(chain: Chain) -> Contender | None:
    """Unscale, clip, and see by the norm whether all was finite."""

    def ready(params: Any, grads: Any) -> bool:
        torch._foreach_mul_(grads, 1 / GRAD_SCALE)
        return bool(clip_grad_norm_(params, chain.max_norm, foreach=True).isfinite())

    return _contender("torch, check by norm", chain, ready)


def _contender(name: str, chain: Chain, ready: Callable[[Any, Any], bool]) -> Contender | None:
    if chain.setting.name not in RULES:
        return None
    torch.set_num_threads(fastgd.get_num_threads())
    roles = (chain.params, chain.grads, chain.ema, *chain.states)
    params, grads, ema, *states = ([torch.from_numpy(a) for a in role] for role in roles)
    copies = [torch.from_numpy(c.view(np.uint16)).view(torch.bfloat16) for c in chain.copies]
    for p, g in zip(params, grads, strict=True):
        p.grad = g  # where clip_grad_norm_ looks for them
    form = {"foreach" if chain.setting.name in UNFUSED else "fused": True}
    update = RULES[chain.setting.name](form, params, grads, states, dict(chain.setting.hyper))

    def step() -> None:
        if not ready(params, grads):
            return
        update()
        torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)
        torch._foreach_copy_(copies, params)
        torch._foreach_zero_(grads)

    return Contender(name, step, params=chain.written, prepare=chain.refill)
