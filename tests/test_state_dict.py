"""Saving and resuming: torch's layout both ways, bit-identical, in the dtypes that were saved, or an error."""

from __future__ import annotations

import copy
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits
from cases import CASES, RULES, TABLE, Case, every_case
from classes import SHAPES, Model, every_engine, every_rule, key_of, normal, optimizer, tuned

import fastgd


def through_pickle(saved):
    return pickle.loads(pickle.dumps(saved))


def through_npz(saved):
    """As a user of NumPy saves it: arrays by name in one file, the groups beside them."""
    file = io.BytesIO()
    arrays = {f"{i}.{key}": a for i, state in saved["state"].items() for key, a in state.items()}
    np.savez(file, groups=np.array(repr(saved["param_groups"])), **arrays)
    file.seek(0)
    state = {}
    with np.load(file) as loaded:
        groups = eval(str(loaded["groups"]))
        for name in loaded.files:
            if name != "groups":
                i, _, key = name.partition(".")
                state.setdefault(int(i), {})[key] = loaded[name]
    return {"state": state, "param_groups": groups}


def trained(engine, case, steps=3, **more):
    """Parameters and an optimizer some steps on its way; one parameter has skipped a step, one has not begun."""
    params = normal(0)
    opt = optimizer(engine, case, params, **more)
    for t in range(1, steps + 1):
        opt.step(grads(t))
    return params, opt


def grads(t):
    return [None if (i == 1 and t == 2) or (i == 4 and t <= 3) else g for i, g in enumerate(normal(t))]


def everything(opt):
    """The bytes of all that loading may change."""
    params = [p.tobytes() for group in opt.param_groups for p in group["params"]]
    states = {i: {k: (a.dtype, a.tobytes()) for k, a in state.items()} for i, state in opt.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return params, states, groups


@every_engine
@every_case
@pytest.mark.parametrize("through", [through_pickle, through_npz, copy.deepcopy])
def test_resume_is_bit_identical(case, engine, through):
    params, opt = trained(engine, case)
    if through is through_npz:  # which knows no bfloat16; its parameter has no state yet
        assert all(a.dtype.kind != "V" for state in opt.state.values() for a in state.values())
    saved_params, saved = copy.deepcopy(params), through(opt.state_dict())

    other = optimizer(engine, tuned(case, lr=99.0, maximize=not case.maximize), saved_params)
    other.load_state_dict(saved)
    for t in range(4, 7):
        opt.step(grads(t))
        other.step(grads(t))
    assert everything(other) == everything(opt)
    assert list(other.state) == [0, 1, 2, 3, 4]


@every_engine
@every_rule
def test_layout(case, engine):
    """torch's: indices run on over the groups, hyperparameters lie beside them, what has not stepped has no state."""
    groups = [{"params": normal(0)[:2]}, {"params": normal(0)[3:], "lr": 0.5}, {"params": np.ones(2)}]
    opt = optimizer(engine, case, groups)
    opt.step([*normal(1)[:2], None, normal(1)[4], np.ones(2)])
    saved = opt.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert list(saved["state"]) == [0, 1, 3, 4]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3], [4]]
    for group, lr in zip(saved["param_groups"], (case.hyper["lr"], 0.5, case.hyper["lr"]), strict=True):
        assert case.hyper.items() - {"lr": 0}.items() <= {**group, "lr": case.hyper["lr"]}.items()
        assert group["lr"] == lr
    for i, state in saved["state"].items():
        assert set(state) == {"step", *map(key_of, case.states)}
        assert state["step"] == 1
        for key in state.keys() - {"step"}:
            assert state[key] is opt.state[i][key], "as torch's, not copied"


