"""An independent truth: float64 against plain loops by others, with hyperparameters that are nowhere neutral."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from cases import RULES, TABLE, Case, every_case

import fastgd

# The two order their operations differently: about one unit in the last place (1.1e-16) an operation, times some ten
# operations in 40 steps, on values of the size of 1: 1e-13. A wrong formula is off by lr times something, 1e-4 or more.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@every_case
@pytest.mark.parametrize("how", ["function", "class"])
def test_forty_steps(case, how):
    rng = np.random.default_rng(1)
    p = rng.normal(size=(5, 4))
    grads = rng.normal(size=(40, 5, 4))
    truth = TABLE[case.rule].oracle(case, p.copy(), grads)
    if how == "function":
        states = [np.zeros_like(p) for _ in case.states]
        for step, g in enumerate(grads, 1):
            case.step(fastgd, p, g, states, step)
    else:
        optimizer = getattr(fastgd, case.class_name)([p], **case.hyper)
        for g in grads:
            optimizer.step([g])
        states = [state for key, state in optimizer.state[0].items() if key != "step"]
    for name, actual, expected in zip(("params", *case.states), (p, *states), truth, strict=True):
        assert np.abs(expected).min() > 0, "an oracle that moved"
        np.testing.assert_allclose(actual, expected, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_defaults_are_torchs(rule):
    case = Case(rule, ())
    step = inspect.signature(getattr(fastgd, f"{rule}_step")).parameters
    ours = inspect.signature(getattr(fastgd, case.class_name)).parameters
    theirs = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}  # Lion's, by its authors' code
    if rule != "lion":
        torch = pytest.importorskip("torch")
        theirs = {n: p.default for n, p in inspect.signature(getattr(torch.optim, case.class_name)).parameters.items()}
    compared = 0
    for name, parameter in [*step.items(), *ours.items()]:
        if parameter.default not in (inspect.Parameter.empty, None) and name in theirs:
            assert parameter.default == theirs[name], name
            compared += 1
    assert compared >= 2 * len(TABLE[rule].hyper) - 2  # sgd's lr has no default here


def test_first_step_leaves_dampening_out():
    """By hand: 0.5 * 4 + 3 at the first step, 0.5 * 4 + (1 - 0.25) * 3 at any other, and where no step is given."""
    for step, buffer in ((1, 5.0), (2, 4.25), (None, 4.25), (2**40, 4.25)):
        p, b = np.array(10.0), np.array(4.0)
        fastgd.sgd_step(p, np.array(3.0), 2.0, momentum=0.5, dampening=0.25, momentum_buffers=b, step=step)
        assert (b, p) == (buffer, 10 - 2 * buffer)


def test_bias_correction_at_any_step():
    """Steps are 64-bit integers, one a parameter; far out the correction is gone and nothing else has changed."""
    m, v = np.array([0.3]), np.array([0.2])
    for step in (1, 2, 255, 256, 257, 2**24 + 1, 2**31 + 1, 2**62):
        p, moments = np.array([1.0]), (m.copy(), v.copy())
        fastgd.adam_step(p, np.array([0.5]), *moments, step=step, lr=0.1, betas=(0.9, 0.999), eps=1e-3)
        m1, v1 = 0.9 * 0.3 + 0.1 * 0.5, 0.999 * 0.2 + 0.001 * 0.25
        mhat, vhat = m1 / (1 - 0.9**step), v1 / (1 - 0.999**step)
        # 1 - 0.999 ** step loses three digits to cancellation at the first steps.
        np.testing.assert_allclose(p, 1 - 0.1 * mhat / (np.sqrt(vhat) + 1e-3), rtol=1e-12)
