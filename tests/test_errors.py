"""Every bad call raises what api.md says, in words that name the argument, and has not changed one byte."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits, values
from cases import CASES, TABLE, Case
from classes import every_rule, tuned

import fastgd

every_engine = pytest.mark.parametrize("module", [fastgd, fastgd.reference], ids=["compiled", "twin"])

# Only the last of many arrays will be wrong; the first has its shape and dtype. One is large enough for all threads.
SHAPES = [(4, 3), (), (0,), (20_000,), (2, 5), (4, 3)]
DTYPES = ["f4", "f8", "f2", "f4", ml_dtypes.bfloat16, "f4"]
LAST = len(SHAPES) - 1


def snapshot(x: Any) -> Any:
    """The bytes of all that an argument holds."""
    if isinstance(x, Mapping):
        return {key: snapshot(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [snapshot(value) for value in x]
    return np.asarray(x).tobytes() if isinstance(x, np.ndarray) else repr(x)


class Call:
    """A good call, of lists, to be spoiled."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.step: Any = 3
        self.roles: dict[str, Any] = {
            name: [values(s, np.dtype(d), k) for s, d in zip(SHAPES, DTYPES, strict=True)]
            for k, name in enumerate(("params", "grads", *case.states))
        }

    @property
    def written(self) -> list[str]:
        return [name for name in self.roles if name != "grads"]

    def take(self, module: Any, **more: Any) -> None:
        params, grads, *states = self.roles.values()
        tuned(self.case, **more).step(module, params, grads, states, self.step)

    def raises(self, module: Any, error: type[Exception], *words: str, **more: Any) -> None:
        before = snapshot(self.roles)
        with pytest.raises(error) as caught:
            self.take(module, **more)
        assert caught.type is error
        message = str(caught.value)
        assert all(word in message for word in words), f"{words} in: {message}"
        assert snapshot(self.roles) == before, "a call that raised has changed something"


def as_form(form: str, arrays: list[Any]) -> Any:
    if form == "dict":
        return {f"fc{i}.weight": a for i, a in enumerate(arrays)}
    return arrays if form == "list" else tuple(arrays) if form == "tuple" else arrays[-1]


class Foreign:
    """An array of another library, as NumPy's protocols see it."""

    def __init__(self, a: Any) -> None:
        self._a = a
        self.shape, self.dtype, self.__array_interface__ = a.shape, a.dtype, a.__array_interface__

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._a


def jax_array(a: Any) -> Any:
    if importlib.util.find_spec("jax"):
        return importlib.import_module("jax.numpy").asarray(a)
    return type("ArrayImpl", (Foreign,), {"__module__": "jaxlib._jax"})(a)


# What stands in the place of an array: how it comes about, and words of the message.
NOT_ARRAYS = {
    "list": (lambda a: a.tolist(), "got a list of 4", "np.array"),
    "tuple": (lambda a: tuple(a.ravel()), "got a tuple of 12"),
    "dict": (lambda a: {"weight": a}, "got a dict of 1"),
    "str": (lambda a: "weights", "got str"),
    "bytes": (lambda a: a.tobytes(), "got bytes"),
    "memoryview": (lambda a: memoryview(a), "got memoryview"),
    "float": (lambda a: 1.0, "got float", "0-d"),
    "numpy-scalar": (lambda a: a[0, 0], "float32", "0-d"),
    "type": (lambda a: np.ndarray, "got type"),
    "foreign": (lambda a: Foreign(a), "Foreign"),
    "jax": (jax_array, "jax", "immutable"),
    "masked": (lambda a: np.ma.MaskedArray(a, a > 1), "masked", "filled"),
}
OTHER_DTYPES = ["i4", "i8", "u1", "?", "c8", "c16", "O", "g", "U4", "S4", "M8[s]", "f4,f4"]
OTHER_DTYPES += [np.dtype(d).newbyteorder("S") for d in ("f2", "f4", "f8")]
OTHER_DTYPES += [ml_dtypes.float8_e4m3fn, ml_dtypes.int4]


