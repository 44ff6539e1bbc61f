"""The classes do what the functions do, a parameter at a time, and torch.optim's bookkeeping around it."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits
from cases import CASES, RULES, TABLE, Case, every_case
from classes import DTYPES, FULLEST, SHAPES, Model, every_engine, every_rule, normal, optimizer, tuned

import fastgd


def flat_bytes(opt):
    """All that a step may change."""
    states = {i: {key: a.tobytes() for key, a in state.items()} for i, state in opt.state.items()}
    return [p.tobytes() for group in opt.param_groups for p in group["params"]], states


@every_engine
@every_case
def test_steps_with_none_gradients(case, engine):
    """A skipped parameter's bytes and count stay, and its bias correction is its own ever after."""
    params = normal(0)
    model = Model(params, [case] * len(params))
    opt = optimizer(engine, case, params)
    for t in range(1, 5):
        grads = [None if (i + t) % 3 == 0 else g for i, g in enumerate(normal(t))]
        before = [p.tobytes() for p in params]
        opt.step(grads)
        model.step(grads)
        model.check(opt)
        assert all(p.tobytes() == b for p, b, g in zip(params, before, grads, strict=True) if g is None)
    assert len(set(model.steps)) > 1
    before = flat_bytes(opt)
    opt.step([None] * len(params))
    assert flat_bytes(opt) == before


@every_engine
@pytest.mark.parametrize("rule", RULES)
def test_groups_with_their_own_hyperparameters_and_flags(rule, engine):
    """One call steps them all: every variant of a rule is a group, and each has its own lr, some a schedule."""
    cases = [case for case in CASES if case.rule == rule]
    cases += [tuned(cases[-1], lr=lambda step: 0.03 / step), tuned(cases[0], lr=lambda step: np.float32(0.02) * step)]
    groups, of = [], []
    for i, case in enumerate(cases):
        group = normal(100 + i, SHAPES[: i % 3 + 1], DTYPES[: i % 3 + 1])
        groups.append({"params": group, **{flag: False for flag in ("nesterov", "amsgrad") if flag in case.hyper}})
        groups[-1] |= {"maximize": False, "momentum": 0.0, "centered": False, "weight_decay": 0.0} | case.hyper
        allowed = inspect.signature(getattr(fastgd, case.class_name)).parameters
        groups[-1] = {key: value for key, value in groups[-1].items() if key in allowed}
        of += [case] * len(group)
    params = [p for group in groups for p in group["params"]]
    model = Model(params, of)
    opt = optimizer(engine, Case(rule, ()), groups[:-1])
    opt.add_param_group(groups[-1])
    assert [group["lr"] for group in opt.param_groups] == [case.hyper["lr"] for case in cases]
    for t in range(1, 4):
        flat = normal(t, [p.shape for p in params], [p.dtype for p in params])
        flat[t] = None
        rest = iter(flat)
        by_group = [[next(rest) for _ in group["params"]] for group in groups]
        opt.step(by_group if t % 2 else flat)
        model.step(flat)
        model.check(opt)


@every_engine
@every_rule
def test_forms(case, engine):
    """Bare, list, tuple and dict, with gradients in the same form; a dict's order does not matter."""
    for form in (list, tuple, dict):
        arrays = normal(0)
        model = Model(arrays, [case] * len(arrays))
        opt = optimizer(engine, case, dict(enumerate(arrays)) if form is dict else form(arrays))
        for t in (1, 2):
            grads = normal(t)
            opt.step(dict(reversed([*enumerate(grads)])) if form is dict else form(grads))
            model.step(grads)
            model.check(opt)
    (bare,) = arrays = normal(3, SHAPES[:1], DTYPES[:1])
    model = Model(arrays, [case])
    opt = optimizer(engine, case, bare)
    for grads in (normal(4, SHAPES[:1], DTYPES[:1]), normal(5, SHAPES[:1], DTYPES[:1]), [None]):
        opt.step(grads[0])
        model.step(grads)
        model.check(opt)


