"""What the tests of regrouped reductions share: data in pools, and one computation planned as given and regrouped.

Covers plans that are made in this process, without a cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr
from dask.core import flatten
from dask.local import get_sync

from meshcompute import planning
from meshcompute.clients import pool
from meshcompute.planning import Assignment, Request
from meshcompute.scheduler.live import EmptyView


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """One computation, planned as given and regrouped."""

    given: Assignment
    regrouped: Assignment

    @property
    def names(self) -> dict[str, int]:
        return {kind.name: kind.count for kind in self.regrouped.regrouped}

    def values(self) -> tuple[Any, Any]:
        """Results of both."""
        return tuple(get_sync(dict(a.tasks), list(a.keys))[0] for a in (self.given, self.regrouped))


def expression(x: Any) -> Any:
    return FinalizeCompute(collections_to_expr((x,))).optimize()


def plan(expr: Any, *, is_regrouping: bool = True, **options: Any) -> Assignment:
    keys = tuple(flatten(expr.__dask_keys__()))
    request = Request(keys=keys, is_propagating=True, is_regrouping=is_regrouping, **options)
    assignment = planning.assign(expr, request, EmptyView())
    missing = {dep for task in assignment.tasks.values() for dep in task.dependencies} - assignment.tasks.keys()
    assert not missing
    return assignment


def both(x: Any) -> Both:
    expr = expression(x)
    return Both(given=plan(expr, is_regrouping=False), regrouped=plan(expr))


def sent(assignment: Assignment) -> set[tuple[Any, str]]:
    """Values that a plan sends between pools, each once for each destination: key, and where it goes."""
    pools = assignment.pool_by_key
    return {
        (dep, pools[key])
        for key, task in assignment.tasks.items()
        for dep in task.dependencies
        if key in pools and pools.get(dep, pools[key]) != pools[key]
    }


def crossing(assignment: Assignment) -> float:
    """Bytes that a plan sends between pools."""
    return sum(assignment.nbytes_by_key[key] for key, _ in sent(assignment))


def values_crossing(assignment: Assignment) -> list[Any]:
    """Values that a plan sends between pools."""
    keys = [key for key, _ in sorted(sent(assignment), key=str)]
    return list(get_sync(dict(assignment.tasks), keys))


def series(blocks: Sequence[np.ndarray], pools: str, axis: int = 0) -> da.Array:
    """An array of blocks that lie in pools a, b, ... in turn."""
    parts = []
    for i, block in enumerate(blocks):
        with pool(pools[i % len(pools)]):
            parts.append(da.from_array(block, chunks=block.shape))
    return da.concatenate(parts, axis=axis)


def blocks_of(n: int = 24, shape: tuple[int, ...] = (2, 5), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(3, 100, shape) for _ in range(n)]


def climate(pools: str) -> tuple[xr.DataArray, xr.DataArray]:
    """A series of days, a block per month, and the same in memory."""
    times = pd.date_range("2001-01-01", "2002-12-31")
    values = np.random.default_rng(4).random((len(times), 3, 2))
    values[::17, 1] = np.nan
    lengths = pd.Series(1, times).groupby([times.year, times.month]).sum()
    edges = np.cumsum([0, *lengths])
    blocks = [values[a:b] for a, b in itertools.pairwise(edges)]
    dims, coords = ("time", "y", "x"), {"time": times}
    return xr.DataArray(series(blocks, pools), coords, dims), xr.DataArray(values, coords, dims)
