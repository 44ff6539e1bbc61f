"""fastgd's own functions and classes on torch's tensors: the bits of arrays; or refused by name, nothing changed."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
from bits import BF16, F16, F32, F64, assert_same_bits, operands, run_python
from cases import CASES, TABLE, every_case
from classes import DTYPES, SHAPES, Model, every_rule, key_of, normal, optimizer
from tensors import array, tensor, torch
from test_errors import jax_array

import fastgd

MODULES = {"compiled": fastgd, "twin": fastgd.reference}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)

FULLEST = {case.rule: case for case in CASES if not case.maximize}
ADAMW = FULLEST["adamw"]
EVERY = (F64, F32, F16, BF16)


def as_tensors(arrays):
    return [tensor(a) for a in arrays]


def assert_same(tensors, arrays, what=""):
    for k, (t, a) in enumerate(zip(tensors, arrays, strict=True)):
        assert_same_bits(array(t), a, f"{what} {k}")


@every_case
@every_module
def test_steps(case, module):
    """Tensors of every dtype and mixes of them, bare: the bits of the same step on arrays."""
    for k, dtypes in enumerate([(d, d, d) for d in EVERY] + [(F32, F16, BF16), (BF16, F64, F32)]):
        arrays = operands(case, (1031,), dtypes, seed=k)
        tensors = as_tensors(arrays)
        versions = [t._version for t in tensors]
        case.step(module, tensors[0], tensors[1], tensors[2:])
        case.step(fastgd.reference, arrays[0], arrays[1], arrays[2:])
        assert_same(tensors, arrays, str(dtypes))
        assert [t._version - v for t, v in zip(tensors, versions, strict=True)] == [1, 0, *[1] * len(case.states)]


@every_rule
@every_module
@pytest.mark.parametrize("form", ["list", "tuple", "dict", "parameters"])
def test_forms(case, module, form):
    """In lists, tuples and dicts, 0-d and empty, None among the gradients, arrays and tensors side by side."""
    roles = [normal(k, SHAPES, DTYPES) for k in range(2 + len(case.states))]
    roles[2:] = [[abs(a) for a in role] for role in roles[2:]]
    roles = [[np.asarray(a) for a in role] for role in roles]
    given = [[a.copy() if i == 3 and k != 1 else tensor(a) for i, a in enumerate(role)] for k, role in enumerate(roles)]
    if form == "parameters":
        given[0] = [x if isinstance(x, np.ndarray) else torch.nn.Parameter(x) for x in given[0]]
    for role in (roles[1], given[1]):
        role[4] = None
    made = {"tuple": tuple, "dict": lambda role: dict(enumerate(role))}.get(form, list)
    params, grads, *states = map(made, given)
    case.step(module, params, grads, states)
    case.step(fastgd.reference, roles[0], roles[1], roles[2:])
    for name, role, expected in zip(("params", "grads", *case.states), given, roles, strict=True):
        for x, a in zip(role, expected, strict=True):
            if a is not None:
                assert_same_bits(x if isinstance(x, np.ndarray) else array(x), a, name)
    touched = [role[i]._version for k, role in enumerate(given) if k != 1 for i in (0, 1, 2)]
    assert touched == [1] * len(touched)
    assert all(role[4]._version == 0 for k, role in enumerate(given) if k != 1), "no gradient, not written"


@every_rule
@every_module
def test_layouts(case, module):
    """Transposed, channels-last, strided tensors and an expanded gradient: the bits of a contiguous step."""
    shape = (2, 3, 4, 5)
    layouts = [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.clone(),
    ]
    arrays = normal(2, [shape] * (2 + len(case.states)), [np.float32] * (2 + len(case.states)))
    arrays[1] = np.full(shape, 0.25, np.float32)
    arrays[2:] = [abs(a) for a in arrays[2:]]
    for shift in range(len(layouts)):
        tensors = [layouts[(k + shift) % 4](tensor(a)) for k, a in enumerate(arrays)]
        tensors[1] = torch.tensor(0.25).expand(shape)
        expected = [a.copy() for a in arrays]
        case.step(module, tensors[0], tensors[1], tensors[2:])
        case.step(fastgd.reference, expected[0], expected[1], expected[2:])
        assert_same(tensors, expected)


@every_rule
@every_module
def test_one_pass(case, module):
    """Averages, copies and gradients that are zeroed as tensors, too; a skipped step leaves every version."""
    n = 700
    arrays = operands(case, (n,), (F32, F32, F32))
    arrays = [np.where(np.isfinite(a), np.clip(abs(a), 0.01, 10), np.float32(1)).astype(np.float32) for a in arrays]
    ema, narrow = arrays[0].copy(), arrays[0].astype(ml_dtypes.bfloat16)
    for bad in (False, True):
        if bad:
            arrays[1][n // 2] = np.nan
        mine = as_tensors([*arrays, ema, narrow])
        versions = [t._version for t in mine]
        asked = dict(max_norm=0.5, skip_nonfinite=True, zero_grads=True, stats=True, ema_decay=0.75, grad_scale=4.0)
        told = []
        for mod, x in ((module, mine), (fastgd.reference, [*arrays, ema, narrow])):
            hyper = {k: v for k, v in case.hyper.items() if k != "amsgrad"}
            if TABLE[case.rule].counts:
                hyper["step"] = 3
            states = dict(zip(case.states, x[2:-2], strict=True))
            step = getattr(mod, f"{case.rule}_step")
            told.append(step(x[0], x[1], **states, **hyper, **asked, ema=x[-2], copies=x[-1]).to_dict())
        assert str(told[0]) == str(told[1])
        assert told[0]["skipped"] == bad
        assert_same(mine, [*arrays, ema, narrow])
        assert [t._version - v for t, v in zip(mine, versions, strict=True)] == [int(not bad)] * len(mine)


@every_rule
@pytest.mark.parametrize("engine", [fastgd._core, fastgd.reference.engine], ids=["compiled", "twin"])
def test_classes(case, engine):
    """fastgd's classes over tensors: every step, their versions, resume and copies."""
    arrays = normal(0)
    tensors = as_tensors(arrays)
    opt, model = optimizer(engine, case, tensors), Model(arrays, [case] * 5)
    other = None
    for t in range(1, 6):
        grads = [None if (i + t) % 4 == 0 else g for i, g in enumerate(normal(t))]
        for o in filter(None, (opt, other)):
            o.step([None if g is None else tensor(g) for g in grads])
        model.step(grads)
        assert_same(tensors, model.params, f"step {t}")
        if t == 2:
            other = optimizer(engine, case, [x.clone() for x in tensors])
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i, states in enumerate(model.states):
        for key, expected in states.items():
            assert_same_bits(opt.state[i][key], expected, key)
    assert_same(other.param_groups[0]["params"], model.params, "resumed")
    assert all(t._version >= 3 for t in tensors)
    last = copy.deepcopy(opt)
    before = [array(x).tobytes() for x in tensors]
    last.step(as_tensors(normal(9)))
    assert [array(x).tobytes() for x in tensors] == before
    opt.step(as_tensors(normal(9)))
    assert [array(x).tobytes() for x in tensors] != before
    assert [array(x).tobytes() for x in tensors] == [array(x).tobytes() for x in last.param_groups[0]["params"]]


