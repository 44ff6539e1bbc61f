"""fastgd.torch beside the twin and beside torch: arrays as tensors and back, and the three ways of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits
from cases import Case
from classes import Model, normal
from emulation import module

import fastgd

torch = pytest.importorskip("torch")
classes = pytest.importorskip("fastgd.torch")

UNCOUNTED = ("sgd", "lion")  # rules of whose steps torch's state shows no count


def tensor(a: Any) -> Any:
    """A tensor of its own with the array's values and order of dimensions."""
    a = np.array(a)
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def array(t: Any) -> Any:
    """The tensor's memory as an array."""
    t = t.detach()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def parameters(arrays: Sequence[Any]) -> list[Any]:
    return [torch.nn.Parameter(tensor(a)) for a in arrays]


def give(params: Sequence[Any], grads: Sequence[Any]) -> None:
    """Set the gradients, of arrays or None."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else tensor(g)


def build(case: Case, params: Any, module: Any = classes, **more: Any) -> Any:
    """The case's class of ``fastgd.torch``, or of ``torch.optim`` as its plain loop over single tensors."""
    if module is torch.optim:
        more["foreach"] = False  # keeps torch from its fused path, too
    return getattr(module, case.class_name)(params, **case.hyper | more)


def take(opt: Any, params: Sequence[Any], seed: int) -> None:
    """A step with the gradients of a seed."""
    arrays = [array(p) for p in params]
    give(params, normal(seed, [a.shape for a in arrays], [a.dtype for a in arrays]))
    opt.step()


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def everything(opt: Any) -> Any:
    """The bytes of all that a step may change, and the hyperparameters."""

    def seen(value: Any) -> Any:
        return (value.dtype, array(value).tobytes()) if isinstance(value, torch.Tensor) else value

    params = params_of(opt)
    states = [{key: seen(value) for key, value in opt.state.get(p, {}).items()} for p in params]
    groups = [{key: seen(v) for key, v in group.items() if key != "params"} for group in opt.param_groups]
    return [seen(p) for p in params], states, groups


def assert_is(opt: Any, model: Model) -> None:
    """The optimizer's parameters, states and counts are those that the twin's function came to."""
    for i, (p, expected) in enumerate(zip(params_of(opt), model.params, strict=True)):
        assert_same_bits(array(p), expected, f"params[{i}]")
        state = opt.state.get(p, {})
        if model.steps[i] and model.cases[i].rule not in UNCOUNTED:
            assert state["step"] == model.steps[i], f"the count of params[{i}]"
        for key, value in model.states[i].items():
            assert_same_bits(array(state[key]), value, f"state[{i}][{key!r}]")


def _directly(monkeypatch: Any) -> None:
    opt = classes.SGD([torch.ones(1)])
    assert fastgd.torch.plan.direct(opt), "the compiled module reads torch's tensors"


def _through_views(monkeypatch: Any) -> None:
    """As with a torch that has no exchange API."""
    monkeypatch.setattr(fastgd.torch.optimizers, "direct", lambda opt: False)


def _on_the_twin(monkeypatch: Any) -> None:
    """As without the compiled module."""
    monkeypatch.setattr(fastgd.engine, "active", fastgd.reference.engine)


def _on_an_emulated_gpu(monkeypatch: Any) -> None:
    """The host's tensors stepped by the CUDA module compiled for the host."""
    emulated = module()
    monkeypatch.setattr(fastgd.torch.plan, "engine_of", lambda opt: emulated)


WAYS = {"direct": _directly, "viewed": _through_views, "twin": _on_the_twin, "gpu": _on_an_emulated_gpu}


@pytest.fixture(params=["direct", "viewed", *(pytest.param(way, marks=pytest.mark.slow) for way in ("twin", "gpu"))])
def way(request: Any, monkeypatch: Any) -> str:
    """How the classes reach the engine: the test runs in each."""
    WAYS[request.param](monkeypatch)
    return str(request.param)