@every_engine
@every_rule
@pytest.mark.parametrize("kind", NOT_ARRAYS)
def test_not_an_array(case, module, kind):
    make, *words = NOT_ARRAYS[kind]
    for role in Call(case).roles:
        if (kind, role) == ("jax", "grads"):  # which are only read
            continue
        call = Call(case)
        call.roles[role][LAST] = make(call.roles[role][LAST])
        call.raises(module, TypeError, f"{role}[{LAST}]: expected ", *words)


@every_engine
@every_rule
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_unsupported_dtype(case, module, dtype):
    dtype = np.dtype(dtype)
    if dtype == np.longdouble == np.float64:
        return  # on this platform a long double is a double
    for role in Call(case).roles:
        call = Call(case)
        call.roles[role][LAST] = np.zeros(SHAPES[LAST], dtype)
        got = str(dtype) if dtype.isnative else dtype.str
        call.raises(module, TypeError, f"{role}[{LAST}]: expected ", "dtype", got)


@every_engine
@every_rule
@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (4, 1), (1, 3), (3,), (), (4, 2), (0, 3), (5, 3)], ids=str)
def test_another_shape(case, module, shape):
    """Neither of the same size nor one that would broadcast."""
    for role in Call(case).roles:
        call = Call(case)
        call.roles[role][LAST] = np.ones(shape, "f4")
        named = "grads" if role == "params" else role  # the others are measured by their parameter
        call.raises(module, ValueError, f"{named}[{LAST}]: expected shape", str(shape), "(4, 3)")


@every_engine
@every_rule
def test_another_length(case, module):
    for form in ("list", "tuple"):
        for role in Call(case).roles:
            for change in (lambda x: x[:-1], lambda x: x + x[-1:], lambda x: x[:0]):
                call = Call(case)
                spoiled = change(call.roles[role])
                if role == "params" and spoiled:
                    spoiled = [np.copy(a) for a in spoiled]  # nothing shared with what follows
                call.roles[role] = as_form(form, spoiled)
                named = "grads" if role == "params" else role
                expected = len(spoiled) if role == "params" else len(SHAPES)
                call.raises(module, ValueError, f"{named}: expected {expected} ")


@every_engine
@every_rule
def test_another_form(case, module):
    """A list for an array, too, where it is a list of one."""
    for form, other in itertools.permutations(("list", "dict", "array"), 2):
        for role in (*case.states, "grads"):
            call = Call(case)
            call.roles = {name: as_form(form, arrays[-1:]) for name, arrays in call.roles.items()}
            call.roles[role] = as_form(other, [values((4, 3), np.dtype("f4"), 9)])
            call.raises(module, ValueError, f"{role}: expected ", "got a")


@every_engine
@every_rule
def test_neither_array_nor_list(case, module):
    for role in Call(case).roles:
        for nothing in (iter([]), set(), "arrays", 1.0, len):
            call = Call(case)
            call.roles[role] = nothing
            call.raises(module, TypeError, f"{role}: expected ", f"got {type(nothing).__name__}")


@every_engine
@every_rule
def test_other_keys(case, module):
    for role in Call(case).roles:
        for spoil in ("missing", "extra", "another"):
            call = Call(case)
            call.roles = {name: as_form("dict", arrays) for name, arrays in call.roles.items()}
            if spoil != "extra":
                a = call.roles[role].pop(f"fc{LAST}.weight")
            if spoil != "missing":
                call.roles[role]["fc9.weight"] = np.ones((4, 3), "f4") if spoil == "extra" else a
            named = "grads" if role == "params" else role
            call.raises(module, ValueError, f"{named}: expected the keys of params", "weight'")


@every_engine
@every_rule
def test_labels_of_a_dict_and_of_a_bare_array(case, module):
    for form, suffix in (("dict", f"['fc{LAST}.weight']"), ("array", "")):
        for role in Call(case).roles:
            call = Call(case)
            call.roles[role][LAST] = np.ones(SHAPES[LAST], "i8")
            call.roles = {name: as_form(form, arrays) for name, arrays in call.roles.items()}
            call.raises(module, TypeError, f"{role}{suffix}: expected dtype", "int64")


def read_only(a: Any) -> Any:
    a.setflags(write=False)
    return a


def windows(a: Any) -> Any:
    return np.lib.stride_tricks.as_strided(np.arange(6, dtype="f4"), (4, 3), (4, 4))