@every_engine
@every_rule
def test_odd_layouts(case, engine):
    """Interleaved parameters, and gradients that are broadcast, shared and of other dtypes."""
    wide = [np.random.default_rng(0).normal(size=(5, 8)).astype("f4").T for _ in range(2)]
    params = [wide[0][::2], wide[0][1::2], wide[1][:, ::-1]]
    shared = np.random.default_rng(1).normal(size=(4, 5)).astype(ml_dtypes.bfloat16)
    shared.setflags(write=False)
    grads = [shared, shared, np.broadcast_to(np.float64(0.3), (8, 5))]
    model = Model(params, [case] * 3)
    opt = optimizer(engine, case, params)
    for _ in range(2):
        opt.step(grads)
        model.step(grads)
        model.check(opt)


@every_engine
@every_rule
def test_state_dtype(case, engine):
    """bfloat16 parameters with float32 state; by default the state has its parameter's dtype."""
    params = normal(0)
    model = Model(params, [case] * len(params), "f4")
    opt = optimizer(engine, case, params, state_dtype=np.float32)
    for t in (1, 2, 3):
        opt.step(normal(t))
        model.step(normal(t))
    model.check(opt)
    for bad in ("i4", np.longdouble, ">f4", complex):
        with pytest.raises(TypeError, match=r"^state_dtype: expected"):
            optimizer(engine, case, normal(0), state_dtype=bad)


@every_engine
@every_rule
def test_hyperparameters_may_change_between_steps(case, engine):
    """As schedulers and warm-ups do it, flags too: states come when they are needed and stay when they are not."""
    plain = next(c for c in CASES if c.rule == case.rule)
    off = {"momentum": 0.0, "nesterov": False, "centered": False, "amsgrad": False, "weight_decay": 0.0}
    params = normal(0)
    model = Model(params, [plain] * len(params))
    opt = optimizer(engine, plain, params)
    for t, now in enumerate((plain, tuned(case, lr=0.5), tuned(plain, lr=0.01), case, plain), 1):
        (group,) = opt.param_groups
        group.update({key: value for key, value in off.items() if key in group} | now.hyper)
        model.cases = [now] * len(params)
        opt.step(normal(t))
        model.step(normal(t))
        model.check(opt)


@every_engine
@pytest.mark.parametrize("class_name", ["Adam", "AdamW"])
def test_amsgrad_is_not_lost(class_name, engine):
    """The maximum is kept from step to step: long after one huge gradient the steps are still small."""
    moved = {}
    for amsgrad in (True, False):
        p = np.zeros(1)
        opt = optimizer(engine, Case(class_name.lower(), ()), p, betas=(0.5, 0.5), weight_decay=0, amsgrad=amsgrad)
        for g in [1e3] + [1e-3] * 60:
            before = p.copy()
            opt.step(np.array([g]))
        moved[amsgrad] = abs(p - before)
    assert moved[True] < moved[False] / 1e5


@every_engine
@every_rule
def test_schedules(case, engine):
    """`lr` is called with the 1-based step of the parameters, once for those of one count, as optax's schedules are."""
    calls = []

    def schedule(count):
        calls.append(count)
        return np.asarray(0.1 / count, np.float32)  # a 0-d array, as optax's are

    params = normal(0)
    scheduled = tuned(case, lr=schedule)
    opt = optimizer(engine, scheduled, params)
    assert not calls, "a schedule that is called before the first step counts a step too many"
    model = Model(params, [tuned(case, lr=lambda count: np.float32(0.1 / count))] * len(params))
    for t, skipped in ((1, None), (2, 3), (3, None)):
        grads = [None if i == skipped else g for i, g in enumerate(normal(t))]
        opt.step(grads)
        model.step(grads)
        model.check(opt)
    assert calls == [1, 2, 3, 2]


