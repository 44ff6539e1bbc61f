"""fastgd.torch: the classes step as fastgd's own do, to the bit, and keep torch.optim's books around it."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from bits import BF16, F16, F32, F64, assert_same_bits, operands, run_python
from cases import CASES, TABLE, Case, every_case
from classes import DTYPES, SHAPES, Model, every_rule, key_of, normal, optimizer, tuned
from tensors import (
    UNCOUNTED,
    array,
    assert_is,
    build,
    classes,
    everything,
    give,
    parameters,
    params_of,
    take,
    tensor,
    torch,
    way,
)

import fastgd

__all__ = ["way"]  # a fixture

COUNTED = [case for case in CASES if case.rule not in UNCOUNTED]
OF_TORCH = [case for case in CASES if hasattr(torch.optim, case.class_name)]
FULLEST = list({case.rule: case for case in CASES if not case.maximize}.values())
every_torch_rule = pytest.mark.parametrize("case", [c for c in FULLEST if c in OF_TORCH], ids=str)
ADAMW = next(case for case in FULLEST if case.rule == "adamw")

# torch orders its operations differently, about one unit in the last place of float64 (1.1e-16) an operation: some ten
# operations in a few steps on values of the size of 1 make 1e-14. A wrong formula is off by 1e-4 or more.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def grads_of(t, none=()):
    return [None if i in none else g for i, g in enumerate(normal(t))]


def trained(case, steps=3, **more):
    """An optimizer some steps on its way; one parameter has skipped a step, one has not begun."""
    opt = build(case, parameters(normal(0)), **more)
    for t in range(1, steps + 1):
        go_on(opt, t)
    return opt


def go_on(opt, t):
    give(params_of(opt), grads_of(t, none=([1] if t == 2 else []) + ([4] if t <= 3 else [])))
    opt.step()


def twin_of(opt, case, **more):
    """An optimizer of the class over copies of the parameters, with hyperparameters and state yet to be loaded."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params_of(opt)]
    return build(tuned(case, lr=99.0, maximize=not case.maximize), params, **more)


# ---- the steps


@every_case
def test_steps_are_the_twins(case, way):
    """Every variant, dtype and shape, in each way to the engine; who has no gradient neither moves nor counts."""
    arrays = normal(0)
    params = parameters(arrays)
    opt = build(case, params)
    model = Model(arrays, [case] * len(arrays))
    for t in range(1, 5):
        grads = grads_of(t, none=[i for i in range(5) if (i + t) % 3 == 0])
        versions = [p._version for p in params]
        give(params, grads)
        assert opt.step() is None
        model.step(grads)
        assert_is(opt, model)
        moved = [p._version - before for p, before in zip(params, versions, strict=True)]
        assert [bool(m) for m in moved] == [g is not None for g in grads]
    before = everything(opt)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    opt.step()
    assert everything(opt) == before


@every_case
@pytest.mark.parametrize("mix", [(F64, F64, F64), (F32, F32, F32), (BF16, BF16, F32), (F16, F16, BF16)], ids=str)
def test_any_values_in_any_state_dtype(case, mix):
    """Subnormals, infinities and NaNs too, with states that the user put there, in a dtype of their own."""
    p, g, *states = operands(case, (1031,), mix, seed=3)
    param = torch.nn.Parameter(tensor(p))
    opt = build(case, [param])
    opt.state[param] = {key_of(name): tensor(s) for name, s in zip(case.states, states, strict=True)}
    if case in COUNTED:
        opt.state[param]["step"] = torch.tensor(4.0)
    give([param], [g])
    opt.step()
    case.step(fastgd.reference, p, g, states, 5)
    assert_same_bits(array(param), p, str(case))
    for name, expected in zip(case.states, states, strict=True):
        assert_same_bits(array(opt.state[param][key_of(name)]), expected, name)
    if case in COUNTED:
        assert opt.state[param]["step"] == 5


@every_rule
def test_state_dtype(case, way):
    """float32 state beside narrow parameters, which torch's fused step refuses."""
    arrays = normal(0, SHAPES[:3], [np.float16, ml_dtypes.bfloat16, np.float16])
    opt = build(case, parameters(arrays), state_dtype=torch.float32)
    model = Model(arrays, [case] * 3, np.float32)
    for t in (1, 2, 3):
        grads = normal(t, SHAPES[:3], [a.dtype for a in arrays])
        give(params_of(opt), grads)
        opt.step()
        model.step(grads)
    assert_is(opt, model)
    with pytest.raises(TypeError, match="state_dtype: expected one of"):
        build(case, parameters(arrays), state_dtype=torch.int32)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 1],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, layout, way):
    """Each operand of another layout, and gradients that were expanded: the bits of a contiguous step."""
    shape = (2, 3, 4, 5)
    (a,) = normal(0, [shape], [np.float32])
    model = Model([a], [case])
    for of_param, of_grad in ((True, False), (False, True), (True, True)):
        model = Model([a], [case])
        param = torch.nn.Parameter((LAYOUTS[layout] if of_param else torch.clone)(tensor(a)))
        opt = build(case, [param])
        strides = param.stride()
        for t in (1, 2):
            (g,) = normal(t, [shape], [np.float32])
            param.grad = (LAYOUTS[layout] if of_grad else torch.clone)(tensor(g))
            opt.step()
            model.step([g])
        param.grad = tensor(np.float32(0.3)).expand(shape)
        opt.step()
        model.step([np.full(shape, 0.3, np.float32)])
        assert_is(opt, model)
        assert param.stride() == strides


@every_rule
def test_gradients_that_torch_has_not_negated_yet(case, way):
    """The imaginary part of a conjugate shows negative numbers over positive memory."""
    (a, g) = normal(5, [(3, 4), (3, 4)], [np.float32, np.float32])
    model = Model([a], [case])
    param = torch.nn.Parameter(tensor(a))
    opt = build(case, [param])
    param.grad = torch.complex(tensor(g), tensor(-g)).conj().imag
    assert param.grad.is_neg()
    opt.step()
    model.step([g])
    assert_is(opt, model)


