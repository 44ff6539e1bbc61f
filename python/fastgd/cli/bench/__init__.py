"""Measure every rule on this machine: against the memory's own limit, NumPy, and the peers that are installed."""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastgd
from fastgd.cli.bench import classes, core, cuda, one_pass
from fastgd.cli.bench.case import settings, workloads
from fastgd.cli.bench.machine import described
from fastgd.cli.bench.peers import PEERS
from fastgd.cli.bench.report import Report
from fastgd.cli.stop import Stop

SUITES = {"core": core, "pass": one_pass, "torch": classes, "cuda": cuda}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--suite", choices=SUITES, default="core", help="what to measure")
    parser.add_argument("--sections", nargs="+", choices=_sections(), metavar="NAME", help="only these of the suite")
    parser.add_argument(
        "--rules", nargs="+", metavar="NAME", help="only these rules (momentum, nesterov: variants of sgd)"
    )
    parser.add_argument("--sizes", nargs="+", type=size, metavar="N", help="of the single arrays: 1000, 100Ki, 64Mi")
    parser.add_argument("--lists", nargs="+", choices=workloads(), metavar="MODEL", help=", ".join(workloads()))
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="NAME", help=", ".join(map(repr, PEERS)))
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of a case at most")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="after S seconds and 3 rounds a case begins no other"
    )
    parser.add_argument("--quick", action="store_true", help="few rules, small arrays, no compiler: half a minute")
    parser.add_argument("--thorough", action="store_true", help="also what takes a peer minutes to compile")
    parser.add_argument("--huge", action="store_true", help="up to 1 Gi elements wherever they fit into memory at all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save every timing")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="save the roofline: bytes per second by size")


def _sections() -> list[str]:
    return list(dict.fromkeys(name for suite in SUITES.values() for name in suite.SECTIONS))


def size(text: str) -> int:
    """Read a number of elements such as 1000, 100Ki or 64Mi."""
    match = re.fullmatch(r"(\d+) ?(Ki|Mi|Gi)?", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a number such as 1000, 100Ki or 64Mi, got {text!r}")
    return int(match[1]) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[match[2]]


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and save what was asked for."""
    if fastgd.config()["isa"] == "reference":
        raise Stop("the compiled module is missing here; the NumPy twin is there to check bits, not to be timed")
    unknown = [name for name in args.rules or () if name not in settings()]
    if unknown:
        raise Stop(f"--rules: there is no {' or '.join(unknown)}, only {', '.join(settings())}")
    suite: Any = SUITES[args.suite]
    missing = [name for name in args.sections or () if name not in suite.SECTIONS]
    if missing:
        raise Stop(f"--sections: {args.suite} has no {' or '.join(missing)}, only {', '.join(suite.SECTIONS)}")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise Stop('--plot needs matplotlib: pip install "fastgd[demo]"')
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise Stop(f"cannot save {path}: no such folder")

    report = Report(described())
    print(report.header(), flush=True)
    suite.run(args, report)
    print(report.closing())
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        print(f"\nEvery timing was saved to {args.json}", file=sys.stderr)
    if args.plot is not None:
        from fastgd.cli.bench.plot import save_roofline

        save_roofline(report, args.plot)
        print(f"\nThe roofline was saved to {args.plot}", file=sys.stderr)
    return 0
