"""The one pass: whatever is asked for beside the step, the twin's bits, torch's values, and nothing that was not asked.

The arrays of a call lie in a dict of roles: params, grads, states, ema and copies, a list each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    MIXES,
    assert_only_views_moved,
    assert_same_bits,
    is_nan,
    remember,
    run_python,
    values,
)
from cases import CASES, TABLE, Case, every_case
from classes import every_engine, every_rule, optimizer, tuned
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_errors import DTYPES as ERROR_DTYPES
from test_errors import (
    LAST,
    NOT_ARRAYS,
    OTHER_DTYPES,
    SHAPES,
    SHARED,
    Call,
    as_form,
    interlocked,
    read_only,
    snapshot,
    stride_zero,
    windows,
)
from test_errors import every_engine as every_module
from test_layouts import LAYOUTS
from test_layouts import SHAPE as LAYOUT_SHAPE
from test_properties import SEED, SETTINGS, views
from test_truth import TOLERANCE

import fastgd
from fastgd import _core, reference

FLAGS = {"skip_nonfinite": True, "zero_grads": True, "stats": True}
SCALARS: dict[str, Any] = {"grad_scale": 3.7, "max_norm": 0.9, **FLAGS}
EXTRAS = (*SCALARS, "ema", "copies")
COMBINATIONS = [(e,) for e in EXTRAS] + [tuple(e for e in EXTRAS if e != without) for without in (None, *EXTRAS)]

Roles = dict[str, list[Any]]


def tame(a: Any) -> Any:
    """The same array with what is not finite, or so large that a sum of squares overflows, made small."""
    with np.errstate(all="ignore"):
        wide = a.astype(F64)
        a[...] = np.where(np.abs(wide) < 1e4, wide, 0.37).astype(a.dtype)
    return a


def copy_dtypes(param: np.dtype[Any]) -> list[np.dtype[Any]]:
    """Those that a copy of a parameter may have."""
    return [d for d in (BF16, F16, F32) if d.itemsize <= param.itemsize]


def problem(case: Case, shapes: Sequence[Any], mixes: Sequence[Sequence[Any]], wild: bool = False) -> Roles:
    """Arrays for a call: those of each parameter of one of the mixes, every seventh without a gradient."""
    roles: Roles = {name: [] for name in ("params", "grads", *case.states, "ema", "copies")}
    for i, shape in enumerate(shapes):
        param, grad, state = mixes[i % len(mixes)]
        copies = copy_dtypes(param)
        dtypes = [param, grad, *[state] * len(case.states), state, copies[i % len(copies)]]
        for k, (role, dtype) in enumerate(zip(roles, dtypes, strict=True)):
            a = values(shape, dtype, 10 * i + k)
            roles[role].append(a if wild else tame(a))
        if i % 7 == 6:
            roles["grads"][i] = None
    return roles


def copied(roles: Roles) -> Roles:
    return {name: [None if a is None else np.array(a) for a in arrays] for name, arrays in roles.items()}


def asked(extras: Iterable[str], roles: Roles) -> dict[str, Any]:
    """The keywords of a call."""
    keywords = {name: SCALARS[name] if name in SCALARS else roles[name] for name in extras}
    return keywords | ({"ema_decay": 0.97} if "ema" in keywords else {})


def take(module: Any, case: Case, roles: Roles, step: Any = 3, **one_pass: Any) -> Any:
    """A step of ``fastgd`` or ``fastgd.reference``, and what it returns."""
    hyper = {name: value for name, value in case.hyper.items() if name != "amsgrad"}  # seen by its state
    if TABLE[case.rule].counts:
        hyper["step"] = step
    states = {name: roles[name] for name in case.states}
    return getattr(module, f"{case.rule}_step")(roles["params"], roles["grads"], **states, **hyper, **one_pass)


def told(stats: Any) -> str:
    """What a call returned, to the last bit; every NaN is alike."""
    return "None" if stats is None else repr(stats.to_dict())


def assert_same(actual: Roles, expected: Roles, what: str) -> None:
    for name in actual:
        for i, (a, e) in enumerate(zip(actual[name], expected[name], strict=True)):
            if a is not None or e is not None:
                assert_same_bits(a, e, f"{what}: {name}[{i}]")


def assert_twin(case: Case, roles: Roles, extras: Iterable[str], what: str = "") -> Any:
    """Take a compiled step; arrays and StepStats have the twin's bits."""
    twins = copied(roles)
    before = copied(roles)
    actual = take(fastgd, case, roles, **asked(extras, roles))
    expected = take(reference, case, twins, **asked(extras, twins))
    what = f"{case} {'+'.join(extras)} {what}"
    assert told(actual) == told(expected), what
    assert_same(roles, twins, what)
    for name in {"ema", "copies"} - set(extras):
        assert_same({name: roles[name]}, before, what)
    for g, old in zip(roles["grads"], before["grads"], strict=True):
        if g is not None and "zero_grads" not in extras:
            assert_same_bits(g, old, what)
    return actual


