"""The GPU's kernels on the host, block after block: indexing, edges, cutting, sums, lists, layouts, dtypes, all extras.

What is imported here from other tests runs here once more, with the emulated module in the place of ``fastgd``.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
from typing import Any

import numpy as np
import pytest
import test_bits
import test_one_pass
from bits import BF16, F32, F64, MIXES, assert_same_bits, values
from cases import CASES, TABLE
from classes import every_rule, normal, optimizer
from emulation import module
from pretended import gpu, on_gpu  # noqa: F401
from test_bits import (  # noqa: F401
    test_addresses_that_are_no_multiple_of_the_itemsize,
    test_every_size,
)
from test_one_pass import (  # noqa: F401
    EXTRAS,
    assert_twin,
    copied,
    problem,
    take,
    test_broadcast_and_read_only_gradients,
    test_every_extra_alone_and_with_the_others,
    test_every_mix_of_dtypes,
    test_gradient_beyond_the_compute_type_is_not_finite,
    test_layouts,
    test_neutral_values_are_the_plain_step,
    test_values_that_provoke,
)

import fastgd
from fastgd import coefficients, reference
from fastgd.steps import Steps


class Emulated(Steps):
    """The functions over the emulated module, which tests take for ``fastgd``."""

    __all__ = fastgd.__all__


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """In every test of this file; and how many thread blocks a launch has at most."""
    steps = Emulated(module())
    for other in (test_bits, test_one_pass):
        monkeypatch.setattr(other, "fastgd", steps)
    return steps


@pytest.fixture
def blocks(monkeypatch):
    return lambda n: monkeypatch.setenv("FASTGD_EMULATED_BLOCKS", str(n))


def test_it_is_another_module(emulated):
    assert module() is not fastgd._core
    assert module().RULES == fastgd._core.RULES
    assert emulated._engine.architectures() == ["emulated"]


@pytest.mark.parametrize("most", [1, 2, 3, 64, 100_000])
@every_rule
def test_any_number_of_thread_blocks(case, most, blocks):
    """A launch is cut anywhere; which block comes last is anyone's."""
    blocks(most)
    rng = np.random.default_rng(3)
    for sizes in (
        (rng.integers(0, 9000, 40) * rng.choice([0, 1, 1, 1], 40)).tolist(),
        [1 << 16 | 3],
        [1023, 70_000, 1],
    ):
        for extras in (EXTRAS, ("stats",), ("max_norm",), ("skip_nonfinite",), ()):
            assert_twin(case, problem(case, sizes, MIXES), extras, str(most))


def test_groups_of_blocks(blocks):
    """Sums of more than one group of 256 blocks, beside small arrays."""
    case = CASES[0]
    for most in (1, 50):
        blocks(most)
        for sizes in ([600_000, 5, 262_144, 0, 262_145], [3, 262_143, 1_000_000]):
            assert_twin(case, problem(case, sizes, [(F32, F32, F32), (F64, BF16, F32)]), ("max_norm", "stats"))


@every_rule
def test_more_arrays_than_one_launch_takes(case):
    """Several launches a call, each of which ends its own sums; every parameter at a step of its own."""
    sizes = [(i * 37) % 90 for i in range(1500)]
    for extras in ((), EXTRAS):
        assert_twin(case, problem(case, sizes, MIXES), extras, "many")
    if TABLE[case.rule].counts:
        roles = problem(case, sizes[:900], [(F32, F32, F32)])
        twins = copied(roles)
        steps = [i % 400 + 1 for i in range(900)]
        take(test_one_pass.fastgd, case, roles, steps)
        take(reference, case, twins, steps)
        test_one_pass.assert_same(roles, twins, "steps")


@pytest.mark.parametrize("extras", [(), ("stats",), EXTRAS], ids="+".join)
def test_strided_arrays_of_many_dimensions(extras):
    """Layouts fill the arguments too: launches that are full of them, and 64 dimensions."""
    case = CASES[-1]
    roles: dict[str, list[Any]] = {name: [] for name in problem(case, [], MIXES)}
    for i in range(120):
        shape = (2,) * 6 if i % 2 else (3, 1, 4, 2)
        for name, arrays in problem(case, [shape], [MIXES[1]]).items():
            spread = np.zeros([2 * n for n in shape], arrays[0].dtype)[tuple(slice(None, None, 2) for _ in shape)]
            spread[...] = arrays[0]
            roles[name].append(spread)
    for name, arrays in problem(case, [(1,) * 30 + (2, 3)], [MIXES[1]]).items():
        roles[name].append(arrays[0].reshape((1,) * 30 + (3, 2)).swapaxes(-1, -2))
    assert_twin(case, roles, extras)


