"""Memory of any layout: the bits of a contiguous step, written where the elements are and nowhere else.

Each layout gives an array with the values of a contiguous one, and the whole memory it is a view of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bits import (
    F32,
    MIXES,
    assert_only_views_moved,
    assert_same_bits,
    assert_step_is_twins,
    by_role,
    operands,
    remember,
    values,
)
from cases import CASES, Case, every_case

import fastgd
from fastgd import reference

SHAPE = (3, 16, 5, 7)  # more than a tile


def _within(a: Any, base: Any, view: Any) -> tuple[Any, Any]:
    view[...] = a
    return view, base


def _every_other(a: Any, step: int) -> tuple[Any, Any]:
    base = values([2 * n + 1 for n in a.shape], a.dtype, 91)
    return _within(a, base, base[tuple(slice(1, None, 2) if step > 0 else slice(-2, None, -2) for _ in a.shape)])


def _permuted(a: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    base = np.empty([a.shape[axis] for axis in axes], a.dtype)
    return _within(a, base, base.transpose(np.argsort(axes)))


def _reversed(a: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    base = np.empty_like(a)
    return _within(a, base, np.flip(base, axes))


def _offset(a: Any) -> tuple[Any, Any]:
    base = values(a.size + 8, a.dtype, 92)
    return _within(a, base, base[3 : 3 + a.size].reshape(a.shape))


def _rows(a: Any) -> tuple[Any, Any]:
    base = values((*a.shape[:-1], a.shape[-1] + 2), a.dtype, 93)
    return _within(a, base, base[..., 1:-1])


def _field(a: Any) -> tuple[Any, Any]:
    """A packed record: neither address nor stride is a multiple of the itemsize."""
    base = np.full(a.shape, 119, np.uint8).astype([("tag", np.uint8), ("x", a.dtype), ("end", np.uint8)])
    return _within(a, base, base["x"])


LAYOUTS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "C": lambda a: _permuted(a, (0, 1, 2, 3)),
    "F": lambda a: _permuted(a, (3, 2, 1, 0)),
    "channels_last": lambda a: _permuted(a, (0, 2, 3, 1)),
    "swapped": lambda a: _permuted(a, (1, 0, 3, 2)),
    "reversed": lambda a: _reversed(a, (0, 1, 2, 3)),
    "half_reversed": lambda a: _reversed(a, (1, 3)),
    "strided": lambda a: _every_other(a, 2),
    "backward": lambda a: _every_other(a, -2),
    "offset": _offset,
    "rows": _rows,
    "field": _field,
}


def _check(case: Case, contiguous: list[Any], placed: list[tuple[Any, Any]], what: str) -> None:
    """Step both; the same bits, and of the memory around the placed arrays no byte has moved."""
    before = remember(placed)
    case.step(fastgd, contiguous[0], contiguous[1], contiguous[2:])
    case.step(fastgd, placed[0][0], placed[1][0], [view for view, _ in placed[2:]])
    assert_step_is_twins(case, [view for view, _ in placed], contiguous, what)
    assert_only_views_moved(placed, before, what)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_case
def test_layout_of_the_parameter_against_all_others(case, layout):
    for i, other in enumerate(LAYOUTS):
        for spread in ([other] * 4, list(LAYOUTS)[i:] + list(LAYOUTS)):  # gradient and states alike, or all different
            contiguous = operands(case, SHAPE, MIXES[i % len(MIXES)])
            names = [layout, *spread][: len(contiguous)]
            placed = [LAYOUTS[name](a) for name, a in zip(names, contiguous, strict=True)]
            _check(case, contiguous, placed, " ".join(names))


@pytest.mark.parametrize("axes", [(0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
@every_case
def test_broadcast_gradient(case, axes):
    for layout, dtypes in itertools.product(("C", "F", "strided"), MIXES):
        contiguous = operands(case, SHAPE, dtypes)
        one = values([1 if axis in axes else n for axis, n in enumerate(SHAPE)], dtypes[1], 3)
        contiguous[1] = np.broadcast_to(one, SHAPE).copy()
        placed = [LAYOUTS[layout](a) for a in contiguous]
        placed[1] = (np.broadcast_to(one, SHAPE), one)
        _check(case, contiguous, placed, layout)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0, 2), (1,), (1, 1), (1, 5, 1), (5, 1, 3), (2,) * 11, (1,) * 20 + (3,)],
    ids=str,
)
@every_case
def test_shape(case, shape):
    """0-d, empty, dimensions of one element, and many of them: in C and F order and mixed."""
    for dtypes, order in itertools.product(MIXES, ("CCCCC", "FFFFF", "CFCFC", "FCFCF")):
        contiguous = operands(case, shape, dtypes)
        expected = [a.copy() for a in contiguous]
        actual = [np.array(a, order=order[k]) for k, a in enumerate(contiguous)]
        case.step(fastgd, actual[0], actual[1], actual[2:])
        case.step(reference, expected[0], expected[1], expected[2:])
        assert_step_is_twins(case, actual, expected, order)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layouts", ["FFFFF", "FCFCF", "CFCFC"])
@pytest.mark.parametrize("case", [CASES[3], CASES[-3], CASES[-1]], ids=str)
def test_large_transposed_arrays_on_threads(case, layouts, threads, set_threads):
    set_threads(threads)
    for dtypes in MIXES:
        contiguous = operands(case, (311, 403), dtypes)
        placed = [(np.array(a, order=layouts[k]),) * 2 for k, a in enumerate(contiguous)]
        _check(case, contiguous, placed, layouts)


@every_case
def test_forms(case):
    """Bare, list, tuple and dict take the same steps, with empty arrays among them and a number of its own for each."""
    shapes, steps = [(0,), (4, 3), (), (2, 0), (1030,)], [4, 1, 2, 1, 3]
    keys = [f"fc{i}.weight" for i in range(len(shapes))]
    forms: dict[str, Callable[[list[Any]], Any]] = {
        "list": list,
        "tuple": tuple,
        "dict": lambda items: dict(zip(keys, items, strict=True)),
        "reordered": lambda items: dict(reversed([*zip(keys, items, strict=True)])),
    }

    def arrays() -> list[list[Any]]:
        return by_role([operands(case, s, MIXES[i], i) for i, s in enumerate(shapes)])

    bare = arrays()
    for i, step in enumerate(steps):
        case.step(fastgd, bare[0][i], bare[1][i], [role[i] for role in bare[2:]], step)
    for name, form in forms.items():
        actual = arrays()
        roles = [form(role) for role in actual]
        if name == "reordered":
            roles[0] = forms["dict"](actual[0])  # the order of keys need not be that of the parameters
        case.step(fastgd, roles[0], roles[1], roles[2:], form(steps))
        for i in range(len(shapes)):
            assert_step_is_twins(case, [role[i] for role in actual], [role[i] for role in bare], f"{name} [{i}]")


@every_case
def test_no_gradient_no_change(case):
    """A parameter without gradient: neither it nor its states move, also where its neighbours do."""
    roles, expected = (by_role([operands(case, 5, MIXES[1], i) for i in range(3)]) for _ in "ab")
    roles[1][1] = None
    case.step(fastgd, *roles[:2], roles[2:])
    for i in (0, 2):
        case.step(fastgd, expected[0][i], expected[1][i], [role[i] for role in expected[2:]])
    for i, k in itertools.product(range(3), (0, *range(2, len(roles)))):
        assert_same_bits(roles[k][i], expected[k][i], f"[{i}]")
    case.step(fastgd, roles[0][0], None, [role[0] for role in roles[2:]])
    assert_same_bits(roles[0][0], expected[0][0])
    case.step(fastgd, [], [], [[] for _ in case.states])


def test_interleaved_arrays():
    """Bounds that overlap are not elements that do."""
    base = values(2000, F32)
    even, odd = base[::2].copy(), base[1::2].copy()
    fastgd.sgd_step([base[::2], base[1::2]], [even.copy(), odd.copy()], 0.3)
    fastgd.sgd_step([even, odd], [even.copy(), odd.copy()], 0.3)
    assert_same_bits(base[::2], even)
    assert_same_bits(base[1::2], odd)