# Around the tree's block of 1024, its 16 lanes and a tile; empty; without a gradient.
SIZES = [1, 0, 15, 16, 17, 300, 255, 1023, 1024, 1025, 0, 2047, (3, 700), 513, (), 5000]


@pytest.mark.parametrize("extras", COMBINATIONS, ids="+".join)
@every_case
def test_every_extra_alone_and_with_the_others(case, extras):
    roles = problem(case, SIZES, MIXES)
    before = copied(roles)
    stats = assert_twin(case, roles, extras)
    assert (stats is None) == (not {"stats", "skip_nonfinite"} & set(extras))
    for i, g in enumerate(roles["grads"]):
        if g is None:
            for name in set(roles) - {"grads"}:
                assert_same_bits(roles[name][i], before[name][i], f"{name}[{i}] has no gradient")
        elif "zero_grads" in extras:
            assert not np.signbit(g.astype(F64)).any() and not g.any()


@pytest.mark.parametrize("dtypes", [(p, g, s) for p in DTYPES for g in DTYPES for s in DTYPES], ids=str)
def test_every_mix_of_dtypes(dtypes):
    for case in CASES:
        if not case.maximize:
            for dtype in copy_dtypes(dtypes[0]):
                roles = problem(case, [1300], [dtypes])
                roles["copies"] = [values(1300, dtype, 5)]
                assert_twin(case, roles, EXTRAS)


@pytest.mark.parametrize("extras", COMBINATIONS, ids="+".join)
@every_rule
def test_values_that_provoke(case, extras):
    """Zeros, subnormals, huge, inf and NaN: also in the norm, the factor and the counts."""
    for i, mix in enumerate(MIXES):
        whole = problem(case, [700, 1024], [mix], wild=True)
        stats = assert_twin(case, whole, extras)
        if stats is not None:
            assert stats.nonfinite > 0 and stats.skipped == ("skip_nonfinite" in extras)
        if i == 0:  # the sum of squares overflows, and nothing is not finite
            huge = problem(case, [100], [mix])
            huge["grads"][0][7] = 1e200
            stats = assert_twin(case, huge, extras)
            assert stats is None or (stats.nonfinite == 0 and stats.grad_norm in (math.inf, None))


@every_rule
def test_gradient_beyond_the_compute_type_is_not_finite(case):
    roles = problem(case, [5], [(F32, F64, F32)])
    roles["grads"][0][3] = 1e39
    stats = assert_twin(case, roles, ["skip_nonfinite", "stats"])
    assert stats.skipped and stats.nonfinite == 1


@every_case
def test_neutral_values_are_the_plain_step(case):
    """A scale of one, a norm that is not reached, and no more."""
    plain, neutral = (problem(case, SIZES, MIXES) for _ in "ab")
    stats = take(fastgd, case, neutral, grad_scale=1.0, max_norm=1e9, skip_nonfinite=True, zero_grads=False, stats=True)
    assert take(fastgd, case, plain) is None
    assert stats.clip_factor == 1.0 and stats.nonfinite == 0
    assert_same(neutral, plain, "neutral")
    assert take(fastgd, case, neutral, max_norm=None, ema=None, ema_decay=None, copies=None, stats=False) is None
    take(fastgd, case, plain)
    assert_same(neutral, plain, "none")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@every_rule
def test_threads_and_lists(case, threads, set_threads):
    """Parts of threads begin and end anywhere in a list; sums are cut by blocks all the same."""
    set_threads(threads)
    rng = np.random.default_rng(3)
    for sizes in (rng.integers(0, 9000, 60) * rng.choice([0, 1, 1, 1], 60), [1 << 18 | 3], [1023, 200_000, 1]):
        for extras in (EXTRAS, ("stats",), ("max_norm",), ("skip_nonfinite",)):
            assert_twin(case, problem(case, sizes.tolist() if len(sizes) > 9 else sizes, MIXES), extras, str(threads))


def digest(module: Any) -> str:
    """A fingerprint of every case with every extra, and of what it tells."""
    total = hashlib.sha256()
    for case in CASES:
        roles = problem(case, [2311, 40], MIXES[:2] if case.maximize else MIXES)
        total.update(told(take(module, case, roles, **asked(EXTRAS, roles))).encode())
        for a in (a for arrays in roles.values() for a in arrays if a is not None):
            total.update(np.where(is_nan(a), 0, a.ravel().view(f"u{a.itemsize}")).tobytes())
    return total.hexdigest()


