"""What is an array here, in which forms arrays come, and every check of them: the one place for these messages.

The compiled module passes what is plainly fine. All else comes here, is checked exactly, and goes back as plain lists
or raises before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastgd import devices, tensors

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Array | Sequence[Array] | Mapping[Any, Array]
Gradients: TypeAlias = Array | Sequence[Array | None] | Mapping[Any, Array | None] | None

_MAX_WORK: Any = 1_000_000  # for np.may_share_memory, whose stubs know 0 and -1 only

DTYPES = ("float64", "float32", "float16", "bfloat16")
COPY_DTYPES = DTYPES[1:]

# Types of other libraries that are no arrays: what to do instead, by the first name of the module that defines them.
_ELSEWHERE = {
    "pandas": "pass .to_numpy()",
}


class Form:
    """How the arrays of an argument come: bare, in a list or tuple, or in a dict.

    Parameters
    ----------
    value : object
        The argument that all others must look like.
    """

    def __init__(self, value: Any) -> None:
        self.keys: list[Any] | None = None
        self.kind: str
        if isinstance(value, Mapping):
            self.kind, self.keys = "dict", list(value)
            self.suffixes = [f"[{key!r}]" for key in self.keys]
        elif isinstance(value, (list, tuple)):
            self.kind = "list"
            self.suffixes = [f"[{i}]" for i in range(len(value))]
        else:
            self.kind, self.suffixes = "array", [""]

    def labels(self, name: str) -> list[str]:
        """What messages call the entries of an argument: ``grads[3]``, ``grads['fc1.weight']``, ``grads``."""
        return [name + suffix for suffix in self.suffixes]

    def flatten(self, name: str, value: Any, like: str = "params") -> list[Any]:
        """The entries of ``value`` in order, or an error where it has another form, length or other keys."""
        if self.kind == "dict":
            if not isinstance(value, Mapping):
                raise _form_error(name, value, f"a dict, as {like} is")
            assert self.keys is not None
            for key in self.keys:
                if key not in value:
                    raise ValueError(f"{name}: expected the keys of {like}, got none for {key!r}")
            if len(value) != len(self.keys):
                extra = next(key for key in value if key not in self.keys)
                raise ValueError(f"{name}: expected the keys of {like}, got {extra!r} too, which {like} has not")
            return [value[key] for key in self.keys]
        if self.kind == "list":
            n = len(self.suffixes)
            if not isinstance(value, (list, tuple)):
                raise _form_error(name, value, f"a list or tuple of {n}, as {like} is")
            if len(value) != n:
                raise ValueError(f"{name}: expected {n} entries, as many as {like} has, got {len(value)}")
            return list(value)
        if isinstance(value, (list, tuple, Mapping)):
            raise ValueError(f"{name}: expected one array, as {like} is, got {described(value)}")
        return [value]


class Checked(NamedTuple):
    """The arrays of one step, checked, as plain lists."""

    params: list[Array]
    grads: list[Array | None]
    states: tuple[list[Array], ...]
    ema: list[Array] | None
    copies: list[Array] | None


def check(
    names: Sequence[str],
    params: Any,
    grads: Any,
    states: Sequence[Any],
    ema: Any = None,
    copies: Any = None,
    zero_grads: bool = False,
    on_gpu: bool = False,
) -> Checked:
    """Check the arrays of one step, or raise naming the argument and index.

    Parameters
    ----------
    names : sequence of str
        The arguments' names of ``states``.
    params, grads, states, ema, copies
        As the caller gave them, in any form.
    zero_grads : bool
        Whether the gradients are written.
    on_gpu : bool
        Whether the arrays are to lie on a GPU, that of the first parameter.
    """
    form = Form(params)
    labels = form.labels("params")
    flat_params = check_params(labels, form.flatten("params", params), None if on_gpu else devices.HOST)
    written = list(zip(labels, flat_params, strict=True))
    labels = form.labels("grads")
    flat_grads = check_grads(labels, flat_params, form.flatten("grads", grads), zero_grads)
    labelled_grads = [(label, g) for label, g in zip(labels, flat_grads, strict=True) if g is not None]

    def checked(check: Callable[[str, Array, Any], Array], name: str, value: Any) -> list[Array]:
        labels = form.labels(name)
        flat = [check(*entry) for entry in zip(labels, flat_params, form.flatten(name, value), strict=True)]
        written.extend(zip(labels, flat, strict=True))
        return flat

    # The last names may be of states this variant has not.
    flat_states = [checked(check_state, name, state) for name, state in zip(names, states, strict=False)]
    flat_ema = None if ema is None else checked(check_ema, "ema", ema)
    flat_copies = None if copies is None else checked(check_copy, "copies", copies)
    if zero_grads:
        check_memory(written + labelled_grads, [])
    else:
        check_memory(written, labelled_grads)
    return Checked(flat_params, flat_grads, tuple(flat_states), flat_ema, flat_copies)


def check_array(
    label: str, value: Any, dtypes: Sequence[str] = DTYPES, written: bool = False, place: str | None = devices.HOST
) -> Array:
    """``value`` as a plain ndarray over the same memory, or an error where it is no array or has another dtype.

    ``place`` is where it must lie, None for anywhere; of an array on a GPU the result is a window.
    """
    if devices.is_on_gpu(value):
        value = devices.window(label, value, written)
    elif not isinstance(value, np.ndarray):
        given, value = value, tensors.ndarray(label, value, written)
        if value is None:
            raise TypeError(f"{label}: expected a NumPy array or a tensor, got {described(given)}{_advice(given)}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{label}: expected a plain array, got a masked array; fill it first, a.filled(0)")
    a = value if isinstance(value, devices.Window) else np.asarray(value)  # what a subclass says does not count
    check_dtype(label, a.dtype, dtypes)
    if place is not None and devices.place(a) != place:
        raise TypeError(
            f"{label}: expected an array in the memory of {place}, got one in that of {devices.place(a)}; "
            "all arrays of a call lie on one device: move it there"
        )
    return a


def check_params(labels: Sequence[str], params: Sequence[Any], place: str | None = devices.HOST) -> list[Array]:
    """Check that each parameter is an array that can be stepped in place; overlaps are left to check_memory.

    ``place`` is where all must lie, None for where the first does.
    """
    if place is None and params:
        place = devices.place(check_array(labels[0], params[0], place=None))
    return [_writable(label, p, place=place) for label, p in zip(labels, params, strict=True)]


def check_grads(
    labels: Sequence[str], params: Sequence[Array], grads: Sequence[Any], zero: bool = False
) -> list[Array | None]:
    """Check that each gradient is None or an array of its parameter's shape; to be zeroed, one that can be written."""
    check = _writable if zero else check_array
    return [
        None if g is None else _shaped(label, p, check(label, g, place=devices.place(p)))
        for label, p, g in zip(labels, params, grads, strict=True)
    ]