def test_states_have_the_layout_of_their_parameter():
    param = torch.nn.Parameter(torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    param.grad = torch.ones_like(param)
    opt = build(ADAMW, [param])
    opt.step()
    assert {opt.state[param][key].stride() for key in ("exp_avg", "exp_avg_sq")} == {param.stride()}
    assert not opt.state[param]["exp_avg"].requires_grad


def test_a_stale_graph_is_noticed(way):
    """As with torch's own steps: what autograd saved has changed since."""
    w = torch.nn.Parameter(torch.ones(3))
    opt = build(ADAMW, [w])
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch.optim's books


@every_torch_rule
def test_constructors_are_torchs(case):
    """All of torch's arguments in their order, then those of the one pass, by name alone."""
    theirs = list(inspect.signature(getattr(torch.optim, case.class_name)).parameters.values())
    ours = list(inspect.signature(getattr(classes, case.class_name)).parameters.values())
    own = ["max_norm", "skip_nonfinite", "zero_grads", "stats", "copies", "norm_group", "state_dtype"]
    assert ours[: len(theirs)] == theirs
    assert [p.name for p in ours[len(theirs) :]] == own
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    cls = getattr(classes, case.class_name)
    assert issubclass(cls, getattr(torch.optim, case.class_name))
    assert isinstance(cls([torch.ones(3)], lr=0.1), torch.optim.Optimizer)


@pytest.mark.parametrize("case", OF_TORCH, ids=str)
def test_state_is_torchs(case):
    """The same keys, dtypes, shapes, strides and hyperparameters, parameter by parameter and in the state dict."""
    opts = [build(case, parameters(normal(0)), module) for module in (classes, torch.optim)]
    for t in (1, 2):
        for opt in opts:
            go_on(opt, t)

    def described(x):
        if not isinstance(x, torch.Tensor):
            return x
        return type(x), x.dtype, x.shape, x.stride() if x.numel() else None, x.requires_grad

    def books(saved):
        state = {i: {k: described(x) for k, x in entry.items()} for i, entry in saved["state"].items()}
        return state, [{k: v for k, v in group.items() if k != "foreach"} for group in saved["param_groups"]]

    mine, theirs = (books(opt.state_dict()) for opt in opts)
    assert mine == theirs
    assert [len(opt.state) for opt in opts] == [len(theirs[0])] * 2


@pytest.mark.parametrize("case", OF_TORCH, ids=str)
@pytest.mark.parametrize("there, back", [("ours", "torch's"), ("torch's", "ours")], ids=["to torch", "from torch"])
def test_state_dicts_load_both_ways(case, there, back):
    """Half way in one class, on in the other: as torch alone all the way."""
    module = {"ours": classes, "torch's": torch.optim}
    arrays = normal(0, SHAPES, [np.float64] * 5)
    first, alone = (build(case, parameters(arrays), m) for m in (module[there], torch.optim))
    for t in (1, 2, 3):
        take(first, params_of(first), t)
        take(alone, params_of(alone), t)
    second = build(tuned(case, lr=99.0), [torch.nn.Parameter(p.detach()) for p in params_of(first)], module[back])
    second.load_state_dict(first.state_dict())
    for t in (4, 5, 6):
        take(second, params_of(second), t)
        take(alone, params_of(alone), t)
    for a, b in zip(params_of(second), params_of(alone), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)
        assert second.state[a].keys() == alone.state[b].keys()
        for key in alone.state[b]:
            np.testing.assert_allclose(array(second.state[a][key]), array(alone.state[b][key]), **CLOSE, err_msg=key)


@every_case
def test_state_dicts_of_numpys_class(case):
    """Of fastgd's own class, loaded here, and the way back: on to the bit."""
    arrays = normal(0)
    own = optimizer(fastgd.engine.active, case, arrays)
    for t in (1, 2, 3):
        own.step(grads_of(t, none=[1] if t == 2 else []))
    opt = build(tuned(case, lr=99.0), parameters(arrays))
    opt.load_state_dict(own.state_dict())
    third = optimizer(fastgd.engine.active, tuned(case, lr=99.0), [a.copy() for a in arrays])
    third.load_state_dict(opt.state_dict() if case in COUNTED else own.state_dict())
    for t in (4, 5):
        give(params_of(opt), grads_of(t))
        opt.step()
        own.step(grads_of(t))
        third.step(grads_of(t))
    for i, (p, a) in enumerate(zip(params_of(opt), arrays, strict=True)):
        assert_same_bits(array(p), a, f"params[{i}]")
        assert_same_bits(third.param_groups[0]["params"][i], a, f"params[{i}], and back")
        for key in map(key_of, case.states):
            assert_same_bits(array(opt.state[p][key]), own.state[i][key], key)


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(saved):
    return pickle.loads(pickle.dumps(saved))


@every_case
@pytest.mark.parametrize("through", [through_file, through_pickle, copy.deepcopy])
def test_resume_is_bit_identical(case, through):
    opt = trained(case)
    other = twin_of(opt, case)
    saved = through(opt.state_dict())
    other.load_state_dict(saved)
    for t in (4, 5, 6):
        go_on(opt, t)
        go_on(other, t)
    assert everything(other) == everything(opt)


@every_rule
@pytest.mark.parametrize("through", [through_pickle, copy.deepcopy])
def test_copies_go_their_own_way(case, through):
    """A copied or unpickled optimizer has its own parameters, and all that was asked of the first."""
    opt = trained(case, stats=True, max_norm=0.5)
    average = [p.detach().clone() for p in params_of(opt)]
    opt.track_ema(zip(params_of(opt), average, strict=True), 0.9, updates=7)
    other = through(opt)
    assert type(other) is type(opt)
    before = everything(other)
    go_on(opt, 4)
    assert everything(other) == before
    go_on(other, 4)
    assert everything(other) == everything(opt)
    assert (other.one_pass, other.ema_updates) == (opt.one_pass, 8)
    assert other.last_stats.to_dict() == opt.last_stats.to_dict()
    for (_, mine), theirs in zip(other._ema[0], average, strict=True):
        assert mine is not theirs
        assert torch.equal(mine, theirs)


@every_rule
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_loaded_states_keep_their_dtype(case, state_dtype):
    """float32 state of narrow parameters, which torch recasts; and it is a copy."""
    arrays = normal(0, SHAPES[:2], [np.float16, ml_dtypes.bfloat16])
    opt = build(case, parameters(arrays), state_dtype=torch.float32)
    take(opt, params_of(opt), 1)
    other = twin_of(opt, case, state_dtype=state_dtype)
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert everything(other)[1:] == everything(opt)[1:]
    for p, q in zip(params_of(opt), params_of(other), strict=True):
        assert all(opt.state[p][key].data_ptr() != other.state[q][key].data_ptr() for key in opt.state[p])
    take(other, params_of(other), 2)
    for i, entry in before["state"].items():
        assert all(torch.equal(saved["state"][i][key], value) for key, value in entry.items())
    take(opt, params_of(opt), 2)
    assert everything(other) == everything(opt)


@every_rule
@pytest.mark.parametrize("state_dtype", [None, torch.float64])
def test_loaded_states_are_no_narrower_than_asked_for(case, state_dtype):
    """Checkpoints are halved to save space; averages of squares that stayed float16 would be zeros soon."""
    opt = build(case, parameters(normal(0, SHAPES[:2], [np.float32] * 2)))
    take(opt, params_of(opt), 1)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry.update({key: x.half() for key, x in entry.items() if key != "step"})
    other = twin_of(opt, case, state_dtype=state_dtype)
    other.load_state_dict(saved)
    for i, p in enumerate(params_of(other)):
        for key, x in saved["state"][i].items():
            loaded = other.state[p][key]
            assert torch.equal(loaded, x.to(loaded.dtype))
            assert key == "step" or loaded.dtype == (state_dtype or torch.float32)


@every_rule
def test_loading_rolls_back(case):
    """An earlier state, of the same optimizer, and the very beginning."""
    opt = trained(case, 0)
    saved = [copy.deepcopy(([p.detach() for p in params_of(opt)], opt.state_dict()))]
    for t in (1, 2, 3):
        go_on(opt, t)
        saved.append(copy.deepcopy(([p.detach() for p in params_of(opt)], opt.state_dict())))
    third = everything(opt)
    for start in (1, 0, 2):
        opt.load_state_dict(saved[start][1])
        for p, old in zip(params_of(opt), saved[start][0], strict=True):
            p.data.copy_(old)
        for t in range(start + 1, 4):
            go_on(opt, t)
        assert everything(opt) == third


def test_hooks_come_in_torchs_order():
    """Those of the step, of state_dict and of load_state_dict, each with what torch gives it."""

    def told(module):
        calls = []
        params = parameters(normal(0))
        opt = build(ADAMW, params, module)

        def note(name, result=None):
            return lambda *args: calls.append((name, [type(a).__name__ for a in args[1:]])) or result

        opt.register_step_pre_hook(note("before step"))
        opt.register_step_post_hook(note("after step"))
        opt.register_state_dict_pre_hook(note("before state_dict"))
        opt.register_state_dict_post_hook(note("after state_dict"))
        opt.register_load_state_dict_pre_hook(note("before load"))
        opt.register_load_state_dict_post_hook(note("after load"))
        opt.register_load_state_dict_post_hook(lambda o: calls.append(sorted(o.state[params[0]])))
        take(opt, params, 1)
        opt.load_state_dict(opt.state_dict())
        take(opt, params, 2)
        return calls

    assert told(classes) == told(torch.optim)


def test_hooks_may_change_what_is_loaded_and_what_was():
    opt = trained(ADAMW)
    saved = opt.state_dict()

    def halved(_, state_dict):
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {"state": {0: state_dict["state"][0]}, "param_groups": groups}

    seen = []
    opt.register_load_state_dict_pre_hook(halved)
    opt.register_load_state_dict_post_hook(lambda o: seen.append({s["exp_avg"].dtype for s in o.state.values()}))
    opt.load_state_dict(saved)
    assert (len(opt.state), opt.param_groups[0]["lr"]) == (1, 0.5)
    assert seen == [{torch.float32}]


def test_a_step_hook_may_change_the_arguments():
    opt = trained(ADAMW)
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), kwargs))
    assert opt.step() == 7.0


