"""Regrouped reductions on a live cluster: right results, and at least ten times fewer bytes, as measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from meshcompute.clients import pool, propagate_pools
from meshcompute.explaining import explain
from meshcompute.traffic import measure_traffic

SWITCH = "meshcompute.regroup-reductions"


@pytest.fixture(scope="module", params=["ab", "abc"])
def pools(request: pytest.FixtureRequest, start_sites: Callable[..., Any]) -> Iterator[str]:
    """A mesh of two sites, and one of three; its client is Dask's default."""
    sites = start_sites(pools=tuple(request.param), workers_per_site=2, threads_per_worker=1)
    with sites.client.as_current(), propagate_pools():
        yield request.param


def series(pools: str, n: int = 96, shape: tuple[int, ...] = (1, 60, 50)) -> da.Array:
    """Blocks that lie at the sites in turn."""
    parts = []
    for i in range(n):
        with pool(pools[i % len(pools)]):
            parts.append(da.random.default_rng(i).normal(3, 10, shape, chunks=shape))
    return da.concatenate(parts)


def measured(x: Any) -> tuple[Any, int]:
    """Result, and bytes between sites."""
    with measure_traffic() as traffic:
        result = x.compute()
    return result, sum(n for pair, n in traffic.bytes_between_pools.items() if "client" not in pair)