def check_state(label: str, param: Array, state: Any) -> Array:
    """Check that a state is an array of its parameter's shape that can be written."""
    if state is None:
        raise ValueError(f"{label}: missing; pass an array of shape {param.shape}, zeros before the first step")
    return _shaped(label, param, _writable(label, state, place=devices.place(param)))


def check_ema(label: str, param: Array, average: Any) -> Array:
    """Check that an average is an array of its parameter's shape that can be written."""
    if average is None:
        raise ValueError(f"{label}: missing; pass an array of shape {param.shape}, a copy of the parameter at first")
    return _shaped(label, param, _writable(label, average, place=devices.place(param)))


def check_copy(label: str, param: Array, copy: Any) -> Array:
    """Check that a copy is an array of its parameter's shape, and of a dtype no wider, that can be written."""
    if copy is None:
        raise ValueError(f"{label}: missing; pass an array of shape {param.shape} to take the new parameter")
    a = _shaped(label, param, _writable(label, copy, COPY_DTYPES, devices.place(param)))
    if a.itemsize > param.itemsize:
        raise ValueError(
            f"{label}: expected a dtype no wider than its parameter's, {param.dtype}, got {a.dtype}; "
            "pass a narrower array, or a wider parameter"
        )
    return a


def check_memory(written: Sequence[tuple[str, Array]], read: Sequence[tuple[str, Array]]) -> None:
    """Raise where a written array shares memory with any other array; arrays that are only read may share.

    The arrays are sorted by their first byte, so that only those whose bounds meet are looked at in pairs, exactly:
    a[::2] and a[1::2] are fine.
    """
    spans = [(*_bounds(a), True, label, a) for label, a in written if a.size]
    spans += [(*_bounds(a), False, label, a) for label, a in read if a.size]
    spans.sort(key=lambda span: span[0])
    active: list[tuple[int, int, bool, str, Array]] = []
    for span in spans:
        low, _, writes, label, a = span
        active = [other for other in active if other[1] > low]
        for _, _, other_writes, other_label, b in active:
            # With max_work the check is exact, except that it gives up on strides made to be hard, and says True.
            if (writes or other_writes) and np.may_share_memory(a, b, max_work=_MAX_WORK):
                raise _overlap_error(label, a, other_label, b)
        active.append(span)