@every_rule
def test_closures(case):
    """Evaluated with gradients enabled, before the step, which steps with what it left."""
    (a,) = normal(0, [(3,)], [np.float32])
    w = torch.nn.Parameter(tensor(a))
    opt = build(case, [w])

    def closure():
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss == (tensor(a) ** 2).sum()
    model = Model([a], [case])
    model.step([2 * a])
    assert_is(opt, model)


@every_rule
def test_groups(case, way):
    """Each its own hyperparameters, also a group that comes in the middle, and hyperparameters that change."""
    arrays = normal(0)
    params = parameters(arrays)
    cases = [tuned(case, lr=0.3), tuned(case, lr=0.3), case, case, tuned(case, lr=0.003)]
    model = Model(arrays, cases)
    opt = build(case, [{"params": params[:2], "lr": 0.3}, {"params": params[2:4]}])
    for t in range(1, 5):
        if t == 2:
            opt.add_param_group({"params": params[4:], "lr": 0.003})
        if t == 4:
            opt.param_groups[1]["lr"] = 0.7
            model.cases[2:4] = [tuned(case, lr=0.7)] * 2
        grads = grads_of(t, none=[4] if t == 1 else [])
        give(params, grads)
        opt.step()
        model.step(grads)
    assert_is(opt, model)


@every_rule
def test_named_parameters(case):
    """torch keeps the names in the group; the stats call the parameters by them."""
    params = parameters(normal(0))
    names = [f"layer{i}.weight" for i in range(5)]
    opt = build(case, list(zip(names, params, strict=True)), stats=True)
    take(opt, params, 1)
    assert opt.param_groups[0]["param_names"] == names
    assert list(opt.last_stats.per_param) == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names


SCHEDULERS = {
    "LambdaLR": lambda s, o: s.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda s, o: s.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda s, o: s.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda s, o: s.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda s, o: s.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda s, o: s.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda s, o: s.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda s, o: s.PolynomialLR(o, 5, 1.5),
    "CosineAnnealingLR": lambda s, o: s.CosineAnnealingLR(o, 4, 0.001),
    "CosineAnnealingWarmRestarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda s, o: s.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda s, o: s.OneCycleLR(o, 0.1, 10),
    "SequentialLR": lambda s, o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 2), s.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda s, o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 2), s.ExponentialLR(o, 0.9)], o),
    "ReduceLROnPlateau": lambda s, o: s.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_schedulers(name, rule):
    """The same rates, and momenta where they are cycled, without a warning; and the steps that come of them."""
    case = next(c for c in FULLEST if c.rule == rule)
    arrays = normal(0, SHAPES, [np.float64] * 5)
    opts = [build(case, parameters(arrays), module) for module in (classes, torch.optim)]
    seen = []
    for opt in opts:
        scheduler = SCHEDULERS[name](torch.optim.lr_scheduler, opt)
        rows = []
        for t in range(1, 8):
            take(opt, params_of(opt), t)
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
            (group,) = opt.param_groups
            rows.append({key: group[key] for key in ("lr", "betas", "momentum") if key in group})
        seen.append(rows)
    assert seen[0] == seen[1]
    assert len({str(row) for row in seen[0]}) > 1, "a schedule that moved"
    for a, b in zip(*map(params_of, opts), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)


def test_every_scheduler_is_there():
    assert set(SCHEDULERS) == set(torch.optim.lr_scheduler.__all__) - {"LRScheduler"}


@every_rule
def test_zero_grad(case):
    opt = trained(case)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in params_of(opt))
    opt.zero_grad()
    assert all(p.grad is None for p in params_of(opt))


# ---- what the user does between two steps


def replaced(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key] = opt.state[p][key] * 0.5 + 0.25
        model.states[0][key] = model.states[0][key] * np.float32(0.5) + np.float32(0.25)


def filled(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key].fill_(0.75)
        model.states[0][key].fill(0.75)


def state_of_other_memory(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key].data = torch.full_like(p.data, 0.75)
        model.states[0][key].fill(0.75)


def state_of_another_dtype(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key] = opt.state[p][key].double()
        model.states[0][key] = model.states[0][key].astype(np.float64)


def state_that_requires_a_gradient(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key] = opt.state[p][key].clone().requires_grad_()


def state_of_another_class(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key] = torch.nn.Parameter(opt.state[p][key].clone(), requires_grad=False)


def state_of_another_layout(opt, p, model):
    for key in model.states[0]:
        opt.state[p][key] = torch.stack([opt.state[p][key]] * 2, -1)[..., 1]


def entry_replaced(opt, p, model):
    opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def entry_cleared(opt, p, model):
    opt.state[p].clear()
    model.states[0].clear()
    model.steps[0] = 0


def entry_gone(opt, p, model):
    del opt.state[p]
    model.states[0].clear()
    model.steps[0] = 0


def all_state_gone(opt, p, model):
    opt.state.clear()
    for i in range(len(model.states)):
        model.states[i].clear()
        model.steps[i] = 0


def state_another_dict(opt, p, model):
    opt.state = copy.copy(opt.state)
    replaced(opt, p, model)


def count_filled(opt, p, model):
    if "step" in opt.state[p]:
        opt.state[p]["step"].fill_(40.0)
        model.steps[0] = 40


