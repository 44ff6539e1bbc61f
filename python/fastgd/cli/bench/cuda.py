"""The suite ``cuda``: every rule on a GPU against a device-to-device copy, torch's fused steps and CuPy's kernels."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

import fastgd
from fastgd.cli.bench.case import Setting, Shape, settings, workloads
from fastgd.cli.bench.contest import patience
from fastgd.cli.bench.measure import LIMIT, OURS, Contender, Result, compete
from fastgd.cli.bench.report import Report, elements_in_words
from fastgd.cli.stop import Stop

_MI = 2**20
_SIZES = [_MI, 64 * _MI, 256 * _MI]
_LISTS = ["yolo26n", "resnet50", "gpt2-small"]
_FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}  # what torch has fused kernels for
_DEVICE = "cuda"
_EXTRAS = {"grad_scale": 8.0, "max_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.999, "zero_grads": False}


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure the sections that were asked for, each into the report."""
    cuda = fastgd.config()["cuda"]
    if cuda is None:
        raise Stop("the suite cuda needs fastgd._cuda: pip install . -C cmake.define.FASTGD_CUDA=ON, where nvcc is")
    if not cuda["devices"]:
        raise Stop(f"the suite cuda needs a GPU: {cuda['problem']}")
    if find_spec("torch") is None:
        raise Stop("the suite cuda needs torch, which is not installed")
    report.note(f"device: {cuda['devices'][0]}; limit: a device-to-device copy of as many bytes, read plus written")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, report)


def sizes(args: argparse.Namespace, report: Report) -> None:
    """Every rule on one tensor, float32 and bfloat16."""
    for n in args.sizes or (_SIZES[:1] if args.quick else _SIZES):
        for dtype in ("float32", "bfloat16"):
            section = report.begin("size", f"One tensor on the GPU: {elements_in_words(n)}, {dtype}")
            for name in args.rules or settings():
                case = _Case(settings()[name], [(n,)], dtype)
                contenders = [case.copy(), case.ours(), *case.fused(), *case.cupy()]
                section.add(case.result(name, compete(contenders, *patience(args))))
            section.finish()


def lists(args: argparse.Namespace, report: Report) -> None:
    """AdamW on the parameters of real models, host time included."""
    section = report.begin("list", "AdamW on the GPU, models")
    for model in args.lists or (_LISTS[:1] if args.quick else _LISTS):
        case = _Case(settings()["adamw"], workloads()[model], "float32")
        section.add(case.result(model, compete([case.copy(), case.ours(), *case.fused()], *patience(args))))
    section.finish()


def one_pass(args: argparse.Namespace, report: Report) -> None:
    """AdamW with all extras against torch's separate calls."""
    section = report.begin("pass", "The one pass on the GPU: AdamW, unscaled, clipped, averaged, copied")
    for model in args.lists or (_LISTS[:1] if args.quick else _LISTS):
        case = _Case(settings()["adamw"], workloads()[model], "float32")
        contenders = [case.ours(ema=case.averages, copies=case.copies, **_EXTRAS), case.separate()]
        section.add(case.result(model, compete(contenders, *patience(args))))
    section.finish()


def host(args: argparse.Namespace, report: Report) -> None:
    """What a step costs the host, which does not wait for the GPU."""
    section = report.begin("small", "Host time of a step, 366 tensors of 8")
    case = _Case(settings()["adamw"], [(8,)] * 366, "float32")
    contenders = [_Hosted(c.name, c.step) for c in (case.ours(), *case.fused())]
    times = compete(contenders, *patience(args, rounds=31))
    section.add(Result("class AdamW", case.elements, 366, 0, times))
    section.finish()


SECTIONS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "sizes": sizes,
    "lists": lists,
    "pass": one_pass,
    "host": host,
}


class _Timed(Contender):
    """A contender that is done when the GPU is."""

    def seconds(self, steps: int) -> float:
        _wait()
        spent = super().seconds(steps)
        begin = time.perf_counter()
        _wait()
        return spent + time.perf_counter() - begin


