"""Arrays on a GPU: which those are, the module that steps them, their streams, and how NumPy's checks see them.

A *window* is an ndarray that lies on a GPU's memory. It has a shape, a dtype, strides and an address, which is all that
checks look at, and what ``fastgd._cuda`` takes in the place of the array; its elements must never be touched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

_CUDA = (2, 13)  # DLPack's device types: a GPU's memory, and managed memory
HOST = "the host"


class Window(np.ndarray[Any, Any]):
    """The shape of an array on a GPU; see the module."""

    owner: Any
    place: str

    def __array_finalize__(self, obj: Any) -> None:
        self.owner, self.place = getattr(obj, "owner", None), getattr(obj, "place", HOST)

    def __repr__(self) -> str:
        return f"<window of shape {self.shape} and dtype {self.dtype} on {self.place}>"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        return type(None), ()  # whoever is copied makes new ones

    def __deepcopy__(self, memo: Any) -> Any:
        return None


def is_on_gpu(value: Any) -> bool:
    """Whether ``value`` is an array on a GPU. Imports no library: whoever made the array has."""
    if isinstance(value, (np.ndarray, type)):
        return isinstance(value, Window)
    if _is_tensor(value):
        return bool(value.is_cuda)
    try:
        return hasattr(value, "__cuda_array_interface__") or value.__dlpack_device__()[0] in _CUDA
    except Exception:  # whatever a stranger's array raises when it is asked where it lies
        return False


def _is_tensor(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def place(value: Any) -> str:
    """Where the memory of an ndarray or a window is."""
    return value.place if isinstance(value, Window) else HOST


def engine_of(values: Any, otherwise: Any) -> Any:
    """The module that steps these arrays: that of the first of them. The twin is asked for by name, and stays."""
    label, first = "params", values
    if isinstance(values, Mapping):
        label, first = next(((f"params[{key!r}]", a) for key, a in values.items()), (label, None))
    elif isinstance(values, (list, tuple)):
        label, first = "params[0]", values[0] if values else None
    if not is_on_gpu(first) or otherwise.__name__ == "fastgd.reference.engine":
        return otherwise
    try:
        return import_module("fastgd._cuda")
    except ImportError as error:
        raise TypeError(
            f"{label}: expected an array in the host's memory, got one on a GPU, and this build of fastgd has no CUDA "
            f"({error}); install it where nvcc is, pip install . -C cmake.define.FASTGD_CUDA=ON, or step a host copy"
        ) from None


def window(label: str, value: Any, written: bool) -> Window:
    """``value``, an array on a GPU, as a window."""
    if isinstance(value, Window):
        return value
    if _is_tensor(value):
        from fastgd import tensors

        tensors.check_dense(label, value)
        itemsize = value.element_size()
        strides = tuple(n * itemsize for n in value.stride())
        return _window(value, value.data_ptr(), value.shape, strides, str(value.dtype)[6:], False, value.device.index)
    name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    if not hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{label}: expected an array with the CUDA array interface, got {name}; pass cupy.from_dlpack(x)"
        )
    if written and name.startswith("jax"):
        raise TypeError(f"{label}: expected an array that can be written, got {name}; JAX arrays are immutable")
    seen = value.__cuda_array_interface__
    if seen.get("mask") is not None:
        raise TypeError(f"{label}: expected a plain array, got a masked array; fill it first")
    address, read_only = seen["data"]
    dtype = getattr(value, "dtype", None)  # names bfloat16, which the interface does not
    dtype = getattr(dtype, "name", seen["typestr"]) if seen["typestr"][1] == "V" else seen["typestr"]
    device = getattr(getattr(value, "device", None), "id", None)
    if device is None:
        try:
            device = import_module("fastgd._cuda").device_of(address)
        except ImportError:  # whoever asked is about to be told
            device = 0
    return _window(value, address, seen["shape"], seen.get("strides"), dtype, read_only, device)


def _window(owner: Any, address: int, shape: Any, strides: Any, dtype: str, read_only: bool, device: int) -> Window:
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as scalar
    else:
        scalar = dtype
    size = np.dtype(scalar).itemsize
    interface = {"version": 3, "shape": tuple(shape), "strides": strides, "data": (address or size, read_only)}
    memory = type("Memory", (), {"__array_interface__": {**interface, "typestr": f"|V{size}"}, "owner": owner})()
    seen: Window = np.asarray(memory).view(np.dtype(scalar)).view(Window)
    seen.owner, seen.place = owner, f"cuda:{device}"
    return seen


def readable(seen: Any) -> Any:
    """What the engine reads quickest of an array: a tensor whose type it has learned itself, all else by its window."""
    if not isinstance(seen, Window):
        return seen
    from fastgd import tensors

    owner = seen.owner
    return owner if tensors.is_tensor(owner) and tensors.learn(type(owner), import_module("fastgd._cuda")) else seen


def number(label: str, value: Any) -> tuple[int, bool]:
    """Where a number on a GPU lies, and whether it is float64."""
    seen = window(label, value, False)
    if seen.size != 1 or seen.dtype.name not in ("float64", "float32"):
        raise ValueError(f"{label}: expected one float64 or float32, got shape {seen.shape} and dtype {seen.dtype}")
    return seen.__array_interface__["data"][0], seen.dtype.name == "float64"


def full_like(seen: Any, fill: float, dtype: Any) -> Any:
    """A new array in the layout of an ndarray or, beside the array of a window, of its library."""
    if not isinstance(seen, Window):
        return np.full_like(seen, fill, dtype=dtype, subok=False)
    library = _library(seen)
    if library.__name__ == "torch":
        return library.full_like(seen.owner.detach(), fill, dtype=getattr(library, np.dtype(dtype).name))
    with library.cuda.Device(seen.owner.device.id):
        return library.full_like(seen.owner, fill, dtype=dtype)


def copied_like(seen: Any, value: Any) -> Any:
    """A copy of an ndarray or window, of its own dtype, where the first argument lies and in its layout."""
    if not isinstance(seen, Window):
        copy = np.empty_like(seen, dtype=value.dtype, subok=False)
        copy[...] = value
        return copy
    copy = full_like(seen, 0.0, value.dtype)
    library = _library(seen)
    source = value.owner if isinstance(value, Window) else value
    if library.__name__ != "torch":
        copy[...] = library.asarray(source)
    elif isinstance(value, Window):
        copy.copy_(library.as_tensor(source))
    else:
        plain = np.ascontiguousarray(source)
        raw = plain.view(np.int16) if plain.dtype.name == "bfloat16" else plain
        copy.copy_(library.from_numpy(raw.copy()).view(copy.dtype).reshape(copy.shape))
    return copy


def _library(seen: Window) -> Any:
    """The library of a window's array, which can make more of them: torch or CuPy."""
    name = type(seen.owner).__module__.partition(".")[0]
    if _is_tensor(seen.owner):
        return sys.modules["torch"]
    if name != "cupy":
        raise TypeError(
            f"params: expected arrays of CuPy or torch for a class, which makes states, got {name}; "
            "pass cupy.asarray(x), which shares the memory"
        )
    return sys.modules["cupy"]


def stream_for(seen: Any, stream: int | None) -> int | None:
    """The stream that was named, else the one that is current for the array of a window."""
    if stream is not None or not isinstance(seen, Window):
        return stream
    index = int(seen.place.removeprefix("cuda:"))
    if _is_tensor(seen.owner):
        return int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(seen.owner, cupy.ndarray):
        with cupy.cuda.Device(index):
            return int(cupy.cuda.get_current_stream().ptr)
    number = seen.owner.__cuda_array_interface__.get("stream")
    return number if number is not None and number > 2 else 0  # 1 and 2 name default streams


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