def count_replaced(opt, p, model):
    if "step" in opt.state[p]:
        opt.state[p]["step"] = torch.tensor(40.0, dtype=torch.float64)
        model.steps[0] = 40


def count_an_int(opt, p, model):
    if "step" in opt.state[p]:
        opt.state[p]["step"] = 40
        model.steps[0] = 40


def param_of_other_memory(opt, p, model):
    p.data = torch.full_like(p.data, 0.5)
    model.params[0].fill(0.5)


def param_written(opt, p, model):
    with torch.no_grad():
        p.mul_(0.5)
    model.params[0] *= np.float32(0.5)


def param_replaced(opt, p, model):
    new = torch.nn.Parameter(torch.full_like(p, 0.5))
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = opt.state.pop(p)
    model.params[0].fill(0.5)


def list_replaced(opt, p, model):
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])
    param_replaced(opt, p, model)


def groups_replaced(opt, p, model):
    opt.param_groups = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    param_replaced(opt, p, model)


EDITS = [replaced, filled, state_of_other_memory, state_of_another_dtype, entry_replaced, entry_cleared, entry_gone]
EDITS += [all_state_gone, state_another_dict, count_filled, count_replaced, count_an_int, param_of_other_memory]
EDITS += [state_that_requires_a_gradient, state_of_another_class, state_of_another_layout]
EDITS += [param_written, param_replaced, list_replaced, groups_replaced]


@pytest.mark.parametrize(
    "case",
    [case if case.rule in ("sgd", "adamw") else pytest.param(case, marks=pytest.mark.slow) for case in FULLEST],
    ids=str,
)
@pytest.mark.parametrize("edit", EDITS)
def test_the_next_step_uses_what_is_there(case, edit, way):
    shapes, dtypes = SHAPES[:2] + SHAPES[3:4], [np.float32] * 3
    arrays = normal(0, shapes, dtypes)
    model = Model(arrays, [case] * 3)
    opt = build(case, parameters(arrays))
    for t in range(1, 7):
        if t in (3, 6):  # 6: after steps enough for anything that is kept
            edit(opt, params_of(opt)[0], model)
        grads = normal(t, shapes, dtypes)
        give(params_of(opt), grads)
        opt.step()
        model.step(grads)
        assert_is(opt, model)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before", "after", "closure"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_by_hooks_and_closures(edit, where, way):
    """The same from a hook before or after the step, or from its closure."""
    (a, b) = normal(0, SHAPES[:2], [np.float32] * 2)
    model = Model([a, b], [ADAMW] * 2)
    opt = build(ADAMW, parameters([a, b]))
    grads = [normal(t, SHAPES[:2], [np.float32] * 2) for t in range(6)]

    def at_the_third(*_):
        if t == 3:
            edit(opt, params_of(opt)[0], model)
            give(params_of(opt), grads[t])

    if where == "before":
        opt.register_step_pre_hook(at_the_third)
    if where == "after":
        opt.register_step_post_hook(lambda *_: model.step(grads[t]) or at_the_third())
    for t in range(6):
        give(params_of(opt), grads[t])
        opt.step(at_the_third if where == "closure" else None)
        if where != "after":
            model.step(grads[t])
        assert_is(opt, model)


@every_rule
def test_gradients_of_other_memory(case):
    """A gradient whose memory, or object, is another; one whose values alone are."""
    (a,) = normal(0, [(40,)], [np.float32])
    model = Model([a], [case])
    w = torch.nn.Parameter(tensor(a))
    opt = build(case, [w])
    w.grad = torch.ones_like(w)
    kept = w.grad
    for t, change in enumerate((lambda g: None, lambda g: kept.copy_(g), lambda g: setattr(kept, "data", g)), 1):
        (g,) = normal(t, [(40,)], [np.float32])
        change(tensor(g))
        assert w.grad is kept
        opt.step()
        model.step([array(kept).copy()])
        assert_is(opt, model)


def test_a_sum_that_starts_anew(way):
    """Adagrad's sums start from initial_accumulator_value, also where the state was cleared."""
    w = torch.nn.Parameter(torch.ones(3))
    opt = classes.Adagrad([w], lr=0.1, initial_accumulator_value=0.25)
    for _ in range(2):
        w.grad = torch.full((3,), 2.0)
        opt.step()
        assert opt.state[w]["sum"].tolist() == [4.25] * 3
        opt.state.clear()


@pytest.mark.parametrize("resumed", [False, True])
def test_momentum_that_comes_later(resumed):
    """A buffer starts as the gradient, without dampening, whenever that is: as torch's, resumed in between or not."""
    arrays = normal(0, SHAPES, [np.float64] * 5)
    opts = [build(Case("sgd", ()), parameters(arrays), module) for module in (classes, torch.optim)]
    for opt in opts:
        take(opt, params_of(opt), 1)
        if resumed:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.param_groups[0].update(momentum=0.83, dampening=0.31)
        for t in (2, 3):
            take(opt, params_of(opt), t)
    for a, b in zip(*map(params_of, opts), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)


# ---- the one pass


def asked(model, grads, **ask):
    """The twin's step over all parameters that have a gradient, with everything that is asked for: its stats."""
    index = [i for i, g in enumerate(grads) if g is not None]
    case = model.cases[0]
    for i in index:
        for name in case.states:
            model.states[i].setdefault(key_of(name), np.zeros_like(model.params[i]))
    for name in ("ema", "copies"):
        if name in ask:
            ask[name] = [ask[name][i] for i in index]
    hyper = {k: v for k, v in case.hyper.items() if k != "amsgrad"} | ask
    if TABLE[case.rule].counts:
        hyper["step"] = [model.steps[i] + 1 for i in index]
    states = {name: [model.states[i][key_of(name)] for i in index] for name in case.states}
    step = getattr(fastgd.reference, f"{case.rule}_step")
    stats = step([model.params[i] for i in index], [grads[i] for i in index], **states, **hyper)
    if not (stats and stats.skipped):
        for i in index:
            model.steps[i] += 1
    return stats


def numbers(stats):
    """The stats without what they call the parameters."""
    told = stats.to_dict()
    told["per_param"] = told["per_param"] and list(told["per_param"].values())
    return str(told)  # NaN is itself there


def to_float32(arrays):
    return [a.astype(np.float32) for a in arrays]