@every_engine
@every_rule
def test_step_that_raises_changes_nothing(case, engine):
    """Not a byte and not a count, also where the last gradient alone is wrong; the next step is as if it never was."""
    shared = normal(0, [(40,)], [DTYPES[-1]])[0]
    params = [*normal(0)[:-1], shared[:10].reshape(2, 5)]
    model = Model(params, [case] * len(params))
    opt = optimizer(engine, case, params, state_dtype=None)
    good, (*most, _) = normal(2), normal(1)
    bad = {
        "shape": ([*most, np.zeros((5, 2), "f4")], ValueError, r"grads\[4\]: expected shape"),
        "broadcast": ([*most, np.zeros(5, "f4")], ValueError, r"grads\[4\]: expected shape"),
        "length": (most, ValueError, "grads: expected 5 entries"),
        "dtype": ([*most, np.zeros((2, 5), "i4")], TypeError, r"grads\[4\]: expected dtype"),
        "list": ([*most, 1.0], TypeError, r"grads\[4\]: expected a NumPy array or a tensor"),
        "masked": ([*most, np.ma.zeros((2, 5))], TypeError, r"grads\[4\]: .*masked"),
        "form": (dict(enumerate(normal(1))), ValueError, "grads: expected a list"),
        "None": (None, ValueError, "grads: expected a list"),
        "array": (normal(1)[0], ValueError, "grads: expected a list"),
        "a parameter": ([*most, params[-1]], ValueError, r"grads\[4\].*params\[4\]|params\[4\].*grads\[4\]"),
        "part of a parameter": ([*most, shared[9:19].reshape(2, 5)], ValueError, r"overlaps"),
    }
    for t in (1, 2):
        for grads, error, message in bad.values():
            before = flat_bytes(opt)
            with pytest.raises(error, match=message):
                opt.step(grads)
            assert flat_bytes(opt) == before
        opt.step(good)
        model.step(good)
        model.check(opt)
        if t == 1 and case.states:  # and with a gradient that is one of the states, which live since this step
            for key in opt.state[4].keys() - {"step"}:
                before = flat_bytes(opt)
                with pytest.raises(ValueError, match=r"grads\[4\]"):
                    opt.step([*most, opt.state[4][key]])
                assert flat_bytes(opt) == before


@every_engine
@every_rule
def test_hyperparameter_that_went_wrong_changes_nothing(case, engine):
    """Set in a group after construction, or what a schedule returns or raises: the last group's alone is enough."""

    class Stop(Exception):
        pass

    def raising(step):
        raise Stop

    first, last = normal(0), normal(1)
    model = Model([*first, *last], [case] * 2 * len(first))
    opt = optimizer(engine, case, [{"params": first}, {"params": last}])
    grads = [*normal(2), *normal(3)]
    opt.step(grads)
    model.step(grads)
    lr = case.hyper["lr"]
    for bad, error in (
        (raising, Stop),
        (-0.1, ValueError),
        (lambda step: float("nan"), ValueError),
        (lambda step: -1.0, ValueError),
        (lambda step: "0.1", TypeError),
        (lambda step: None, TypeError),
    ):
        before = flat_bytes(opt)
        opt.param_groups[1]["lr"] = bad
        with pytest.raises(error, match=None if error is Stop else "^lr: expected"):
            opt.step(grads)
        assert flat_bytes(opt) == before
    opt.param_groups[1]["lr"] = lr
    opt.step(grads)
    model.step(grads)
    model.check(opt)


@every_engine
def test_failed_step_leaves_no_new_state(engine):
    """Switching amsgrad on calls for a state; a step that then fails must not leave it behind."""
    params = normal(0)
    opt = optimizer(engine, Case("adam", ()), params)
    opt.step(normal(1))
    opt.param_groups[0]["amsgrad"] = True
    before = flat_bytes(opt)
    with pytest.raises(ValueError):
        opt.step([*normal(1)[:-1], np.zeros(3)])
    assert flat_bytes(opt) == before


@every_engine
@every_rule
def test_read_only_since(case, engine):
    """A parameter or state that its owner has made read-only is an error before anything is written."""
    params = normal(0)
    opt = optimizer(engine, case, params)
    opt.step(normal(1))
    for array in (params[-1], *(a for key, a in opt.state[4].items() if key != "step")):
        before = flat_bytes(opt)
        array.setflags(write=False)
        with pytest.raises(ValueError, match="read-only"):
            opt.step(normal(2))
        array.setflags(write=True)
        assert flat_bytes(opt) == before