@every_engine
@every_rule
def test_saved_dtype_is_kept(case, engine):
    """float32 state of bfloat16 and float16 parameters is not recast to the parameter's dtype, as torch does it."""
    low = [np.float16, ml_dtypes.bfloat16]
    params, twins = (normal(0, SHAPES[:2], low) for _ in range(2))
    opt = optimizer(engine, case, params, state_dtype=np.float32)
    opt.step(normal(1, SHAPES[:2], low))
    for state_dtype in (None, np.float32, np.float64):  # of the new instance: for states that are yet to come
        for twin, p in zip(twins, params, strict=True):
            twin[...] = p
        other = optimizer(engine, case, twins, state_dtype=state_dtype)
        other.load_state_dict(through_pickle(opt.state_dict()))
        assert everything(other) == everything(opt)
        if case.states:
            assert {a.dtype.name for s in other.state.values() for k, a in s.items() if k != "step"} == {"float32"}
    opt.step(normal(2, SHAPES[:2], low))
    other.step(normal(2, SHAPES[:2], low))
    assert everything(other) == everything(opt)


@every_engine
@every_rule
def test_loaded_arrays_are_copies_in_any_layout(case, engine):
    """What was loaded from does not change with the steps, may be read-only, broadcast, or transposed."""
    params, opt = trained(engine, case)
    saved = through_pickle(opt.state_dict())
    for state in saved["state"].values():
        for key in state:
            if state[key].ndim == 2:
                state[key] = np.asfortranarray(state[key])
            state[key].setflags(write=False)
    before = pickle.dumps(saved)
    other = optimizer(engine, case, copy.deepcopy(params))
    other.load_state_dict(saved)
    assert everything(other) == everything(opt)
    opt.step(grads(4))
    other.step(grads(4))
    assert everything(other) == everything(opt)
    assert pickle.dumps(saved) == before


@every_engine
@every_rule
def test_loading_an_earlier_state(case, engine):
    """Rolling back, also to the very beginning, and loading what oneself gave."""
    params, opt = trained(engine, case, steps=0)
    start = copy.deepcopy((params, opt.state_dict()))
    opt.step(grads(1))
    first = copy.deepcopy((params, opt.state_dict(), everything(opt)))
    opt.step(grads(2))
    opt.load_state_dict(opt.state_dict())
    opt.step(grads(3))
    third = everything(opt)

    for p, old in zip(params, first[0], strict=True):
        p[...] = old
    opt.load_state_dict(first[1])
    assert everything(opt) == first[2]
    opt.step(grads(2))
    opt.step(grads(3))
    assert everything(opt) == third

    for p, old in zip(params, start[0], strict=True):
        p[...] = old
    opt.load_state_dict(start[1])
    assert opt.state == {}
    for t in (1, 2, 3):
        opt.step(grads(t))
    assert everything(opt) == third


@every_engine
@every_rule
def test_a_schedule_stays(case, engine):
    """It is not in the file, for it cannot be: its last value is; and a group with a schedule keeps it."""
    scheduled = tuned(case, lr=lambda step: 0.5 / step)
    params = normal(0)
    opt = optimizer(engine, scheduled, params)
    for t in (1, 2, 3):
        opt.step(normal(t))
    saved = through_pickle(opt.state_dict())
    assert saved["param_groups"][0]["lr"] == 0.5 / 3
    other = optimizer(engine, scheduled, copy.deepcopy(params))
    other.load_state_dict(saved)
    opt.step(normal(4))
    other.step(normal(4))
    assert everything(other) == everything(opt)
    plain = optimizer(engine, case, params)
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["lr"] == 0.5 / 3