@every_rule
def test_state_dicts_of_torchs_class(case):
    """Of fastgd.torch and of torch, whose tensors are taken as arrays."""
    modules = [fastgd.torch] if case.rule == "lion" else [fastgd.torch, torch.optim]
    for module in modules:
        params = [torch.nn.Parameter(x) for x in as_tensors(normal(0))]
        theirs = getattr(module, case.class_name)(params, **case.hyper)
        for p, g in zip(params, normal(1), strict=True):
            p.grad = tensor(g)
        theirs.step()
        if case.rule == "lion":
            continue  # whose state shows no count
        opt = optimizer(fastgd.engine.active, case, [array(p).copy() for p in params])
        opt.load_state_dict(theirs.state_dict())
        for i, p in enumerate(params):
            for key in map(key_of, case.states):
                assert_same_bits(opt.state[i][key], array(theirs.state[p][key]), key)
            assert opt.state[i]["step"] == 1


def test_a_stale_graph_is_noticed():
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    fastgd.sgd_step(w, torch.ones(3), lr=0.5)
    assert w.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_are_more_than_tensors():
    """Parameters, subclasses, buffers, tensors of inference mode, views of others and of NumPy's memory."""
    kind = type("Named", (torch.Tensor,), {})
    with torch.inference_mode():
        inference = torch.ones(4)
    base, shared = torch.ones(8), np.ones(4, np.float32)
    for x in (
        torch.nn.Parameter(torch.ones(4)),
        torch.nn.Buffer(torch.ones(4)),
        torch.ones(4).as_subclass(kind),
        inference,
        base[::2],
        torch.from_numpy(shared),
        torch.ones(4, requires_grad=True),
        torch.ones(4).share_memory_(),
    ):
        fastgd.sgd_step(x, torch.full((4,), 0.5).as_subclass(kind), lr=1.0)
        assert x.tolist() == [0.5] * 4, type(x)
    assert base.tolist() == [0.5, 1.0] * 4
    assert shared.tolist() == [0.5] * 4


