"""What a step tells of itself, and what the course of a run says of the learning rate."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
from classes import every_engine, every_rule, normal, optimizer

import fastgd
from fastgd import reference
from fastgd.dynamics import verdict

every_module = pytest.mark.parametrize("module", [fastgd, reference], ids=["compiled", "twin"])

NAMES = ["grad_norm", "clip_factor", "update_norm", "param_norm", "nonfinite", "skipped"]
SHAPES = [(40, 30), (), (0,), (5000,), (7,)]
# Sums in float64 that differ in their order only, on fewer than 10,000 elements: far below 1e-12. Anything else that
# could be summed (before the step, before the scale, another parameter) is off in the first digits.
RTOL = 1e-12


def stepped(module, form=list, **one_pass):
    """The stats of a step over arrays of normal values, with what NumPy makes of the same arrays."""
    params, grads = normal(0, SHAPES, [np.float64] * 5), normal(1, SHAPES, [np.float64] * 5)
    grads[3] = None
    keys = [f"fc{i}.weight" for i in range(5)] if form is dict else list(range(5))
    old = [p.copy() for p in params]
    formed = [dict(zip(keys, x, strict=True)) if form is dict else x for x in (params, grads)]
    stats = module.sgd_step(*formed, 0.1, grad_scale=4.0, **one_pass)
    norms = {
        key: (np.linalg.norm(g / 4), np.linalg.norm(p - o), np.linalg.norm(p))
        for key, p, g, o in zip(keys, params, grads, old, strict=True)
        if g is not None
    }
    return stats, norms


@every_module
@pytest.mark.parametrize("form", [list, dict])
@pytest.mark.parametrize("max_norm", [None, 1.5, 1e9])
def test_values(module, form, max_norm):
    stats, norms = stepped(module, form, max_norm=max_norm, stats=True)
    whole = np.sqrt(np.square(list(norms.values())).sum(axis=0))
    np.testing.assert_allclose([stats.grad_norm, stats.update_norm, stats.param_norm], whole, rtol=RTOL)
    np.testing.assert_allclose(stats.clip_factor, min(1, (max_norm or 1e9) / (whole[0] + 1e-6)), rtol=RTOL)
    np.testing.assert_allclose(stats.update_norm, 0.1 * whole[0] * stats.clip_factor, rtol=RTOL)
    assert (stats.nonfinite, stats.skipped) == (0, False)
    assert list(stats.per_param) == list(norms), "the parameter without gradient is left out"
    for key, expected in norms.items():
        np.testing.assert_allclose(stats.per_param[key], expected, rtol=RTOL)
        assert stats.per_param[key]._fields == ("grad_norm", "update_norm", "param_norm")


@every_module
def test_a_bare_array_is_parameter_zero(module):
    stats = module.sgd_step(np.array([3.0, 4.0]), np.array([6.0, 8.0]), 0.5, stats=True)
    assert stats.per_param == {0: (10.0, 5.0, 0.0)}
    assert (stats.grad_norm, stats.update_norm, stats.param_norm) == (10.0, 5.0, 0.0)


@every_module
def test_nonfinite_counts_every_element(module):
    grads = [np.array([1.0, math.nan, math.inf]), np.ones(5000), np.array(-math.inf), np.full((30, 50), math.nan)]
    params = [np.ones(g.shape) for g in grads]
    stats = module.sgd_step(params, grads, 0.1, stats=True)
    assert (stats.nonfinite, stats.skipped) == (2 + 1 + 1500, False)
    assert math.isnan(stats.grad_norm) and math.isnan(stats.update_norm) and math.isnan(stats.param_norm)
    finite = {i for i, norms in stats.per_param.items() if all(map(math.isfinite, norms))}
    assert finite == {1}
    stats = module.sgd_step(params, grads, 0.1, skip_nonfinite=True)
    assert (stats.nonfinite, stats.skipped) == (2 + 1 + 1500, True)


@every_module
def test_a_nan_in_a_gradient_is_not_a_missing_gradient(module):
    stats = module.sgd_step([np.ones(2), np.ones(2)], [np.full(2, np.nan), None], 0.1, stats=True)
    assert list(stats.per_param) == [0] and math.isnan(stats.grad_norm) and math.isnan(stats.per_param[0].param_norm)


@every_module
def test_a_skipped_step(module):
    stats, _ = stepped(module, skip_nonfinite=True, stats=True)
    assert not stats.skipped and stats.update_norm > 0
    p = np.ones(3)
    stats = module.sgd_step([p, p.copy()], [np.array([3.0, 4.0, 0.0]), np.array([1.0, np.nan, 2.0])], 0.1, **BOTH)
    assert (stats.skipped, stats.nonfinite, stats.clip_factor, stats.update_norm) == (True, 1, 1.0, 0.0)
    assert math.isnan(stats.grad_norm) and math.isnan(stats.param_norm)
    assert stats.per_param[0].grad_norm == 5.0 and stats.per_param[0].update_norm == 0.0
    assert (p == 1).all()


BOTH = {"skip_nonfinite": True, "stats": True}


@every_module
def test_without_norms(module):
    """skip_nonfinite alone tells what it knows."""
    stats, _ = stepped(module, skip_nonfinite=True, max_norm=1.5)
    assert (stats.nonfinite, stats.skipped) == (0, False) and 0 < stats.clip_factor < 1
    assert stats.grad_norm is stats.update_norm is stats.param_norm is stats.per_param is None
    assert stats.to_dict() == {
        "grad_norm": None,
        "clip_factor": stats.clip_factor,
        "update_norm": None,
        "param_norm": None,
        "nonfinite": 0,
        "skipped": False,
        "per_param": None,
    }


@every_module
def test_only_stats_and_skip_nonfinite_return_anything(module):
    assert stepped(module)[0] is None
    assert stepped(module, max_norm=1.0)[0] is None
    assert isinstance(stepped(module, stats=True)[0], fastgd.StepStats)
    assert isinstance(stepped(module, skip_nonfinite=True)[0], fastgd.StepStats)


def test_to_dict_is_plain():
    stats, _ = stepped(fastgd, dict, stats=True)
    plain = stats.to_dict()
    assert list(plain) == [*NAMES, "per_param"]
    for name in NAMES:
        assert plain[name] == getattr(stats, name)
    assert plain["per_param"] == {key: norms._asdict() for key, norms in stats.per_param.items()}
    assert json.loads(json.dumps(plain)) == plain


def test_repr_and_copies():
    stats, _ = stepped(fastgd, stats=True)
    values = ", ".join(f"{name}={getattr(stats, name)!r}" for name in NAMES)
    assert repr(stats) == f"StepStats({values})"
    for again in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert again.to_dict() == stats.to_dict()


def test_reads_well():
    def text(grad, **one_pass):
        return str(fastgd.sgd_step(np.array([3.0, 4.0]), np.array(grad), 0.1, **one_pass))

    assert text([6.0, 8.0], stats=True) == "gradient 10; update 1, parameters 4"
    assert text([6.0, 8.0], stats=True, max_norm=2.5) == "gradient 10, clipped by 0.25; update 0.25, parameters 4.75"
    assert text([6.0, 8.0], stats=True, max_norm=1e9) == "gradient 10; update 1, parameters 4"
    assert text([math.nan, 8.0], stats=True).startswith("1 gradient value not finite; gradient nan; update nan")
    assert text([math.nan, math.inf], **BOTH) == "skipped: 2 gradient values not finite"
    assert text([math.nan, 1.0], skip_nonfinite=True) == "skipped: 1 gradient value not finite"
    assert text([6.0, 8.0], skip_nonfinite=True) == "0 gradient values not finite"
    assert text([6.0, 8.0], skip_nonfinite=True, max_norm=2.5) == "0 gradient values not finite, clipped by 0.25"


class Writer:
    """TensorBoard's, as far as it matters."""

    def __init__(self):
        self.logged = []

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.logged.append((tag, scalar_value, global_step))