def spoilt(case):
    """Broken state dicts: what is done to a good one, the error, words of the message."""
    state = next(map(key_of, case.states), None)

    def entry(i, **more):
        return lambda saved: saved["state"][i].update(more)

    def group(**more):
        return lambda saved: saved["param_groups"][-1].update(more)

    yield lambda saved: saved.pop("state"), ValueError, "'state'"
    yield lambda saved: saved.pop("param_groups"), ValueError, "'param_groups'"
    yield lambda saved: saved["param_groups"].append(saved["param_groups"][0]), ValueError, "expected 1 groups, got 2"
    yield lambda saved: saved["param_groups"].clear(), ValueError, "got 0"
    yield lambda saved: saved["param_groups"][0].pop("params"), ValueError, "'params'"
    yield lambda saved: saved["param_groups"][0]["params"].pop(), ValueError, "expected 5 parameters, got 4"
    yield lambda saved: saved["param_groups"][0]["params"].append(9), ValueError, "expected 5 parameters, got 6"
    yield group(params=[0, 1, 2, 3, 3]), ValueError, "twice"
    yield group(lr=-1.0), ValueError, "lr: expected"
    yield group(lr=float("nan")), ValueError, "lr: expected"
    yield group(lr="0.1"), TypeError, "lr: expected"
    yield lambda saved: saved["state"].update({9: saved["state"][3]}), ValueError, "state_dict['state'][9]"
    yield lambda saved: saved["state"].update({3: 1.0}), TypeError, "state_dict['state'][3]"
    yield entry(3, other=np.zeros(1500)), ValueError, "'other'"
    for step in (-1, 2.5, float("nan"), float("inf"), 2**63):
        yield entry(3, step=step), ValueError, "state_dict['state'][3]['step']: expected"
    for step in ("3", None, 3j, [3], np.array([3, 3])):
        yield entry(3, step=step), TypeError, "state_dict['state'][3]['step']: expected"
    if TABLE[case.rule].counts and case.rule != "sgd":
        yield lambda saved: saved["state"][3].pop("step"), ValueError, "state_dict['state'][3]: missing key 'step'"
    if state:
        where = f"state_dict['state'][3]['{state}']: expected"
        yield entry(3, **{state: np.zeros(1501, "f4")}), ValueError, where
        yield entry(3, **{state: np.zeros(1, "f4")}), ValueError, where
        yield entry(3, **{state: np.zeros(1500, int)}), TypeError, where
        yield entry(3, **{state: np.zeros(1500, ">f4")}), TypeError, where
        yield entry(3, **{state: np.ma.zeros(1500)}), TypeError, where
        yield entry(3, **{state: [0.0] * 1500}), TypeError, where
        yield lambda saved: saved["state"][3].pop(state), ValueError, f"state_dict['state'][3]: missing key '{state}'"


@every_engine
@every_rule
def test_what_does_not_fit_changes_nothing(case, engine):
    _, opt = trained(engine, case)
    _, reference = trained(engine, case)
    for i, (spoil, error, message) in enumerate(spoilt(case)):
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0]["step"] = np.array(77)  # a good one before the bad
        spoil(saved)
        before = everything(opt)
        with pytest.raises(error) as caught:
            opt.load_state_dict(saved)
        assert message in str(caught.value), i
        assert everything(opt) == before, i
    for bad in (None, [], "state", {}):
        with pytest.raises(ValueError, match="state_dict: expected a dict"):
            opt.load_state_dict(bad)
    opt.step(grads(4))
    reference.step(grads(4))
    assert everything(opt) == everything(reference)


@every_engine
@every_rule
@pytest.mark.parametrize("step", [np.float32(7), 7.0, np.array(7.0, "f4"), np.int64(7), 7, "tensor"], ids=repr)
def test_steps_as_others_save_them(case, engine, step):
    """torch saves a 0-d float32 tensor."""
    step = pytest.importorskip("torch").tensor(7.0) if isinstance(step, str) else step
    _, opt = trained(engine, case)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][3]["step"] = step
    opt.load_state_dict(saved)
    assert opt.state[3]["step"] == 7 and opt.state[3]["step"].dtype == np.int64