def test_the_tree_is_that_of_the_processor(emulated):
    rng = np.random.default_rng(0)
    for n in (*range(40), 1023, 1024, 1025, 10_000):
        g = rng.normal(size=n) * np.exp(rng.normal(size=n) * 5)
        for keywords in ({}, {"max_norm": 1e300}):
            norms = [m.sgd_step(np.zeros(n), g, 0.0, stats=True, **keywords).grad_norm for m in (emulated, fastgd)]
            assert norms[0] == norms[1] == m_norm(g)


def m_norm(g: Any) -> float:
    return math.sqrt(reference.onepass.sum_of_squares(g))


HYPER = {
    "sgd": lambda r: (r.random(), r.random(), r.random() - 0.5, r.choice([0.0, r.random()])),
    "adam": lambda r: (r.random(), r.random(), 1 - 10 ** -r.uniform(1, 9), r.random(), r.choice([0.0, r.random()])),
    "adagrad": lambda r: (r.random(), r.random(), r.choice([0.0, r.random()]), r.random()),
    "rmsprop": lambda r: (r.random(), r.random(), r.choice([0.0, r.random()]), r.random(), r.random()),
    "lion": lambda r: (r.random(), r.random(), r.random(), r.random()),
}


@pytest.mark.parametrize("rule", fastgd._core.RULES)
def test_coefficients_of_the_device(rule):
    """The same formulas once more: the bits of coefficients.py, at any step."""
    r = random.Random(0)
    steps = [
        *range(1, 70),
        10**6,
        2**31,
        2**53 + 1,
        2**63 - 1,
        *(r.randrange(1, 2 ** r.randrange(1, 64)) for _ in range(300)),
    ]
    for step in steps:
        h = HYPER["adam" if rule == "adamw" else rule](r)
        call = {
            "sgd": lambda n, h=h: coefficients.sgd(n, *h, False, False),
            "adam": lambda n, h=h: coefficients.adam(n, h[0], h[1:3], h[3], h[4], False, False),
            "adamw": lambda n, h=h: coefficients.adamw(n, h[0], h[1:3], h[3], h[4], False, False),
            "adagrad": lambda n, h=h: coefficients.adagrad(n, *h, False),
            "rmsprop": lambda n, h=h: coefficients.rmsprop(h[0], h[1], h[4], h[2], h[3], False, False, n),
            "lion": lambda n, h=h: coefficients.lion(h[0], h[1:3], h[3], False, n),
        }[rule]
        assert call(0)[:2] == call(step)[:2]
        assert list(call(0)[2:]) == list(h), "the hyperparameters, in their order"
        assert module().coefficients(rule, list(h), step) == list(call(step)[2:]), step


@every_rule
def test_class(case):
    """The classes over the module: states, counts, groups of arrays without gradients."""
    ours, plain = (optimizer(engine, case, normal(0)) for engine in (module(), fastgd._core))
    for step in range(4):
        grads = normal(step + 1)
        grads[step] = None
        for each in (ours, plain):
            each.step(grads)
    assert_like(ours, plain)


@every_rule
def test_the_device_counts_the_steps_that_are_not_skipped(case):
    """Nobody looks while steps are taken: the counts, and what depends on them, are the device's."""
    ours, plain = (optimizer(engine, case, normal(0)) for engine in (module(), fastgd._core))
    told: list[list[Any]] = [[], []]
    for step in range(9):
        grads = normal(step + 1)
        grads[step % 5] = None
        if step in (1, 4, 5):
            grads[(step + 1) % 5] = np.full_like(grads[(step + 1) % 5], np.nan)
        more = {} if step == 7 else {"skip_nonfinite": True, "stats": step % 2 == 0}
        for each, stats in zip((ours, plain), told, strict=True):
            stats.append(each.step(grads, **more))
    assert [s and s.skipped for s in told[1]].count(True) >= 2
    assert [repr(s and s.to_dict()) for s in told[0]] == [repr(s and s.to_dict()) for s in told[1]]
    assert_like(ours, plain)
    for each in (ours, plain):
        each.load_state_dict(each.state_dict())
        each.step(normal(20))
    assert_like(ours, plain)


def test_a_rate_that_depends_on_the_step_counts_the_steps_taken():
    case = next(c for c in CASES if c.rule == "adam")
    engines = (module(), fastgd._core)
    ours, plain = (optimizer(e, case, normal(0), lr=lambda step: 0.1 / step) for e in engines)
    for step in range(5):
        grads = normal(step + 1)
        grads[0][0, 0] = np.nan if step in (1, 2) else 0.5
        for each in (ours, plain):
            each.step(grads, skip_nonfinite=True)
    assert_like(ours, plain)
    assert ours.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


