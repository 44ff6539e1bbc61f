"""What a ``torch.amp.GradScaler`` and a step tell each other. Nothing else here knows the scaler's insides."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState


def scale_and_found(optimizer: Any, scaler: Any) -> tuple[float, bool] | None:
    """By what the gradients are to be divided, and whether the scaler knows that some are not finite.

    None where no scaler is at work. Without ``scaler``, what ``scaler.step(optimizer)`` left in the attributes
    ``grad_scale`` and ``found_inf`` counts.
    """
    if scaler is None:
        found = getattr(optimizer, "found_inf", None)
        scale = getattr(optimizer, "grad_scale", None)
        if found is None and scale is None:
            return None
        return 1.0 if scale is None else float(scale), found is not None and float(found) > 0
    if not scaler.is_enabled():
        return None
    if scaler._scale is None:
        raise RuntimeError("scaler: expected one that has scaled a loss, got none; call scaler.scale(loss).backward()")
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError("scaler: expected one update a step, got a second step; call scaler.update() in between")
    if state["stage"] is OptState.UNSCALED:
        return 1.0, any(float(found) > 0 for found in state["found_inf_per_device"].values())
    return scaler.get_scale(), False


def tell(optimizer: Any, scaler: Any, skipped: bool) -> None:
    """Leave what ``scaler.update()`` looks for after a step."""
    state = scaler._per_optimizer_states[id(optimizer)]
    found = torch.full((), float(skipped), device=scaler._scale.device)
    state["found_inf_per_device"] = {found.device: found}
    state["stage"] = OptState.STEPPED
