"""What is said about the measurements: tables that are Markdown too, and JSON with every timing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgd.cli.bench.measure import LIMIT, OURS, Result


@dataclass
class Section:
    """A table: one row a result."""

    kind: str  # the section of the suite
    title: str
    results: list[Result] = field(default_factory=list)
    timed_peers: bool = False  # whether the best peer's time is told, too

    def add(self, result: Result) -> None:
        """Take a row; a terminal sees that something happens."""
        self.results.append(result)
        if sys.stderr.isatty():
            print(f"\r\033[K  {self.title}: {result.label}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print the table."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(f"\n## {self.title}\n\n{self.table()}", flush=True)

    def table(self) -> str:
        names = list(dict.fromkeys(name for result in self.results for name in result.times))
        others = [name for name in names if name not in (OURS, LIMIT)]
        limited = LIMIT in names
        head = ["", OURS]
        head += ["per element"] * (self.kind == "growth") + ["GB/s", "of limit"] * limited
        head += others + ["best peer"] * any(result.peers() for result in self.results)
        head += ["its time"] * ("best peer" in head and self.timed_peers)
        return _aligned([head, *(self._row(result, head, others) for result in self.results)])

    def _row(self, result: Result, head: Sequence[str], others: Sequence[str]) -> list[str]:
        peers = result.peers()
        cells = {
            "": result.label,
            OURS: _time(result.seconds()),
            "per element": _time(result.seconds() / result.elements),
            "GB/s": f"{result.rate() / 1e9:.1f}",
            "of limit": f"{result.ratio(LIMIT):.2f}" if LIMIT in result.times else "-",
            "best peer": f"{min(peers.values()):.2f}" if peers else "-",
            "its time": _time(result.seconds(min(peers, key=peers.__getitem__))) if peers else "-",
        }
        cells |= {name: f"{result.ratio(name):.2f}" if name in result.times else "-" for name in others}
        return [cells[column] for column in head]


@dataclass
class Report:
    """All sections of a run, and what is to be said besides."""

    machine: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    def begin(self, kind: str, title: str, *, timed_peers: bool = False) -> Section:
        """Start a section."""
        self.sections.append(Section(kind, title, timed_peers=timed_peers))
        return self.sections[-1]

    def note(self, text: str) -> None:
        """Say something once, at the end."""
        self.notes[text] = None

    def header(self) -> str:
        width = max(map(len, self.machine))
        lines = [f"    {name:<{width}}  {value}" for name, value in self.machine.items()]
        return "\n".join(
            [
                "# fastgd bench",
                "",
                *lines,
                "",
                "Medians of interleaved rounds. Under a peer's name: its time over that of fastgd.",
                "GB/s: the bytes that the step must move, by its time. of limit: the time of a loop that only reads",
                "and rewrites the same streams on the same threads, over that of fastgd.",
            ]
        )

    def closing(self) -> str:
        """Who was ahead where, and the notes."""
        lines = []
        ahead, compared = [], 0
        for section in self.sections:
            for result in section.results:
                compared += bool(result.peers())
                faster = {name: ratio for name, ratio in result.peers().items() if ratio < 1}
                if faster:
                    name = min(faster, key=faster.__getitem__)
                    ahead.append(f"{section.title}, {result.label}: {name} ({faster[name]:.2f})")
        if compared:
            lines += ["", f"A peer was ahead in {len(ahead)} of {compared} rows{':' if ahead else '.'}"]
            lines += [f"- {line}" for line in ahead]
        if self.notes:
            lines += ["", "Notes", *(f"- {text}" for text in self.notes)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON; times in seconds of one step."""
        return {
            "machine": self.machine,
            "sections": [
                {
                    "kind": section.kind,
                    "title": section.title,
                    "results": [
                        {
                            "label": result.label,
                            "elements": result.elements,
                            "arrays": result.arrays,
                            "bytes": result.bytes,
                            "medians": {name: result.seconds(name) for name in result.times},
                            "ratios": {name: result.ratio(name) for name in result.times},
                            "times": {name: list(times) for name, times in result.times.items()},
                        }
                        for result in section.results
                    ],
                }
                for section in self.sections
            ],
            "notes": list(self.notes),
        }


def elements_in_words(n: int) -> str:
    """Write a size the way the tables do: 100 Ki, 64 Mi, 2.6 M."""
    for unit, name in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if n >= unit and n % unit == 0:
            return f"{n // unit} {name} elements"
    if n >= 10**6:
        return f"{n / 1e6:.1f} M elements"
    return f"{n} element{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if seconds >= 0.9995 * unit:  # so that it is not written as 1e+03 of the next
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-12:.3g} ps"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns as wide as they need, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (rows[0], ruler, *rows[1:]):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)
