"""Runs of the benchmark of placement, on a mesh whose scheduler is a process of its own.

Covers computing one job as stock Dask does and as we do, what crossed meanwhile, and what was seen: the true size of
every value (of what a shuffle sends, not of the number that its senders return) and the site where it was made. Does
not cover what should have crossed (``placement_graphs.py``).

Stock Dask gets the graph that we get, fused likewise, with its loads tied to their sites by resources, as a user
without pools would have to; where the rest runs is its own choice, which differs from run to run, by up to five times
in bytes: it computes every job a few times, and the mean counts. It goes first, on a scheduler that has
nothing of ours.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
from dask.base import collections_to_expr
from dask.core import flatten
from distributed import Client, wait
from placement_graphs import CLIENT, given_graph
from placement_record import (
    Record,
    Restrictions,
    count_tasks,
    have_resources,
    note_senders,
    place_resource,
    take_record,
    take_sent,
)
from placement_workloads import Job

from meshcompute import explain, explaining, measure_traffic, propagate_pools

SETTLE_SECONDS = 60.0
STOCK_RUNS = 4


@dataclass(kw_only=True)
class Run:
    """What came of one run.

    Attributes
    ----------
    results
        Values.
    bytes_between_sites
        What crossed, by ordered pair.
    nbytes_by_key, site_by_key
        What the scheduler saw; of senders of shuffles, what they sent.
    seconds
        How long it took.
    plans
        What was planned, one for each computation.
    error
        What was raised, empty if nothing.
    """

    results: list[Any] = field(default_factory=list)
    bytes_between_sites: dict[tuple[str, str], float] = field(default_factory=dict)
    nbytes_by_key: dict[Any, int] = field(default_factory=dict)
    site_by_key: dict[Any, str] = field(default_factory=dict)
    seconds: float = 0.0
    plans: list[Any] = field(default_factory=list)
    error: str = ""


class Runner:
    """Runs jobs on a mesh.

    Parameters
    ----------
    client
        Of the mesh.
    stores
        Folder of each of its sites.
    """

    def __init__(self, client: Client, stores: Mapping[str, Path]) -> None:
        self.client = client
        self.stores = stores
        self.sites = tuple(stores)

    def prepare(self) -> None:
        """Give workers the resources that stand for sites in stock Dask, and have the scheduler take notes."""
        groups = [(site,) for site in self.sites] + [self.sites[:2]]
        workers = self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        for address, worker in workers.items():
            site = str(worker["name"]).rsplit("-", 2)[0]
            names = [place_resource(group) for group in groups if site in group]
            self.client.run(have_resources, names, workers=[address])
        self.client.run(note_senders)
        self.client.register_plugin(Record())

    def stock(self, job: Job) -> Run:
        """Compute as stock Dask does, several times: bytes are the mean, the rest is of one, one that failed if any."""

        def work(run: Run) -> None:
            kept = job.kept
            if kept is not None:
                futures = self._get_stock([kept], is_finalized=False, is_gathered=False)
                rebuild, arguments = kept.__dask_postpersist__()
                kept = rebuild({key: futures[key] for key in flatten(kept.__dask_keys__())}, *arguments)
            run.results = [self._get_stock([result])[0] for result in job.given(kept)]

        runs = [self._measured(work) for _ in range(STOCK_RUNS)]
        total = sum((Counter(run.bytes_between_sites) for run in runs), Counter[tuple[str, str]]())
        one = next((run for run in runs if run.error), runs[0])
        return replace(one, bytes_between_sites={pair: n / len(runs) for pair, n in total.items()})

    def _get_stock(self, collections: Sequence[Any], *, is_finalized: bool = True, is_gathered: bool = True) -> Any:
        given = given_graph(collections, is_finalized=is_finalized)
        restrictions = {key: place_resource(pools) for key, pools in given.pools_by_key.items()}
        with dask.annotate(resources=Restrictions(restrictions)):
            got = self.client.get(dict(given.tasks), list(given.keys), sync=is_gathered)
        return got if is_gathered else dict(zip(given.keys, got, strict=True))

    def ours(self, job: Job) -> Run:
        """Compute with pools and placement."""

        def work(run: Run) -> None:
            with propagate_pools():
                kept = job.kept
                if kept is not None:
                    run.plans.append(plan_of_persisted(kept))
                    kept = kept.persist()
                    wait(kept)
                for result in job.given(kept):
                    run.plans.append(explain(result)._assignment)
                    run.results.append(result.compute())

        return self._measured(work)

    def _measured(self, work: Callable[[Run], None]) -> Run:
        run = Run()
        self.client.run_on_scheduler(take_record)
        began = time.monotonic()
        with measure_traffic() as traffic:
            try:
                work(run)
            except Exception as exc:  # one calculation that fails is a row like others
                run.error = f"{type(exc).__name__}: {str(exc)[:200]}"
        run.seconds = time.monotonic() - began
        crossed = traffic.bytes_between_pools
        run.bytes_between_sites = {pair: n for pair, n in crossed.items() if CLIENT not in pair}
        for key, (nbytes, worker) in self.client.run_on_scheduler(take_record).items():
            run.nbytes_by_key[key] = nbytes
            run.site_by_key[key] = worker.rsplit("-", 2)[0]
        for sent in self.client.run(take_sent).values():
            run.nbytes_by_key.update(sent)
        self._forget()
        return run

    def _forget(self) -> None:
        """Wait until nothing of this run is left that the next one could use."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.client.run_on_scheduler(count_tasks):
            if time.monotonic() > deadline:
                raise RuntimeError(f"The scheduler still has tasks {SETTLE_SECONDS:g} s after a run")
            time.sleep(0.02)


def plan_of_persisted(collection: Any) -> Any:
    """Give the plan for what ``persist`` computes: results stay where they are made."""
    expr = collections_to_expr(collection).optimize()
    return explaining._assign(expr, tuple(flatten(expr.__dask_keys__())), is_gathered=False)


def is_right(got: Any, expected: Any) -> bool:
    """Tell whether a result is what it must be, to rounding; tables may have their rows in any order."""
    if isinstance(expected, pd.DataFrame | pd.Series):
        got, expected = got.sort_index(), expected.sort_index()
        if not got.index.equals(expected.index):
            return False
    got, expected = np.asarray(got), np.asarray(expected)
    tolerance = 1e-5 if expected.dtype == np.float32 else 1e-8
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    return got.shape == expected.shape and bool(np.allclose(got, expected, rtol=tolerance, atol=tolerance * scale))


@contextmanager
def configured(pairs: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Have settings of Dask while the block runs."""
    with dask.config.set(dict(pairs)):
        yield