def test_log():
    stats, _ = stepped(fastgd, dict, stats=True)
    writer = Writer()
    stats.log(writer, 7)
    assert writer.logged == [(f"fastgd/{name}", getattr(stats, name), 7) for name in NAMES]
    writer = Writer()
    stats.log(writer, 8, prefix="opt.", per_param=True)
    assert writer.logged[:6] == [(f"opt.{name}", getattr(stats, name), 8) for name in NAMES]
    assert len(writer.logged) == 6 + 3 * 4
    assert ("opt.update_norm/fc4.weight", stats.per_param["fc4.weight"].update_norm, 8) in writer.logged


def test_log_leaves_out_what_is_not_known():
    writer = Writer()
    stats, _ = stepped(fastgd, skip_nonfinite=True)
    stats.log(writer, 1, per_param=True)
    assert [tag for tag, *_ in writer.logged] == ["fastgd/clip_factor", "fastgd/nonfinite", "fastgd/skipped"]


@every_engine
@every_rule
def test_names_of_a_class(case, engine):
    """Keys where every group is a dict and no key is in two; else indices over all groups."""

    def names(params, grads):
        return list(optimizer(engine, case, params).step(grads, stats=True).per_param)

    def arrays(n):
        return [np.ones(3) for _ in range(n)]

    first, second = dict(zip("ab", arrays(2), strict=True)), dict(zip("cd", arrays(2), strict=True))
    grads = {key: np.ones(3) for key in "abcd"}
    assert names(first, {"a": grads["a"], "b": None}) == ["a"]
    assert names(first, {"b": grads["b"], "a": grads["a"]}) == ["a", "b"]
    two = [{"params": first}, {"params": second}]
    both = [{key: grads[key] for key in "ab"}, {key: grads[key] for key in "cd"}]
    assert names(two, both) == list("abcd")
    assert names([two[0], {"params": dict(zip("bc", arrays(2), strict=True))}], arrays(4)) == [0, 1, 2, 3]
    assert names([two[0], {"params": arrays(2)}], [both[0], [None, np.ones(3)]]) == [0, 1, 3]
    assert names(arrays(3), arrays(3)) == [0, 1, 2]
    assert names(np.ones(3), np.ones(3)) == [0]