# ---- refused


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


FREED = []


def freed(x):
    x = x.clone()
    FREED.append((x.untyped_storage(), x.untyped_storage().nbytes()))
    FREED[-1][0].resize_(0)
    return x


@pytest.fixture
def mesh():
    """Of this process alone."""
    from torch.distributed.device_mesh import DeviceMesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


# What stands in the place of a tensor of shape (4, 3): how it comes about, and words of the message.
REFUSED = {
    "fake": (fake, "a FakeTensor", "wraps"),
    "sparse": (lambda x: x.to_sparse(), "layout sparse coo", "x.to_dense()"),
    "mkldnn": (lambda x: x.to_mkldnn(), "layout  mkldnn", "x.to_dense()"),
    "complex": (lambda x: torch.complex(x, x), "complex64", "view_as_real"),
    "meta": (lambda x: x.to("meta"), "a tensor on meta", "to_empty"),
    "lazy": (lambda x: torch.nn.LazyLinear(3).weight, "an UninitializedParameter", "run the model once"),
    "lazy buffer": (lambda x: torch.nn.parameter.UninitializedBuffer(), "an UninitializedBuffer", "run the model"),
    "freed": (freed, "memory was freed"),
    "negative": (lambda x: torch.complex(x, x).conj().imag, "negative", "x.resolve_neg()"),
    "int64": (lambda x: x.long(), "int64", "float32"),
    "int8": (lambda x: x.to(torch.int8), "int8", "float32"),
    "bool": (lambda x: x > 1, "bool", "float32"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn", "bfloat16"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
}


def good(case):
    """Roles of three tensors each; the last will be spoilt."""
    shapes = [(20_000,), (), (4, 3)]
    roles = [as_tensors(normal(k, shapes, [np.float32] * 3)) for k in range(2 + len(case.states))]
    return dict(zip(("params", "grads", *case.states), [roles[0], roles[1], *roles[2:]], strict=True))


def take(case, module, roles):
    params, grads, *states = roles.values()
    case.step(module, params, grads, states)


def assert_refused(case, module, role, bad, *words, error=TypeError):
    roles = good(case)
    before = {name: [x.clone() for x in xs] for name, xs in roles.items()}
    tensors = {name: list(xs) for name, xs in roles.items()}
    roles[role][2] = bad
    try:
        with pytest.raises(error) as caught:
            take(case, module, roles)
        message = str(caught.value)
        assert message.startswith(f"{role}[2]: expected "), message
        assert all(word in message for word in words), message
    finally:
        while FREED:  # torch cannot print a tensor without memory, in a failure's report
            storage, size = FREED.pop()
            storage.resize_(size)
    for name, xs in tensors.items():
        for i, x in enumerate(xs):
            assert torch.equal(x, before[name][i]), name
            assert x._version == 0


@every_module
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning", "ignore:.*quantize_per_tensor:DeprecationWarning")
def test_refused(module, what):
    """Whatever has no plain memory of real numbers, in the place of any role, by name and with advice."""
    make, *words = REFUSED[what]
    for role in good(ADAMW):
        assert_refused(ADAMW, module, role, make(torch.rand(4, 3)), *words)


@every_module
def test_dtensor(module, mesh):
    from torch.distributed.tensor import DTensor

    for role in good(ADAMW):
        bad = DTensor.from_local(torch.rand(4, 3), mesh)
        assert_refused(ADAMW, module, role, bad, "a DTensor", "x.to_local()")


@every_module
def test_inside_a_transform(module):
    """vmap's and grad's tensors have no memory of their own."""

    def inside(x):
        with pytest.raises(TypeError, match=r"params: expected .*inside a transform of torch\.func"):
            module.sgd_step(x, torch.ones(3), lr=0.1)
        with pytest.raises(TypeError, match=r"(params|grads): expected .*inside a transform of torch\.func"):
            module.sgd_step(w, x, lr=0.1)
        return x.sum()

    w = torch.ones(3)
    torch.func.vmap(inside)(torch.ones(2, 3))
    torch.func.grad(inside)(torch.ones(3))
    assert w.tolist() == [1.0] * 3
    assert w._version == 0


@every_module
@every_rule
def test_memory_and_shapes(case, module):
    """What holds for arrays: shapes, and memory that is written has one owner."""
    assert_refused(case, module, "grads", torch.rand(3, 4), "expected shape (4, 3)", "(3, 4)", error=ValueError)
    for role in good(case):
        if role != "grads":
            bad = torch.rand(1, 3).expand(4, 3)
            assert_refused(case, module, role, bad, "memory of their own", error=ValueError)
    roles = good(case)
    before = roles["params"][2].clone()
    for bad in (roles["params"][2], roles["params"][2].detach(), array(roles["params"][2])):
        roles["grads"][2] = bad
        with pytest.raises(ValueError, match=r"(params|grads)\[2\]: expected memory of its own"):
            take(case, module, roles)
    assert torch.equal(roles["params"][2], before)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning", "ignore:.*quantize_per_tensor:DeprecationWarning")
def test_refused_by_classes(what):
    make, *words = REFUSED[what]
    try:
        with pytest.raises(TypeError) as caught:
            fastgd.AdamW([torch.ones(4, 3), make(torch.rand(4, 3))])
        assert str(caught.value).startswith("params[1]: expected ")
        params = [torch.ones(4, 3), torch.ones(4, 3)]
        opt = fastgd.AdamW(params)
        for _ in range(2):
            with pytest.raises(TypeError) as caught:
                opt.step([torch.ones(4, 3), make(torch.rand(4, 3))])
            assert str(caught.value).startswith("grads[1]: expected ")
            assert all(word in str(caught.value) for word in words)
            assert (opt.state, [p._version for p in params]) == ({}, [0, 0])
            assert params[0].tolist() == [[1.0] * 3] * 4
    finally:
        while FREED:
            storage, size = FREED.pop()
            storage.resize_(size)


@every_module
def test_jax(module):
    """Its arrays are immutable: read as a gradient, refused as a parameter, as which a tensor may stand beside them."""
    w, g = torch.ones(4, 3), jax_array(np.full((4, 3), 0.5, np.float32))
    module.sgd_step(w, g, lr=1.0)
    assert w.tolist() == [[0.5] * 3] * 4
    with pytest.raises(TypeError, match=r"params: .*jax.*immutable"):
        module.sgd_step(g, w, lr=1.0)
    opt = fastgd.SGD([w], lr=1.0)
    opt.step([g])
    assert w.tolist() == [[0.0] * 3] * 4


def test_arrays_of_other_libraries():
    """What speaks DLPack alone is stepped through NumPy's view, or not if that cannot be written."""

    class Other:
        def __init__(self, a, device=(1, 0)):
            self.a, self.device = a, device

        def __dlpack__(self, **how):
            return self.a.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.device

    a = np.ones(4)
    fastgd.sgd_step(Other(a), Other(np.full(4, 0.5)), lr=1.0)
    assert a.tolist() == [0.5] * 4
    with pytest.raises(TypeError, match=r"params: expected an array .*(host's memory|CUDA array interface)"):
        fastgd.sgd_step(Other(a, (2, 0)), np.ones(4), lr=1.0)
    a.setflags(write=False)
    with pytest.raises((TypeError, ValueError), match="params: expected an array that "):
        fastgd.sgd_step(Other(a), np.ones(4), lr=1.0)
    assert a.tolist() == [0.5] * 4


def test_ml_dtypes_is_not_needed():
    """Plain bfloat16 tensors need nothing of NumPy; others say what they need."""
    code = """
import sys
sys.modules["ml_dtypes"] = None
import torch, fastgd
p, g = (torch.full((8, 4), x, dtype=torch.bfloat16) for x in (2.0, 0.5))
fastgd.sgd_step(p, g, lr=1.0)
fastgd.sgd_step(p.mT, g.mT, lr=1.0)
fastgd.sgd_step([p], [torch.tensor(0.5).bfloat16().expand(8, 4)], lr=1.0, zero_grads=False, stats=True)
assert p.tolist() == [[0.5] * 4] * 8, p
try:
    fastgd.sgd_step(p, p, lr=1.0)
except TypeError as error:
    assert "ml_dtypes" in str(error), error
    print("told")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["told"]


def test_torch_is_not_imported():
    """Who has no tensors does not wait for torch."""
    code = "import numpy as np, sys, fastgd; fastgd.sgd_step(np.ones(3), np.ones(3), lr=0.1)"
    result = run_python(f"{code}\nprint('torch' in sys.modules)")
    assert result.stdout.split() == ["False"], result.stderr
