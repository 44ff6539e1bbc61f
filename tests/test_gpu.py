"""What only a GPU can show: the twin's bits on it, streams, graphs, memory, no waiting. Needs CuPy or torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bits import BF16, DTYPES, F16, F32, F64, MIXES, assert_same_bits, assert_step_is_twins, operands, values
from cases import CASES, every_case
from classes import every_rule, normal, optimizer
from test_one_pass import EXTRAS, asked, copied, problem, take, told

import fastgd
from fastgd import reference

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


class There:
    """An array on the GPU with the layout of one on the host, of any of the four dtypes."""

    def __init__(self, a: Any, offset: int = 0) -> None:
        import cupy

        base = a if a.base is None or not isinstance(a.base, np.ndarray) else a.base
        low = base.__array_interface__["data"][0]
        self._start = a.__array_interface__["data"][0] - low + offset
        self.memory = cupy.zeros(base.nbytes + offset + 16, np.uint8)
        self.memory[offset : offset + base.nbytes] = cupy.asarray(np.frombuffer(base.tobytes(), np.uint8))
        self.base, self.offset, self.like = base, offset, a
        self.dtype, self.shape = a.dtype, a.shape
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": a.shape,
            "strides": a.strides,
            "data": (self.memory.data.ptr + self._start, False),
            "typestr": "<V2" if a.dtype == ml_dtypes.bfloat16 else a.dtype.str,
        }

    def get(self) -> Any:
        """The elements, on the host."""
        raw = self.memory.get()
        return np.ndarray(self.shape, self.dtype, raw.data, self._start, self.like.strides).copy()


def there(arrays: Any, **more: Any) -> Any:
    if isinstance(arrays, list):
        return [there(a, **more) for a in arrays]
    return There(arrays, **more) if isinstance(arrays, np.ndarray) else arrays


def back(arrays: Any) -> Any:
    return [a.get() if isinstance(a, There) else a for a in arrays]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@every_case
def test_bits(cupy, case, dtypes):
    """Every size up to 300 and some beyond, dense and at odd addresses, and the twin's bits after two steps."""
    for offset in (0, 2 * max(d.itemsize for d in dtypes)):
        sizes = [*range(301), 1023, 1024, 1025, 4097, 100_003]
        expected = [operands(case, n, dtypes, n) for n in sizes]
        roles = [there(list(role), offset=offset) for role in zip(*(map(np.array, e) for e in expected), strict=True)]
        for step in (1, 2):
            case.step(fastgd, roles[0], roles[1], roles[2:], step)
            for e in expected:
                case.step(reference, e[0], e[1], e[2:], step)
        for i, e in enumerate(expected):
            assert_step_is_twins(case, back(role[i] for role in roles), e, str(sizes[i]))


@pytest.mark.parametrize("extras", [(), ("stats",), ("max_norm",), ("skip_nonfinite",), EXTRAS], ids="+".join)
@pytest.mark.parametrize("wild", [False, True])
@every_rule
def test_one_pass(cupy, case, extras, wild):
    """Norms, factors and counts too; many arrays, one large one, strided ones."""
    for sizes in (
        [1, 0, 15, 300, 1023, 1024, 1025, (3, 700), ()],
        [(i * 37) % 900 for i in range(2000)],
        [3_000_001, 5],
    ):
        plain = problem(case, sizes, MIXES, wild=wild)
        moved = {name: there(arrays) for name, arrays in copied(plain).items()}
        a = take(fastgd, case, moved, **asked(extras, moved))
        e = take(reference, case, plain, **asked(extras, plain))
        assert told(a) == told(e)
        for name, arrays in plain.items():
            for x, y in zip(back(moved[name]), arrays, strict=True):
                if y is not None:
                    assert_same_bits(x, y, name)


