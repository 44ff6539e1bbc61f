"""torch's own table of optimizer tests, torch.testing._internal.common_optimizers.optim_db, on the classes."""

from __future__ import annotations

import copy
import importlib
import warnings

import numpy as np
import pytest
from classes import normal
from tensors import array, classes, give, params_of, tensor, torch

pytestmark = pytest.mark.slow  # the import of torch's test utilities alone takes seconds

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"]
every_class = pytest.mark.parametrize("name", NAMES)

SHAPES = [(4, 3), (), (0,), (2, 3, 4, 5), (130,)]
STEPS = 6

# Some ten operations a step, each within a unit in the last place of float64 (1.1e-16), on values of the size of 1.
# A tensor among the keywords is of float32, and torch computes with it in float32: 6e-8, and in 1 - beta ** step over
# 1e-3, the value of 1 - 0.999; of that the root, times six steps of a rate of 1e-3: 2e-7.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CLOSE_TO_FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def table():
    """By the class's name."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It freezes torch.backends' flags for the process, and other tests have a use for them.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        module = importlib.import_module("torch.testing._internal.common_optimizers")
    return {info.optim_cls.__name__: info for info in module.optim_db if info.optim_cls.__name__ in NAMES}


def inputs(info):
    """Keywords of the class with what they are called: the CPU's, and those for CUDA, of which all run here, too."""
    found = {}
    for device in ("cpu", "cuda"):
        for row in info.optim_inputs_func(device=device):
            found.setdefault(row.desc, row.kwargs)
    assert len(found) >= 7
    return found


def has_tensor(kwargs):
    return any(isinstance(x, torch.Tensor) for x in (kwargs.get("lr"), *kwargs.get("betas", ())))


def variants(info, kwargs):
    """The keywords with those flags that change nothing here."""
    yield kwargs
    if not has_tensor(kwargs):  # which torch refuses with foreach
        yield kwargs | {"foreach": True}
        if "cpu" in info.supports_fused_on:
            yield kwargs | {"fused": True}
    if info.has_capturable_arg:
        yield kwargs | {"capturable": True}


def plainly(kwargs):
    """As torch's loop over single tensors takes them on the CPU."""
    return {**{k: v for k, v in kwargs.items() if k != "capturable"}, "foreach": False}


def tolerance(kwargs):
    return CLOSE_TO_FLOAT32 if has_tensor(kwargs) else CLOSE


def laid(a, t=0):
    """A tensor in one of torch's layouts."""
    x = tensor(a)
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.mT.contiguous().mT if x.ndim == 2 and t % 2 == 0 else x


def run(opt, dtype=np.float64, laid_out=False, steps=range(1, STEPS + 1)):
    for t in steps:
        grads = normal(t, [p.shape for p in params_of(opt)], [dtype] * len(params_of(opt)))
        grads[t % len(grads)] = None
        give(params_of(opt), grads)
        if laid_out:
            for p in params_of(opt):
                p.grad = None if p.grad is None else laid(array(p.grad), t)
        opt.step()


def fresh(dtype=np.float64, laid_out=False):
    make = laid if laid_out else tensor
    return [torch.nn.Parameter(make(a)) for a in normal(0, SHAPES, [dtype] * len(SHAPES))]


def assert_close(opt, theirs, what, **tolerance):
    for i, (p, q) in enumerate(zip(params_of(opt), params_of(theirs), strict=True)):
        np.testing.assert_allclose(array(p), array(q), **tolerance, err_msg=f"{what}: params[{i}]")
        state, expected = opt.state.get(p, {}), theirs.state.get(q, {})
        assert state.keys() == expected.keys(), what
        for key in expected:
            np.testing.assert_allclose(array(state[key]), array(expected[key]), **tolerance, err_msg=f"{what}: {key}")


