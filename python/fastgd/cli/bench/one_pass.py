"""The suite ``pass``: all that comes between backward and the next forward, in one sweep and in torch's several."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

import fastgd
from fastgd.cli.bench.case import Memory, Setting, settings, workloads
from fastgd.cli.bench.chain import Chain, ChainMemory
from fastgd.cli.bench.contest import agreeing, as_class, fits, installed, limit, ours, patience, result
from fastgd.cli.bench.measure import LIMIT, OURS, Contender, Result, compete, steps_taken
from fastgd.cli.bench.peers import CHAINS, Peer
from fastgd.cli.bench.report import Report, elements_in_words

_MI = 2**20
_SIZES = [32 * _MI, 64 * _MI]
_QUICK_SIZES = [_MI]
_LISTS = ["yolo26n", "yolo26s", "resnet50", "gpt2-small"]
_QUICK_LISTS = ["yolo26n"]
_RULES = ["adamw", "nesterov"]
_PLAIN_SIZES = [64 * _MI]
_PLAIN_RULES = ["sgd", "nesterov", "adamw"]  # the fewer bytes a step moves, the more do statistics cost it

_QUIET = f"{OURS} without stats"
_CLASS = f"{OURS} class"
_STATS = f"{OURS} with stats"
_NEUTRAL_ASKED = f"{OURS}, neutral arguments"
_NEUTRAL = {
    "grad_scale": 1.0,
    "max_norm": None,
    "skip_nonfinite": False,
    "ema": None,
    "ema_decay": None,
    "copies": None,
    "zero_grads": False,
    "stats": False,
}


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure the sections that were asked for, each into the report."""
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, report)


def sizes(args: argparse.Namespace, report: Report) -> None:
    """All of the one pass on one array."""
    for n in args.sizes or (_QUICK_SIZES if args.quick else _SIZES):
        _all_extras(args, "size", f"One pass, one array: {elements_in_words(n)}", elements_in_words(n), [(n,)], report)


def lists(args: argparse.Namespace, report: Report) -> None:
    """All of the one pass on the parameters of real models."""
    for model in args.lists or (_QUICK_LISTS if args.quick else _LISTS):
        shapes = workloads()[model]
        n = sum(map(prod, shapes))
        title = f"One pass, {model}: {len(shapes)} arrays, {elements_in_words(n)}"
        _all_extras(args, "list", title, model, shapes, report)


def plain(args: argparse.Namespace, report: Report) -> None:
    """The step alone: with arguments that ask for nothing, and with nothing but statistics."""
    for n in args.sizes or (_QUICK_SIZES if args.quick else _PLAIN_SIZES):
        if not fits(n * 20, f"plain step, {elements_in_words(n)}", report):
            continue
        memory = Memory(elements_in_words(n), [(n,)], single=True)
        section = report.begin("plain", f"The step alone, one array: {elements_in_words(n)}, float32")
        for setting in _settings(args, _PLAIN_RULES):
            case = memory.case(setting)
            case.reset()
            contenders = [limit(case), ours(case)]
            contenders += [ours(case, _NEUTRAL_ASKED, **_NEUTRAL), ours(case, _STATS, stats=True)]
            section.add(result(case, setting.name, compete(contenders, *_patience(args))))
        section.finish()


def small(args: argparse.Namespace, report: Report) -> None:
    """What it costs to ask where the call is all that costs."""
    section = report.begin("small", "Overhead of the keywords")
    names = {"step": fastgd.sgd_step, "w": np.array([1.0], np.float32), "g": np.array([1e-3], np.float32), "lr": 1e-3}
    contenders = [
        Contender(OURS, "step(w, g, lr)", names),
        Contender(_NEUTRAL_ASKED, "step(w, g, lr, **neutral)", names | {"neutral": _NEUTRAL}),
        Contender(_STATS, "step(w, g, lr, stats=True)", names),
    ]
    section.add(Result("one element, `sgd_step(w, g, lr)`", 1, 1, 0, compete(contenders, *_patience(args))))

    case = Memory("366 x 8", [(8,)] * 366).case(settings()["adamw"])
    case.reset()
    contenders = [as_class(case, OURS), as_class(case, _NEUTRAL_ASKED, **_NEUTRAL), as_class(case, _STATS, stats=True)]
    section.add(Result("class AdamW, 366 arrays of 8", case.elements, 366, 0, compete(contenders, *_patience(args))))
    section.finish()


SECTIONS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "sizes": sizes,
    "lists": lists,
    "plain": plain,
    "small": small,
}