def described(value: Any) -> str:
    """What came, in words for a message."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if tensors.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if value is None:
        return "None"
    if isinstance(value, (list, tuple, Mapping)):
        return f"a {type(value).__name__} of {len(value)}"
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module.partition('.')[0]}.{type(value).__name__}"


def check_dtype(label: str, dtype: np.dtype[Any], dtypes: Sequence[str] = DTYPES) -> None:
    """Raise where ``dtype`` is none of ``dtypes``."""
    if dtype.name not in dtypes:
        raise TypeError(f"{label}: expected dtype {', '.join(dtypes[:-1])} or {dtypes[-1]}, got {dtype}")
    if not dtype.isnative:
        raise TypeError(
            f"{label}: expected a dtype in this machine's byte order, got {dtype.str!r}; "
            "convert it with a.astype(a.dtype.newbyteorder('='))"
        )


def _writable(label: str, value: Any, dtypes: Sequence[str] = DTYPES, place: str | None = devices.HOST) -> Array:
    a = check_array(label, value, dtypes, written=True, place=place)
    if not a.flags.writeable:
        raise ValueError(f"{label}: expected an array that can be written, got a read-only one; pass a copy of it")
    if _overlaps_itself(a):
        raise ValueError(
            f"{label}: expected an array whose elements have memory of their own, got strides {a.strides} over shape "
            f"{a.shape}, where elements overlap; pass a copy of it"
        )
    return a


def _shaped(label: str, param: Array, a: Array) -> Array:
    if a.shape != param.shape:
        raise ValueError(
            f"{label}: expected shape {param.shape}, as its parameter has, got {a.shape}; nothing is broadcast"
        )
    return a


def _bounds(a: Array) -> tuple[int, int]:
    """The address of the first byte of ``a``, which is not empty, and the one past its last."""
    low = high = a.__array_interface__["data"][0]
    for stride, n in zip(a.strides, a.shape, strict=True):
        if stride < 0:
            low += stride * (n - 1)
        else:
            high += stride * (n - 1)
    return low, high + a.itemsize


def _overlaps_itself(a: Array) -> bool:
    """Whether two elements of ``a`` share a byte."""
    reach = a.itemsize
    axes = sorted((abs(stride), n) for stride, n in zip(a.strides, a.shape, strict=True) if n > 1)
    if a.size == 0 or not axes:
        return False
    for stride, n in axes:
        if stride < reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    if axes[0][0] == 0:
        return True
    # Strides that interlock, as no view of a dense array has: look at every element.
    starts = np.zeros(1, np.int64)
    for stride, n in axes:
        starts = (starts[:, None] + stride * np.arange(n)).ravel()
    starts.sort()
    return bool((np.diff(starts) < a.itemsize).any())


def _advice(value: Any) -> str:
    advice = _ELSEWHERE.get(type(value).__module__.partition(".")[0])
    if advice:
        return f"; {advice}"
    if isinstance(value, (np.generic, int, float)):
        return "; pass a 0-d array, np.array(x)"
    if isinstance(value, (list, tuple)):
        return "; pass np.array(x)"
    if hasattr(value, "__next__"):
        return "; pass list(x)"
    return ""


def _form_error(name: str, value: Any, expected: str) -> Exception:
    error: type[Exception] = TypeError
    if value is None or isinstance(value, (np.ndarray, list, tuple, Mapping)):
        error = ValueError  # arrays, in another form
    return error(f"{name}: expected {expected}, got {described(value)}")


def _overlap_error(label: str, a: Array, other_label: str, b: Array) -> ValueError:
    if getattr(a, "owner", a) is getattr(b, "owner", b):
        return ValueError(f"{label}: expected memory of its own, got the same array as {other_label}; pass a copy")
    return ValueError(f"{label}: expected memory of its own, got an array that overlaps {other_label}; pass a copy")