@every_rule
def test_everything_at_once(case, way):
    """Clipping, checking, averages of every parameter, copies, zeroing and stats: the bits of the twin's functions."""
    dtypes = [np.float32, np.float64, np.float16, np.float32, ml_dtypes.bfloat16]
    arrays = normal(0, SHAPES, dtypes)
    model = Model(arrays, [case] * 5)
    ema = to_float32(arrays)
    narrow = [ml_dtypes.bfloat16 if a.dtype.itemsize > 2 else a.dtype for a in arrays]
    copies = [a.astype(d) for a, d in zip(arrays, narrow, strict=True)]
    params, averages, targets = parameters(arrays), [tensor(e) for e in ema], [tensor(c) for c in copies]
    opt = build(case, params, max_norm=0.7, skip_nonfinite=True, zero_grads=True, stats=True, copies=targets)
    opt.track_ema(zip(params, averages, strict=True), lambda updates: updates / 4)
    for t in range(1, 5):
        grads = [np.asarray(g * g.dtype.type(8)) for g in normal(t, SHAPES, dtypes)]
        if t == 2:
            grads[3][17] = np.inf
        give(params, grads)
        before = everything(opt), [x.clone() for x in averages + targets]
        updates = opt.ema_updates
        written = [*params, *averages, *targets, *(p.grad for p in params)]
        versions = [x._version for x in written]
        opt.step()
        ask = dict(max_norm=0.7, skip_nonfinite=True, zero_grads=True, stats=True)
        stats = asked(model, grads, ema=ema, ema_decay=opt.ema_updates / 4 or 0.5, copies=copies, **ask)
        assert numbers(opt.last_stats) == numbers(stats)
        assert opt.last_stats.skipped == (t == 2)
        moved = [x._version - v for x, v in zip(written, versions, strict=True)]
        if t == 2:
            assert (everything(opt), opt.ema_updates) == (before[0], updates)
            assert all(torch.equal(x, y) for x, y in zip(averages + targets, before[1], strict=True))
            assert way == "gpu" or not any(moved[: -len(params)])  # counted before anyone knows
            assert not any(p.grad.any() for p in params), "else every step to come is skipped, too"
            continue
        assert {m for m, x in zip(moved, written, strict=True) if x.numel()} == {1}
        assert opt.last_stats.clip_factor < 1
        assert_is(opt, model)
        for x, expected in zip(averages + targets, ema + copies, strict=True):
            assert_same_bits(array(x), expected, f"step {t}")
        assert not any(p.grad.any() for p in params)
    assert opt.ema_updates == 3


@every_rule
def test_a_first_step_that_is_skipped_leaves_nothing(case, way):
    """No state and no count: with them the next would not be the first. Without zero_grads the gradients stay."""
    opt, alone = (build(case, parameters(normal(0)), skip_nonfinite=True) for _ in range(2))
    before = everything(opt)
    grads = normal(1)
    grads[0][1, 1] = np.nan
    give(params_of(opt), grads)
    opt.step()
    assert opt.last_stats.skipped
    assert everything(opt) == before
    assert not any(opt.state.get(p) for p in params_of(opt)) or case.rule == "adagrad"  # whose constructor makes it
    for p, g in zip(params_of(opt), grads, strict=True):
        assert_same_bits(array(p.grad), g)
    for o in (opt, alone):
        take(o, params_of(o), 2)
    assert everything(opt) == everything(alone)


@every_torch_rule
def test_max_norm_is_clip_grad_norm(case, way):
    arrays = normal(0, SHAPES, [np.float64] * 5)
    opts = [build(case, parameters(arrays), max_norm=0.3), build(case, parameters(arrays), torch.optim)]
    for t in (1, 2, 3):
        for opt in opts:
            params = params_of(opt)
            give(params, normal(t, SHAPES, [np.float64] * 5))
            if opt is opts[1]:
                torch.nn.utils.clip_grad_norm_(params, 0.3)
            opt.step()
    for a, b in zip(*map(params_of, opts), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)
    assert opts[0].last_stats is None


def test_one_pass_may_change_between_steps():
    opt = build(ADAMW, parameters(normal(0)))
    params = params_of(opt)
    take(opt, params, 1)
    assert opt.last_stats is None
    opt.one_pass["stats"] = True
    take(opt, params, 2)
    first = opt.last_stats
    assert (first.clip_factor, first.skipped) == (1.0, False)
    opt.one_pass["max_norm"] = first.grad_norm / 100
    take(opt, params, 3)
    assert opt.last_stats.clip_factor < 0.1
    opt.one_pass["zero_grads"] = True
    take(opt, params, 4)
    assert not any(p.grad.any() for p in params)
    opt.one_pass.update(stats=False, max_norm=None)
    take(opt, params, 5)
    assert opt.last_stats is None
    opt.one_pass["max_norm"] = -1.0
    before = everything(opt)
    with pytest.raises(ValueError, match="max_norm: expected a number > 0"):
        take(opt, params, 6)
    assert everything(opt) == before


def test_stats_of_some_gradients():
    """Parameters without gradient are not in them; a step without any gradient has stats, too."""
    opt = build(ADAMW, parameters(normal(0)), stats=True)
    give(params_of(opt), grads_of(1, none=[0, 3]))
    opt.step()
    assert list(opt.last_stats.per_param) == [1, 2, 4]
    opt.zero_grad()
    opt.step()
    assert (opt.last_stats.grad_norm, opt.last_stats.per_param) == (0.0, {})


def net():
    """A model with buffers, a frozen parameter and tied ones."""
    torch.manual_seed(0)
    first, second, third = (torch.nn.Linear(4, 4) for _ in range(3))
    model = torch.nn.Sequential(first, torch.nn.BatchNorm1d(4), second, third)
    model[2].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    return model


def floating(state):
    return {key: x for key, x in state.items() if x.is_floating_point()}


@pytest.mark.parametrize("decay", [0.9, lambda updates: 0.9 * (1 - np.exp(-updates / 2))], ids=["float", "callable"])
@pytest.mark.parametrize("form", ["pairs", "dict", "state dicts"])
def test_averages_of_a_model(decay, form, way):
    """Parameters, also one without gradient, frozen and tied, and buffers, as an averaging of its own has them."""
    model, inputs = net(), torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(1))
    averaged, expected = copy.deepcopy(model), copy.deepcopy(model)
    pairs = list(zip(model.parameters(), averaged.parameters(), strict=True))
    buffers = [(x, y) for x, y in zip(model.buffers(), averaged.buffers(), strict=True) if x.is_floating_point()]
    sources = {
        "pairs": pairs + buffers,
        "dict": dict(pairs + buffers),
        "state dicts": list(
            zip(floating(model.state_dict()).values(), floating(averaged.state_dict()).values(), strict=True)
        ),
    }
    opt = classes.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    opt.track_ema(sources[form], decay, updates=3)
    for i, x in enumerate(inputs[:5], 4):
        opt.zero_grad()
        model(x)[:, : 1 + i % 2].square().sum().backward()
        if i == 5:
            model[3].weight.grad = None
        opt.step()
        weight = np.float32(1.0 - (decay(i) if callable(decay) else decay))
        theirs = floating(expected.state_dict())
        for key, value in floating(model.state_dict()).items():
            if key != "2.weight":  # tied: averaged once
                theirs[key] += torch.tensor(weight) * (value - theirs[key])
    assert opt.ema_updates == 8
    for key, value in floating(averaged.state_dict()).items():
        assert torch.equal(value, floating(expected.state_dict())[key]), key
    assert not torch.equal(averaged[1].running_mean, model[1].running_mean)
    assert torch.equal(averaged[3].bias, model[3].bias)
    opt.track_ema(None)
    before = copy.deepcopy(averaged.state_dict())
    model(inputs[9]).sum().backward()
    opt.step()
    assert all(torch.equal(x, before[key]) for key, x in averaged.state_dict().items())


