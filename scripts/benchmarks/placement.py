#!/usr/bin/env python
"""How many bytes cross between sites: everyday calculations, against the exact optimum and whoever else there is.

Every calculation lies over 2, 3 and 5 sites, whose links cost the same or not. For each, the bytes between sites of

  stock      stock Dask, measured: its loads are tied to their sites, the rest runs where its scheduler likes
  layers     the rule of the published library, computed: whole layers where most of their input is
  one site   everything that may run anywhere at one site, the best one, computed
  optimum    the best plan that there is for the graph as Dask makes it, by exact methods, from true sizes
  planned    our plan, with the sizes that its values turned out to have
  measured   what crossed when it ran

Results are compared with numpy's and pandas' own. Scheduler and workers are processes of their own; data can be read at
its own site only. Sizes are small: it is bytes that are counted here, not seconds.

Run it where meshcompute is installed with its extra "test": ``python scripts/benchmarks/placement.py --check``
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask
from inlab import report, run, say, surroundings
from placement_figures import Row, missed_bars, render_table, save_picture
from placement_graphs import (
    Links,
    equal_links,
    given_graph,
    layer_rule_cost,
    single_site_cost,
    skewed_links,
)
from placement_judge import OurPlan, explained
from placement_optimum import optimum
from placement_runs import Run, Runner, is_right
from placement_workloads import WORKLOADS, Job, Workload

from meshcompute.embedded import EmbeddedMesh

HERE = Path(__file__).resolve().parent
SITES = "abcdefghijklmnop"
KINDS = {"equal": equal_links, "skewed": skewed_links}
WORKERS_PER_SITE = 2


class Progress:
    """Tells a waiting person what was done, and when it will all be.

    Parameters
    ----------
    n_steps
        How many there are.
    """

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.done = 0
        self.began = time.monotonic()

    def step(self, text: str) -> None:
        """One more is done."""
        self.done += 1
        spent = time.monotonic() - self.began
        left = spent / self.done * (self.n_steps - self.done)
        say(f"{self.done:>4}/{self.n_steps}, {left / 60:4.1f} min left  {text}")


@contextmanager
def open_mesh(sites: Sequence[str]) -> Iterator[Runner]:
    """Have a cluster of these sites while the block runs."""
    path = [str(HERE), os.environ.get("PYTHONPATH", "")]
    # Workers import the calculations; and a tree of sources that this process was told to use is theirs, too.
    environment = {"PYTHONPATH": os.pathsep.join(part for part in path if part)}
    with tempfile.TemporaryDirectory(prefix="meshcompute-placement-") as folder:
        stores = {site: Path(folder) / site for site in sites}
        for store in stores.values():
            store.mkdir()
        with (
            EmbeddedMesh(stores, workers_per_site=WORKERS_PER_SITE, environment=environment) as mesh,
            mesh.client() as client,
        ):
            runner = Runner(client, stores)
            runner.prepare()
            try:
                yield runner
            except KeyboardInterrupt:
                # A gather that is given up half-way is no news.
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)
                raise


def measure(options: argparse.Namespace, sites: Sequence[str], progress: Progress) -> Iterator[Row]:
    """Measure all workloads over some sites."""
    jobs: dict[str, tuple[Job, Run]] = {}
    with open_mesh(sites) as runner:
        for workload in options.workloads:
            with dask.config.set(dict(workload.config)):
                job = workload.job(sites, runner.stores)
                jobs[workload.name] = job, runner.stock(job)
            progress.step(f"{len(sites)} sites, {workload.name}: stock Dask, {jobs[workload.name][1].seconds:.1f} s")
        for kind in options.links:
            links = KINDS[kind](sites)
            for workload in options.workloads:
                job, stock = jobs[workload.name]
                with dask.config.set({**dict(workload.config), **link_settings(links)}):
                    ours = runner.ours(job)
                    row = judge(workload, job, stock=stock, ours=ours, links=links, options=options)
                found = "".join(f"; {text}" for text in row.missed())
                progress.step(f"{row.title}: {ours.seconds:.1f} s{found}")
                yield row


def link_settings(links: Links) -> dict[str, Any]:
    """Say in meshcompute's settings what links cost; that they cost the same is what it takes them to do."""
    if links.is_uniform:
        return {}
    pairs = itertools.permutations(range(len(links.sites)), 2)
    given = [{"from": links.sites[i], "to": links.sites[j], "cost": links.costs[i][j]} for i, j in pairs]
    return {"meshcompute.links": given, "meshcompute.objective": "money"}


def judge(workload: Workload, job: Job, *, stock: Run, ours: Run, links: Links, options: argparse.Namespace) -> Row:
    """Work out what rivals and the optimum move, from the true sizes, and compare."""
    collections = [*([] if job.kept is None else [job.kept]), *job.given(job.kept)]
    is_finalized = job.kept is None
    given = given_graph(collections, is_finalized=is_finalized)
    unfused = given_graph(collections, is_finalized=is_finalized, is_fused=False)
    seen: dict[Any, float] = {**stock.nbytes_by_key, **ours.nbytes_by_key}
    _, problem = given.problem(links.sites, seen)
    keys, unfused_problem = unfused.problem(links.sites, seen)
    best = optimum(problem, links, options.time_limit)
    plans = [OurPlan(assignment, seen) for assignment in ours.plans]
    wrong = [
        f"{who}: {run.error or 'a result is not right'}"
        for who, run in {"stock": stock, "ours": ours}.items()
        if run.error or not all(map(is_right, run.results, job.expected))
    ]
    row = Row(
        workload=workload.name,
        n_sites=len(links.sites),
        links=links.name,
        n_tasks=len(given.tasks),
        stock=links.weigh(stock.bytes_between_sites),
        layers=layer_rule_cost(unfused_problem, keys, links),
        single=single_site_cost(problem, links),
        optimum=best.cost,
        bound=best.bound,
        predicted=sum(plan.predicted_cost(links) for plan in plans),
        planned=sum(plan.cost(links) for plan in plans),
        measured=links.weigh(ours.bytes_between_sites),
        wrong="; ".join(wrong),
        regroups=workload.regroups,
    )
    return explained(row, given=given, plans=plans, ours=ours, links=links, time_limit=options.time_limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 3, 5], help="numbers of sites")
    parser.add_argument("--links", nargs="+", default=list(KINDS), choices=list(KINDS), help="kinds of links")
    parser.add_argument("--only", default=[""], nargs="+", metavar="TEXT", help="workloads with one of these texts")
    parser.add_argument("--full", action="store_true", help="also 4, 8 and 16 sites, and more time to prove optima")
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds to prove one optimum")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="paint the figures into this file")
    options = parser.parse_args()
    options.workloads = [w for w in WORKLOADS if any(text in w.name for text in options.only)]
    if not options.workloads:
        parser.error(f"no workload has that in its name: {'; '.join(w.name for w in WORKLOADS)}")
    if options.full:
        options.sites = sorted({*options.sites, 4, 8, 16})
        options.time_limit = max(options.time_limit, 120.0)
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})
    where = surroundings()
    progress = Progress(len(options.sites) * len(options.workloads) * (1 + len(options.links)))
    rows = [row for n_sites in options.sites for row in measure(options, SITES[:n_sites], progress)]
    print(f"{where}\n\n{render_table(rows)}\n")
    if options.picture:
        save_picture(rows, options.picture)
    return report({"where": where, "rows": [asdict(row) for row in rows]}, missed_bars(rows), options)


if __name__ == "__main__":
    run(main)