def test_every_isa_has_the_twins_bits():
    expected = digest(reference)
    for isa in _core.available_isas():
        code = "import test_one_pass, fastgd; print(fastgd.config()['isa'], test_one_pass.digest(fastgd))"
        done = run_python(code, FASTGD_ISA=isa)
        assert done.stdout.split() == [isa, expected], done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@every_rule
def test_layouts(case, layout):
    """Bits and norms of contiguous arrays, and no byte moved beside the views, zeroed gradients included."""
    for i, other in enumerate(LAYOUTS):
        for extras in (EXTRAS, ("stats",), ("max_norm", "stats")):
            contiguous = problem(case, [LAYOUT_SHAPE], [MIXES[i % len(MIXES)]])
            names = {name: layout if k % 2 else other for k, name in enumerate(contiguous)}
            placed = {name: LAYOUTS[names[name]](arrays[0]) for name, arrays in contiguous.items()}
            before = remember(list(placed.values()))
            roles = {name: [view] for name, (view, _) in placed.items()}
            expected = take(reference, case, contiguous, **asked(extras, contiguous))
            actual = take(fastgd, case, roles, **asked(extras, roles))
            assert told(actual) == told(expected), f"{other} {extras}"
            assert_same(roles, contiguous, f"{other} {extras}")
            assert_only_views_moved(list(placed.values()), before, other)


@pytest.mark.parametrize("axes", [(0,), (2,), (0, 1, 2)], ids=str)
@every_rule
def test_broadcast_and_read_only_gradients(case, axes):
    shape = (5, 40, 30)
    for mix in MIXES:
        roles, dense = (problem(case, [shape], [mix]) for _ in "ab")
        one = tame(values([1 if axis in axes else n for axis, n in enumerate(shape)], mix[1], 3))
        roles["grads"] = [np.broadcast_to(one, shape)]
        dense["grads"] = [np.array(roles["grads"][0])]
        extras = [e for e in EXTRAS if e != "zero_grads"]
        actual = take(fastgd, case, roles, **asked(extras, roles))
        expected = take(reference, case, dense, **asked(extras, dense))
        assert told(actual) == told(expected)
        assert_same(roles, dense, str(mix))


