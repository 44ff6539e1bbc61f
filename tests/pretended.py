"""A GPU that is pretended: arrays with CuPy's names over the host's memory, which the emulated module steps."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulation import module

STREAM = 77  # that is current


class ndarray:
    """An array on a device. NumPy gets nothing out of it."""

    __module__ = "cupy"

    def __init__(self, a: Any, device: int = 0, read_only: bool = False) -> None:
        self.host = a  # what no code of fastgd may look at
        self.device = SimpleNamespace(id=device)
        self.dtype, self.shape = a.dtype, a.shape
        a = a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a
        interface = a.__array_interface__
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": a.shape,
            "strides": None if a.flags.c_contiguous else a.strides,
            "data": (interface["data"][0], read_only),
            "typestr": "<V2" if self.dtype == ml_dtypes.bfloat16 else a.dtype.str,
        }

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("implicit conversion to NumPy is not allowed")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[key] = value.host


def on_gpu(a: Any, **more: Any) -> Any:
    """An array, or a list or dict of them, as CuPy's."""
    if isinstance(a, dict):
        return {key: on_gpu(value, **more) for key, value in a.items()}
    if isinstance(a, (list, tuple)):
        return [on_gpu(x, **more) for x in a]
    return ndarray(a, **more) if isinstance(a, np.ndarray) else a


@contextmanager
def a_device(number: int) -> Any:
    yield


@pytest.fixture
def gpu(monkeypatch: Any) -> Any:
    """``fastgd._cuda`` is the emulated module, and CuPy is there."""
    cupy: Any = ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.full_like = lambda x, fill, dtype: ndarray(np.full_like(x.host, fill, dtype=dtype), x.device.id)
    cupy.asarray = lambda x: x if isinstance(x, ndarray) else ndarray(np.array(x))
    cupy.cuda = SimpleNamespace(Device=a_device, get_current_stream=lambda: SimpleNamespace(ptr=STREAM))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "fastgd._cuda", module())
    return cupy
