"""Threads: how many, whose, what a fork leaves of them, and what they find in the control register."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import BF16, DTYPES, F32, MIXES, assert_step_is_twins, operands, run_python
from cases import CASES, Case

import fastgd
from fastgd import _core, coefficients, reference, threads

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's affinity, /proc and fork")
CASE = Case("adamw", ("amsgrad",))

# A step over enough for all threads, and its bits: what processes and threads below do.
WORK = """
import hashlib, os, sys
import fastgd
from bits import F32, operands
from test_threads import CASE

def work():
    p, g, *states = operands(CASE, 300_000, (F32,) * 5)
    for step in (1, 2, 3):
        CASE.step(fastgd, p, g, states, step)
    return hashlib.sha256(p.tobytes()).hexdigest()

def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def run(code: str, **env: str) -> str:
    done = run_python(WORK + code, timeout=60, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# How many ------------------------------------------------------------------------------------------------------------


def test_set_num_threads(set_threads):
    for n in (1, 2, 5, np.int64(3)):
        set_threads(n)
        assert fastgd.get_num_threads() == fastgd.config()["num_threads"] == n


@LINUX
@pytest.mark.parametrize(("numbers", "made"), [((1, 1), 0), ((2, 2), 1), ((5, 2), 4), ((2, 5), 4)])
def test_so_many_threads_work(numbers, made):
    """The calling thread is one of them; those made once are kept."""
    printed = run(f"before = tasks()\nfor n in {numbers}: fastgd.set_num_threads(n); work()\nprint(tasks() - before)")
    assert int(printed) == made


@pytest.mark.parametrize(
    ("given", "n"), [("3", 3), (" 4 ", 4), ("", None), ("0", ""), ("-1", ""), ("two", ""), ("1.5", "")]
)
def test_environment(given, n):
    done = run_python("import fastgd; print(fastgd.get_num_threads())", FASTGD_NUM_THREADS=given)
    if n == "":
        assert "ValueError: FASTGD_NUM_THREADS: " in done.stderr and given in done.stderr.splitlines()[-1]
    else:
        assert int(done.stdout) == (n or threads.default())


@LINUX
def test_affinity():
    code = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import fastgd; print(fastgd.get_num_threads())"
    assert run_python(f"import os; {code}", FASTGD_NUM_THREADS="").stdout == "1\n"


CGROUPS: dict[str, tuple[dict[str, str], float]] = {
    "none": ({}, float("inf")),
    "v2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2-unlimited": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, float("inf")),
    "v2-parent-is-tighter": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 20000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        2.5,
    ),
    "v2-namespace-root": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "1\n",
            "sys/fs/cgroup/memory/m/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1-unlimited": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        float("inf"),
    ),
    "odd": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "what\n"}, float("inf")),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_cgroup(name, tmp_path):
    files, quota = CGROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert threads._quota(tmp_path) == quota