@every_class
@pytest.mark.parametrize("laid_out", [False, True], ids=["contiguous", "laid out"])
def test_inputs(table, name, laid_out):
    """Every row of the table, with every flag that is harmless: torch's loop in float64."""
    for what, kwargs in inputs(table[name]).items():
        theirs = getattr(torch.optim, name)(fresh(laid_out=laid_out), **plainly(kwargs))
        run(theirs, laid_out=laid_out)
        for variant in variants(table[name], kwargs):
            opt = getattr(classes, name)(fresh(laid_out=laid_out), **variant)
            run(opt, laid_out=laid_out)
            assert_close(opt, theirs, f"{what}: {variant}", **tolerance(kwargs))


@every_class
def test_flags_change_no_bit(table, name):
    """foreach, fused and capturable are accepted, and nothing comes of them."""
    for what, kwargs in inputs(table[name]).items():
        runs = []
        for variant in variants(table[name], kwargs):
            opt = getattr(classes, name)(fresh(np.float32), **variant)
            run(opt, np.float32)
            runs.append([array(p).tobytes() for p in params_of(opt)])
        assert len(runs) > 1 or "lr" in kwargs, what
        assert all(r == runs[0] for r in runs), what


@every_class
def test_differentiable_is_refused(table, name):
    """With a reason: a step in place has no derivative."""
    for kwargs in inputs(table[name]).values():
        with pytest.raises(ValueError, match="differentiable: expected False, got True; a step in place has no deriv"):
            getattr(classes, name)(fresh(), **kwargs | {"differentiable": True})


@every_class
def test_groups(table, name):
    """Two groups, one with the keywords of the row, one with the class's defaults and a rate of its own."""
    for what, kwargs in inputs(table[name]).items():
        opts = []
        for module, given in ((classes, kwargs), (torch.optim, plainly(kwargs))):
            params = fresh()
            own = {k: v for k, v in given.items() if k != "foreach"}
            flags = {"foreach": False} if module is torch.optim else {}
            groups = [{"params": params[:2], **own}, {"params": params[2:], "lr": 0.003}]
            opts.append(getattr(module, name)(groups, **flags))
            run(opts[-1])
        assert_close(*opts, what, **tolerance(kwargs))


@every_class
def test_state_dicts(table, name):
    """Half way to torch's class and to a copy of itself, for every row; and both back."""
    for what, kwargs in inputs(table[name]).items():
        first = getattr(torch.optim, name)(fresh(), **plainly(kwargs))
        run(first)
        opt = getattr(classes, name)([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], **kwargs)
        opt.load_state_dict(first.state_dict())
        second = getattr(torch.optim, name)([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)])
        second.load_state_dict(copy.deepcopy(opt.state_dict()))
        for o in (first, opt, second):
            run(o, steps=range(STEPS + 1, STEPS + 4))
        assert_close(opt, first, what, **tolerance(kwargs))
        assert_close(second, first, what, **tolerance(kwargs))


@every_class
def test_error_inputs(table, name):
    """What torch refuses is refused in torch's words."""
    rows = table[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(rows) >= 7
    for row in rows:
        given = row.optimizer_error_input
        params = given.params if given.params is not None else [torch.nn.Parameter(torch.ones(2, 3))]
        if issubclass(row.error_type, Warning):
            with pytest.warns(row.error_type, match=row.error_regex):
                getattr(classes, name)(params, **given.kwargs)
            continue
        messages = []
        for module in (classes, torch.optim):
            with pytest.raises(row.error_type, match=row.error_regex) as caught:
                getattr(module, name)(params, **given.kwargs)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1], given.desc


@every_class
def test_schedulers_of_the_table(table, name):
    """Those that torch's table runs with the class: the same rates, the same steps."""
    for makers in table[name].scheduler_inputs:
        opts = []
        for module in (classes, torch.optim):
            opt = getattr(module, name)(fresh(), lr=0.01, foreach=False)
            schedulers = [make(opt) for make in makers]
            for t in range(1, 13):
                run(opt, steps=[t])
                for s in schedulers:
                    s.step(*[1.0] * isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau))
            opts.append(opt)
        assert opts[0].param_groups[0]["lr"] == opts[1].param_groups[0]["lr"]
        assert_close(*opts, f"{len(makers)} schedulers", **CLOSE)
