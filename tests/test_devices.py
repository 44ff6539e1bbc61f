"""Arrays on a GPU, up to the module that steps them: which engine, which stream, what is refused and in what words."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits, run_python
from cases import CASES
from classes import every_rule, normal, optimizer
from emulation import module
from pretended import STREAM, gpu, ndarray, on_gpu  # noqa: F401
from test_one_pass import EXTRAS, asked, copied, problem, take, told

import fastgd
from fastgd import _core, devices

MIXES = [(np.dtype(p), np.dtype(g), np.dtype(s)) for p, g, s in (("f4", "f4", "f4"), ("f8", "f2", "f4"))]
MIXES.append((np.dtype(ml_dtypes.bfloat16), np.dtype("f4"), np.dtype(ml_dtypes.bfloat16)))
SGD = next(case for case in CASES if case.rule == "sgd")


def pointers(roles: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: on_gpu(arrays) for name, arrays in roles.items()}


@pytest.mark.parametrize("extras", [(), ("stats",), EXTRAS], ids="+".join)
@every_rule
def test_functions(gpu, case, extras):  # noqa: F811
    """On arrays that only show their address, the bits of the step on the host."""
    plain = problem(case, [(4, 3), 0, (), 3000, (2, 5)], MIXES)
    plain["grads"][3] = plain["grads"][3][::-1]
    there = copied(plain)
    there["grads"][3] = there["grads"][3][::-1].copy()[::-1]
    views = pointers(there)
    a = take(fastgd, case, views, **asked(extras, views))
    e = take(fastgd, case, plain, **asked(extras, plain))
    assert told(a) == told(e)
    for name, arrays in plain.items():
        for x, y in zip(there[name], arrays, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert_same_bits(x, y, name)


@every_rule
def test_classes(gpu, case):  # noqa: F811
    """States are made by the array's own library; saving, loading and copying go on to the bit."""
    plain = optimizer(_core, case, normal(0))
    params = normal(0)
    there = getattr(fastgd, case.class_name)(on_gpu(params), **case.hyper)
    for step in range(5):
        grads = normal(step + 1)
        grads[step % 2] = None
        plain.step([None if g is None else g.copy() for g in grads], skip_nonfinite=step == 3)
        there.step(on_gpu(grads), skip_nonfinite=step == 3)
        if step == 2:
            there.load_state_dict(there.state_dict())
    for a, e in zip(params, plain._params, strict=True):
        assert_same_bits(a, e)
    assert there.state.keys() == plain.state.keys()
    for i, state in plain.state.items():
        for key, e in state.items():
            a = there.state[i][key]
            assert_same_bits(a if key == "step" else a.host, e)
            assert key == "step" or isinstance(a, ndarray)
    twice = copy.deepcopy(there)
    assert [p.host.tobytes() for p in twice.param_groups[0]["params"]] == [p.tobytes() for p in params]
    twice.step(on_gpu(normal(9)))
    assert [p.host.tobytes() for p in twice.param_groups[0]["params"]] != [p.tobytes() for p in params]


def test_a_class_takes_states_from_the_host(gpu):  # noqa: F811
    """A checkpoint that was made on the host goes on there, and the other way round."""
    case = next(case for case in CASES if case.rule == "adamw")
    plain = optimizer(_core, case, normal(0))
    plain.step(normal(1))
    params = [p.copy() for p in plain._params]
    there = getattr(fastgd, case.class_name)(on_gpu(params), **case.hyper)
    there.load_state_dict(plain.state_dict())
    there.step(on_gpu(normal(2)))
    plain.step(normal(2))
    for a, e in zip(params, plain._params, strict=True):
        assert_same_bits(a, e)
    with pytest.raises(TypeError, match=r"state_dict.*cuda:0"):
        plain.load_state_dict(there.state_dict())


def test_streams(gpu, monkeypatch):  # noqa: F811
    """The current stream, or the one that is named; arrays in the named one are kept."""
    seen = []
    real = module().step
    monkeypatch.setattr(module(), "step", lambda *a: seen.append(a[-1].stream) or real(*a))
    w, g = np.ones(3), np.ones(3)
    for stream, number in (
        (None, STREAM),
        (5, 5),
        (type("S", (), {"ptr": 6})(), 6),
        (type("T", (), {"cuda_stream": 8})(), 8),
    ):
        fastgd.sgd_step(on_gpu(w), on_gpu(g), 0.1, stream=stream)
        assert seen[-1] == number
    gone = on_gpu(g)
    before = sys.getrefcount(gone)
    fastgd.sgd_step(on_gpu(w), gone, 0.1, stream=9)
    assert sys.getrefcount(gone) > before
    with pytest.raises(TypeError, match=r"stream: expected .* got str"):
        fastgd.sgd_step(on_gpu(w), on_gpu(g), 0.1, stream="fast")
    for call in (lambda: fastgd.sgd_step(w, g, 0.1, stream=5), lambda: fastgd.SGD([w], 0.1).step([g], stream=5)):
        with pytest.raises(ValueError, match="stream: expected none for arrays in the host's memory"):
            call()
    assert np.allclose(w, 0.5)