def interlocked(a: Any) -> Any:
    """Strides of 2 and 3 elements: 0 2 4 6 and 0 3 6 meet at 6; and the bounds alone do not show it."""
    return np.lib.stride_tricks.as_strided(np.arange(20, dtype="f4"), (4, 3), (8, 12))


def stride_zero(a: Any) -> Any:
    return np.lib.stride_tricks.as_strided(np.ones(3, "f4"), (4, 3), (0, 4))


def between_bytes(a: Any) -> Any:
    return np.lib.stride_tricks.as_strided(np.ones(12, "f4"), (4, 3), (9, 3))


@every_engine
@every_rule
@pytest.mark.parametrize("spoil", [read_only, windows, interlocked, stride_zero, between_bytes])
def test_what_cannot_be_written(case, module, spoil):
    for role in Call(case).written:
        call = Call(case)
        call.roles[role][LAST] = spoil(call.roles[role][LAST])
        words = ("read-only",) if spoil is read_only else ("strides", "overlap")
        call.raises(module, ValueError, f"{role}[{LAST}]: expected ", *words)


# How a second array may share memory with a first.
SHARED = {
    "the same array": lambda a: a,
    "a view": lambda a: a[:],
    "reversed": lambda a: a[::-1, ::-1],
    "another dtype": lambda a: a.view("f2")[:, :3],
    "its last element": lambda a: np.lib.stride_tricks.as_strided(a[-1:, -1:], (4, 3), (0, 0)),
}


@every_engine
@every_rule
@pytest.mark.parametrize("how", SHARED)
def test_shared_memory(case, module, how):
    """Between any two roles of which one is written, and between two arrays of one role."""
    roles = list(Call(case).roles)
    for first in roles:
        for second in roles:
            if first == second == "grads" or (how == "its last element" and second != "grads"):
                continue
            call = Call(case)
            shared = SHARED[how](call.roles[first][0])
            call.roles[second][LAST] = shared
            same = "the same array" if how == "the same array" else "overlaps"
            call.raises(module, ValueError, f"{first}[0]", f"{second}[{LAST}]", same)


@every_engine
@every_rule
def test_shared_in_part(case, module):
    """Windows over one buffer with one element in common: at an end of each, or somewhere inside."""
    for second in Call(case).roles:
        buffer = values(60, np.dtype("f4"), 11)
        call = Call(case)
        call.roles["params"][0] = buffer[:12].reshape(4, 3)
        call.roles[second][LAST] = buffer[11:23].reshape(4, 3)
        call.raises(module, ValueError, "params[0]", f"{second}[{LAST}]", "overlaps")

        call.roles["params"][0] = buffer[12:24][::-1].reshape(4, 3)  # its first byte is that of its last element
        call.roles[second][LAST] = buffer[1:13].reshape(4, 3)
        call.raises(module, ValueError, "params[0]", f"{second}[{LAST}]", "overlaps")

        call.roles["params"][0] = np.lib.stride_tricks.as_strided(buffer, (4, 3), (48, 16))  # 0 4 8, 12 16 20, ...
        call.roles[second][LAST] = np.lib.stride_tricks.as_strided(buffer[6:], (4, 3), (24, 8))  # 6 8 10, ...
        call.raises(module, ValueError, "params[0]", f"{second}[{LAST}]", "overlaps")


def cells(a: Any) -> list[int]:
    """The address of every byte of every element."""
    start = a.__array_interface__["data"][0]
    at = (start + int(np.dot(index, a.strides)) for index in np.ndindex(a.shape))
    return [address + byte for address in at for byte in range(a.itemsize)]


@every_engine
def test_overlap_is_exact(module):
    """Windows of any strides over one buffer: refused where a written byte is an element's twice, and only there."""
    rng = np.random.default_rng(3)
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        buffer = bytearray(rng.normal(size=64).astype("f4").tobytes())
        shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 4, rng.integers(0, 4)))
        arrays = []
        while len(arrays) < 6:
            strides = rng.integers(-8, 9, len(shape)) * rng.choice([4, 4, 4, 2, 1], len(shape))
            reach = strides * (np.array(shape, int) - 1)
            low, high = -int(reach[reach < 0].sum()), 256 - 4 - int(reach[reach > 0].sum())
            if low <= high:
                memory = buffer if rng.random() < 0.75 else bytearray(buffer)
                arrays.append(np.ndarray(shape, "f4", memory, int(rng.integers(low, high + 1)), tuple(strides)))
        params, grads, buffers = arrays[:2], arrays[2:4], arrays[4:]
        written = [cell for a in (*params, *buffers) for cell in cells(a)]
        overlap = len(set(written)) < len(written) or not set(written).isdisjoint(c for g in grads for c in cells(g))
        outcomes[overlap] += 1
        before = bytes(buffer)
        try:
            module.sgd_step(params, grads, 0.1, momentum=0.9, momentum_buffers=buffers)
        except ValueError:
            assert overlap and bytes(buffer) == before
        else:
            assert not overlap
    assert min(outcomes.values()) > 500


