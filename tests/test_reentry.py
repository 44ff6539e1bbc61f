"""What user code may do in the middle of a step: an lr callable, a hyperparameter's __float__, a fork."""

from __future__ import annotations

import os

import numpy as np
import pytest
from bits import run_python

import fastgd


def stepping_with(action, p=None, engine_class=fastgd.SGD, **hyper):
    """An optimizer over one array whose schedule calls `action` once, in its second step."""
    p = np.zeros((32, 64), "f4") if p is None else p
    calls = []

    def lr(step):
        if step == 2 and not calls:
            calls.append(step)
            action(p, opt)
        return 0.1

    opt = engine_class([p], lr, **hyper)
    opt.step([np.ones(p.shape, p.dtype)])
    return p, opt


def reshape(p, opt):
    p.shape = (64, 32, 1, 1)


def resize(p, opt):
    p.resize((5_000_000,), refcheck=False)


def lock(p, opt):
    p.setflags(write=False)


@pytest.mark.parametrize("action", [reshape, resize, lock])
def test_array_changed_by_the_schedule(action):
    """The engine has read the array by then: it looks again before it writes."""
    base = np.zeros((32, 128), "f4")
    p, opt = stepping_with(action, base[:, ::2] if action is reshape else np.zeros((32, 64), "f4"))
    before = p.copy()
    with pytest.raises((ValueError, RuntimeError)):
        opt.step([np.ones((32, 64), "f4")])
    assert opt.state[0]["step"] == 1
    assert np.array_equal(p.ravel()[: before.size], before.ravel())


@pytest.mark.parametrize("method", ["step", "load_state_dict", "add_param_group"])
def test_the_optimizer_itself_refuses(method):
    saved = {}

    def action(p, opt):
        arguments = {"step": [np.ones_like(p)], "load_state_dict": saved, "add_param_group": {"params": [p.copy()]}}
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            getattr(opt, method)(arguments[method])

    p, opt = stepping_with(action, momentum=0.9)
    saved.update(opt.state_dict())
    saved["param_groups"] = [{**saved["param_groups"][0], "momentum": 0.5}]
    buffer = opt.state[0]["momentum_buffer"]
    opt.step([np.ones_like(p)])
    assert opt.param_groups[0]["momentum"] == 0.9 and len(opt.param_groups) == 1
    assert opt.state[0]["momentum_buffer"] is buffer and (buffer == np.float32(0.9) + 1).all()


def test_hyperparameter_that_converts_differently_each_time():
    class Fickle(float):
        calls = 0

        def __float__(self):
            Fickle.calls += 1
            return 0.0 if Fickle.calls == 1 else 0.9

    params = [np.zeros(1000, "f4") for _ in "ab"]
    with pytest.raises((TypeError, ValueError)):
        fastgd.sgd_step(params, [np.ones(1000, "f4")] * 2, 0.1, momentum=Fickle(), step=[1, 2])
    assert not any(p.any() for p in params)


def test_states_are_asked_for_once(monkeypatch):
    """Asking is slow: a step that asks each time would pass every other test."""
    params = [np.ones(3, "f4") for _ in range(5)]
    opt = fastgd.AdamW(params)
    opt.step([np.ones(3, "f4")] * 5)
    monkeypatch.setattr(type(opt), "_initialise", lambda *_: pytest.fail("asked again"))
    opt.step([np.ones(3, "f4")] * 5)


@pytest.mark.parametrize("count", [2**63 - 2, 2**63 - 3])
def test_step_counts_end(count):
    p = np.ones(3, "f4")
    opt = fastgd.AdamW([p])
    opt.step([np.ones(3, "f4")])
    saved = opt.state_dict()
    saved["state"][0]["step"] = count
    opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="step"):
        for _ in range(3):
            opt.step([np.ones(3, "f4")])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_optimizer_in_a_child_forked_during_its_step():
    """In a process of its own: other libraries warn of forks."""
    code = """
import os, threading
import numpy as np
import fastgd

opt = fastgd.SGD([np.zeros(1 << 20, "f4")], 0.1)
grads = [np.ones(1 << 20, "f4")]
stop = threading.Event()

def run():
    while not stop.is_set():
        opt.step(grads)

thread = threading.Thread(target=run)
thread.start()
codes = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        try:
            opt.step(grads)
            os._exit(0)
        except BaseException:
            os._exit(1)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(codes)
"""
    done = run_python(code)
    assert done.stdout.strip() == str([0] * 10), done.stderr