ARRAYS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean(0),
    "std": lambda x: x.std(0),
    "sum": lambda x: x.sum(0),
    "max": lambda x: x.max(0),
    "any": lambda x: (x > 40).any(0),
    "argmax": lambda x: x.argmax(0),
    "nanmean": lambda x: da.nanmean(x, axis=0) if isinstance(x, da.Array) else np.nanmean(x, axis=0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_reduction_of_interleaved_blocks_moves_ten_times_fewer_bytes(name: str, pools: str) -> None:
    x = series(pools)
    reduced = ARRAYS[name](x)
    plan = explain(reduced)
    ours, fewer = measured(reduced)
    with dask.config.set({SWITCH: False}):
        without = explain(reduced)
        stock, more = measured(reduced)
    np.testing.assert_allclose(ours, stock, rtol=1e-12)
    assert 0 < fewer <= more / 10
    assert plan.n_tasks <= 1.1 * without.n_tasks
    if name == "nanmean":  # that nothing is missing is known when it has run
        assert between_sites(plan) >= fewer
        plan = explain(reduced)
    assert between_sites(plan) == pytest.approx(fewer, rel=0.05)


def between_sites(plan: Any) -> float:
    """Bytes between sites that are predicted."""
    return sum(n for pair, n in plan.bytes_between_pools.items() if "client" not in pair)


def test_a_mean_of_series_that_are_split_moves_half_of_what_it_did(pools: str) -> None:
    n = 24 // len(pools)
    x = da.concatenate([series(name, n, (2, 60, 50)) for name in pools])
    for function, share in ((da.mean, 0.55), (da.std, 0.7)):
        reduced = function(x, axis=0)
        plan = explain(reduced)
        ours, fewer = measured(reduced)
        with dask.config.set({SWITCH: False}):
            stock, more = measured(reduced)
        np.testing.assert_allclose(ours, stock, rtol=1e-12)
        assert between_sites(plan) == pytest.approx(fewer, rel=0.05)
        assert 0 < fewer <= share * more


def test_the_mean_over_time_of_xarray_moves_ten_times_fewer_bytes(pools: str) -> None:
    times = pd.date_range("2001-01-01", periods=96)
    x = xr.DataArray(series(pools), {"time": times}, ("time", "y", "x")).mean("time")
    ours, fewer = measured(x)
    with dask.config.set({SWITCH: False}):
        stock, more = measured(x)
    xr.testing.assert_allclose(ours, stock)
    assert 0 < fewer <= more / 10


def seasons(pools: str) -> Any:
    times = pd.date_range("2001-01-01", periods=96, freq="7D")
    return xr.DataArray(series(pools), {"time": times}, ("time", "y", "x")).groupby("time.season")


@pytest.mark.parametrize("use_flox", [False, True])
def test_means_by_group_of_xarray_are_right_and_move_fewer_bytes(pools: str, use_flox: bool) -> None:
    with xr.set_options(use_flox=use_flox):
        x = seasons(pools).mean()
    ours, fewer = measured(x)
    with dask.config.set({SWITCH: False}):
        stock, more = measured(x)
    xr.testing.assert_allclose(ours, stock)
    assert 0 < fewer <= more / 3  # a mean of each of four groups from each site, with its numbers


@pytest.mark.parametrize("name", ["sum", "count", "max", "std"])
def test_what_flox_makes_by_group_sends_one_part_of_each_group_from_each_site(pools: str, name: str) -> None:
    with xr.set_options(use_flox=True):
        x = getattr(seasons(pools), name)()
    plan = explain(x)
    assert "4 reductions regrouped by pool" in str(plan)
    ours, first = measured(x)
    plan = explain(x)  # that nothing is missing, so that numbers cross as one, is known when it has run
    again, second = measured(x)
    with dask.config.set({SWITCH: False}):
        stock, more = measured(x)
    xr.testing.assert_allclose(ours, stock)
    xr.testing.assert_identical(ours, again)
    assert between_sites(plan) == pytest.approx(second, rel=0.05)
    field = 60 * 50 * 8
    parts = 4 * (len(pools) - 1) * field  # squared deviations, sums and numbers of a std
    expected = {"sum": parts, "count": 0, "max": parts, "std": 3 * parts}[name]
    assert first == second == pytest.approx(expected, abs=4 * len(pools) * 1000)
    assert 0 < second <= more / 2


def test_a_mean_for_each_day_of_the_week_by_flox_moves_ten_times_fewer_bytes(pools: str) -> None:
    """Every block has every group: flox's method map-reduce."""
    times = pd.date_range("2001-01-01", periods=60 * 7)
    x = xr.DataArray(series(pools, 60, (7, 20, 20)), {"time": times}, ("time", "y", "x"))
    with xr.set_options(use_flox=True):
        reduced = x.groupby("time.dayofweek").mean()
    ours, fewer = measured(reduced)
    with dask.config.set({SWITCH: False}):
        stock, more = measured(reduced)
    xr.testing.assert_allclose(ours, stock)
    assert 0 < fewer <= more / 10


def test_a_table_by_group_is_right_and_moves_fewer_bytes(pools: str) -> None:
    parts = []
    for i in range(15):
        rng = np.random.default_rng(i)
        some = rng.choice(rng.permutation(500)[:400], 3000)  # so that groups come up first in any partition
        table = pd.DataFrame({"k": some, "v": rng.normal(size=3000), "w": rng.integers(0, 9, 3000)})
        with pool(pools[i % len(pools)]):
            parts.append(dd.from_pandas(table, npartitions=1))
    x = dd.concat(parts).groupby("k").agg({"v": ["mean", "max"], "w": "sum"})
    ours, fewer = measured(x)
    with dask.config.set({SWITCH: False}):
        stock, more = measured(x)
    pd.testing.assert_frame_equal(ours, stock)
    assert 0 < fewer < more / 2


def test_parts_are_merged_on_their_way_where_links_differ_in_price(pools: str) -> None:
    """The result is wanted where something large lies; the first pool's part goes there by the second."""
    others = pools[1:]
    with pool(pools[-1]):
        large = da.random.default_rng(9).normal(0, 1, (4, 60, 500), chunks=(1, 60, 500))
    reduced = (large[:, :, :50] * 2 + series(pools).std(0)).sum(0) + large.sum(0)[:, :50]
    links = [{"from": a, "to": b, "cost": 1.0} for a, b in zip(pools, others, strict=False)]
    settings = {"meshcompute.objective": "money", "meshcompute.links": [{"from": "*", "to": "*", "cost": 9.0}, *links]}
    with dask.config.set({SWITCH: False}):
        stock = reduced.compute()
    with dask.config.set(settings):
        plan = explain(reduced)
        with measure_traffic() as traffic:
            ours = reduced.compute()
    np.testing.assert_allclose(ours, stock, rtol=1e-9)
    sent = {pair: n for pair, n in traffic.bytes_between_pools.items() if "client" not in pair and n > 10_000}
    assert sent.keys() == {(a, b) for a, b in zip(pools, others, strict=False)}
    assert sum(sent.values()) == pytest.approx(between_sites(plan), rel=0.05)


def test_a_reduction_that_is_held_is_used_again_and_nothing_runs_twice(pools: str) -> None:
    reduced = series(pools, n=24).mean(0)
    held = reduced.persist()
    expected = held.compute()
    with measure_traffic() as traffic:
        again = reduced.persist()
        np.testing.assert_array_equal(again.compute(), expected)
    assert sum(n for pair, n in traffic.bytes_between_pools.items() if "client" not in pair) == 0


def test_two_computations_with_the_same_parts_at_once_are_right(pools: str) -> None:
    x = series(pools, n=24)
    first, second = dask.compute(x.var(0, ddof=0), x.var(0, ddof=1))
    np.testing.assert_allclose(first * 24 / 23, second)


def test_a_scheduler_without_meshcompute_regroups_all_the_same(
    stock_python: str, start_sites: Callable[..., Any]
) -> None:
    sites = start_sites(scheduler_python=stock_python, worker_python=stock_python)
    with sites.client.as_current(), propagate_pools():
        reduced = series("ab", n=48).std(0)
        ours, fewer = measured(reduced)
        with dask.config.set({SWITCH: False}):
            stock, more = measured(reduced)
    np.testing.assert_allclose(ours, stock)
    assert 0 < fewer <= more / 10