class _Hosted(Contender):
    """A contender of which only the host's time counts; the GPU never has so many steps before it that it waits."""

    def seconds(self, steps: int) -> float:
        spent = 0.0
        for left in range(steps, 0, -100):
            _wait()
            spent += super().seconds(min(left, 100))
        return spent


def _wait() -> None:
    import torch

    if _DEVICE == "cuda":
        torch.cuda.synchronize()


class _Case:
    """A setting on tensors of the GPU; each contender has parameters and states of its own."""

    def __init__(self, setting: Setting, shapes: Sequence[Shape], dtype: str) -> None:
        import torch

        self.torch = torch
        self.setting = setting
        self.dtype = getattr(torch, dtype)
        self.elements = sum(map(prod, shapes))
        self.shapes = shapes
        self.grads = self.new()
        self.averages, self.copies = self.new(), [x.to(torch.bfloat16) for x in self.new()]
        self.name = next(name for name in fastgd.__all__ if name.lower() == setting.rule)
        streams = 3 + 2 * len(setting.states)  # gradients are read, parameters and states read and written
        self.bytes = self.elements * streams * self.grads[0].element_size()

    def new(self) -> list[Any]:
        torch = self.torch
        return [torch.randn(shape, device=_DEVICE, dtype=self.dtype) for shape in self.shapes]

    def result(self, label: str, times: dict[str, list[float]]) -> Result:
        return Result(label, self.elements, len(self.shapes), self.bytes, times)

    def copy(self) -> Contender:
        source = self.torch.empty(self.bytes // 2, dtype=self.torch.uint8, device=_DEVICE)
        to = self.torch.empty_like(source)
        return _Timed(LIMIT, lambda: to.copy_(source))

    def ours(self, **one_pass: Any) -> Contender:
        optimizer = getattr(fastgd, self.name)(self.new(), **self.setting.hyper)
        return _Timed(OURS, lambda: optimizer.step(self.grads, **one_pass))

    def fused(self) -> list[Contender]:
        if self.name not in _FUSED:
            return []
        return [_Timed("torch fused", self._torch()[1].step)]

    def _torch(self) -> tuple[list[Any], Any]:
        params = [self.torch.nn.Parameter(p) for p in self.new()]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params, getattr(self.torch.optim, self.name)(params, **self.setting.hyper, fused=True)

    def separate(self) -> Contender:
        """What a training loop calls one after the other for the same."""
        torch = self.torch
        params, optimizer = self._torch()
        plain = [p.detach() for p in params]

        def step() -> None:
            torch._foreach_div_(self.grads, 1.0)  # by one: the gradients stay what they are
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()
            torch._foreach_lerp_(self.averages, plain, 0.001)
            torch._foreach_copy_(self.copies, plain)

        return _Timed("torch calls", step)

    def cupy(self) -> list[Contender]:
        """CuPy's elementwise kernel of a rule, as its users write them; for two rules, in float32."""
        if find_spec("cupy") is None or self.dtype != self.torch.float32 or self.setting.name not in _CUPY:
            return []
        import cupy

        kernel = cupy.ElementwiseKernel(*_CUPY[self.setting.name], "step")
        states = [self.new() for _ in self.setting.states]
        roles = [[cupy.from_dlpack(x) for x in role] for role in (self.grads, self.new(), *states)]

        def step() -> None:
            for g, *written in zip(*roles, strict=True):
                kernel(g, *written)

        return [_Timed("cupy", step)]


_CUPY = {
    "sgd": ("T g", "T p", "p -= (T)1e-3 * g"),
    "adamw": (
        "T g",
        "T p, T m, T v",
        "p *= (T)0.99999; m += (T)0.1 * (g - m); v = (T)0.999 * v + (T)0.001 * g * g;"
        "p -= (T)1e-3 * m / (sqrt(v) + (T)1e-8)",
    ),
}