def refused(error: type[Exception], *words: str, **roles: Any) -> None:
    """A step is refused in these words, and nothing has changed."""
    good: dict[str, Any] = {
        "params": [on_gpu(np.ones((2, 3))) for _ in "ab"],
        "grads": [on_gpu(np.ones((2, 3))) for _ in "ab"],
    }
    good |= {"momentum_buffers": [on_gpu(np.zeros((2, 3))) for _ in "ab"]}
    call = good | roles
    arrays = [getattr(a, "host", a) for role in call.values() if isinstance(role, list) for a in role]
    before = [np.array(a).tobytes() for a in arrays]
    with pytest.raises(error) as caught:
        fastgd.sgd_step(**call, lr=0.1, momentum=0.9)
    assert all(word in str(caught.value) for word in words), caught.value
    assert [np.array(a).tobytes() for a in arrays] == before


def test_errors(gpu):  # noqa: F811
    a, b = (np.ones((2, 3)) for _ in "ab")
    refused(TypeError, "grads[1]", "the host", "cuda:0", "one device", grads=[on_gpu(a), b])
    refused(TypeError, "params[1]", "cuda:1", "cuda:0", params=[on_gpu(a), on_gpu(b, device=1)])
    refused(TypeError, "momentum_buffers[0]", "cuda:1", momentum_buffers=[on_gpu(a, device=1), on_gpu(b)])
    refused(TypeError, "grads[0]", "cuda:0", "the host", params=[a, b], momentum_buffers=[a + 1, b + 1])
    refused(ValueError, "grads[1]", "shape (2, 3)", "(3, 2)", grads=[on_gpu(a), on_gpu(np.ones((3, 2)))])
    refused(TypeError, "params[0]", "dtype", "int64", params=[on_gpu(np.ones((2, 3), int)), on_gpu(b)])
    refused(ValueError, "params[1]", "the same array", params=[on_gpu(a)] * 2)
    refused(ValueError, "params[1]", "overlaps", params=[on_gpu(a), on_gpu(a[::-1])])
    refused(ValueError, "params[0]", "read-only", params=[on_gpu(a, read_only=True), on_gpu(b)])
    both = fastgd.SGD([on_gpu(a)], 0.1)
    with pytest.raises(TypeError, match=r"param_groups\[1\].*cuda:0.*cuda:1"):
        both.add_param_group({"params": [on_gpu(b, device=1)]})
    with pytest.raises(TypeError, match=r"params: expected .*the host, got .*cuda:0"):
        fastgd.reference.sgd_step(on_gpu(a), on_gpu(b), 0.1)


def test_without_the_module(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "fastgd._cuda", None)
    for call in (
        lambda p: fastgd.sgd_step(p, p, 0.1),
        lambda p: fastgd.sgd_step([p], [p], 0.1, stats=True),
        lambda p: fastgd.SGD({"w": p}, 0.1),
    ):
        with pytest.raises(TypeError, match=r"params.*no CUDA.*FASTGD_CUDA=ON.*host"):
            call(on_gpu(np.ones(3)))
    assert fastgd.config()["cuda"] is None


def test_a_window_shows_itself_and_nothing_else(gpu):  # noqa: F811
    seen = devices.window("params", on_gpu(np.ones((2, 3), "f4")), True)
    assert repr(seen) == str(seen) == "<window of shape (2, 3) and dtype float32 on cuda:0>"
    assert pickle.loads(pickle.dumps(seen)) is None and copy.deepcopy([seen]) == [None]


def test_nothing_is_imported_for_it():
    """Neither CuPy nor torch nor the module, until an array of theirs comes."""
    code = "import sys, numpy as np, fastgd; w = np.ones(3); fastgd.sgd_step(w, w.copy(), 0.1); fastgd.AdamW([w]);"
    done = run_python(code + "print({'cupy', 'torch', 'fastgd._cuda'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_the_module_is_what_the_build_made():
    """Where it was built it imports without a GPU, and says plainly what there is."""
    try:
        cuda = importlib.import_module("fastgd._cuda")
    except ImportError:
        assert fastgd.config()["cuda"] is None
        return
    told = fastgd.config()["cuda"]
    assert told["architectures"] == cuda.architectures() != []
    assert cuda.RULES == _core.RULES
    assert told["devices"] or told["problem"]


def test_the_benchmark_says_what_is_missing(monkeypatch, capsys):
    """And where torch's tensors of the host stand for those of a GPU, its sections run."""
    from fastgd.cli import bench, main

    told = {**fastgd.config(), "cuda": None}
    monkeypatch.setattr(fastgd, "config", lambda: told)
    assert main(["bench", "--suite", "cuda"]) == 1
    assert "needs fastgd._cuda" in capsys.readouterr().err
    told["cuda"] = {"devices": [], "architectures": ["90"], "problem": "no driver"}
    assert main(["bench", "--suite", "cuda"]) == 1
    assert "needs a GPU: no driver" in capsys.readouterr().err
    pytest.importorskip("torch")
    told["cuda"]["devices"] = ["pretended"]
    monkeypatch.setattr(bench.cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(bench.cuda, "find_spec", lambda name: name == "torch" or None)
    quick = ["--quick", "--rounds", "3", "--seconds", "0.01", "--sizes", "1000", "--rules", "sgd", "adamw"]
    assert main(["bench", "--suite", "cuda", *quick, "--lists", "mlp-mnist"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch fused", "torch calls", "pretended", "Host time", "bfloat16"))