@pytest.mark.parametrize(("cpus", "quota", "expected"), [(8, 2.5, 3), (2, 2.5, 2), (8, 0.5, 1), (4, float("inf"), 4)])
def test_default_is_the_lesser_of_affinity_and_quota(cpus, quota, expected, monkeypatch):
    monkeypatch.delenv("FASTGD_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda root: quota if root == Path("/") else None)
    assert threads.default() == expected


# Whose ---------------------------------------------------------------------------------------------------------------


def test_many_python_threads_with_arrays_of_their_own(set_threads):
    set_threads(3)
    shapes = [3, 1000, 40_000, 120_001]

    def work(i: int) -> list[Any]:
        arrays = operands(CASE, shapes[i % 4], (F32, BF16, F32), i % 4)
        for step in range(1, 13):
            CASE.step(fastgd, arrays[0], arrays[1], arrays[2:], step)
        return arrays

    expected = [work(i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for i, arrays in enumerate(pool.map(work, range(48))):
            assert_step_is_twins(CASE, arrays, expected[i % 4], str(i))


def test_one_optimizer_from_two_threads(set_threads):
    """A second step while the first runs is refused; what was taken is counted and whole."""
    set_threads(2)
    optimizer = fastgd.SGD([np.zeros(1 << 20, np.float16)], 1.0)
    p, g = optimizer.param_groups[0]["params"][0], np.full(1 << 20, -1, np.float16)

    def step(_: int) -> int:
        try:
            optimizer.step([g])
        except RuntimeError as error:
            assert "in the middle of a step" in str(error)
            return 0
        return 1

    with ThreadPoolExecutor(4) as pool:
        taken = sum(pool.map(step, range(200)))
    assert 0 < taken == optimizer.state[0]["step"]
    assert (p == taken).all()


@pytest.mark.skipif(sys.platform == "win32", reason="no signals between processes")
@pytest.mark.parametrize("how", ["function", "class"])
def test_interrupt_during_a_long_call(how, set_threads):
    """Ctrl-C in the middle: the step is taken to its end, and KeyboardInterrupt comes right after it.

    That another thread sees the middle shows, too, that the GIL is not held.
    """
    set_threads(2)
    p = np.zeros((1 << 23, 2), np.float16)[:, 0]
    g = np.ones_like(p)
    optimizer = fastgd.SGD([p], 1.0)
    middle = False

    def interrupt(before: float) -> None:
        nonlocal middle
        while p[0] == before:
            time.sleep(0.0001)
        middle = bool(p[-1] == before)
        os.kill(os.getpid(), signal.SIGINT)

    def step() -> None:
        optimizer.step([g]) if how == "class" else fastgd.sgd_step([p], [g], 1.0)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = 0
    try:
        while not middle:  # on a busy machine the signal may come late
            steps += 1
            assert steps < 20
            watcher = threading.Thread(target=interrupt, args=[p[0]])
            watcher.start()
            with pytest.raises(KeyboardInterrupt):
                step()
                watcher.join()
                time.sleep(1)  # where a late signal comes
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (p == -steps).all()
    step()
    assert (p == -steps - 1).all()
    if how == "class":
        assert optimizer.state[0]["step"] == steps + 1


# After a fork --------------------------------------------------------------------------------------------------------


@LINUX
def test_fork():
    """Parent and child both step in parallel before and after; a hang would be a timeout."""
    run("""
import warnings; warnings.simplefilter("ignore")  # newer Pythons warn of any fork with threads
fastgd.set_num_threads(4)
expected = work()
for generation in range(3):
    child = os.fork()
    if child == 0:
        before = tasks()
        fine = work() == expected == work() and tasks() - before == 3
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if work() == expected else 1)
        os._exit(0 if fine and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert work() == expected
    assert os.waitpid(child, 0)[1] == 0
""")


@LINUX
def test_fork_while_another_thread_steps():
    run("""
import threading, warnings; warnings.simplefilter("ignore")
fastgd.set_num_threads(3)
expected = work()
stop = threading.Event()
def loop():
    while not stop.is_set():
        work()
stepper = threading.Thread(target=loop)
stepper.start()
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == expected else 1)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
stop.set()
stepper.join()
""")


@LINUX
def test_multiprocessing():
    run("""
import multiprocessing, warnings; warnings.simplefilter("ignore")
fastgd.set_num_threads(2)
expected = work()
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert set(pool.starmap(work, [()] * 12)) == {expected}
assert work() == expected
""")


# The control register ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 100_000])
def test_flush_to_zero_changes_nothing_and_stays(n, set_threads):
    """torch switches it on for its thread, and threads made from there inherit it."""
    torch = pytest.importorskip("torch")
    set_threads(3)
    subnormal = np.array([3e-42], np.float32)
    for case, mix in itertools.product(CASES, MIXES):
        expected, actual = (operands(case, n, mix) for _ in "ab")
        case.step(reference, expected[0], expected[1], expected[2:])
        assert torch.set_flush_denormal(True)
        try:
            case.step(fastgd, actual[0], actual[1], actual[2:])
            flushed = (subnormal * np.float32(0.5))[0] == 0
        finally:
            torch.set_flush_denormal(False)
        assert_step_is_twins(case, actual, expected)
        assert flushed, "left as it was found"


@LINUX
def test_flush_to_zero_in_workers():
    """Threads that are born while it is on keep it for life."""
    pytest.importorskip("torch")
    run("""
import numpy as np, torch
p = np.full(1 << 20, 3e-42, np.float32)
torch.set_flush_denormal(True)
fastgd.set_num_threads(4)
before = tasks()
for _ in range(3):
    fastgd.sgd_step(p, p * 0, 1.0)
assert tasks() - before == 3
torch.set_flush_denormal(False)
assert (p == np.float32(3e-42)).all()
""")


@pytest.mark.skipif(sys.platform == "win32", reason="C's fesetround by ctypes")
@pytest.mark.parametrize("mode", ["up", "down", "zero"])
def test_rounding_mode(mode):
    """Nearest even, whatever the mode; it is left as it was. Coefficients are made beforehand: they are Python's."""
    libm = ctypes.CDLL(None)
    x86 = os.uname().machine in ("x86_64", "AMD64")
    code = {"up": 0x800, "down": 0x400, "zero": 0xC00} if x86 else {"up": 1 << 22, "down": 2 << 22, "zero": 3 << 22}
    case = Case("adam", ("decay", "amsgrad"))
    row = coefficients.adam(2, 0.017, (0.83, 0.957), 0.003, 0.07, True, False)
    for dtype in DTYPES:
        p, g, *states = operands(case, 999, [dtype])
        twins = operands(case, 999, [dtype])
        assert libm.fesetround(code[mode]) == 0
        try:
            done = _core.step("adam", [row], None, p, g, tuple(states), False)
            kept = libm.fegetround()
        finally:
            libm.fesetround(0)
        assert done and kept == code[mode]
        reference.engine.step("adam", [row], None, [twins[0]], [g], tuple([s] for s in twins[2:]), True)
        assert_step_is_twins(case, [p, g, *states], twins, f"{mode} {dtype}")