def test_norm_is_of_the_logical_order():
    """Numbers of very different size: any other order of adding them gives other bits."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(70, 90)) * np.exp(rng.normal(size=(70, 90)) * 9)

    def norm(p: Any, g: Any, module: Any = fastgd) -> Any:
        return module.sgd_step(p, g, 0.1, stats=True).grad_norm

    expected = norm(np.zeros_like(g), g)
    assert norm(np.zeros(g.shape), g, reference) == expected
    assert norm(np.zeros_like(g), np.ascontiguousarray(g.T).T) == expected
    assert norm(np.zeros(g.shape, order="F"), np.asfortranarray(g)) == expected
    assert norm(np.zeros(g.shape, order="F"), g) == expected
    assert norm(np.zeros(g.size), g.ravel()) == expected
    assert norm(np.zeros(g.shape).T, g.T) != expected


# The tree, element by element, as it is written down.
def _tree(x: Any) -> float:
    total = group = 0.0
    flat = x.ravel().tolist()
    for start in range(0, len(flat), 1024):
        lanes = [0.0] * 16
        for j, element in enumerate(flat[start : start + 1024]):
            lanes[j % 16] += element * element
        for half in (8, 4, 2, 1):
            lanes = [lanes[j] + lanes[j + half] for j in range(half)]
        if start % (256 * 1024) == 0:
            total, group = total + group, 0.0
        group += lanes[0]
    return total + group


@pytest.mark.parametrize("module", [fastgd, reference], ids=["compiled", "twin"])
def test_the_tree(module):
    rng = np.random.default_rng(0)
    sizes = [*range(40), 1023, 1024, 1025, 3000, 10_000, 256 * 1024, 600_000]
    grads = [rng.normal(size=n) * np.exp(rng.normal(size=n) * 5) for n in sizes]
    stats = module.sgd_step([np.zeros(n) for n in sizes], grads, 0.0, stats=True)
    sums = [_tree(g) for g in grads]
    assert [stats.per_param[i].grad_norm for i in range(len(sizes))] == [math.sqrt(s) for s in sums]
    total = 0.0
    for s in sums:
        total += s
    assert stats.grad_norm == math.sqrt(total)


@st.composite
def calls(draw: Any) -> tuple[Case, dict[str, list[tuple[Any, Any]]], tuple[str, ...], list[bool]]:
    """A case, the arrays of some parameters as views with their memory, what is asked for, and who has no gradient."""
    case = draw(st.sampled_from(CASES))
    extras = tuple(draw(st.sets(st.sampled_from(EXTRAS))))
    wild = draw(st.integers(0, 3)) == 0
    placed: dict[str, list[Any]] = {name: [] for name in ("params", "grads", *case.states, "ema", "copies")}
    count = draw(st.integers(0, 4))
    for _ in range(count):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
        for name, arrays in placed.items():
            dtypes = copy_dtypes(placed["params"][-1][0].dtype) if name == "copies" else DTYPES
            view, base = draw(views(shape, draw(st.sampled_from(dtypes))))
            arrays.append((view if wild else tame(view), base))
    return case, placed, extras, [draw(st.integers(0, 5)) == 0 for _ in range(count)]


@SETTINGS
@given(call=calls(), threads=st.sampled_from([1, 2, 5]), seed=SEED)
def test_any_call(call, threads, seed):
    case, placed, extras, skipped = call
    steps = np.random.default_rng(seed).integers(1, 9, len(skipped)).tolist()
    before = {name: remember(arrays) for name, arrays in placed.items()}
    actual = {name: [view for view, _ in arrays] for name, arrays in placed.items()}
    actual["grads"] = [None if s else g for s, g in zip(skipped, actual["grads"], strict=True)]
    twins = copied(actual)
    previous = fastgd.get_num_threads()
    fastgd.set_num_threads(threads)
    try:
        result = take(fastgd, case, actual, steps, **asked(extras, actual))
    finally:
        fastgd.set_num_threads(previous)
    assert told(result) == told(take(reference, case, twins, steps, **asked(extras, twins)))
    assert_same(actual, twins, f"{case} {extras}")
    for name, arrays in placed.items():
        assert_only_views_moved(arrays, before[name], name)


@every_case
def test_truth(case):
    """Five steps in float64 against torch's separate calls: unscale, clip_grad_norm_, step, lerp_, copy_, zero_."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    shapes, scale, max_norm, decay = [(5, 4), (7,)], 512.0, 1.3, 0.83
    params = [rng.normal(size=s) for s in shapes]
    start = [p.copy() for p in params]
    roles: Roles = {"params": params, "ema": [rng.normal(size=s) for s in shapes]}
    roles |= {name: [np.zeros(s) for s in shapes] for name in case.states}
    roles["copies"] = [np.zeros(s, F32) for s in shapes]
    averages = [torch.tensor(e) for e in roles["ema"]]
    clipped: list[list[Any]] = [[] for _ in shapes]
    for step in range(1, 6):
        # Clipped, except for the gradient of the last step, which is shorter than max_norm.
        unscaled = [rng.normal(size=s) * (0.01 if step == 5 else 1) for s in shapes]
        roles["grads"] = [g * scale for g in unscaled]
        old = [p.copy() for p in params]
        stats = take(
            fastgd,
            case,
            roles,
            step,
            grad_scale=scale,
            max_norm=max_norm,
            skip_nonfinite=True,
            ema=roles["ema"],
            ema_decay=decay,
            copies=roles["copies"],
            zero_grads=True,
            stats=True,
        )

        tensors = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        for tensor, g in zip(tensors, unscaled, strict=True):
            tensor.grad = torch.tensor(g * scale)
        torch._foreach_mul_([tensor.grad for tensor in tensors], 1 / scale)
        norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
        for history, tensor in zip(clipped, tensors, strict=True):
            history.append(tensor.grad.numpy().copy())
        oracle = TABLE[case.rule].oracle
        truth = [oracle(case, p.copy(), np.array(history)) for p, history in zip(start, clipped, strict=True)]
        torch._foreach_lerp_(averages, [torch.tensor(p) for p, *_ in truth], 1 - decay)

        for i, (p, *states) in enumerate(truth):
            np.testing.assert_allclose(params[i], p, **TOLERANCE)
            for name, state in zip(case.states, states, strict=True):
                np.testing.assert_allclose(roles[name][i], state, **TOLERANCE, err_msg=name)
            np.testing.assert_allclose(roles["ema"][i], averages[i].numpy(), **TOLERANCE)
            # Parameters that differ by 1e-12 may round to neighbours in float32, which are 2 ** -23 apart.
            copy = torch.zeros(shapes[i]).copy_(torch.tensor(p)).numpy()
            np.testing.assert_allclose(roles["copies"][i], copy, rtol=2.0**-23)
            assert not roles["grads"][i].any()
        np.testing.assert_allclose(stats.grad_norm, norm.item(), **TOLERANCE)
        assert (stats.clip_factor == 1.0) == (step == 5)
        np.testing.assert_allclose(stats.clip_factor, min(1.0, max_norm / (norm.item() + 1e-6)), **TOLERANCE)
        flat = np.concatenate([p.ravel() for p in params])
        np.testing.assert_allclose(stats.param_norm, np.linalg.norm(flat), **TOLERANCE)
        moved = flat - np.concatenate([p.ravel() for p in old])
        np.testing.assert_allclose(stats.update_norm, np.linalg.norm(moved), **TOLERANCE)
        assert (stats.nonfinite, stats.skipped) == (0, False)