def test_averages_follow_replaced_memory(way):
    """What is tracked is the tensor, wherever its memory lies by now."""
    w = torch.nn.Parameter(torch.zeros(3))
    buffer, averages = torch.zeros(2), [torch.zeros(3), torch.zeros(2)]
    opt = classes.SGD([w], lr=1.0)
    opt.track_ema([(w, averages[0]), (buffer, averages[1])], 0.5)
    for t in range(1, 4):
        w.data = torch.full((3,), float(t))
        buffer.data = torch.full((2,), float(t))
        w.grad = torch.zeros(3)
        opt.step()
    assert averages[0].tolist() == [2.125] * 3  # ((0 + 1) / 2 + 2) / 2 + 3) / 2
    assert averages[1].tolist() == [2.125] * 2


def test_averages_without_any_gradient(way):
    w, average = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
    opt = classes.SGD([w], lr=1.0)
    opt.track_ema([(w, average)], 0.75)
    opt.step()
    assert (average.tolist(), w.tolist(), opt.ema_updates) == ([0.25] * 3, [1.0] * 3, 1)
    assert (average._version, w._version) == (1, 0)


AVERAGE = torch.zeros(3)
BAD_PAIRS = {
    "no pair": (lambda w: [w, w], TypeError, "expected a pair"),
    "a triple": (lambda w: [(w, AVERAGE, AVERAGE)], TypeError, "expected a pair"),
    "an array": (lambda w: [(w, np.zeros(3))], TypeError, "got ndarray"),
    "integers": (lambda w: [(torch.tensor(3), torch.tensor(3))], TypeError, "int64"),
    "booleans": (lambda w: [(torch.tensor(True), torch.tensor(True))], TypeError, "bool"),
    "shapes": (lambda w: [(w, torch.zeros(4))], ValueError, "expected an average of shape (3,)"),
    "twice": (lambda w: [(w, AVERAGE), (w, torch.zeros(3))], ValueError, "each tensor once"),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_what_is_no_pair(what):
    pairs, error, words = BAD_PAIRS[what]
    w = torch.nn.Parameter(torch.ones(3))
    opt = classes.SGD([w], lr=1.0)
    with pytest.raises(error) as caught:
        opt.track_ema(pairs(w), 0.9)
    assert words in str(caught.value)
    assert "tensors[" in str(caught.value)
    opt.step()
    assert opt.ema_updates == 0


@pytest.mark.parametrize("decay", [None, -0.1, 1.5, float("nan"), "0.9"])
def test_decay_out_of_range(decay, way):
    """Given as a number it is refused at once, from a callable in the step, of which nothing remains."""
    w, average = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
    opt = classes.SGD([w], lr=1.0)
    with pytest.raises((TypeError, ValueError), match="decay"):
        opt.track_ema([(w, average)], decay)
    opt.track_ema([(w, average)], lambda updates: decay)
    w.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match="decay"):
        opt.step()
    assert (w.tolist(), average.tolist(), opt.ema_updates) == ([1.0] * 3, [0.0] * 3, 0)


def test_an_average_over_a_parameter_is_refused(way):
    w, v = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = classes.SGD([w, v], lr=1.0)
    opt.track_ema([(w, v.detach())], 0.5)
    w.grad, v.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="expected memory of its own"):
        opt.step()
    assert (w.tolist(), v.tolist(), opt.ema_updates) == ([1.0] * 3, [1.0] * 3, 0)


COPIES = {
    "wider": [torch.zeros(3, dtype=torch.float64)],
    "none": [],
    "too many": [torch.zeros(3), torch.zeros(3)],
    "another shape": [torch.zeros(4)],
    "missing": [None],
    "integers": [torch.zeros(3, dtype=torch.int32)],
    "the parameter's": None,
}


@pytest.mark.parametrize("spoilt", COPIES)
def test_copies_that_do_not_fit(spoilt, way):
    w = torch.nn.Parameter(torch.ones(3))
    opt = classes.SGD([w], lr=1.0, copies=COPIES[spoilt] if spoilt != "the parameter's" else [w.detach()])
    w.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match="copies"):
        opt.step()
    assert w.tolist() == [1.0] * 3


def test_a_step_after_one_that_raised(way):
    """Whatever raised, nothing has changed, and the next good step is as if it had not been."""
    opt, alone = trained(ADAMW), trained(ADAMW)
    scaler = torch.amp.GradScaler("cpu")
    spoils = [
        lambda: opt.one_pass.update(max_norm=0.0),
        lambda: opt.one_pass.update(copies=[torch.ones(1)]),
        lambda: opt.param_groups[0].update(lr=-1.0),
        lambda: opt.track_ema([(params_of(opt)[0], torch.zeros(4, 3))], lambda updates: 2.0),
    ]
    for t, spoil in enumerate(spoils, 4):
        before = everything(opt)[0]
        spoil()
        give(params_of(opt), normal(t))
        with pytest.raises(ValueError):
            opt.step()
        assert everything(opt)[0] == before
        opt.one_pass.update(max_norm=None, copies=None)
        opt.param_groups[0]["lr"] = ADAMW.hyper["lr"]
        opt.track_ema(None)
        with pytest.raises(RuntimeError):
            opt.step(scaler=scaler)  # which has scaled nothing
        opt.step()
        take(alone, params_of(alone), t)
        assert everything(opt) == everything(alone)


# ---- GradScaler


def scaled_run(opt, how, infinite=(2, 3, 6), steps=9):
    """Steps under a scaler; the scales, which steps were skipped, and the parameters."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=4.0, backoff_factor=0.5, growth_interval=2)
    scales, params = [], params_of(opt)
    for t in range(1, steps + 1):
        scaler.scale(torch.zeros(()))
        grads = normal(t, SHAPES, [np.float64] * 5)
        if t in infinite:
            grads[t % 2][()] = np.nan if t == 3 else np.inf
        scale = scaler.get_scale()
        give(params, [g * scale for g in grads])  # by a power of two: exact
        before, updates = everything(opt), getattr(opt, "ema_updates", 0)
        how(opt, scaler)
        scales.append(scale)
        if t in infinite:
            assert everything(opt) == before
        else:
            assert everything(opt) != before
        if isinstance(opt, classes.AdamW | classes.SGD):
            assert opt.last_stats.skipped == (t in infinite)
            assert opt.ema_updates == updates + (t not in infinite)
        with pytest.raises(RuntimeError):  # a second step before the update
            how(opt, scaler)
        scaler.update()
    return scales


def by_scaler(opt, scaler):
    scaler.step(opt)


def by_optimizer(opt, scaler):
    opt.step(scaler=scaler)


def unscaled(how):
    def step(opt, scaler):
        scaler.unscale_(opt)
        how(opt, scaler)

    return step


HOWS = {"scaler.step": by_scaler, "opt.step": by_optimizer}
HOWS |= {f"unscaled, {name}": unscaled(how) for name, how in HOWS.items()}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_grad_scaler(how, rule, way):
    """The scales of torch's own optimizer, its parameters; a step with inf or NaN moves and counts nothing."""
    case = next(c for c in FULLEST if c.rule == rule)
    arrays = normal(0, SHAPES, [np.float64] * 5)
    opt, theirs = build(case, parameters(arrays)), build(case, parameters(arrays), torch.optim)
    averages = [p.detach().clone() for p in params_of(opt)]
    opt.track_ema(zip(params_of(opt), averages, strict=True), 0.9)
    scales = scaled_run(opt, HOWS[how])
    assert scales == scaled_run(theirs, by_scaler)
    assert len(set(scales)) > 3
    for a, b in zip(params_of(opt), params_of(theirs), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)
    assert "grad_scale" not in vars(opt)
    assert "found_inf" not in vars(opt)


