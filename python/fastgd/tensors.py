"""Arrays of other libraries, seen as NumPy's over the same memory, or refused by name.

The compiled module reads torch's plain tensors itself once it has learned their type. All else comes here through
``fastgd.arrays``: what is odd, every message, and with a torch that has no DLPack exchange API every tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastgd import engine

_CPU = (1, 3)  # DLPack's device types: plain and pinned memory of the host
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch.Tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def learn(kind: type, module: Any = None) -> bool:
    """Teach the compiled module, or another, to read tensors of exactly this type; False where it cannot."""
    torch = sys.modules["torch"]
    module = module or engine.active
    learn_type = getattr(module, "learn", None)
    if learn_type is None or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        return False
    module.call_with_written(_count_versions)
    return bool(learn_type(kind, "is_neg"))


def learn_types(values: Iterable[Any], module: Any) -> bool:
    """Teach a module the types of all tensors among arguments; whether one is new, so that it may be asked again."""
    new = {(type(x), module) for x in _tensors(values)} - _met
    _met.update(new)
    return any([learn(kind, module) for kind, _ in new])


_met: set[tuple[type, Any]] = set()


def ndarray(label: str, value: Any, written: bool) -> Any:
    """``value`` as an ndarray over the same memory, None where it is nobody's array, or an error that says why not."""
    if is_tensor(value):
        return _from_torch(label, value)
    library = type(value).__module__.partition(".")[0]
    if library in ("jax", "jaxlib") and hasattr(value, "__array__"):
        if written:
            raise TypeError(
                f"{label}: expected an array that can be written, got {library}.{type(value).__name__}; "
                "JAX arrays are immutable; keep a NumPy array, np.array(x), and step that"
            )
        return np.asarray(value)
    if isinstance(value, type) or not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        return None
    name = f"{library}.{type(value).__name__}"
    if value.__dlpack_device__()[0] not in _CPU:
        raise TypeError(f"{label}: expected an array in the host's memory, got {name} on another device; {_NO_CUDA}")
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{label}: expected an array that NumPy can view, got {name}: {error}") from error


def wrote(values: Iterable[Any]) -> None:
    """Tell torch of each tensor among arguments (arrays, or lists or dicts of them) that a step has written."""
    tensors = _tensors(values)
    if tensors:
        _count_versions(tensors)


def _tensors(values: Iterable[Any]) -> list[Any]:
    tensors: list[Any] = []
    if "torch" in sys.modules:
        for value in values:
            entries = value.values() if isinstance(value, Mapping) else value
            tensors += filter(is_tensor, entries if isinstance(value, (list, tuple, Mapping)) else [value])
    return tensors


_NO_CUDA = "this build of fastgd has no CUDA; step a copy in the host's memory"


def check_dense(label: str, x: Any) -> None:
    """Raise where a tensor on a GPU has no memory that can be stepped."""
    torch = sys.modules["torch"]
    with torch._C.DisableTorchFunctionSubclass():
        what, advice = _why_not(torch, x, "cuda")
    if what:
        raise TypeError(f"{label}: expected a dense tensor of real numbers, got {what}; {advice}")


def _from_torch(label: str, x: Any) -> Any:
    torch = sys.modules["torch"]
    with torch._C.DisableTorchFunctionSubclass():
        what, advice = _why_not(torch, x)
        if what:
            raise TypeError(f"{label}: expected a dense tensor of real numbers on the CPU, got {what}; {advice}")
        learn(type(x))
        plain = x.detach()
        if x.dtype != torch.bfloat16:
            return plain.numpy()
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError(
                f"{label}: this tensor of bfloat16 needs a closer look, and NumPy needs ml_dtypes for it; "
                'pip install "fastgd[bfloat16]"'
            ) from None
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _why_not(torch: Any, x: Any, device: str = "cpu") -> tuple[str, str]:
    """What a tensor is that has no memory to be stepped in, and what to do; empty where it has."""
    kind = type(x).__name__
    if hasattr(x, "_local_tensor") and hasattr(x, "placements"):
        return "a DTensor", "pass x.to_local(), or use the classes of fastgd.torch"
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {kind}, which wraps other tensors or none", "pass the plain tensor that it stands for"
    if torch.nn.parameter.is_lazy(x):
        return f"an {kind}", "run the model once, so that its shape is known"
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() or functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        return "a tensor inside a transform of torch.func", "step outside of it"
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").replace("_", " ").lower()
        return f"a tensor of layout {layout}", "pass x.to_dense()"
    if x.device.type != device:
        no_data = x.device.type == "meta"
        return f"a tensor on {x.device}", "give it memory, x.to_empty(device='cpu')" if no_data else _NO_CUDA
    name = str(x.dtype).removeprefix("torch.")
    if x.is_complex():
        return f"dtype {name}", "pass torch.view_as_real(x)"
    if name not in _DTYPES:
        return f"dtype {name}", f"pass {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
    if x.is_neg():
        return "a view of negative numbers that torch has not computed yet", "pass x.resolve_neg()"
    if x.numel() and not x.data_ptr():
        return "a tensor whose memory was freed", "give it memory again, or leave it out"
    return "", ""


def _count_versions(tensors: list[Any]) -> None:
    """So that autograd notices a graph that saved what a step has changed."""
    increment = sys.modules["torch"].autograd.graph.increment_version
    try:
        increment(tensors)
    except (TypeError, AttributeError):  # an older torch: one tensor at a time
        for x in tensors:
            increment(x)
