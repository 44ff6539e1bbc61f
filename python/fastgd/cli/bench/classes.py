"""The suite ``torch``: fastgd.torch's classes against those of torch.optim, on the same tensors; and Ultralytics."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from typing import Any

import fastgd
from fastgd.cli.bench.case import Case, Memory, settings, workloads
from fastgd.cli.bench.contest import agreeing, fits, limit, patience, result
from fastgd.cli.bench.measure import OURS, Contender, Result, compete, steps_taken
from fastgd.cli.bench.report import Report, elements_in_words
from fastgd.cli.stop import Stop

_LISTS = ["yolo26n", "resnet50", "gpt2-small"]
_QUICK_LISTS = ["yolo26n"]
_RULES = ["sgd", "nesterov", "adamw"]
_FORMS: dict[str, dict[str, Any]] = {"torch fused": {"fused": True}, "torch default": {}}


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure the sections that were asked for, each into the report."""
    if find_spec("torch") is None:
        raise Stop("the suite torch needs torch, which is not installed")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, report)


def lists(args: argparse.Namespace, report: Report) -> None:
    """The step of a class on the parameters of real models."""
    for model in args.lists or (_QUICK_LISTS if args.quick else _LISTS):
        shapes = workloads()[model]
        n = sum(map(prod, shapes))
        if not fits(n * 4 * 12, model, report):  # each class has states of its own
            continue
        section = report.begin("list", f"Classes of torch, {model}: {len(shapes)} tensors, {elements_in_words(n)}")
        memory = Memory(model, shapes)
        for name in args.rules or _RULES:
            case = memory.case(settings()[name])
            section.add(result(case, name, compete(_contenders(case, report), *patience(args, rounds=31))))
        section.finish()


def small(args: argparse.Namespace, report: Report) -> None:
    """A step over many tiny tensors, where the call is all that costs."""
    section = report.begin("small", "Overhead of a class of torch")
    memory = Memory("366 x 8", [(8,)] * 366)
    for name in args.rules or _RULES:
        case = memory.case(settings()[name])
        times = compete(_contenders(case, report)[1:], *patience(args, rounds=31))
        section.add(Result(f"{name}, 366 tensors of 8", case.elements, 366, 0, times))
    section.finish()


def ultralytics(args: argparse.Namespace, report: Report) -> None:
    """Ultralytics' ``optimizer_step`` and what takes its place, by turns in a training run."""
    if find_spec("ultralytics") is None:
        report.note("Ultralytics: not installed")
        return
    from fastgd.cli.bench.yolo import optimizer_steps

    section = report.begin("ultralytics", "Ultralytics, optimizer_step of YOLO26n in a training run", timed_peers=True)
    shapes = workloads()["yolo26n"]
    for optimizer in ["AdamW"] if args.quick else ["AdamW", "SGD"]:
        times = optimizer_steps(optimizer, steps=args.rounds or (8 if args.quick else 64))
        section.add(Result(optimizer, sum(map(prod, shapes)), len(shapes), 0, times))
    section.finish()
    report.note("Ultralytics: unscale, clip, step, zero, and the average of parameters and buffers, on its own tensors")


SECTIONS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "lists": lists,
    "small": small,
    "ultralytics": ultralytics,
}


def _contenders(case: Case, report: Report) -> list[Contender]:
    import torch

    import fastgd.torch

    torch.set_num_threads(fastgd.get_num_threads())
    case.reset()
    expected = steps_taken(_class(OURS, fastgd.torch, case, {}))
    entrants: list[Contender | None] = [limit(case)]
    entrants.append(agreeing(OURS, lambda case: _class(OURS, fastgd.torch, case, {}), case, expected, report))
    for label, form in _FORMS.items():
        enter = lambda case, label=label, form=form: _class(label, torch.optim, case, form)  # noqa: E731
        entrants.append(agreeing(label, enter, case, expected, report))
    return [contender for contender in entrants if contender is not None]


def _class(label: str, module: Any, case: Case, form: dict[str, Any]) -> Contender:
    """The class of a module over the tensors of the case, with a state of its own."""
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in case.params]
    for p, g in zip(params, case.grads, strict=True):
        p.grad = torch.from_numpy(g)
    (name,) = (name for name in fastgd.torch.__all__ if name.lower() == case.setting.rule)
    optimizer = getattr(module, name)(params, **case.setting.hyper, **form)
    return Contender(label, optimizer.step, params=case.written)