@every_engine
@every_rule
def test_a_gradient_by_group(case, engine):
    """With several groups the gradients come an entry a group, and messages say where."""
    groups = [{"params": {"w": np.ones(3)}}, {"params": [np.ones(2), np.ones(2)]}]
    opt = optimizer(engine, case, groups)
    good = [{"w": np.ones(3)}, [np.ones(2), None]]
    opt.step(good)
    assert [int(state["step"]) for state in opt.state.values()] == [1, 1]
    for bad, label in (
        ([good[0], [np.ones(2), np.ones(3)]], r"grads\[1\]\[1\]: expected shape"),
        ([{"w": np.ones(4)}, good[1]], r"grads\[0\]\['w'\]: expected shape"),
        ([{"v": np.ones(3)}, good[1]], r"grads\[0\]: expected the keys"),
        ([good[0], [np.ones(2)]], r"grads\[1\]: expected 2"),
        ([good[0]], "grads: expected 2 entries"),
        ([good[0], good[1], good[1]], "grads: expected 2 entries"),
    ):
        before = flat_bytes(opt)
        with pytest.raises(ValueError, match=label):
            opt.step(bad)
        assert flat_bytes(opt) == before


@every_engine
@every_rule
@pytest.mark.parametrize("count", [255, 256, 2**24, 2**31, 2**53 + 1, 2**62])
def test_counts_are_64_bit_integers(case, engine, count):
    """Not the bfloat16 that stays at 256, nor the float32 that stays at 2**24."""
    params = normal(0)
    opt = optimizer(engine, case, params)
    model = Model(params, [case] * len(params))
    opt.step(normal(1))
    model.step(normal(1))
    saved = opt.state_dict()
    for i, state in saved["state"].items():
        state["step"] = np.array(count + i, np.int64)
        model.steps[i] = count + i
    opt.load_state_dict(saved)
    for t in (2, 3):
        opt.step(normal(t))
        model.step(normal(t))
        model.check(opt)
    assert [int(state["step"]) for state in opt.state.values()] == [count + i + 2 for i in range(len(params))]


@every_engine
def test_initial_accumulator_value(engine):
    p, twin, total = np.full(3, 2.0, "f4"), np.full(3, 2.0, "f4"), np.full(3, 0.7, "f4")
    opt = optimizer(engine, Case("adagrad", ()), p, initial_accumulator_value=0.7)
    opt.step(np.ones(3, "f4"))
    Case("adagrad", ()).step(fastgd.reference, twin, np.ones(3, "f4"), [total], 1)
    assert_same_bits(p, twin)
    assert_same_bits(opt.state[0]["sum"], total)
    for bad in (-1.0, float("nan"), "1"):
        with pytest.raises((ValueError, TypeError), match=r"^initial_accumulator_value: expected"):
            fastgd.Adagrad(p, initial_accumulator_value=bad)


@every_rule
def test_constructor_errors(case):
    cls, hyper = getattr(fastgd, case.class_name), case.hyper
    read_only = np.ones(3)
    read_only.setflags(write=False)
    p, whole = np.ones(3), np.ones(9)
    bad = [
        ([], ValueError, "params: expected at least one"),
        ({}, ValueError, "params: expected at least one"),
        (None, TypeError, "params: expected"),
        (1.0, TypeError, "params: expected"),
        (iter([p]), TypeError, "params: expected"),
        ([p, [1.0]], TypeError, r"params\[1\]: expected a NumPy array or a tensor"),
        ({"w": p, "b": None}, TypeError, r"params\['b'\]: expected a NumPy array or a tensor"),
        ([p, np.ones(3, int)], TypeError, r"params\[1\]: expected dtype"),
        (np.ones(3, ">f4"), TypeError, "params: expected a dtype in this machine's byte order"),
        (np.ma.ones(3), TypeError, "params: .*masked"),
        ([p, read_only], ValueError, r"params\[1\]: .*read-only"),
        ([p, p], ValueError, r"the same array"),
        ([whole[:5], whole[4:]], ValueError, r"params\[1\]: .*overlaps params\[0\]"),
        (np.lib.stride_tricks.as_strided(p, (3,), (0,)), ValueError, "params: .*strides"),
        ([{"params": p}, {"lr": 0.1}], ValueError, r"param_groups\[1\]: expected the key 'params'"),
        ([{"params": p}, p], TypeError, r"param_groups\[1\]: expected a dict"),
        ([{"params": p}, {"params": [p[1:]]}], ValueError, r"param_groups\[1\]\['params'\]\[0\]: .*overlaps"),
        ([{"params": p}, {"params": np.ones(1), "lr": -1.0}], ValueError, "lr: expected"),
    ]
    for params, error, message in bad:
        with pytest.raises(error, match=message):
            cls(params, **hyper)
    for name in hyper:
        if name in {"nesterov", "centered", "amsgrad"}:
            continue
        for value, error in ((float("nan"), ValueError), ("a", TypeError)):
            with pytest.raises(error, match=rf"^{name}(\[0\])?: expected"):
                cls(np.ones(3), **hyper | {name: (value, 0.9) if name == "betas" else value})
    with pytest.raises(TypeError, match="learning_rate"):
        cls(np.ones(3), **hyper, learning_rate=0.1)


