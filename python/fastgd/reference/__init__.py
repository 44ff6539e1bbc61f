"""Every step again, in NumPy alone: the same arguments, the same bits."""

from fastgd.reference import engine
from fastgd.steps import Steps

_steps = Steps(engine)
sgd_step = _steps.sgd_step
adam_step = _steps.adam_step
adamw_step = _steps.adamw_step
adagrad_step = _steps.adagrad_step
rmsprop_step = _steps.rmsprop_step
lion_step = _steps.lion_step

__all__ = ["adagrad_step", "adam_step", "adamw_step", "lion_step", "rmsprop_step", "sgd_step"]
