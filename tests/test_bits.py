"""One answer: the compiled step has the twin's bits, for every rule, dtype mix, size, slicing, thread count and ISA."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from bits import BF16, DTYPES, F16, F32, F64, MIXES, assert_step_is_twins, by_role, digest, operands, run_python, values
from cases import CASES, RULES, TABLE, every_case

import fastgd
from fastgd import _core, coefficients, reference

THREADS = (1, 2, 3, 7)
# A Latin square: every pair of dtypes in every two roles. Each state of a rule has another dtype.
PAIRS = {(p, g, (p + g) % 4, (p + g + 1) % 4, (p + g + 2) % 4) for p in range(4) for g in range(4)}
ALL = {(p, g, s) for p in range(4) for g in range(4) for s in range(4)}
MIX = [
    pytest.param([DTYPES[i] for i in mix], id="-".join(DTYPES[i].name for i in mix), marks=marks)
    for mixes, marks in ((PAIRS, ()), (ALL, pytest.mark.slow))
    for mix in sorted(mixes)
]


def test_registry_is_complete():
    assert set(TABLE) == set(RULES) == set(_core.RULES), "each rule of the registry has its line in tests/cases.py"
    for rule, entry in _core.RULES.items():
        twin = reference.engine.RULES[rule]
        assert (twin["flags"], twin["coefficients"]) == (entry["flags"], entry["coefficients"])
        assert entry["flags"] == tuple(TABLE[rule].flags)
        assert callable(getattr(coefficients, rule))
        assert callable(getattr(fastgd, f"{rule}_step")) and callable(getattr(reference, f"{rule}_step"))
    for case in CASES:
        mask = sum(1 << _core.RULES[case.rule]["flags"].index(flag) for flag in case.flags)
        assert _core.RULES[case.rule]["states"][mask] == len(case.states), case
        assert getattr(fastgd, case.class_name)._rule == case.rule


@pytest.mark.parametrize("dtypes", MIX)
@every_case
def test_every_size(case, dtypes):
    """All sizes up to 300 in one call, as slices of arrays that the twin steps whole: so every offset, too."""
    cuts = np.cumsum(range(300))
    actual, expected = (operands(case, 45150, dtypes) for _ in range(2))
    params, grads, *states = (np.split(a, cuts) for a in actual)
    assert {p.size for p in params} == set(range(301))
    for step in (1, 2):
        case.step(fastgd, params, grads, states, step)
        case.step(reference, expected[0], expected[1], expected[2:], step)
    assert_step_is_twins(case, actual, expected)


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 4097, 100003, pytest.param((1 << 20) + 3, marks=pytest.mark.slow)])
@every_case
def test_large_sizes_on_any_threads(case, n, set_threads):
    for dtypes in MIXES:
        expected = operands(case, n, dtypes)
        case.step(reference, expected[0], expected[1], expected[2:])
        for threads in THREADS:
            set_threads(threads)
            actual = operands(case, n, dtypes)
            case.step(fastgd, actual[0], actual[1], actual[2:])
            assert_step_is_twins(case, actual, expected, f"{n} {threads}")


@every_case
def test_list_of_all_dtypes_on_any_threads(case, set_threads):
    """Parts of threads begin and end anywhere in the list; None and empty arrays lie between."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(0, 9000, 60) * rng.choice([0, 1, 1, 1], 60)
    mixes = [[DTYPES[i] for i in rng.integers(0, 4, 5)] for _ in sizes]

    def arrays():
        params, grads, *states = by_role([operands(case, n, mixes[i], i) for i, n in enumerate(sizes)])
        return params, [None if i % 7 == 3 else g for i, g in enumerate(grads)], states

    steps = [int(s) for s in rng.integers(1, 5, len(sizes))]
    expected = arrays()
    case.step(reference, *expected, steps)
    for threads in THREADS:
        set_threads(threads)
        params, grads, states = arrays()
        case.step(fastgd, params, grads, states, steps)
        roles, twins = (params, grads, *states), (*expected[:2], *expected[2])
        for i in range(len(sizes)):
            assert_step_is_twins(case, [r[i] for r in roles], [r[i] for r in twins], f"{threads} [{i}]")


@every_case
def test_class_has_the_bits_of_the_function(case):
    """The prepared handle reads its arrays by another way; states begin as the class makes them."""
    arrays = [((7, 3), F32), ((), F64), ((0,), BF16), ((1500,), F16), ((33, 2), BF16)]
    for state_dtype in (None, F32):
        params, twins = ([values(*array) for array in arrays] for _ in "ab")
        states = [[np.zeros(shape, state_dtype or dtype) for shape, dtype in arrays] for _ in case.states]
        optimizer = getattr(fastgd, case.class_name)(params, **case.hyper, state_dtype=state_dtype)
        for step in (1, 2, 3):
            grads = [values(shape, arrays[i - step][1], step) for i, (shape, _) in enumerate(arrays)]
            optimizer.step(grads)
            case.step(reference, twins, grads, states, step)
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            kept = [a for key, a in optimizer.state[i].items() if key != "step"]
            assert_step_is_twins(case, [p, p, *kept], [twin, twin, *(s[i] for s in states)], f"[{i}]")


@every_case
def test_addresses_that_are_no_multiple_of_the_itemsize(case):
    def misplaced(a, offset):
        buffer = np.empty(a.nbytes + 8, np.uint8)
        view = np.ndarray(a.shape, a.dtype, buffer, offset)
        view[...] = a
        return view

    for dtypes, n in itertools.product(MIXES, [*range(34), 1100]):
        expected = operands(case, n, dtypes)
        for shift in range(1, 4):
            actual = [misplaced(a, (shift * (k + 1)) % 8) for k, a in enumerate(expected)]
            twin = [a.copy() for a in expected]
            case.step(fastgd, actual[0], actual[1], actual[2:])
            case.step(reference, twin[0], twin[1], twin[2:])
            assert_step_is_twins(case, actual, twin, f"{n} {shift}")


def test_every_isa_ran_and_has_the_twins_bits():
    expected = digest(reference)
    assert _core.available_isas()[-1] == "baseline"
    for isa in _core.available_isas():
        done = run_python("import bits, fastgd; print(fastgd.config()['isa'], bits.digest(fastgd))", FASTGD_ISA=isa)
        assert done.stdout.split() == [isa, expected], done.stderr


@pytest.mark.parametrize("isa", ["avx3", "AVX2", "baseline,avx2"])
def test_unknown_isa_is_an_error_that_names_the_choices(isa):
    done = run_python("import fastgd", FASTGD_ISA=isa)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: FASTGD_ISA: ")
    assert all(choice in last for choice in [isa, *_core.available_isas()])