@pytest.mark.parametrize("how", [by_scaler, by_optimizer])
def test_what_a_scaler_found_counts(how, way):
    """Whoever mends gradients after unscale_ found them not finite: the step is skipped all the same, as torch's."""
    for module in (classes, torch.optim):
        opt = build(ADAMW, parameters(normal(0, SHAPES, [np.float32] * 5)), module)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(torch.zeros(()))
        grads = normal(1, SHAPES, [np.float32] * 5)
        grads[3][5] = np.inf
        give(params_of(opt), grads)
        before = everything(opt)
        scaler.unscale_(opt)
        params_of(opt)[3].grad[5] = 1.0
        (how if module is classes else by_scaler)(opt, scaler)
        assert everything(opt) == before
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        if module is classes:
            assert opt.last_stats.skipped


def test_scaler_and_clipping():
    """max_norm is of the unscaled gradients, as clip_grad_norm_ after unscale_."""
    arrays = normal(0, SHAPES, [np.float64] * 5)
    runs = []
    for module, more in ((classes, {"max_norm": 0.3}), (torch.optim, {})):
        opt = build(ADAMW, parameters(arrays), module, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in (1, 2):
            scaler.scale(torch.zeros(()))
            give(params_of(opt), [g * 2.0**10 for g in normal(t, SHAPES, [np.float64] * 5)])
            if module is classes:
                opt.step(scaler=scaler)
            else:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(params_of(opt), 0.3)
                scaler.step(opt)
            scaler.update()
        runs.append(opt)
    for a, b in zip(*map(params_of, runs), strict=True):
        np.testing.assert_allclose(array(a), array(b), **CLOSE)


def test_scalers_that_have_not_scaled_or_are_disabled():
    opt = build(ADAMW, parameters(normal(0)))
    before = everything(opt)
    give(params_of(opt), normal(1))
    with pytest.raises(RuntimeError, match=r"scaler\.scale"):
        opt.step(scaler=torch.amp.GradScaler("cpu"))
    assert everything(opt) == before
    opt.step(scaler=torch.amp.GradScaler("cpu", enabled=False))
    other = build(ADAMW, parameters(normal(0)))
    take(other, params_of(other), 1)
    assert everything(opt) == everything(other)
    assert opt.last_stats is None


def test_scaler_with_a_closure():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = classes.SGD([w], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def closure():
        opt.zero_grad()
        loss = (w * w).sum()
        scaler.scale(loss).backward()
        return loss

    assert opt.step(closure, scaler=scaler) == 3
    scaler.update()
    assert w.tolist() == [1 - 0.1 * 2.0] * 3


# ---- refused, and nothing has changed


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


FREED = []


def freed(x):
    FREED.append((x.untyped_storage(), x.untyped_storage().nbytes()))
    FREED[-1][0].resize_(0)
    return x


@contextlib.contextmanager
def memory_back():
    """Memory for what was freed, at the end, for torch cannot print a tensor without it, in a failure's report."""
    try:
        yield
    finally:
        while FREED:
            storage, size = FREED.pop()
            storage.resize_(size)


REFUSED = {
    "meta": (lambda x: x.to("meta"), "a tensor on meta"),
    "fake": (fake, "a FakeTensor"),
    "freed": (lambda x: freed(x.clone()), "memory was freed"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "expanded": (lambda x: x[:1].expand(x.shape), "memory of their own"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parameters_that_cannot_be_stepped(what, way):
    """By name, with nothing changed; and a good step before and after does not matter."""
    make, words = REFUSED[what]
    good, bad = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(make(torch.ones(4)))
    opt = classes.AdamW([good, bad])
    good.grad, bad.grad = torch.ones(4), torch.ones_like(bad)
    with memory_back():
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)) as caught:
                opt.step()
            assert words in str(caught.value)
            assert "param_groups[0]['params'][1]" in str(caught.value)
            assert (good.tolist(), good._version) == ([1.0] * 4, 0)


@pytest.mark.parametrize("what", REFUSED)
def test_parameters_that_cannot_be_stepped_and_are_not(what, way):
    """Without a gradient, as a frozen part of a model, they harm no step, as in torch."""
    good, bad = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(REFUSED[what][0](torch.ones(4)))
    opt = classes.AdamW([good, bad])
    good.grad = torch.ones(4)
    with memory_back():
        opt.step()
    assert good.tolist() != [1.0] * 4


def test_a_lazy_parameter(way):
    """Not yet a tensor; and a parameter as any other once the model has run."""
    layer = torch.nn.LazyLinear(3)
    opt = classes.SGD(layer.parameters(), lr=1.0)
    opt.step()  # no gradient: nothing to do, as in torch
    layer(torch.ones(2, 4)).sum().backward()
    before = layer.weight.detach().clone()
    opt.step()
    assert torch.equal(layer.weight, before - 2)


BAD_GRADS = {
    "sparse": (lambda x: x.to_sparse(), "sparse coo"),
    "freed": (lambda x: freed(x.clone()), "memory was freed"),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("what", BAD_GRADS)
def test_gradients_that_are_refused(what, steps, way):
    make, words = BAD_GRADS[what]
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    opt = classes.AdamW(params)
    for t in range(steps):
        take(opt, params, t)
    params[0].grad, params[1].grad = torch.ones(2, 2), make(torch.ones(2, 2))
    before = everything(opt)
    with memory_back():
        with pytest.raises(TypeError) as caught:
            opt.step()
        assert words in str(caught.value)
        assert "param_groups[0]['params'][1].grad" in str(caught.value)
    assert everything(opt) == before


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool], ids=str)
def test_parameters_refused_at_once(dtype):
    opt = classes.AdamW([torch.ones(2)])
    for make in (lambda p: classes.AdamW([p]), lambda p: opt.add_param_group({"params": [p]})):
        with pytest.raises(TypeError, match=str(dtype)):
            make(torch.ones(3, dtype=dtype))
    assert len(opt.param_groups) == 1


@every_rule
def test_differentiable_is_refused(case):
    with pytest.raises(ValueError, match="differentiable: expected False"):
        build(case, parameters(normal(0)), differentiable=True)


def test_overlap_is_refused(way):
    """Parameters in one another's memory, a gradient that is the parameter itself, one gradient zeroed for two."""
    base = torch.ones(6)
    for params, grads, more in (
        ([base[:4], base[2:]], [torch.ones(4), torch.ones(4)], {}),
        ([base[:3]], [base[1:4]], {}),
        ([base[:2], base[2:4]], [AVERAGE[:2], AVERAGE[1:]], {"zero_grads": True}),
    ):
        params = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt = classes.SGD(params, lr=1.0, **more)
        with pytest.raises(ValueError, match="expected memory of its own"):
            opt.step()
        assert base.tolist() == [1.0] * 6
    params = [torch.nn.Parameter(base[::2]), torch.nn.Parameter(base[1::2])]  # interlocked, not overlapping
    for p in params:
        p.grad = torch.full((3,), 2.0)
    classes.SGD(params, lr=1.0).step()
    assert base.tolist() == [-1.0] * 6


@every_rule
@pytest.mark.parametrize("hyper", [{"lr": -0.1}, {"lr": float("nan")}, {"weight_decay": float("inf")}], ids=str)
def test_a_hyperparameter_that_went_bad(case, hyper, way):
    if "weight_decay" in hyper and "decay" not in case.flags and "weight_decay" not in case.hyper:
        return
    opt = trained(case)
    before = everything(opt)
    opt.param_groups[0].update(hyper)
    give(params_of(opt), normal(4))
    with pytest.raises(ValueError, match=next(iter(hyper))):
        opt.step()
    opt.param_groups[0].update({key: case.hyper[key] for key in hyper})
    assert everything(opt)[:1] == before[:1]


def test_one_element_rates():
    """A tensor of one element is a rate in torch, whatever its shape."""
    arrays = normal(0)
    opts = [build(tuned(ADAMW, lr=lr), parameters(arrays)) for lr in (torch.tensor(0.25), torch.tensor([0.25]), 0.25)]
    for opt in opts:
        take(opt, params_of(opt), 1)
    assert everything(opts[0])[0] == everything(opts[1])[0] == everything(opts[2])[0]


def test_a_rate_that_is_filled():
    """A tensor rate is read in each step: a compiled loop's scheduler fills it."""
    rate = torch.tensor(0.25)
    w = torch.nn.Parameter(torch.zeros(1))
    opt = classes.SGD([w], lr=rate)
    w.grad = torch.ones(1)
    opt.step()
    rate.fill_(0.5)
    opt.step()
    assert w.item() == -0.75


@pytest.mark.slow
def test_many_types_of_tensors():
    """More subclasses than the engine remembers are stepped all the same."""
    code = """
import torch, fastgd.torch
for i in range(40):
    p = torch.ones(3).as_subclass(type(f"T{i}", (torch.Tensor,), {})).requires_grad_()
    p.grad = torch.ones(3)
    fastgd.torch.SGD([p], lr=0.5).step()
    assert p.tolist() == [0.5] * 3, (i, p)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_ml_dtypes_is_not_needed():
    """bfloat16 needs no more than torch, until something is odd; then the message says what is missing."""
    code = """
import sys
sys.modules["ml_dtypes"] = None
import torch, fastgd.torch
p = torch.nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
opt = fastgd.torch.AdamW([p], state_dtype=torch.float32, zero_grads=True, stats=True, max_norm=1.0)
opt.track_ema([(p, p.detach().clone())], 0.9)
for grad in (torch.ones(8, 4).bfloat16(), torch.ones(4, 8).bfloat16().mT):
    p.grad = grad
    opt.step()
opt.load_state_dict(opt.state_dict())
p.grad = p.detach()
try:
    opt.step()
except TypeError as error:
    assert "ml_dtypes" in str(error), error
    print("told")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["told"]


# ---- a guest in the process


@pytest.mark.parametrize("module", [torch.optim, classes], ids=["torch", "fastgd"])
def test_cycles_are_collected(module, way):
    """A parameter's hook that holds the optimizer, which holds the parameter: the collector finds it, as torch's."""
    w = torch.nn.Parameter(torch.ones(3))
    opt = module.AdamW([w])
    w.register_hook(lambda grad, opt=opt: None)
    (w * w).sum().backward()
    opt.step()
    opt.step()
    dead = [weakref.ref(x) for x in (w, opt, opt.state[w]["exp_avg"])]
    del w, opt
    gc.collect()
    assert [ref() for ref in dead] == [None] * 3


@every_rule
def test_nothing_is_kept_alive(case, way):
    """Neither a gradient of before nor what was replaced, nor anything by a step that failed."""
    opt = trained(case)
    p = params_of(opt)[0]
    give(params_of(opt), normal(4))
    opt.step()
    dead = [weakref.ref(q.grad) for q in params_of(opt)]
    dead += [weakref.ref(opt.state[p][key]) for key in opt.state[p]]
    for key in list(opt.state[p]):
        opt.state[p][key] = opt.state[p][key].clone()
    opt.zero_grad()
    take(opt, params_of(opt), 5)
    gc.collect()
    assert [ref() for ref in dead if ref() is not None] == []
    dead = [weakref.ref(q) for q in params_of(opt)]
    p.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(TypeError):
        opt.step()
    del opt, p
    gc.collect()
    assert [ref() for ref in dead if ref() is not None] == []


@pytest.mark.parametrize("what", ["gradient", "state", "state.data", "average", "parameter", "copy"])
def test_memory_is_given_back(what, way):
    """Of what was replaced, the next step holds nothing: each kind of tensor over memory of NumPy's, which tells."""

    def watched():
        a = np.ones(50, np.float32)
        alive.append(weakref.ref(a))
        return torch.from_numpy(a)

    alive = []
    w = torch.nn.Parameter(torch.ones(50))
    average, narrow = torch.ones(50), torch.ones(50)
    opt = classes.AdamW([w], copies=[narrow])
    opt.track_ema([(w, average)], 0.5)
    w.grad = torch.ones(50)
    opt.step()

    def put(x):
        if what == "gradient":
            w.grad = x
        elif what == "state":
            opt.state[w]["exp_avg"] = x
        elif what == "state.data":
            opt.state[w]["exp_avg"].data = x
        elif what == "parameter":
            w.data = x
        elif what == "average":
            opt.track_ema([(w, x)], 0.5)
        else:
            opt.one_pass["copies"] = [x]

    put(watched())
    for _ in range(3):
        opt.step()
    assert alive[0]() is not None
    put(torch.ones(50))
    for _ in range(2):
        opt.step()
    assert alive[0]() is None, "without the garbage collector"


def test_threads_with_an_optimizer_each(set_threads):
    set_threads(2)
    opts = [trained(case, 0) for case in FULLEST] + [trained(case, 0) for case in FULLEST]
    errors = []

    def work(opt):
        try:
            for t in range(1, 8):
                go_on(opt, t)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(opt,)) for opt in opts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    for case, a, b in zip(FULLEST, opts, opts[len(FULLEST) :], strict=False):
        alone = trained(case, 7)
        assert everything(a) == everything(b) == everything(alone), case


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # torch's own, from its compiler
def test_compiled_training_steps(backend):
    """torch.compile leaves the step as it is: the bits of an uncompiled loop."""

    def run(compiled):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        opt = classes.AdamW([w], lr=0.05, max_norm=1.0, zero_grads=True)
        opt.track_ema([(w, average := w.detach().clone())], 0.5)

        def train(x):
            loss = (x @ w).square().sum()
            loss.backward()
            opt.step()
            return loss

        if compiled:
            torch._dynamo.reset()
            train = torch.compile(train, backend=backend)
        losses = [train(torch.ones(2, 4, dtype=torch.float64)).item() for _ in range(4)]
        return losses, w.detach(), average, opt.state[w]["step"].item()

    plain, compiled = run(False), run(True)
    np.testing.assert_allclose(plain[0], compiled[0], rtol=1e-12)  # the compiler may sum in another order
    for a, b in zip(plain[1:3], compiled[1:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert plain[3] == compiled[3] == 4


def test_every_rule_has_its_class():
    assert {case.class_name for case in FULLEST} == set(classes.__all__)
    assert len(DTYPES) == len(SHAPES)