BAD = [(math.nan, 0, 0), (math.inf, -2, -1), (-math.inf, 0, -1)]  # what, in which parameter, at which element


@every_module
@every_case
@pytest.mark.parametrize("bad, index, element", BAD)
def test_skipped_step_never_happened(case, module, bad, index, element):
    """Every byte stays, and the next step is that of a run in which the call was not made."""
    shapes = [1500, (), 3, (4, 5)]
    run, calm = (problem(case, shapes, MIXES) for _ in "ab")
    for step in (1, 2):
        for roles in (run, calm):
            for i, g in enumerate(roles["grads"]):
                g[...] = tame(values(g.shape, g.dtype, 100 * step + i))
        kept = run["grads"][index].flat[element]
        run["grads"][index].flat[element] = bad
        before = snapshot(run)
        stats = take(module, case, run, step, **asked(EXTRAS, run))
        assert stats.skipped and stats.nonfinite == 1 and stats.clip_factor == 1.0 and stats.update_norm == 0.0
        assert snapshot(run) == before
        run["grads"][index].flat[element] = kept
        stats = take(module, case, run, step, **asked(EXTRAS, run))
        assert not stats.skipped and told(stats) == told(take(module, case, calm, step, **asked(EXTRAS, calm)))
        assert_same(run, calm, f"step {step}")


def everything(opt: Any, *more: Any) -> Any:
    """All that a step of an optimizer may change."""
    return snapshot([opt.state_dict(), [group["params"] for group in opt.param_groups], *more])


@every_engine
@every_rule
def test_skipped_step_of_a_class(case, engine):
    """Counts, state and schedule, too; also where the first step of all is skipped."""
    case = tuned(case, lr=lambda step: 0.03 / step)
    run, calm = (problem(case, [1500, (3, 4), ()], [MIXES[0], MIXES[1]]) for _ in "ab")
    opts = [optimizer(engine, case, roles["params"]) for roles in (run, calm)]
    for step in range(1, 4):
        grads = [tame(values(p.shape, p.dtype, 100 * step + i)) for i, p in enumerate(run["params"])]
        bad = [g.copy() for g in grads]
        bad[1][2, 3] = math.inf
        before = everything(opts[0], run, bad)
        stats = opts[0].step(bad, **asked(EXTRAS, run))
        assert stats.skipped and stats.nonfinite == 1
        assert everything(opts[0], run, bad) == before
        for opt, roles in zip(opts, (run, calm), strict=True):
            opt.step([g.copy() for g in grads], **asked(EXTRAS, roles))
        assert_same(run, calm, f"step {step}")
        assert everything(opts[0]) == everything(opts[1])
        assert [int(state["step"]) for state in opts[0].state.values()] == [step] * 3


def in_form(form: str, flat: list[Any]) -> Any:
    """Five entries as one list, one dict, or in two groups of which one is a dict."""
    if form == "list":
        return list(flat)
    if form == "dict":
        return {f"fc{i}": a for i, a in enumerate(flat)}
    return [{"w": flat[0], "b": flat[1]}, tuple(flat[2:])]


