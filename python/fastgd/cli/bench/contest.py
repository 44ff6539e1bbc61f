"""What the suites share: who takes a case's step, who may compete, and for how long."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import fastgd
from fastgd.cli.bench.case import Array, Case
from fastgd.cli.bench.machine import available_memory
from fastgd.cli.bench.measure import LIMIT, OURS, Contender, Result, difference, steps_taken
from fastgd.cli.bench.peers import Peer
from fastgd.cli.bench.report import Report


def ours(case: Case, label: str = OURS, **one_pass: Any) -> Contender:
    """The step as a function, on a bare array or a list."""
    step: Any = getattr(fastgd, f"{case.setting.rule}_step")
    params, grads, *states = (case.form(role) for role in (case.params, case.grads, *case.states))
    keywords = dict(zip(case.setting.states, states, strict=True)) | dict(case.setting.hyper) | one_pass
    numbers = count(1)

    def numbered() -> None:
        step(params, grads, step=next(numbers), **keywords)

    def plain() -> None:
        step(params, grads, **keywords)

    return Contender(label, numbered if case.setting.numbered else plain, params=case.written)


def as_class(case: Case, label: str = f"{OURS} class", **one_pass: Any) -> Contender:
    """The same step through the optimizer class, which keeps parameters and states."""
    (name,) = (name for name in dir(fastgd) if name.lower() == case.setting.rule)
    optimizer = getattr(fastgd, name)(case.params, **case.setting.hyper)
    grads = case.grads
    return Contender(label, lambda: optimizer.step(grads, **one_pass), params=case.written)


def limit(case: Case) -> Contender:
    """A loop that only reads the gradients, and reads and rewrites all else, threaded as a step is."""
    from fastgd._core import stream

    first, read, *others = case.flat  # parameters, gradients, states
    writes = [first, *others]
    return Contender(LIMIT, lambda: stream(read, writes))


def agreeing(
    name: str, enter: Callable[[Case], Contender | None], case: Case, expected: list[Array], report: Report
) -> Contender | None:
    """Who enters under this name, if it has the rule and its first steps are ours."""
    case.reset()
    where = f"{name}, {case.setting.name}, {case.label}"
    try:
        contender = enter(case)
        if contender is None:
            return None
        wrong = difference(expected, steps_taken(contender), case.slack)
    except Exception as error:  # whatever is wrong with a peer must not end the run
        report.note(f"{where}: failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
        return None
    if wrong is not None:
        report.note(f"{where}: left out, it does not compute the same step (a difference of {wrong:.2g})")
        return None
    return contender


def installed(peers: Iterable[Peer], report: Report) -> Iterable[Peer]:
    """The peers whose library is there; one line for each that is not."""
    for peer in peers:
        if peer.installed:
            yield peer
        else:
            report.note(f"{peer.name}: not installed")


def result(case: Case, label: str, times: dict[str, list[float]]) -> Result:
    """The row of a case."""
    return Result(label, case.elements, len(case.params), case.bytes, times)


def patience(args: argparse.Namespace, rounds: int = 11, seconds: float = 4.0) -> tuple[int, float]:
    """The rounds and the seconds of a case."""
    return args.rounds or (5 if args.quick else rounds), args.seconds or (1.0 if args.quick else seconds)


def fits(needed: int, what: str, report: Report) -> bool:
    """Whether there is memory for it; if not, it is said."""
    available = available_memory()
    if available is None or needed < available:
        return True
    report.note(f"{what}: left out, it needs {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free")
    return False