@every_engine
@every_rule
def test_indices_are_only_names(case, engine):
    """A dict whose parameters have other ids, as some tools write it."""
    params, opt = trained(engine, case)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["params"] = [f"layer{i}" for i in range(5)]
    saved["state"] = {f"layer{i}": saved["state"][i] for i in reversed(list(saved["state"]))}
    other = optimizer(engine, case, params)
    other.load_state_dict(saved)
    assert everything(other) == everything(opt)


TORCHS = [case for case in CASES if case.rule != "lion"]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@every_engine
@pytest.mark.parametrize("case", TORCHS, ids=str)
def test_torch_and_back(case, engine, torch):
    """float64, some steps here, some in torch's plain loop, some here: as all of them here."""
    shapes, dtypes = [(4, 3), (), (7,)], [np.float64] * 3
    params, alone = (normal(0, shapes, dtypes) for _ in range(2))
    model = Model(alone, [case] * 3)
    opt = optimizer(engine, case, params)
    for t in (1, 2):
        opt.step(normal(t, shapes, dtypes))
        model.step(normal(t, shapes, dtypes))

    tensors = [torch.from_numpy(p).requires_grad_() for p in params]
    peer = getattr(torch.optim, case.class_name)(tensors, lr=99.0, foreach=False)
    saved = opt.state_dict()
    saved["state"] = {
        i: {key: torch.tensor(float(a)) if key == "step" else torch.from_numpy(a) for key, a in state.items()}
        for i, state in saved["state"].items()
    }
    peer.load_state_dict(saved)
    for t in (3, 4):
        for x, g in zip(tensors, normal(t, shapes, dtypes), strict=True):
            x.grad = torch.from_numpy(g)
        peer.step()
        model.step(normal(t, shapes, dtypes))

    back = optimizer(engine, Case(case.rule, ()), [x.detach().numpy() for x in tensors])
    back.load_state_dict(peer.state_dict())
    back.step(normal(5, shapes, dtypes))
    model.step(normal(5, shapes, dtypes))
    for p, expected in zip(params, model.params, strict=True):
        # As in test_truth: the two order operations differently, 1e-16 an operation; a state lost is off by lr.
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-12)
    for i, state in back.state.items():
        for key, expected in model.states[i].items():
            np.testing.assert_allclose(state[key], expected, rtol=1e-12, atol=1e-12)
    if case.rule != "sgd":  # torch's SGD counts no steps
        assert [int(state["step"]) for state in back.state.values()] == [5, 5, 5]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "lion"])
def test_torchs_keys(rule, torch):
    """The names of groups and states, over all variants of the rule."""
    for case in (case for case in TORCHS if case.rule == rule):
        opt = optimizer(fastgd.engine.active, case, [np.ones(3, "f4")])
        x = torch.ones(3, requires_grad=True)
        peer = getattr(torch.optim, case.class_name)([x], **case.hyper, foreach=False)
        opt.step([np.ones(3, "f4")])
        x.grad = torch.ones(3)
        peer.step()
        ours, theirs = opt.state_dict(), peer.state_dict()
        assert ours["param_groups"][0].items() <= theirs["param_groups"][0].items()
        kept = {key for key, value in theirs["state"].get(0, {}).items() if value is not None}
        assert set(ours["state"][0]) == kept | {"step"}
        if kept >= {"step"}:
            assert ours["state"][0]["step"] == theirs["state"][0]["step"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torchs_state_keeps_its_values(dtype, torch):
    """Straight from torch's dict, a tensor at a time, bit for bit."""
    x = torch.ones(50, dtype=getattr(torch, dtype), requires_grad=True)
    x.grad = torch.linspace(-1, 1, 50, dtype=x.dtype)
    peer = torch.optim.AdamW([x], amsgrad=True, foreach=False)
    peer.step()
    opt = fastgd.AdamW([x.detach().numpy()])
    opt.load_state_dict(peer.state_dict())
    assert opt.param_groups[0]["amsgrad"] is True
    for key, tensor in peer.state[x].items():
        if key != "step":
            assert_same_bits(opt.state[0][key], tensor.numpy())
