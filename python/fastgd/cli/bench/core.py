"""The suite ``core``: the steps themselves, from one element to a model and to the memory's limit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from math import prod

import numpy as np

import fastgd
from fastgd.cli.bench.case import Case, Memory, Setting, settings, workloads
from fastgd.cli.bench.contest import agreeing, as_class, fits, installed, limit, ours, patience, result
from fastgd.cli.bench.measure import OURS, Contender, Result, compete, steps_taken
from fastgd.cli.bench.peers import PEERS, Peer
from fastgd.cli.bench.report import Report, Section, elements_in_words

_KI, _MI = 2**10, 2**20
_SIZES = [1, _KI, 100 * _KI, _MI, 64 * _MI]
_LISTS = ["yolo26n", "resnet50", "gpt2-small"]
_QUICK_SIZES = _SIZES[:-1]
_QUICK_LISTS = ["mlp-mnist", "yolo26n"]
_QUICK_RULES = ["sgd", "nesterov", "adamw"]

# The arrays of a case and of its slowest peers (optax's own, NumPy's temporaries), in units of the parameters.
_COPIES = 12


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure the sections that were asked for, each into the report."""
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, report)


def sizes(args: argparse.Namespace, report: Report) -> None:
    """Every rule on one array, from one element to far beyond the caches."""
    for n in args.sizes or (_QUICK_SIZES if args.quick else _SIZES):
        if not fits(n * 4 * _COPIES, f"one array of {elements_in_words(n)}", report):
            continue
        memory = Memory(elements_in_words(n), [(n,)], single=True)
        section = report.begin("size", f"One array: {elements_in_words(n)}, float32")
        _all_rules(args, section, memory, report)


def lists(args: argparse.Namespace, report: Report) -> None:
    """Every rule on the parameters of real models."""
    for model in args.lists or (_QUICK_LISTS if args.quick else _LISTS):
        shapes = workloads()[model]
        n = sum(map(prod, shapes))
        if not fits(n * 4 * (_COPIES + 4), model, report):
            continue
        memory = Memory(model, shapes)
        section = report.begin("list", f"{model}: {len(shapes)} arrays, {elements_in_words(n)}, float32")
        _all_rules(args, section, memory, report)


def small(args: argparse.Namespace, report: Report) -> None:
    """Where the call is all that costs: one element, and a class over many tiny arrays."""
    section = report.begin("small", "Overhead")
    w, g = np.array([1.0], np.float32), np.array([1e-3], np.float32)
    names = {"sgd_step": fastgd.sgd_step, "w": w, "g": g, "lr": 1e-3}
    statements = [Contender(OURS, "sgd_step(w, g, lr)", names), Contender("numpy", "w -= lr * g", names)]
    section.add(Result("one element, `w -= lr * g`", 1, 1, 0, compete(statements, *patience(args))))

    setting = settings()["adamw"]
    case = Memory("366 x 8", [(8,)] * 366).case(setting)
    case.reset()
    contenders = [as_class(case, OURS), *_torch_classes(args, case)]
    for contender in contenders:
        contender.seconds(3)
    section.add(Result("class AdamW, 366 arrays of 8", case.elements, 366, 0, compete(contenders, *patience(args))))
    section.finish()


def bfloat16(args: argparse.Namespace, report: Report) -> None:
    """AdamW with bfloat16 parameters and gradients and float32 state, against the limit for its own bytes."""
    try:
        from ml_dtypes import bfloat16 as dtype
    except ImportError:
        report.note("bfloat16: not measured, for NumPy has it from ml_dtypes, which is not installed")
        return
    section = report.begin("bfloat16", "AdamW, bfloat16 parameters and gradients, float32 state")
    for n in [_MI] if args.quick else [_MI, 64 * _MI]:
        if not fits(n * 20, f"bfloat16, {elements_in_words(n)}", report):
            continue
        case = Memory(elements_in_words(n), [(n,)], single=True).case(settings()["adamw"])
        case.reset()
        case.params, case.grads = ([a.astype(dtype) for a in role] for role in (case.params, case.grads))
        case.flat = [role[0] for role in (case.params, case.grads, *case.states)]
        contenders = [limit(case), ours(case)]
        section.add(result(case, case.label, compete(contenders, *patience(args))))
    section.finish()


def growth(args: argparse.Namespace, report: Report) -> None:
    """The cost of an element, from a million of them to a billion: no step, no cliff."""
    section = report.begin("growth", "Cost of an element, SGD, float32")
    setting = settings()["sgd"]
    for n in [4**i * _MI for i in range(3 if args.quick else 6)]:
        if not fits(n * 8 if args.huge else n * 16, f"SGD on {elements_in_words(n)}", report):
            continue
        case = Memory(elements_in_words(n), [(n,)], single=True, roles=2).case(setting)
        case.reset()
        contenders = [limit(case), ours(case)]
        section.add(result(case, case.label, compete(contenders, *patience(args))))
    section.finish()


SECTIONS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "sizes": sizes,
    "lists": lists,
    "small": small,
    "bfloat16": bfloat16,
    "growth": growth,
}


def _all_rules(args: argparse.Namespace, section: Section, memory: Memory, report: Report) -> None:
    """One row a rule: ours, the limit, and every peer that takes the same step."""
    peers = list(_peers(args, report))
    for setting in _settings(args):
        case = memory.case(setting)
        case.reset()
        function = ours(case)
        expected = steps_taken(function)
        contenders = [limit(case), function]
        if not case.single:
            contenders.append(as_class(case))
        for peer in peers:
            if peer.most_arrays is not None and len(case.params) > peer.most_arrays and not args.thorough:
                report.note(f"{peer.name}: left out on lists, which take it minutes to compile (--thorough)")
                continue
            contender = agreeing(peer.name, peer.contend, case, expected, report)
            if contender is not None:
                contenders.append(contender)
        section.add(result(case, setting.name, compete(contenders, *patience(args))))
    section.finish()


def _torch_classes(args: argparse.Namespace, case: Case) -> Iterable[Contender]:
    """torch's own classes, for the class of ours."""
    if args.peers is not None and not {"torch fused", "torch foreach"} & set(args.peers):
        return
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(fastgd.get_num_threads())
    for form in ("fused", "foreach"):
        params = [torch.nn.Parameter(torch.from_numpy(p)) for p in case.params]
        for p, g in zip(params, case.grads, strict=True):
            p.grad = torch.from_numpy(g)
        optimizer = torch.optim.AdamW(params, **{form: True}, **case.setting.hyper)
        yield Contender(f"torch {form}", optimizer.step)


def _peers(args: argparse.Namespace, report: Report) -> Iterable[Peer]:
    names = args.peers if args.peers is not None else [n for n in PEERS if not (args.quick and n == "torch.compile")]
    return installed((PEERS[name] for name in names), report)


def _settings(args: argparse.Namespace) -> list[Setting]:
    return [settings()[name] for name in args.rules or (_QUICK_RULES if args.quick else settings())]