@every_engine
@every_rule
@pytest.mark.parametrize("form", ["list", "dict", "groups", "groups of flat"])
def test_classes_do_what_the_functions_do(case, engine, form):
    """All forms of gradients, averages and copies; each parameter counts its own steps."""
    shapes = [(4, 3), (), (0,), (1500,), (2, 5)]
    actual, expected = (problem(case, shapes, MIXES) for _ in "ab")
    params = in_form(form.partition(" ")[0], actual["params"])
    opt = optimizer(engine, case, [{"params": p} for p in params] if "groups" in form else params)
    for name in case.states:
        expected[name] = [np.zeros(p.shape, p.dtype) for p in expected["params"]]
    form = form if form != "groups of flat" else "list"
    counts = [0] * 5
    for step in range(1, 4):
        for roles in (actual, expected):
            roles["grads"] = [
                None if i == step else tame(values(s, MIXES[i][1], 100 * step + i)) for i, s in enumerate(shapes)
            ]
        counts = [n + (g is not None) for n, g in zip(counts, actual["grads"], strict=True)]
        extras = EXTRAS if step != 2 else [e for e in EXTRAS if e != "stats"]
        formed = {name: in_form(form, actual[name]) for name in ("grads", "ema", "copies")}
        stats = opt.step(formed["grads"], **asked(extras, formed))
        twin = take(reference, case, expected, [max(1, n) for n in counts], **asked(extras, expected))
        if form == "dict" and twin.per_param is not None:
            assert list(stats.per_param) == [f"fc{i}" for i in twin.per_param]
            assert [*stats.per_param.values()] == [*twin.per_param.values()]
        else:
            assert told(stats) == told(twin)
        assert repr(stats) == repr(twin)
        for i, state in opt.state.items():
            for name, a in zip(case.states, [a for key, a in state.items() if key != "step"], strict=True):
                assert_same_bits(a, expected[name][i], f"{name}[{i}]")
        for name in ("params", "grads", "ema", "copies"):
            assert_same({name: actual[name]}, expected, f"step {step}")


@every_engine
@every_rule
def test_nothing_to_step(case, engine):
    """No gradient at all, and no parameter at all."""
    roles = problem(case, [3, 4], MIXES)
    roles["grads"] = [None, None]
    before = snapshot(roles)
    stats = optimizer(engine, case, roles["params"]).step(roles["grads"], **asked(EXTRAS, roles))
    assert snapshot(roles) == before
    assert (stats.grad_norm, stats.clip_factor, stats.nonfinite, stats.skipped) == (0.0, 1.0, 0, False)
    assert stats.per_param == {}
    empty: Roles = {name: [] for name in roles}
    for module in (fastgd, reference):
        assert told(take(module, case, empty, **asked(EXTRAS, empty))) == told(stats)


