"""Arrays on a GPU: which those are, the module that steps them, their streams, and how NumPy's checks see them.

A *window* is an ndarray that lies on a GPU's memory. It has a shape, a dtype, strides and an address, which is all that
checks look at, and what ``fastgd._cuda`` takes in the place of the array; its elements must never be touched.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

_CUDA = (2, 13)  # DLPack's device types: a GPU's memory, and managed memory
_DTYPES = ("float64", "float32", "float16", "bfloat16")


class Window(np.ndarray[Any, Any]):
    """The shape of an array on a GPU; see the module."""

    device: int
    owner: Any

    def __repr__(self) -> str:
        return f"<window of shape {self.shape} and dtype {self.dtype} on cuda:{self.device}>"

    __str__ = __repr__


def is_on_gpu(value: Any) -> bool:
    """Whether ``value`` is an array on a GPU. Imports no library: whoever made the array has."""
    if isinstance(value, (np.ndarray, type)):
        return isinstance(value, Window)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    try:
        return hasattr(value, "__cuda_array_interface__") or value.__dlpack_device__()[0] in _CUDA
    except Exception:  # whatever a stranger's array raises when it is asked where it lies
        return False


def engine(label: str) -> Any:
    """``fastgd._cuda``, or an error that says how to come by it."""
    try:
        return import_module("fastgd._cuda")
    except ImportError as error:
        raise TypeError(
            f"{label}: expected an array in the host's memory, got one on a GPU, and this build of fastgd has no CUDA "
            f"({error}); build it where nvcc is, with -C cmake.define.FASTGD_CUDA=ON, or step a copy on the host"
        ) from None


def engine_of(label: str, values: Any, otherwise: Any) -> Any:
    """The module that steps these arrays, by the first of them."""
    if isinstance(values, dict):
        values = values.values()
    if not isinstance(values, (list, tuple)) and not hasattr(values, "__iter__"):
        values = [values]
    return otherwise


def handle(stream: Any) -> int | None:
    """A stream as a number: CuPy's and torch's streams, or the number itself."""
    if stream is None or type(stream) is int:
        return stream
    for name in ("cuda_stream", "ptr"):  # torch's, CuPy's
        number = getattr(stream, name, None)
        if isinstance(number, int):
            return number
    raise TypeError(
        f"stream: expected a stream of CuPy's or torch's, or its number, got {type(stream).__name__}; "
        "pass None for the one that is current"
    )