def _all_extras(
    args: argparse.Namespace, kind: str, title: str, label: str, shapes: list[tuple[int, ...]], report: Report
) -> None:
    """Two rows a rule, with and without statistics: ours, the limit, and torch's chains."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        report.note("one pass: not measured, for NumPy has bfloat16 from ml_dtypes, which is not installed")
        return
    n, single = sum(map(prod, shapes)), len(shapes) == 1
    if not fits(n * (5 * 4 + 2 + (0 if single else 5 * 4 + 2 * 4)), label, report):  # a class has states of its own
        return
    memory = ChainMemory(label, shapes, bfloat16, single=single)
    section = report.begin(kind, f"{title}, float32 with bfloat16 copies", timed_peers=True)
    for setting in _settings(args, _RULES):
        chain = memory.chain(setting)
        times = compete(list(_contenders(args, chain, report)), *_patience(args))
        quiet = times.pop(_QUIET, None)
        section.add(result(chain, f"{setting.name}, all", times))
        if quiet is not None:
            times = {name: of for name, of in times.items() if name != _CLASS} | {OURS: quiet}
            section.add(result(chain, f"{setting.name}, all but stats", times))
    section.finish()
    for text in _REMARKS + _TORCH_REMARKS * bool(_peers(args)):
        report.note(text)


def _contenders(args: argparse.Namespace, chain: Chain, report: Report) -> Iterable[Contender]:
    chain.reset()
    function = _prepared(chain, ours(chain, **chain.asked(), stats=True))
    expected = steps_taken(function)
    yield _prepared(chain, _limit(chain))
    yield function
    entrants: list[tuple[str, Callable[[Any], Contender | None]]] = [
        (_QUIET, lambda case: _prepared(chain, ours(case, _QUIET, **chain.asked())))
    ]
    if not chain.single:
        asked = chain.asked() | {"stats": True}
        entrants.append((_CLASS, lambda case: _prepared(chain, as_class(case, **asked))))
    entrants += [(peer.name, peer.contend) for peer in installed(_peers(args), report)]
    for name, enter in entrants:
        contender = agreeing(name, enter, chain, expected, report)
        if contender is not None:
            yield contender


def _prepared(chain: Chain, contender: Contender) -> Contender:
    contender.prepare = chain.refill
    return contender


def _limit(chain: Chain) -> Contender:
    """Loops over the same arrays that move as many bytes and do nothing else, threaded as a step is.

    The first reads the gradients and reads and rewrites parameters, states and averages. No loop of the core can only
    read or only write, so what is left (the gradients again, their zeros, the copies) is a part of two arrays for the
    second, one read and one rewritten: as many bytes, of which a few more are reads.
    """
    from fastgd._core import stream

    params, grads, *others = chain.flat
    writes = [params, *others]
    left = chain.bytes - grads.nbytes - 2 * sum(a.nbytes for a in writes)
    part = left // (3 * grads.itemsize)
    read, rewritten = params[:part], grads[:part]

    def loops() -> None:
        stream(grads, writes)
        stream(read, [rewritten])

    return Contender(LIMIT, loops)


_REMARKS = [
    "one pass: unscale, finite check, global norm and clip, the step, average (ema), bfloat16 copies, zeroed "
    "gradients; all: and stats",
    "one pass, bytes of an element: 4 to read the gradient for the norm, 8 to read it again and zero it, 8 each for "
    "parameter, average and states, 2 to write the copy: 46 for AdamW, 38 for Nesterov",
    "one pass, limit: loops that move those bytes; the zeroing and the copies, which are only written, are read and "
    "rewritten there, as many bytes in all",
    "one pass: the gradients are filled again before each call, outside of its timing, for every contender",
]
_TORCH_REMARKS = [
    "torch computes no stats; it has the same chain in both rows",
    "torch, check apart: _amp_foreach_non_finite_check_and_unscale_, clip_grad_norm_; torch, check by norm: "
    "_foreach_mul_, clip_grad_norm_, and whether the norm is finite; then both: the functional step (fused where torch "
    "has it), _foreach_lerp_, _foreach_copy_, _foreach_zero_; best peer is the faster of the two",
]


def _peers(args: argparse.Namespace) -> list[Peer]:
    """torch's chains, unless other peers were asked for and torch was not."""
    asked = args.peers is None or any(name.startswith("torch") for name in args.peers)
    return CHAINS if asked else []


def _settings(args: argparse.Namespace, default: list[str]) -> list[Setting]:
    return [settings()[name] for name in args.rules or default]


def _patience(args: argparse.Namespace) -> tuple[int, float]:
    """More rounds than the core suite: a timing is of one step here."""
    return patience(args, rounds=51, seconds=8.0)
