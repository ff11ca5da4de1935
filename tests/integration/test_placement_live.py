"""Placement on a live cluster: what was planned is what runs, and what was predicted is what is measured."""

from __future__ import annotations

import gc
import sys
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed
from distributed import Client, Event, SchedulerPlugin, futures_of, get_worker
from waiting import wait_until

from meshcompute.clients import pool, propagate_pools
from meshcompute.explaining import explain
from meshcompute.traffic import measure_traffic

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make(site: str, shape: tuple[int, ...] = (400, 400), chunks: tuple[int, ...] = (100, 400)) -> da.Array:
    """Chunks that are made at a site, and nowhere else."""

    def values(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        assert str(get_worker().name).split("-")[0] == site
        return np.random.default_rng(block_info[0]["chunk-location"]).random(block.shape)

    with pool(site):
        return da.map_blocks(values, da.zeros(shape, chunks=chunks), dtype=float, meta=np.empty((0,) * len(shape)))


def pools_that_ran(client: Client, prefix: str) -> set[str]:
    """Pools in which tasks of a kind ran."""

    def on_scheduler(dask_scheduler: Any, prefix: str) -> list[str]:
        names = []
        for ts in dask_scheduler.tasks.values():
            if ts.prefix.name.startswith(prefix) and ts.who_has:
                names += [ws.name.split("-")[0] for ws in ts.who_has]
        return names

    return set(client.run_on_scheduler(on_scheduler, prefix=prefix))


def test_a_value_that_many_workers_of_another_pool_need_crosses_once(sites: Any) -> None:
    big = make("a", (1000, 1000), (1000, 1000))
    with pool("b"):
        readers = [big.map_blocks(lambda x, i=i: x[: i + 1].sum(keepdims=True), dtype=float) for i in range(8)]
    with propagate_pools(), measure_traffic() as traffic:
        dask.compute(*readers)
    assert traffic.bytes_between_pools["a", "b"] == pytest.approx(8e6, rel=0.01)


def test_a_value_in_memory_that_many_workers_of_another_pool_need_crosses_once(sites: Any) -> None:
    with propagate_pools():
        big = make("a", (1000, 1000), (1000, 1000)).persist()
        with pool("b"):
            readers = [big.map_blocks(lambda x, i=i: x[: i + 1].sum(keepdims=True), dtype=float) for i in range(8)]
        with measure_traffic() as traffic:
            dask.compute(*readers)
    assert traffic.bytes_between_pools["a", "b"] == pytest.approx(8e6, rel=0.01)


WORKLOADS = {
    "difference of means": lambda a, b: a.mean(0) - b.mean(0),
    "standard deviation of both": lambda a, b: da.concatenate([a, b]).std(0),
    "sum of both": lambda a, b: (a + b).sum(),
    "one level minus the other": lambda a, b: a.mean(0)[10:20] - b[0][10:20],
    "maximum of a small part": lambda a, b: (a[::50] * b[::50]).max(1),
    "rechunked": lambda a, b: a.rechunk((400, 100), method="tasks").sum(0) + b.mean(0),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_predicted_bytes_are_near_the_measured_ones(name: str, sites: Any) -> None:
    a, b = make("a"), make("b")
    x = WORKLOADS[name](a, b)
    with propagate_pools():
        plan = explain(x)
        with measure_traffic() as traffic:
            result = x.compute()
    assert np.isfinite(result).all()
    for ours in (False, True):  # between the pools, and the result to the client
        measured = sum(
            n for (s, d), n in traffic.bytes_between_pools.items() if s != "client" and (d == "client") == ours
        )
        predicted = sum(n for (_, d), n in plan.bytes_between_pools.items() if (d == "client") == ours)
        assert 0.7 * measured - 100 <= predicted <= 1.4 * measured + 100, ours


def test_unpinned_inputs_follow_their_consumers(sites: Any) -> None:
    a = make("a")
    weights = da.random.random((400, 400), chunks=(100, 400))
    with propagate_pools(), measure_traffic() as traffic:
        (a * weights).sum().compute()
    assert traffic.bytes_between_pools.get(("a", "b"), 0) == traffic.bytes_between_pools.get(("b", "a"), 0) == 0


def test_only_graphs_submitted_under_propagate_pools_are_placed(sites: Any) -> None:
    a = make("a")
    with Client(sites.mesh.scheduler_address, set_as_default=False) as other:
        with propagate_pools():
            placed = sites.client.persist((a + 1).sum(0) + 0)
        plain = other.persist(da.ones((40, 40), chunks=10) + 1)
        other.gather(futures_of(plain))
        sites.client.gather(futures_of(placed))
        demands = sites.client.run_on_scheduler(
            lambda dask_scheduler: {str(key): ts.resource_restrictions for key, ts in dask_scheduler.tasks.items()}
        )
        assert all(set(demands[str(future.key)]) <= {"pool-a", "pool-b"} for future in futures_of(placed))
        assert not any(demands[str(future.key)] for future in futures_of(plain))


def test_a_site_that_only_loads_keeps_pace_with_the_one_that_joins(sites: Any) -> None:
    n, most = 64, 3 * 2 * 3  # two rounds and the one at work, of two workers that get three loads at once each

    def join(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        Event("loads may be joined").wait()
        return x + y

    x, y = make("a", (n, 10), (1, 10)), make("b", (n, 10), (1, 10))
    total = da.map_blocks(join, x[:-1], y[1:], dtype=float, meta=np.empty((0, 0))).sum()

    def loads(dask_scheduler: Any) -> tuple[int, int, int]:
        """Loads at work, joins at work, and the loads of one pool that are in memory."""
        at_work = [
            ts.prefix.name.startswith("values") for ws in dask_scheduler.workers.values() for ts in ws.processing
        ]
        there = [
            ts.resource_restrictions.pool
            for ts in dask_scheduler.tasks.values()
            if ts.state == "memory" and ts.prefix.name.startswith("getitem")
        ]
        return sum(at_work), len(at_work) - sum(at_work), max(map(there.count, there), default=0)

    with propagate_pools():
        future = sites.client.compute(total)
    found: list[tuple[int, int, int]] = []

    def is_settled() -> bool:
        found.append(sites.client.run_on_scheduler(loads))
        return found[-1][0] == 0 and found[-1][1] >= 4  # joins wait on all threads of a pool

    try:
        wait_until(is_settled, "loads that wait for joins")
        assert found[-1][2] <= most
    finally:
        Event("loads may be joined").set()
    assert future.result() > 0


class Witness(SchedulerPlugin):  # type: ignore[misc]
    """Note whether the collector of cyclic garbage is on while a graph is taken in."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def update_graph(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(gc.isenabled())


def test_a_graph_that_is_placed_is_taken_in_without_searches_for_garbage(sites: Any) -> None:
    def found(dask_scheduler: Any) -> tuple[list[bool], bool]:
        return dask_scheduler.plugins["witness"].found, gc.isenabled()

    with propagate_pools():  # from now on the scheduler is one of ours
        make("a").sum().compute()
    sites.client.register_plugin(Witness(), name="witness")
    try:
        da.ones((4, 4), chunks=2).sum().compute()
        with propagate_pools():
            make("b").sum().compute()
        assert sites.client.run_on_scheduler(found) == ([True, False], True)
    finally:
        sites.client.unregister_scheduler_plugin("witness")


def test_the_same_computation_twice_while_its_result_is_held(sites: Any) -> None:
    a, b = make("a"), make("b")
    x = (a - b).sum(0)
    with propagate_pools():
        held = x.persist()
        again = (x + 1).compute()
    np.testing.assert_allclose(held.compute() + 1, again)


def test_tasks_that_a_plan_gave_relays_keep_them_when_another_client_brings_them_without(sites: Any) -> None:
    with pool("a"):
        x = delayed(np.ones)(50_000, dask_key_name="shared-x")
    with pool("b"):
        y, z = (delayed(total)(x, i, dask_key_name=f"shared-{i}") for i in range(2))
    with Client(sites.mesh.scheduler_address, set_as_default=False) as stranger:
        with propagate_pools():
            both = sites.client.compute(delayed(total)(y, z, dask_key_name="shared-both"))
        assert both.result() == 100_001
        again = {
            "shared-x": (np.ones, 50_000),
            "shared-0": (total, "shared-x", 0),
            "shared-more": (total, "shared-0", 5),
        }
        assert stranger.get(again, "shared-more") == 50_005
    log = sites.mesh.log("scheduler")
    assert [line for line in log.splitlines() if "Detected different" in line and "shared-" in line] == []


def total(x: Any, y: Any) -> float:
    return float(np.sum(x) + np.sum(y))