@every_engine
@every_rule
def test_missing_states(case, module):
    """Of one parameter (the last), of a bare one, and the whole argument."""
    for role in case.states:
        call = Call(case)
        call.roles[role][LAST] = None
        call.raises(module, ValueError, f"{role}[{LAST}]: missing", "zeros")
        if role == "max_exp_avg_sqs":
            continue  # without it, it is plain Adam
        call.roles[role] = None
        flag = TABLE[case.rule].states[role]
        call.raises(module, ValueError, f"{role}: ", f"missing, and {flag} needs it" if flag else "got None")
        call.roles = {name: arrays and arrays[LAST] for name, arrays in call.roles.items()}
        call.raises(module, ValueError, f"{role}: missing", "zeros")
    call = Call(case)
    call.roles["grads"] = None  # skips one parameter, not a list of them
    call.raises(module, ValueError, "grads: expected a list or tuple of 6", "got None")


NUMBERS = {
    "nan": (float("nan"), ValueError),
    "inf": (float("inf"), ValueError),
    "-inf": (-np.inf, ValueError),
    "float32 nan": (np.float32("nan"), ValueError),
    "0-d nan": (np.array(np.nan), ValueError),
    "huge int": (10**400, ValueError),
    "str": ("0.1", TypeError),
    "None": (None, TypeError),
    "complex": (0.1 + 0j, TypeError),
    "list": ([0.1], TypeError),
    "array of two": (np.array([0.1, 0.2]), TypeError),
    "function": (lambda step: 0.1, TypeError),  # for the classes only
}
NEGATIVE = {"negative": (-0.01, ValueError), "tiny negative": (-5e-324, ValueError), "negative int": (-1, ValueError)}
TOO_LARGE = {"one": (1, ValueError), "1.0": (1.0, ValueError), "1.5": (1.5, ValueError)}
NO_PAIRS = [(0.9, TypeError), (None, TypeError), ((), ValueError), ((0.9,), ValueError), ((0.9,) * 3, ValueError)]


@every_engine
@every_rule
def test_hyperparameters(case, module):
    for name, value in case.hyper.items():
        if isinstance(value, bool):
            continue
        if name == "betas":
            for i in (0, 1):
                for bad, error in (NUMBERS | NEGATIVE | TOO_LARGE).values():
                    betas = (bad, 0.9) if i == 0 else (0.9, bad)
                    Call(case).raises(module, error, f"betas[{i}]: expected ", "got ", betas=betas)
            for pair, error in NO_PAIRS:
                Call(case).raises(module, error, "betas: expected two numbers, got ", betas=pair)
            continue
        for bad, error in (NUMBERS | (NEGATIVE if name != "dampening" else {})).values():
            Call(case).raises(module, error, f"{name}: expected ", "got ", **{name: bad})


@every_engine
def test_nesterov_needs_momentum_and_no_dampening(module):
    (case,) = (case for case in CASES if str(case) == "sgd-decay-momentum-nesterov")
    Call(case).raises(module, ValueError, "nesterov: expected momentum", momentum=0.0)
    Call(case).raises(module, ValueError, "nesterov: expected momentum", "dampening", dampening=0.5)