@every_engine
@every_rule
def test_add_param_group_that_fails_adds_nothing(case, engine):
    p = np.ones(3, "f4")
    model = Model([p], [case])
    opt = optimizer(engine, case, [p])
    for group, error in (
        ({"params": [np.ones(2), p[1:]]}, ValueError),
        ({"params": [np.ones(2), 1.0]}, TypeError),
        ({"params": np.ones(2), "lr": -1.0}, ValueError),
        ({"lr": 0.1}, ValueError),
        ([np.ones(2)], TypeError),
    ):
        with pytest.raises(error):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
    opt.step([np.ones(3)])
    model.step([np.ones(3)])
    model.check(opt)


@every_rule
def test_repr_tells_the_groups(case):
    opt = getattr(fastgd, case.class_name)([{"params": np.ones(3)}, {"params": np.ones(2), "lr": 0.125}], **case.hyper)
    text = repr(opt)
    assert text.startswith(case.class_name)
    assert "Parameter Group 1" in text and "lr: 0.125" in text and "Parameter Group 2" not in text
    assert all(f"{name}: {value}" in text for name, value in case.hyper.items())


@every_rule
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"]
)
def test_duplicates_go_on_alike_and_apart(case, duplicate):
    params = normal(0)
    model = Model(params, [case] * len(params))
    opt = getattr(fastgd, case.class_name)(params, **case.hyper)
    for t in (1, 2):
        opt.step([None if i == t else g for i, g in enumerate(normal(t))])
        model.step([None if i == t else g for i, g in enumerate(normal(t))])
    other = duplicate(opt)
    before = flat_bytes(opt)
    other.step(normal(3))
    assert flat_bytes(opt) == before
    model.step(normal(3))
    model.check(other)


@every_rule
def test_nothing_is_kept_alive(case):
    """Neither by a cycle that only the collector finds, nor by the compiled handle, nor by a failed step."""
    gc.disable()
    try:
        params, grads = normal(0), normal(1)
        opt = getattr(fastgd, case.class_name)(params, **case.hyper | {"lr": lambda step: 0.1})
        opt.step(grads)
        with pytest.raises(ValueError):
            opt.step(grads[:-1])
        dead = [weakref.ref(a) for a in (*params, *grads)]
        dead += [weakref.ref(a) for state in opt.state.values() for key, a in state.items() if key != "step"]
        assert all(ref() is not None for ref in dead[: len(params)])
        del opt, params, grads
        assert [ref() for ref in dead if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "lion"])
def test_constructors_are_torchs(rule):
    """The same names in the same order, up to what torch has beside; keyword-only where torch's are."""
    torch = pytest.importorskip("torch")
    case = Case(rule, ())
    theirs = inspect.signature(getattr(torch.optim, case.class_name)).parameters
    ours = inspect.signature(getattr(fastgd, case.class_name)).parameters
    assert ours.keys() - theirs.keys() - {"capturable"} == {"state_dtype"}
    for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
        shared = [name for name, p in ours.items() if p.kind is kind and name in theirs]
        torchs = [name for name in theirs if name in shared]
        assert shared == torchs
    assert set(TABLE[rule].hyper) < set(ours)
    (group,) = getattr(fastgd, case.class_name)(np.ones(3), lr=1e-3).param_groups
    (torch_group,) = getattr(torch.optim, case.class_name)([torch.ones(3)], lr=1e-3).param_groups
    assert {key: value for key, value in group.items() if key != "params"}.items() <= torch_group.items()


def test_every_rule_has_its_class():
    assert {case.rule for case in FULLEST} == set(RULES)
    assert {case.class_name for case in FULLEST} == {
        name for name in fastgd.__all__ if hasattr(getattr(fastgd, name), "add_param_group")
    }
