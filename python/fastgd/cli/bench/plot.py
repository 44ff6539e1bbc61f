"""The roofline: how near to the memory's own limit each rule comes, by size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgd.cli.bench.measure import LIMIT, OURS, Result
from fastgd.cli.bench.peers import CHAINS, PEERS
from fastgd.cli.bench.report import Report
from fastgd.cli.stop import Stop


def save_roofline(report: Report, path: Path) -> None:
    """Draw bytes per second over the number of elements, one panel a rule.

    Parameters
    ----------
    report : Report
        Its results on single arrays are drawn.
    path : Path
        Where to save the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rules: dict[str, list[Result]] = {}
    for section in report.sections:
        for result in section.results:
            if section.kind == "size":
                rules.setdefault(result.label, []).append(result)
    if not rules:
        raise Stop("--plot: nothing to draw, no single arrays were measured")

    styles: dict[str, dict[str, Any]] = {
        LIMIT: {"color": "0.75", "linewidth": 5, "zorder": 1},
        OURS: {"color": "black", "linewidth": 2, "zorder": 3},
        **{name: {"color": f"C{i}", "linewidth": 1} for i, name in enumerate([*PEERS, *(c.name for c in CHAINS)])},
    }
    columns = min(4, len(rules))
    lines = -(-len(rules) // columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 1 + 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for (rule, results), panel in zip(rules.items(), panels, strict=False):
        for name, style in styles.items():
            points = [(r.elements, r.rate(name) / 1e9) for r in results if name in r.times]
            if points:
                panel.loglog(*zip(*points, strict=True), marker=".", label=name, **style)
        panel.set(title=rule, xlabel="elements", ylabel="GB/s that a step must move")
        panel.label_outer()
        panel.grid(alpha=0.3)
    for panel in panels:  # those left over
        panel.set_visible(False)
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    machine = report.machine
    figure.suptitle(f"fastgd bench: {machine['cpu']}, {machine['isa']}, {machine['threads']} threads")
    figure.savefig(path, dpi=150)