@every_rule
def test_layouts(cupy, case):
    for spread in (lambda a: a[::2, ::-1], lambda a: a.T, lambda a: a[1:, 1:], lambda a: a[:, :1]):
        expected = [spread(a) for a in operands(case, (70, 90), MIXES[1])]
        moved = there([np.ndarray.__getitem__(a, ...) for a in expected])
        case.step(fastgd, moved[0], moved[1], moved[2:])
        copies = [a.copy() for a in expected]
        case.step(reference, copies[0], copies[1], copies[2:])
        assert_step_is_twins(case, back(moved), copies)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions(cupy, dtype):
    """Every bit pattern of 16 bits, and any of the wider, through the compute types."""
    n = 1 << 16
    x = np.arange(n, dtype=np.uint16).view(dtype) if dtype.itemsize == 2 else values(n, dtype)
    for compute in (F32, F64):
        for to in (F16, BF16, F32, F64):
            expected = [np.zeros(n, compute), x, np.full(n, -0.0, to)]
            p, g, b = there([a.copy() for a in expected])
            fastgd.sgd_step(p, g, 0.1, momentum=0.5, momentum_buffers=b, step=1)
            reference.sgd_step(*expected[:2], 0.1, momentum=0.5, momentum_buffers=expected[2], step=1)
            assert_same_bits(b.get(), expected[2], f"{compute} {to}")


@every_rule
def test_classes(cupy, case):
    """States of CuPy's own making, skipped steps among them; saved, loaded, and taken to the host."""
    dtypes = [np.float32, np.float64, np.float16, np.float32, np.float32]
    plain = optimizer(fastgd._core, case, normal(0, dtypes=dtypes))
    params = [cupy.asarray(p) for p in normal(0, dtypes=dtypes)]
    ours = getattr(fastgd, case.class_name)(params, **case.hyper)
    for step in range(6):
        grads = normal(step + 1, dtypes=dtypes)
        grads[0][1] = np.nan if step in (2, 3) else 0.5
        more = {"skip_nonfinite": True, "max_norm": 0.7} if step < 5 else {}
        plain.step(grads, **more)
        ours.step([cupy.asarray(g) for g in grads], **more)
        if step == 4:
            ours.load_state_dict(ours.state_dict())
    for a, e in zip(params, plain._params, strict=True):
        assert_same_bits(a.get(), e)
    for i, state in plain.state.items():
        for key, e in state.items():
            assert_same_bits(np.asarray(ours.state[i][key] if key == "step" else ours.state[i][key].get()), e)


@pytest.fixture
def delay(cupy) -> Any:
    """Something that keeps a stream busy for a while, and then writes."""
    kernel = cupy.RawKernel(
        'extern "C" __global__ void late(float* x, float value, long long cycles) {'
        "  long long start = clock64(); while (clock64() - start < cycles) {} x[threadIdx.x] = value; }",
        "late",
    )
    return lambda x, value, cycles=200_000_000: kernel((1,), (x.size,), (x, np.float32(value), np.int64(cycles)))


@pytest.mark.parametrize("named", [False, True])
def test_streams(cupy, delay, named):
    """A step waits for what its stream has before it, and for nothing else; the host waits for neither."""
    w, g = cupy.ones(64, np.float32), cupy.zeros(64, np.float32)
    fastgd.sgd_step(w, g, 0.1, max_norm=100.0, stats=True)  # memory is there from now on
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        delay(g, 2.0)
        done = cupy.cuda.Event()
        if not named:
            stats = fastgd.sgd_step(w, g, 0.5, max_norm=100.0, stats=True, skip_nonfinite=True)
    if named:
        stats = fastgd.sgd_step(w, g, 0.5, max_norm=100.0, stats=True, skip_nonfinite=True, stream=stream)
        del g
        cupy.get_default_memory_pool().free_all_blocks()
    done.record(stream)
    assert not done.done, "the host waited"
    assert stats.grad_norm == 16.0 and done.done
    stream.synchronize()
    assert (w.get() == 0.0).all()