class Asking(Call):
    """A good call with all extras, to be spoiled; every array of it is written."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for k, (name, dtypes) in enumerate((("ema", ERROR_DTYPES), ("copies", ["f4", "f4", "f2", "f4", "f2", "f4"]))):
            self.roles[name] = [values(s, np.dtype(d), 20 + k) for s, d in zip(SHAPES, dtypes, strict=True)]

    @property
    def written(self) -> list[str]:
        return list(self.roles)

    def take(self, module: Any, **more: Any) -> None:
        params, grads, *states, ema, copies = self.roles.values()
        extras: dict[str, Any] = {"ema": ema, "ema_decay": 0.9, "copies": copies} | SCALARS | more
        tuned(self.case, **extras).step(module, params, grads, states, self.step)


def test_the_call_that_is_spoiled_is_good():
    for case in CASES:
        for module in (fastgd, reference):
            Asking(case).take(module)


@every_module
@every_rule
@pytest.mark.parametrize("kind", NOT_ARRAYS)
def test_extra_that_is_no_array(case, module, kind):
    make, *words = NOT_ARRAYS[kind]
    for role in ("ema", "copies"):
        call = Asking(case)
        call.roles[role][LAST] = make(call.roles[role][LAST])
        call.raises(module, TypeError, f"{role}[{LAST}]: expected ", *words)
        call.roles["grads"][LAST] = None  # also where it would not be touched
        call.raises(module, TypeError, f"{role}[{LAST}]: expected ", *words)


@every_module
@every_rule
@pytest.mark.parametrize("dtype", [*OTHER_DTYPES, "f8"], ids=str)
def test_extra_of_an_unsupported_dtype(case, module, dtype):
    """float64 is one for a copy."""
    dtype = np.dtype(dtype)
    if dtype == np.longdouble == np.float64:
        return  # on this platform a long double is a double
    for role in ("copies",) if dtype == F64 else ("ema", "copies"):
        call = Asking(case)
        call.roles[role][LAST] = np.zeros(SHAPES[LAST], dtype)
        got = str(dtype) if dtype.isnative else dtype.str
        call.raises(module, TypeError, f"{role}[{LAST}]: expected ", "dtype", got)


@every_module
@every_rule
@pytest.mark.parametrize("param", [np.float16, ml_dtypes.bfloat16])
def test_copy_of_a_wider_dtype(case, module, param):
    call = Asking(case)
    for role in (*call.case.states, "params", "grads", "ema", "copies"):
        call.roles[role][LAST] = np.zeros(SHAPES[LAST], param)
    call.take(module)
    call.roles["copies"][LAST] = np.zeros(SHAPES[LAST], F32)
    call.raises(module, ValueError, f"copies[{LAST}]: expected a dtype no wider", "float32", np.dtype(param).name)


@every_module
@every_rule
@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 1), (3,), (), (0, 3), (5, 3)], ids=str)
def test_extra_of_another_shape(case, module, shape):
    for role in ("ema", "copies"):
        call = Asking(case)
        call.roles[role][LAST] = np.ones(shape, "f4")
        call.raises(module, ValueError, f"{role}[{LAST}]: expected shape", str(shape), "(4, 3)")


@every_module
@every_rule
def test_extra_of_another_length_form_or_other_keys(case, module):
    for role in ("ema", "copies"):
        for change in (lambda x: x[:-1], lambda x: x + x[-1:], lambda x: x[:0]):
            call = Asking(case)
            call.roles[role] = change(call.roles[role])
            call.raises(module, ValueError, f"{role}: expected {len(SHAPES)} ")
        for nothing in (iter([]), set(), "arrays", 1.0, len):
            call = Asking(case)
            call.roles[role] = nothing
            call.raises(module, TypeError, f"{role}: expected ", f"got {type(nothing).__name__}")
        for form, other in (("list", "dict"), ("dict", "list"), ("array", "list"), ("list", "array")):
            call = Asking(case)
            call.roles = {name: as_form(form, arrays[-1:]) for name, arrays in call.roles.items()}
            call.roles[role] = as_form(other, [np.ones((4, 3), "f4")])
            call.raises(module, ValueError, f"{role}: expected ", "got a")
        call = Asking(case)
        call.roles = {name: as_form("dict", arrays) for name, arrays in call.roles.items()}
        call.roles[role]["fc9.weight"] = np.ones((4, 3), "f4")
        call.raises(module, ValueError, f"{role}: expected the keys of params", "fc9.weight'")
        del call.roles[role]["fc9.weight"], call.roles[role][f"fc{LAST}.weight"]
        call.raises(module, ValueError, f"{role}: expected the keys of params", f"fc{LAST}.weight'")
        call.roles[role][f"fc{LAST}.weight"] = np.ones((4, 3), "i8")
        call.raises(module, TypeError, f"{role}['fc{LAST}.weight']: expected dtype", "int64")


@every_module
@every_rule
def test_missing_entry(case, module):
    for role in ("ema", "copies"):
        call = Asking(case)
        call.roles[role][LAST] = None
        call.raises(module, ValueError, f"{role}[{LAST}]: missing", "(4, 3)")
        call.roles["grads"][LAST] = None
        call.raises(module, ValueError, f"{role}[{LAST}]: missing", "(4, 3)")


@every_module
@every_rule
@pytest.mark.parametrize("spoil", [read_only, windows, interlocked, stride_zero])
def test_what_cannot_be_written(case, module, spoil):
    """Gradients that are to be zeroed, too, and only those."""
    for role in ("grads", "ema", "copies"):
        call = Asking(case)
        call.roles[role][LAST] = spoil(call.roles[role][LAST])
        words = ("read-only",) if spoil is read_only else ("strides", "overlap")
        call.raises(module, ValueError, f"{role}[{LAST}]: expected ", *words)
        if role == "grads":
            call.take(module, zero_grads=False)


@every_module
@every_rule
@pytest.mark.parametrize("how", [how for how in SHARED if how != "its last element"])  # that overlaps itself
def test_shared_memory(case, module, how):
    """Between any two roles, and between two arrays of one, for all are written."""
    roles = Asking(case).written
    for first in roles:
        for second in roles:
            call = Asking(case)
            call.roles["copies"][LAST] = np.zeros(SHAPES[LAST], "f2")  # fits a parameter of any dtype
            call.roles[second][LAST] = SHARED[how](call.roles[first][0])
            same = "the same array" if how == "the same array" else "overlaps"
            call.raises(module, ValueError, f"{first}[0]", f"{second}[{LAST}]", same)


@every_module
@every_rule
def test_one_gradient_for_two_parameters(case, module):
    """Fine where it is only read; an error where it is to be zeroed."""
    call = Asking(case)
    call.roles["grads"][LAST] = call.roles["grads"][0]
    call.raises(module, ValueError, "grads[0]", f"grads[{LAST}]", "the same array")
    call.take(module, zero_grads=False)


POSITIVE = [0, 0.0, -0.0, -1, -1e-300, -math.inf, math.nan, np.float32("nan"), np.array(0.0)]
NO_NUMBERS = ["0.1", 0.1 + 0j, [0.1], np.array([0.1, 0.2]), lambda step: 0.1]
SCALAR_ERRORS = {
    "max_norm": (POSITIVE, NO_NUMBERS),
    "grad_scale": ([*POSITIVE, math.inf, 10**400], [*NO_NUMBERS, None]),
    "ema_decay": ([-1e-9, 1.0000001, -1, 2, math.nan, math.inf], NO_NUMBERS),
}


@every_module
@every_rule
@pytest.mark.parametrize("name", SCALAR_ERRORS)
def test_scalars_out_of_range(case, module, name):
    for bads, error in zip(SCALAR_ERRORS[name], (ValueError, TypeError), strict=True):
        for bad in bads:
            Asking(case).raises(module, error, f"{name}: expected a ", "got ", **{name: bad})


@every_module
@every_rule
def test_ema_and_ema_decay_come_together(case, module):
    Asking(case).raises(module, ValueError, "ema_decay: missing, and ema needs it", ema_decay=None)
    Asking(case).raises(module, ValueError, "ema: missing, and ema_decay needs it", ema=None)


@every_module
@every_rule
def test_unknown_keyword(case, module):
    """As Python says it of any function."""
    unexpected = f"{case.rule}_step() got an unexpected keyword argument 'max_nrom'"
    Asking(case).raises(module, TypeError, unexpected, max_nrom=1.0)
    opt = getattr(fastgd, case.class_name)(np.ones(3), lr=0.1)
    with pytest.raises(TypeError, match=r"step\(\) got an unexpected keyword argument 'lr'"):
        opt.step(np.ones(3), lr=0.1)


@every_module
def test_scalars_that_are_right(module):
    """Any real number will do, at the ends of its range, too."""
    for max_norm in (math.inf, 5e-324, 2, np.float32(0.5), np.array(0.5), 10**400):
        w = np.ones(3)
        stats = module.sgd_step(w, np.ones(3), 0.1, max_norm=max_norm, stats=True)
        assert 0 <= stats.clip_factor <= 1 and np.isfinite(w).all()
    for decay, expected in ((0, [0.9]), (1, [3.0]), (np.float32(0.5), [1.95]), (True, [3.0])):
        w, ema = np.ones(1), np.full(1, 3.0)
        module.sgd_step(w, np.ones(1), 0.1, ema=ema, ema_decay=decay)
        np.testing.assert_allclose(ema, expected, rtol=1e-15)  # one rounding of 0.9, one of the average
    w = np.ones(1)
    module.sgd_step(w, np.ones(1), 0.5, grad_scale=np.array(2))
    assert w == 0.75


@every_engine
@every_rule
def test_bad_calls_of_classes(case, engine):
    """Each role in turn, wrong in the last array of the last group; counts, state and arrays stay."""
    shapes = [(4, 3), (20_000,), (4, 3)]
    roles = problem(case, shapes, [(F32, F32, F32)])
    roles["copies"] = [np.zeros(s, F32) for s in shapes]
    opt = optimizer(engine, case, [{"params": roles["params"][:1]}, {"params": roles["params"][1:]}])
    opt.step(roles["grads"], **asked(EXTRAS, roles))
    state = next(a for key, a in opt.state[0].items() if key != "step")
    wrong = {
        TypeError: [np.zeros((4, 3), "i4"), [1.0], 1.0],
        ValueError: [
            np.zeros((3, 4), "f4"),
            read_only(np.zeros((4, 3), "f4")),
            stride_zero(None),
            roles["params"][0],
            roles["grads"][0],
            roles["ema"][0][::-1],
            roles["copies"][0],
            state[:],
        ],
    }
    for role in ("grads", "ema", "copies"):
        for error, bads in wrong.items():
            for bad in [*bads, *([np.zeros((4, 3))] if role == "copies" and error is TypeError else [])]:
                for grouped in (False, True):
                    spoiled = dict(roles)
                    spoiled[role] = [*roles[role][:-1], bad]
                    if isinstance(bad, list):  # would be a group's entry
                        continue
                    label = rf"{role}\[1\]\[1\]" if grouped else rf"{role}\[2\]"
                    if grouped:
                        spoiled = {name: [arrays[:1], arrays[1:]] for name, arrays in spoiled.items()}
                    before = everything(opt, roles)
                    with pytest.raises(error, match=label):
                        opt.step(spoiled["grads"], **asked(EXTRAS, spoiled))
                    assert everything(opt, roles) == before
    for more, match in (({"max_norm": 0.0}, "max_norm"), ({"ema_decay": None}, "ema_decay"), ({"stat": True}, "stat")):
        before = everything(opt, roles)
        with pytest.raises((ValueError, TypeError), match=match):
            opt.step(roles["grads"], **asked(EXTRAS, roles) | more)
        assert everything(opt, roles) == before
