"""Fused steps of gradient descent for NumPy arrays and torch tensors: one text, one answer, one pass."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from fastgd import engine as _engine
from fastgd import reference
from fastgd.engine import __version__, config, get_num_threads, set_num_threads
from fastgd.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from fastgd.stats import StepStats
from fastgd.steps import Steps as _Steps

_steps = _Steps(_engine.active)
sgd_step = _steps.sgd_step
adam_step = _steps.adam_step
adamw_step = _steps.adamw_step
adagrad_step = _steps.adagrad_step
rmsprop_step = _steps.rmsprop_step
lion_step = _steps.lion_step


def __getattr__(name: str) -> _ModuleType:
    """`fastgd.torch` and `fastgd.ultralytics`, imported when they are asked for."""
    if name in ("torch", "ultralytics"):
        return _import_module(f"fastgd.{name}")
    raise AttributeError(f"module 'fastgd' has no attribute {name!r}")


__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "RMSprop",
    "StepStats",
    "__version__",
    "adagrad_step",
    "adam_step",
    "adamw_step",
    "config",
    "get_num_threads",
    "lion_step",
    "reference",
    "rmsprop_step",
    "set_num_threads",
    "sgd_step",
]