@every_rule
def test_graphs(cupy, case):
    """A captured step, replayed, gives the bits of the steps; it counts, and reads the rate where it lies."""
    plain = optimizer(fastgd._core, case, normal(0, [(4, 3), (1500,)], ["f4", "f8"]))
    params = [cupy.asarray(p) for p in normal(0, [(4, 3), (1500,)], ["f4", "f8"])]
    grads = [cupy.zeros_like(p) for p in params]
    rate = cupy.asarray(0.1)
    ours = getattr(fastgd, case.class_name)(params, **case.hyper | {"lr": rate}, capturable=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        ours.step(grads, max_norm=0.8, skip_nonfinite=True)
        graph = stream.end_capture()
        for step in range(7):
            new = normal(step + 1, [(4, 3), (1500,)], ["f4", "f8"])
            if step == 3:
                new[1][5] = np.inf
            for g, n in zip(grads, new, strict=True):
                g.set(n, stream=stream)
            rate.fill(0.1 / (step + 1))
            graph.launch(stream)
            plain.param_groups[0]["lr"] = 0.1 / (step + 1)
            plain.step(new, max_norm=0.8, skip_nonfinite=True)
    stream.synchronize()
    for a, e in zip(params, plain._params, strict=True):
        assert_same_bits(a.get(), e)
    assert [int(s["step"]) for s in ours.state.values()] == [6, 6]


def test_memory_is_taken_once(cupy):
    """After the first step of a kind none is asked for, and results give theirs back."""
    params = [cupy.ones(1000 + i, np.float32) for i in range(366)]
    grads = [cupy.ones_like(p) for p in params]
    ours = fastgd.AdamW(params)
    assert ours.step(grads, max_norm=1.0, skip_nonfinite=True, stats=True).grad_norm
    free = cupy.cuda.runtime.memGetInfo()[0]
    for _ in range(2000):
        ours.step(grads, max_norm=1.0, skip_nonfinite=True, stats=True)
    cupy.cuda.runtime.deviceSynchronize()
    assert cupy.cuda.runtime.memGetInfo()[0] == free


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cupy):
    n = (1 << 31) + 1025
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * n:
        pytest.skip("needs 10 GiB of the GPU's memory")
    w, g = cupy.zeros(n, np.float16), cupy.ones(n, np.float16)
    fastgd.sgd_step(w, g, 0.5)
    for part in (w[:1025], w[-2050:], w[(1 << 30) - 5 : (1 << 30) + 5]):
        assert (part == -0.5).all()


def test_out_of_memory_is_an_exception(cupy):
    """Of the sort that NumPy raises, with nothing changed: a stream has no memory of ours yet, and there is none."""
    n = cupy.cuda.runtime.memGetInfo()[1] // 64  # float16: the sums of one gradient want an eighth of what is left
    w, g = cupy.zeros(n, np.float16), cupy.ones(n, np.float16)
    held = []
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        while True:
            held.append(cupy.cuda.runtime.malloc(1 << 22))
    try:
        with cupy.cuda.Stream(non_blocking=True), pytest.raises(MemoryError):
            fastgd.sgd_step(w, g, 0.1, stats=True)
        assert not w.any()
    finally:
        for pointer in held:
            cupy.cuda.runtime.free(pointer)


def test_torch():
    """torch's tensors go to the module as they are, in torch's current stream; autograd hears of it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    host = [torch.randn(300, 7), torch.randn(1025, dtype=torch.bfloat16)]
    ours = [x.clone().cuda() for x in host]
    grads = [torch.randn_like(x) for x in host]
    plain, fast = fastgd.AdamW(host, lr=0.1), fastgd.AdamW(ours, lr=0.1)
    with torch.cuda.stream(torch.cuda.Stream()):
        moved = [g.cuda() for g in grads]
        for _ in range(3):
            version = ours[0]._version
            a, e = fast.step(moved, stats=True), plain.step(grads, stats=True)
            assert ours[0]._version > version
            assert a.to_dict() == e.to_dict()
    for a, e in zip(ours, host, strict=True):
        assert torch.equal(a.cpu(), e)
    assert isinstance(fast.state[0]["exp_avg"], torch.Tensor) and fast.state[0]["exp_avg"].is_cuda


@pytest.mark.slow
def test_compute_sanitizer(cupy):
    """No access out of bounds, no race, nothing read that was never written."""
    tool = shutil.which("compute-sanitizer") or pytest.skip("needs compute-sanitizer")
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_gpu as t, cases;\n"
        "for c in cases.CASES[::3]:\n"
        "    for e in ((), t.EXTRAS):\n"
        "        p = t.problem(c, [1, 300, 1025, (3, 700), 40_000], t.MIXES);\n"
        "        m = {k: t.there(v) for k, v in p.items()}; s = t.take(t.fastgd, c, m, **t.asked(e, m)); s and s.log"
    )
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stdout[-3000:]


def test_cases_are_there():
    assert CASES and fastgd.config()["cuda"]["devices"]