@every_engine
@every_rule
def test_step_numbers(case, module):
    if not TABLE[case.rule].counts:
        Call(case).raises(module, TypeError, "step", step=3)
        return
    every = [3] * len(SHAPES)
    bads = [(0, ValueError, ""), (-1, ValueError, ""), (2**63, ValueError, ""), (1.0, TypeError, "")]
    bads += [(True, TypeError, ""), ("1", TypeError, ""), (np.float64(1), TypeError, ""), (np.bool_(1), TypeError, "")]
    for bad, error, _ in list(bads):
        bads.append(([*every[:-1], bad], error, f"[{LAST}]"))
    bads += [(every[:-1], ValueError, ""), ((*every, 3), ValueError, ""), ([], ValueError, "")]
    bads += [({"a": 3}, ValueError, ""), (np.array(every, float), TypeError, "[0]")]
    if case.rule != "sgd":
        bads.append((None, TypeError, ""))
    for bad, error, suffix in bads:
        call = Call(case)
        call.step = bad
        call.raises(module, error, f"step{suffix}: expected ", "got ")


@every_engine
@every_rule
def test_unknown_and_missing_arguments(case, module):
    Call(case).raises(module, TypeError, "learning_rate", learning_rate=0.1)
    with pytest.raises(TypeError, match="missing"):
        getattr(module, f"{case.rule}_step")([np.ones(2)])


@every_engine
@every_rule
def test_odd_but_right(case, module):
    """What only looks like an error gives the bits of a plain call."""
    plain, odd = Call(case), Call(case)
    for name in odd.written:  # two arrays that lie between each other's elements, and a third beside them
        buffer = np.zeros((4, 9), "f4")
        for i, view in ((0, buffer[:, 0:6:2]), (LAST, buffer[:, 1:6:2])):
            view[...] = odd.roles[name][i]
            odd.roles[name][i] = view
    odd.roles["grads"][0] = odd.roles["grads"][LAST] = read_only(odd.roles["grads"][LAST])
    plain.roles["grads"][0] = odd.roles["grads"][LAST].copy()
    odd.roles["grads"][3] = np.broadcast_to(odd.roles["grads"][3][:1], (20_000,))
    plain.roles["grads"][3] = odd.roles["grads"][3].copy()
    odd.roles["grads"] = tuple(odd.roles["grads"])
    odd.step = np.array([3] * len(SHAPES)) if case.rule != "sgd" else None
    odd.take(module)
    plain.take(module)
    for name in plain.roles:
        for i, (a, expected) in enumerate(zip(odd.roles[name], plain.roles[name], strict=True)):
            assert_same_bits(a, expected, f"{name}[{i}]")


@every_engine
@every_rule
def test_forms_that_are_right(case, module):
    """Lists and tuples are one form; a dict's order is nobody's business; subclasses and 0-d steps are arrays."""
    plain = Call(case)
    plain.take(module)
    for form in ("tuple", "dict"):
        call = Call(case)
        call.roles = {name: as_form(form, arrays) for name, arrays in call.roles.items()}
        if form == "dict":
            call.roles["grads"] = dict(reversed(call.roles["grads"].items()))
            call.step = {key: 3 for key in call.roles["params"]} if case.rule != "sgd" else 3
        call.take(module)
        for name, expected in plain.roles.items():
            arrays = call.roles[name]
            arrays = [arrays[key] for key in call.roles["params"]] if form == "dict" else arrays
            for a, e in zip(arrays, expected, strict=True):
                assert_same_bits(a, e, name)
    call = Call(case)
    call.roles = {name: arrays[LAST].view(np.memmap) for name, arrays in call.roles.items()}
    call.step = np.array(3)
    call.take(module)
    for name, a in call.roles.items():
        assert_same_bits(np.asarray(a), plain.roles[name][LAST], name)


@every_engine
@every_rule
def test_nothing_to_step(case, module):
    """An empty list or dict is a call with nothing to do, but its hyperparameters are checked."""
    for form in ("list", "tuple", "dict"):
        call = Call(case)
        call.roles = {name: as_form(form, []) for name in call.roles}
        call.take(module)
        call.raises(module, ValueError, "lr: expected", lr=-1.0)


@every_engine
def test_unused_states_are_left_alone(module):
    """A buffer without momentum and averages without `centered` are neither checked nor touched."""
    p, g, b = np.ones(3), np.ones(3), np.full(3, 7.0)
    module.sgd_step(p, g, 0.1, momentum_buffers=b)
    module.rmsprop_step(p, g, np.zeros(3), momentum_buffers=b, grad_avgs=b)
    assert (b == 7).all() and (p < 1).all()