@pytest.fixture
def graph():
    """A graph of launches: capture(), then replay()."""
    library = ctypes.CDLL(module().__file__)

    @contextlib.contextmanager
    def capture():
        library.emulated_capture(1)
        yield
        library.emulated_capture(0)

    return capture, library.emulated_replay


@pytest.mark.parametrize("more", [{}, {"skip_nonfinite": True, "max_norm": 0.9}], ids=["plain", "skip"])
@pytest.mark.parametrize("first", [0, 2], ids=["at-once", "after-two"])
@every_rule
def test_graphs(case, gpu, graph, first, more):  # noqa: F811
    """A captured step, replayed, is as many steps: it counts, reads the rate where it lies, and skips by itself."""
    capture, replay = graph
    params, plain = normal(0), optimizer(fastgd._core, case, normal(0))
    rate = np.array(0.1)
    ours = getattr(fastgd, case.class_name)(on_gpu(params), **case.hyper | {"lr": on_gpu(rate)}, capturable=True)
    grads = normal(1)
    fixed = on_gpu(grads)

    def next_of(step: int) -> None:
        for g, new in zip(grads, normal(step + 2), strict=True):
            g[...] = new
        if more and step == 4:
            grads[0][1] = np.nan
        rate[...] = 0.1 / (step + 1)
        plain.param_groups[0]["lr"] = float(rate)
        plain.step(grads, **more)

    for step in range(first):
        next_of(step)
        ours.step(fixed, **more)
    with capture():
        ours.step(fixed, **more)
    for step in range(first, first + 6):
        next_of(step)
        replay()
    for a, e in zip(params, plain._params, strict=True):
        assert_same_bits(a, e)
    assert [int(s["step"]) for s in ours.state.values()] == [int(s["step"]) for s in plain.state.values()]


def test_what_no_graph_can_do(gpu):  # noqa: F811
    with pytest.raises(ValueError, match="capturable: expected parameters on a GPU"):
        fastgd.AdamW([np.ones(3)], capturable=True)
    ours = fastgd.AdamW([on_gpu(np.ones(3))], lr=lambda step: 0.1, capturable=True)
    with pytest.raises(ValueError, match=r"lr'\]: expected a number or a 0-d array with capturable"):
        ours.step([on_gpu(np.ones(3))])
    ours = fastgd.AdamW([on_gpu(np.ones(3))], lr=on_gpu(np.ones(2)), capturable=True)
    with pytest.raises(ValueError, match=r"lr'\]: expected one float64 or float32, got shape \(2,\)"):
        ours.step([on_gpu(np.ones(3))])


def assert_like(ours: Any, plain: Any) -> None:
    for a, e in zip(ours._params, plain._params, strict=True):
        assert_same_bits(a, e)
    assert ours.state.keys() == plain.state.keys()
    for i, state in plain.state.items():
        for key, a in state.items():
            assert_same_bits(ours.state[i][key], a, f"state[{i}][{key!r}]")


def test_a_result_is_fetched_when_someone_looks(emulated):
    """And keeps what it was, whatever is stepped in between."""
    w, g = np.array([3.0, 4.0]), np.array([6.0, 8.0])
    first = emulated.sgd_step(w, g, lr=0.1, max_norm=5.0, stats=True)
    others = [emulated.sgd_step(w.copy(), values(2, F64, i), lr=0.1, stats=True) for i in range(5)]
    assert str(first) == "gradient 10, clipped by 0.5; update 0.5, parameters 4.5"
    del others
    again = emulated.sgd_step(w, g, lr=0.1, skip_nonfinite=True)
    assert (again.skipped, again.nonfinite, again.grad_norm) == (False, 0, None)


def test_a_part_of_the_model(emulated):
    """The host puts sums together in the middle of a call, as where processes share a model."""
    case = CASES[0]
    told = []
    for engine in (module(), fastgd._core):
        roles = problem(case, [700, 30], [(F32, F32, F32)])

        def reduce(sums: list[float], nonfinite: int) -> tuple[float, int]:
            return sum(sums) * 4, nonfinite

        ask = fastgd.onepass.Ask(max_norm=0.5, stats=True, reduce=reduce)
        row = coefficients.sgd(1, 0.1, 0.0, 0.0, 0.0, False, False)
        result = engine.step("sgd", [row], None, roles["params"], roles["grads"], (), False, ask)
        told.append((result if isinstance(result, tuple) else result.fetch(), [p.tobytes() for p in roles["params"]]))
    assert told[0] == told[1]