def train(lr, steps=200, start=1.0, skip=True):
    """Losses and stats of descent on the parabola x**2, which diverges from lr = 1 on."""
    x = np.full(10, start)
    losses, history = [], []
    with np.errstate(all="ignore"):
        for _ in range(steps):
            losses.append(float(x @ x))
            history.append(fastgd.sgd_step(x, 2 * x, lr, stats=True, skip_nonfinite=skip))
    return losses, history


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("lr", [1.01, 1.5, 10.0, 1e6, 1e100])
def test_too_large(lr, skip):
    assert verdict(*train(lr, skip=skip)).startswith("The learning rate is too large: the loss ")


@pytest.mark.parametrize("lr", [1e-5, 1e-3, 0.1, 0.45, 0.9])
def test_neither_too_large_nor_too_small(lr):
    assert verdict(*train(lr)).startswith("The learning rate is neither too large nor far too small")


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-9, 4e-7])
def test_far_too_small(lr):
    words = verdict(*train(lr))
    assert words.startswith("The learning rate is far too small: a step changes the parameters by ")
    assert f"{2 * lr:.1e}" in words


def test_small_updates_of_what_has_converged_are_no_fault():
    losses, history = train(0.4, 100)
    more, rest = train(1e-9, 1000, start=1e-3)
    assert not verdict(losses + more, history + rest).startswith("The learning rate is far too small")


def test_norms_grow_where_the_loss_does_not():
    """A loss that stays below 1 while its parameters run off."""
    x, losses, history = np.ones(3), [], []
    for step in range(100):
        losses.append(1 - 1 / (1 + float(x @ x)))
        history.append(fastgd.sgd_step(x, -(1.2**step) * np.ones(3), 0.1, stats=True))
    assert verdict(losses, history).startswith("The learning rate is too large: the gradients' norm grows without")


def test_growth_from_a_start_at_zero_is_healthy():
    """Parameters that begin at zero grow by any factor, and come to rest."""
    x, losses, history = np.zeros(5), [], []
    for _ in range(2000):
        losses.append(float(((x - 3) ** 2).sum()))
        history.append(fastgd.sgd_step(x, 2 * (x - 3), 1e-3, stats=True))
    assert history[-1].param_norm > 10 * history[9].param_norm
    assert verdict(losses, history).startswith("The learning rate is neither")


def test_negative_losses():
    _, history = train(0.1)
    down = [-1 - step / 100 for step in range(200)]
    assert verdict(down, history).startswith("The learning rate is neither")
    assert verdict([-1 + step / 1000 for step in range(200)], history).startswith("The learning rate is neither")
    assert "the loss grew from -0.82 to 2.8" in verdict([-1 + step / 50 for step in range(200)], history)


def test_a_few_skipped_steps_are_told_and_no_fault():
    x, history = np.ones(10), []
    for step in range(100):
        g = np.full(10, np.inf) if step in (3, 50) else 2 * x
        history.append(fastgd.sgd_step(x, g, 0.1, stats=True, skip_nonfinite=True))
    words = verdict(np.linspace(1, 0, 100), history)
    assert words.startswith("The learning rate is neither")
    assert words.endswith("Skipped, for gradients that were not finite: 2 of 100 steps.")
    assert "Skipped" not in verdict(*train(0.1))


def test_nothing_to_judge():
    losses, history = train(0.1)
    for nothing in ((losses, []), ([], history), ([], [])):
        assert verdict(*nothing).startswith("There is nothing to judge")
    assert verdict(losses[:1], history[:1]).startswith("The learning rate is neither")


def test_verdict_needs_norms():
    stats = fastgd.sgd_step(np.ones(3), np.ones(3), 0.1, skip_nonfinite=True)
    with pytest.raises(ValueError, match="stats=True"):
        verdict([1.0], [stats])
