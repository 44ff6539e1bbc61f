"""Ultralytics YOLO trained through the one pass: a callback that takes over the trainer's optimizer and its step."""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.torch_utils import ModelEMA, unwrap_model

import fastgd.torch

MAX_NORM = 10.0  # at which Ultralytics clips; it has no setting for it
KNOWN = ("SGD", "Adam", "AdamW", "RMSprop")  # of the optimizers that Ultralytics builds


def accelerate(trainer: BaseTrainer) -> None:
    """Train on through one pass, as a callback of Ultralytics.

    The trainer's optimizer becomes the class of `fastgd.torch` with the same name, groups and state, and the scheduler
    goes on with that one. One call takes the place of what ``trainer.optimizer_step`` does by separate sweeps: unscale
    the gradients, clip them at 10, step, and average parameters and buffers into ``trainer.ema``.

    A run may be resumed with this callback or without it, whichever way its checkpoint was made. Where something is
    not as Ultralytics makes it, all is left as it is and one warning says why: an optimizer that fastgd does not have
    (MuSGD), an ``optimizer_step`` of someone else's, parameters outside of the optimizer or not on the CPU.

    The difference: a step that the gradient scaler skips, for a gradient is not finite, leaves ``trainer.ema`` alone,
    its count of updates too. Ultralytics averages the parameters that have not moved once more.

    Parameters
    ----------
    trainer : ultralytics.engine.trainer.BaseTrainer
        As Ultralytics passes it to a callback.

    Examples
    --------
    >>> from ultralytics import YOLO  # doctest: +SKIP
    >>> model = YOLO("yolo26n.pt")  # doctest: +SKIP
    >>> model.add_callback("on_train_start", fastgd.ultralytics.accelerate)  # doctest: +SKIP
    >>> model.train(data="coco8.yaml", optimizer="AdamW")  # doctest: +SKIP
    """
    if type(trainer.optimizer).__module__.startswith(fastgd.torch.__name__):
        return  # the callback was added twice
    obstacle = _obstacle(trainer)
    if obstacle:
        LOGGER.warning(f"fastgd: {obstacle}. All is left as it is, and training goes on without fastgd.")
        return
    slow = trainer.optimizer
    name = type(slow).__name__
    fast = getattr(fastgd.torch, name)([dict(group) for group in slow.param_groups], max_norm=MAX_NORM)
    fast.defaults.update(slow.defaults)
    fast.load_state_dict(slow.state_dict())
    trainer.optimizer = trainer.scheduler.optimizer = fast
    trainer.optimizer_step = _OptimizerStep(trainer)
    LOGGER.info(f"{colorstr('fastgd:')} {name}, clipping and averaging in one pass")


def _obstacle(trainer: BaseTrainer) -> str | None:
    """Why this trainer is to be left as it is."""
    optimizer, kind = trainer.optimizer, type(trainer.optimizer)
    if kind.__name__ not in KNOWN or kind is not getattr(torch.optim, kind.__name__):
        got = f"{kind.__module__}.{kind.__name__}"
        return (
            f"optimizer: expected one of torch.optim's {', '.join(KNOWN)}, got {got}; train(optimizer='AdamW') is one"
        )
    if "optimizer_step" in vars(trainer) or type(trainer).optimizer_step is not BaseTrainer.optimizer_step:
        return (
            "trainer.optimizer_step: expected Ultralytics' own, got another; add this callback before what replaces it"
        )
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    model = {*trainer.model.parameters()}
    trained = {p for p in model if p.requires_grad}
    if not trained <= stepped <= model:  # Ultralytics clips by the norm of the model, fastgd by that of the optimizer
        return "trainer.optimizer: expected the parameters of trainer.model, got others; leave the step to Ultralytics"
    device = next((p.device.type for p in trained if p.device.type != "cpu"), "cpu")
    if device != "cpu":
        return f"device: expected cpu, got {device}; train(device='cpu') is one"
    return None


class _OptimizerStep:
    """What takes the place of ``trainer.optimizer_step``, a method without arguments."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self.tracked: Any = None

    def __call__(self) -> None:
        trainer, optimizer, ema = self.trainer, self.trainer.optimizer, self.trainer.ema
        # A class or an instance with an update of its own averages by that.
        ours = bool(ema) and ema.enabled and getattr(ema.update, "__func__", None) is ModelEMA.update
        self._track(ema.ema if ours else None)
        if ours:
            optimizer.ema_updates = ema.updates
        optimizer.step(scaler=trainer.scaler)
        trainer.scaler.update()
        # None and not zero: a parameter that the next loss does not depend on is then left alone, and the next
        # backward need not add.
        optimizer.zero_grad(set_to_none=True)
        if ours:
            ema.updates = optimizer.ema_updates
        elif ema:
            ema.update(trainer.model)

    def _track(self, averages: torch.nn.Module | None) -> None:
        """Have the optimizer average into the module's tensors: another module after a recovery from NaN."""
        if averages is self.tracked:
            return
        self.tracked = averages
        if averages is None:
            self.trainer.optimizer.track_ema(None)
            return
        live = unwrap_model(self.trainer.model).state_dict(keep_vars=True)  # the parameters, not views of them
        kept = averages.state_dict(keep_vars=True)
        pairs = [(live[name], average) for name, average in kept.items() if average.is_floating_point()]
        self.trainer.optimizer.track_ema(pairs, lambda update: self.trainer.ema.decay(update))
