"""What the benchmark of placement makes of its figures: bars, a table, a picture.

Covers one row per workload, number of sites and kind of links. All figures are bytes between sites, each times the cost
of its link (1 on equal links); what goes to the client is the same for all and left out.
Does not cover how they are come by (``placement.py``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BAR_OPTIMUM = 1.05  # times the optimum of the given graph
BAR_REGROUPED = 10.0  # times fewer than that, for reductions of interleaved data
BAR_STOCK = 5.0  # times fewer than stock Dask, median
TOLERANCE = 0.02  # of what was planned, in what was measured
SLACK_NBYTES = 4096  # numbers, barriers: what a tiny graph may be off by


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload over some sites with some links.

    Attributes
    ----------
    workload
        Name.
    n_sites
        How many sites.
    links
        ``equal`` or ``skewed``.
    n_tasks
        Of the given graph.
    stock
        Stock Dask, measured.
    layers
        The rule by layers of the published library, computed.
    single
        Everything at the best single site, computed.
    optimum
        The best plan for the given graph that was found by exact methods.
    bound
        No plan for the given graph costs less; equal to ``optimum`` unless there was no time to prove that.
    predicted
        What ``explain()`` said.
    planned
        The same plan, with the sizes that the values turned out to have.
    measured
        What crossed.
    wrong
        Which results, stock Dask's and ours, are not what they must be; empty if all are.
    regroups
        Whether a reduction at each site first must save a factor of ten.
    why
        What was found out about a bar that is missed.
    """

    workload: str
    n_sites: int
    links: str
    n_tasks: int
    stock: float
    layers: float
    single: float
    optimum: float
    bound: float
    predicted: float
    planned: float
    measured: float
    wrong: str
    regroups: bool
    why: str = ""

    @property
    def title(self) -> str:
        """Name it for people."""
        return f"{self.workload}, {self.n_sites} sites, {self.links} links"

    def missed(self) -> list[str]:
        """Say which of its bars it misses."""
        if self.wrong:
            return [self.wrong]
        found = []
        if self.regroups:
            if self.planned * BAR_REGROUPED > self.optimum:
                found.append(
                    f"planned is {ratio(self.optimum, self.planned):.1f} x below the given graph's optimum, "
                    f"the bar is {BAR_REGROUPED:g}"
                )
        elif self.planned > BAR_OPTIMUM * self.optimum + SLACK_NBYTES:
            found.append(
                f"planned is {ratio(self.planned, self.optimum):.2f} x the optimum, the bar is {BAR_OPTIMUM:g}"
            )
        if self.measured > self.planned * (1 + TOLERANCE) + SLACK_NBYTES:
            found.append(
                f"measured is {ratio(self.measured, self.planned):.2f} x planned, the bar is {1 + TOLERANCE:g}"
            )
        for name, rival in {"stock": self.stock, "layers": self.layers, "single": self.single}.items():
            if self.measured > rival * (1 + TOLERANCE) + SLACK_NBYTES:
                found.append(f"{name} moves {mb(rival)} MB, we move {mb(self.measured)}")
        return found


def ratio(a: float, b: float) -> float:
    """Divide, also by nothing."""
    if b:
        return a / b
    return 1.0 if not a else math.inf


def times_below_stock(rows: Sequence[Row]) -> float:
    """Median of how many times fewer bytes we move than stock Dask does."""
    return statistics.median(ratio(row.stock, row.measured) for row in rows)


def missed_bars(rows: Sequence[Row]) -> list[str]:
    """Say which bars are missed, with what was found out about it."""
    missed = [
        f"{row.title}: {'; '.join(found)}" + f" [{row.why}]" * bool(row.why) for row in rows if (found := row.missed())
    ]
    if rows and (times := times_below_stock(rows)) < BAR_STOCK:
        missed.append(f"the median is {times:.1f} x below stock Dask, the bar is {BAR_STOCK:g}")
    return missed


def mb(nbytes: float) -> str:
    """Print bytes as megabytes."""
    return f"{nbytes / 1e6:.3f}"


def render_table(rows: Sequence[Row]) -> str:
    """Print rows, in megabytes; a star marks an optimum that was not proved, and an exclamation mark a missed bar."""
    head = ("workload", "tasks", "stock", "layers", "one site", "optimum", "planned", "measured", "x stock")
    lines = []
    for n_sites, links in dict.fromkeys((row.n_sites, row.links) for row in rows):
        lines += ["", f"{n_sites} sites, {links} links; MB between sites" + ", times cost" * (links != "equal")]
        lines.append(f"{head[0]:<22}{head[1]:>6}" + "".join(f"{name:>10}" for name in head[2:]))
        for row in rows:
            if (row.n_sites, row.links) != (n_sites, links):
                continue
            proved = "" if row.optimum <= row.bound * 1.001 + 1 else "*"
            figures = (row.stock, row.layers, row.single, row.optimum, row.planned, row.measured)
            cells = [mb(value) for value in figures]
            cells[3] += proved
            cells.append(f"{ratio(row.stock, row.measured):.1f}")
            lines.append(
                f"{row.workload:<22}{row.n_tasks:>6}"
                + "".join(f"{cell:>10}" for cell in cells)
                + " !" * bool(row.missed())
            )
    lines += ["", f"below stock Dask, median of all: {times_below_stock(rows):.1f} x"]
    return "\n".join(lines).lstrip("\n")


STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("stock Dask", {"marker": "x", "color": "#D55E00"}),
    "layers": ("rule by layers", {"marker": "s", "facecolors": "none", "edgecolors": "#CC79A7"}),
    "single": ("best single site", {"marker": "^", "facecolors": "none", "edgecolors": "#999999"}),
    "optimum": ("optimum of the given graph", {"marker": "|", "color": "black", "s": 160}),
    "measured": ("ours, measured", {"marker": "o", "color": "#009E73", "s": 36}),
}


def save_picture(rows: Sequence[Row], path: Path) -> None:
    """Paint a panel for every number of sites and kind of links: bytes on a logarithmic axis, a line per workload.

    Rows of which a result is wrong are left out.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sites = sorted({row.n_sites for row in rows})
    kinds = list(dict.fromkeys(row.links for row in rows))
    names = list(dict.fromkeys(row.workload for row in rows))
    size = (2.6 + 4.2 * len(sites), 1.4 + 0.24 * len(names) * len(kinds))
    figure, panels = plt.subplots(
        len(kinds), len(sites), figsize=size, layout="constrained", sharey=True, sharex=True, squeeze=False
    )
    for links, line in zip(kinds, panels, strict=True):
        for n_sites, axes in zip(sites, line, strict=True):
            chosen = {
                row.workload: row for row in rows if (row.n_sites, row.links) == (n_sites, links) and not row.wrong
            }
            for y, name in enumerate(names):
                if (row := chosen.get(name)) is not None:
                    axes.plot(
                        [max(row.measured, 1e2), max(row.stock, 1e2)], [y, y], color="#DDDDDD", linewidth=1, zorder=0
                    )
            for kind, (label, style) in STYLES.items():
                points = [(max(getattr(row, kind), 1e2), names.index(name)) for name, row in chosen.items()]
                axes.scatter([x for x, _ in points], [y for _, y in points], label=label, **{"s": 30, **style})
            axes.set_xscale("log")
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_title(f"{n_sites} sites, {links} links", loc="left", fontsize=10)
            axes.grid(axis="x", color="#EEEEEE")
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    panels[0][0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("bytes between sites" + ", times cost of the link" * (kinds[-1] != "equal"))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STYLES), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
