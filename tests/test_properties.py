"""Whatever the shapes, strides, dtypes, values, steps and threads: the twin's bits, and no other byte moved."""

from __future__ import annotations

from typing import Any

import numpy as np
from bits import DTYPES, assert_only_views_moved, assert_step_is_twins, remember, values
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastgd
from fastgd import reference

SETTINGS = settings(max_examples=300, deadline=None)  # a first call is slow, and machines are busy
SEED = st.integers(0, 9)
NUMBER = st.one_of(st.integers(1, 300), st.integers(1, 2**63 - 1))


@st.composite
def views(draw: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """A view of that shape, any way round, and the memory that it lies in."""
    axes = draw(st.permutations(range(len(shape))))
    cuts = [slice(start, start + n * by, by) for n in shape for start, by in [draw(st.sampled_from(PLACES))]]
    base = values([cuts[axis].stop + 1 for axis in axes], dtype, draw(SEED))
    view = base.transpose(np.argsort(axes))[(..., *cuts)]
    return view[(..., *(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape))], base


PLACES = ((0, 1), (0, 1), (3, 1), (0, 2), (1, 3))  # from where, by which step


@st.composite
def problems(draw: Any) -> tuple[Case, list[list[Any]]]:
    """A case, and for each of some parameters its operands as views with their memory."""
    case = draw(st.sampled_from(CASES))
    parameters = []
    for _ in range(draw(st.integers(0, 4))):
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=7))
        placed = [draw(views(shape, draw(st.sampled_from(DTYPES)))) for _ in range(2 + len(case.states))]
        if draw(st.booleans()) and placed[1][0].size:
            part = placed[1][0][(..., *(slice(draw(st.sampled_from([1, None]))) for _ in shape))]
            placed[1] = (np.broadcast_to(part, shape), placed[1][1])
        parameters.append(placed)
    return case, parameters


@SETTINGS
@given(problem=problems(), data=st.data(), threads=st.sampled_from([1, 2, 5]))
def test_any_list(problem, data, threads):
    case, parameters = problem
    numbers = [data.draw(NUMBER) for _ in parameters]
    skipped = [data.draw(st.integers(0, 5)) == 0 for _ in parameters]
    before = [remember(placed) for placed in parameters]
    actual = [[view for view, _ in placed] for placed in parameters]
    twins = [[view.copy() for view, _ in placed] for placed in parameters]
    for one, skip in zip([*actual, *twins], skipped * 2, strict=True):
        one[1] = None if skip else one[1]
    previous = fastgd.get_num_threads()
    fastgd.set_num_threads(threads)
    try:
        for module, operands in ((fastgd, actual), (reference, twins)):
            roles = [[one[k] for one in operands] for k in range(2 + len(case.states))]
            case.step(module, roles[0], roles[1], roles[2:], numbers)
    finally:
        fastgd.set_num_threads(previous)
    for i, placed in enumerate(parameters):
        assert_step_is_twins(case, actual[i], twins[i], f"[{i}]")
        assert_only_views_moved(placed, before[i], f"[{i}]")


@SETTINGS
@given(
    case=st.sampled_from(CASES),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    n=st.integers(0, 5000),
    data=st.data(),
)
def test_any_slicing(case, dtypes, n, data):
    """An array stepped whole and in slices, cut anywhere: an element's place in its array makes no difference."""
    seeds = [data.draw(SEED) for _ in dtypes][: 2 + len(case.states)]
    whole, sliced = ([values(n, dtypes[k], seed) for k, seed in enumerate(seeds)] for _ in "ab")
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=9)))
    case.step(fastgd, whole[0], whole[1], whole[2:])
    roles = [np.split(a, cuts) for a in sliced]
    case.step(fastgd, roles[0], roles[1], roles[2:])
    assert_step_is_twins(case, sliced, whole)


@SETTINGS
@given(data=st.data(), case=st.sampled_from(CASES), parameter=st.sampled_from(DTYPES[:2]))
def test_any_values(data, case, parameter):
    """Values that hypothesis finds: in float64, or in any float32 there is."""
    numbers = hnp.arrays(parameter, 20, elements=st.floats(width=8 * parameter.itemsize))
    actual = [data.draw(numbers) for _ in range(2 + len(case.states))]
    twins = [a.copy() for a in actual]
    for module, arrays in ((fastgd, actual), (reference, twins)):
        case.step(module, arrays[0], arrays[1], arrays[2:])
    assert_step_is_twins(case, actual, twins)
