"""What is computed once a step: the rows, against exact arithmetic, at steps small and huge."""

from __future__ import annotations

import inspect
from decimal import Decimal
from fractions import Fraction
from math import nextafter, prod

import numpy as np
import pytest
from cases import RULES, Case, every_case

import fastgd
from fastgd import coefficients

LR, BETA1, BETA2, EPS, DECAY = 0.017, 0.83, 0.957, 0.003, 0.07


def flags_of(case, row):
    """The flags that a row's variant has set."""
    return tuple(flag for bit, flag in enumerate(RULES[case.rule]["flags"]) if row[0] >> bit & 1)


def row_of(case, **more):
    hyper = {"step": 3, "amsgrad": "amsgrad" in case.flags, "nesterov": "nesterov" in case.flags, "maximize": False}
    hyper |= {"centered": "centered" in case.flags, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    function = getattr(coefficients, case.rule)
    return function(
        **{n: v for n, v in (hyper | case.hyper | more).items() if n in inspect.signature(function).parameters}
    )


@every_case
def test_variant_and_sign(case):
    """Each flag is set by its hyperparameter alone, and the row has as many numbers as the rule says."""
    row = row_of(case)
    assert flags_of(case, row) == case.flags
    assert row[1] == (-1.0 if case.maximize else 1.0)
    assert len(row) == 2 + RULES[case.rule]["coefficients"]
    assert all(type(c) is float for c in row[1:])


@every_case
@pytest.mark.parametrize("kind", [np.float64, np.array, np.float32, Decimal, Fraction], ids=lambda k: k.__name__)
def test_kinds_of_numbers(case, kind):
    """Whatever is a number gives the row of the float it is; NumPy's 0-d arrays and scalars too."""
    exact = {name: float(np.float32(v)) for name, v in case.hyper.items() if type(v) is float}
    row = row_of(case, **exact)
    assert row_of(case, **{name: kind(v) for name, v in exact.items()}) == row
    assert row_of(case, lr=1, weight_decay=1) == row_of(case, lr=1.0, weight_decay=1.0)


def test_rows():
    """By hand, in the order of the rules' headers."""
    w1, w2 = 1 - BETA1, 1 - BETA2
    moments = w1, BETA2, w2, LR / (1 - BETA1 * BETA1), 1 / (1 - BETA2 * BETA2) ** 0.5
    betas = BETA1, BETA2
    assert coefficients.sgd(2, LR, 0.8, 0.3, DECAY, False, True) == (3, -1.0, LR, 0.8, 1 - 0.3, DECAY)
    assert coefficients.sgd(1, LR, 0.8, 0.3, DECAY, False, True) == (3, -1.0, LR, 0.8, 1.0, DECAY)
    assert coefficients.sgd(None, LR, 0.8, 0.3, DECAY, False, True) == (3, -1.0, LR, 0.8, 1 - 0.3, DECAY)
    assert coefficients.adam(2, LR, betas, EPS, DECAY, True, False) == (3, 1.0, DECAY, *moments, EPS)
    assert coefficients.adamw(2, LR, betas, EPS, DECAY, True, False) == (1, 1.0, 1 - LR * DECAY, *moments, EPS)
    assert coefficients.adagrad(4, LR, 0.1, DECAY, EPS, False) == (1, 1.0, LR / (1 + 3 * 0.1), DECAY, EPS)
    assert coefficients.rmsprop(LR, 0.9, EPS, DECAY, 0.8, True, False) == (7, 1.0, LR, 0.9, 1 - 0.9, DECAY, 0.8, EPS)
    assert coefficients.lion(LR, betas, DECAY, False) == (0, 1.0, 1 - LR * DECAY, LR, BETA1, w1, BETA2, w2)


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.9999999, nextafter(1, 0)])
def test_power_is_repeated_squaring(base):
    """Its bits are a promise: libm's pow differs between systems. The exponent's bits, from the lowest up."""
    for exponent in [*range(1, 300), 2**16 + 1, 2**24 - 1, 10**9 + 7]:
        squares = [base]
        for _ in range(exponent.bit_length() - 1):
            squares.append(squares[-1] * squares[-1])
        assert coefficients.power(base, exponent) == prod(s for bit, s in enumerate(squares) if exponent >> bit & 1)


@pytest.mark.parametrize("base", [0.5, 0.83, 0.9, 0.999, 0.9999999])
def test_power_is_exact_enough(base):
    """Squaring doubles a relative error and adds half a unit: in all, `exponent` roundings at most."""
    for exponent in [*range(1, 40), 1000]:  # 0.5**1000 is no subnormal yet
        exact = Fraction(base) ** exponent
        error = abs(Fraction(coefficients.power(base, exponent)) / exact - 1)
        assert error <= exponent * 2.0**-53


@pytest.mark.parametrize("step", [2**24, 2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1])
def test_huge_steps(step):
    """Integers of 64 bits: nothing overflows, and Adagrad's rate still falls."""
    row = coefficients.adam(step, LR, (BETA1, BETA2), EPS, DECAY, False, False)
    assert row[-3:] == (LR, 1.0, EPS)
    rate = coefficients.adagrad(step, LR, 0.1, DECAY, EPS, False)[2]
    assert rate == pytest.approx(LR / (1 + (step - 1) * 0.1), rel=1e-15)
    assert rate < coefficients.adagrad(step // 2, LR, 0.1, DECAY, EPS, False)[2]
    slow = coefficients.adam(step, LR, (BETA1, nextafter(1, 0)), EPS, DECAY, False, False)
    assert 1 <= slow[-2] < 1e8


def test_betas_next_to_one_divide_by_no_zero():
    for step in (1, 2, 3):
        row = coefficients.adam(step, LR, (nextafter(1, 0), nextafter(1, 0)), EPS, DECAY, False, False)
        assert np.isfinite(row).all()
    row = coefficients.adam(1, LR, (0.0, 0.0), EPS, DECAY, False, False)
    assert row[3:] == (1.0, 0.0, 1.0, LR, 1.0, EPS)


def test_every_rule_has_a_function_of_its_name():
    public = {name for name, f in inspect.getmembers(coefficients, inspect.isfunction) if name in RULES}
    assert public == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_steps_and_classes_give_all_hyperparameters_on(rule):
    """An argument of the step or of the class that no coefficient reads would be a promise that nothing keeps."""
    read = set(inspect.signature(getattr(coefficients, rule)).parameters)
    step = set(inspect.signature(getattr(fastgd, f"{rule}_step")).parameters) - {"params", "grads", "one_pass"}
    states = {name for name in step if name.endswith(("buffers", "avgs", "avg_sqs", "sums"))}
    assert step - states | ({"amsgrad", "step"} & read) == read
    cls = getattr(fastgd, Case(rule, ()).class_name)
    made = set(inspect.signature(cls).parameters) - {"params", "state_dtype", "capturable", "initial_accumulator_value"}
    assert made | ({"step"} & read) == read
