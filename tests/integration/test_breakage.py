"""What a distrustful user found: programs that once lost a pin, failed or hung, each as small as it gets."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from dask import delayed
from distributed import Client, get_worker, wait

from meshcompute.clients import pool, propagate_pools
from meshcompute.explaining import explain
from meshcompute.scheduler.guard import Guard
from meshcompute.settings import setting
from meshcompute.traffic import measure_traffic


@pytest.fixture(params=["guard only", "propagate_pools"], autouse=True)
def rules(request: pytest.FixtureRequest, sites: Any) -> Iterator[str]:
    """Every pin must hold with and without placement."""
    with propagate_pools() if request.param == "propagate_pools" else contextlib.nullcontext():
        yield request.param


def checked(value: Any, site: str) -> Any:
    """Return a value, and fail outside of a site."""
    assert f"pool-{site}" in get_worker().state.total_resources, f"ran outside of {site}"
    return value


def checked_in(array: da.Array, site: str) -> da.Array:
    """One more step of an array, which must run at a site."""
    with pool(site):
        return array.map_blocks(checked, site, dtype=array.dtype, meta=np.empty((0,) * array.ndim))


def test_a_bag_that_is_read_in_one_pool_and_mapped_in_another_does_each_step_where_it_belongs() -> None:
    with pool("a"):
        read = db.from_sequence(range(8), npartitions=2).map(checked, "a")
    doubled = read.map(lambda i: 2 * i)
    with pool("b"):
        mapped = doubled.map(checked, "b")
        total = mapped.sum()
    with pool("a"):
        again = mapped.map(checked, "a")
    assert total.compute() == 56
    assert again.compute() == list(range(0, 16, 2))


def test_a_delayed_call_in_one_pool_takes_an_array_of_another() -> None:
    read = checked_in(da.ones((8, 4), chunks=2), "a")
    with pool("b"):
        total = delayed(checked)(read.sum(), "b")
    assert total.compute() == 32


def test_a_delayed_call_takes_an_array_that_went_from_pool_to_pool() -> None:
    moved = checked_in(checked_in(da.ones(8, chunks=4), "a"), "b")
    assert delayed(np.sum)(moved).compute() == 8


def test_a_graph_that_is_sent_before_the_client_is_connected_is_guarded(start_sites: Any) -> None:
    mesh = start_sites(workers_per_site=1, isolated=False).mesh

    async def compute() -> Any:
        client = Client(mesh.scheduler_address, asynchronous=True, set_as_default=False)
        total = client.compute(checked_in(da.ones(4, chunks=2), "a").sum())
        assert client.status != "running"
        async with client:
            return await total, await client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))

    total, plugins = asyncio.run(compute())
    assert total == 4
    assert Guard.name in plugins


def test_of_plans_that_cost_the_same_explain_and_the_scheduler_choose_one() -> None:
    # Each process hashes strings in its own way, and with it orders graphs: ten equal choices are not made by chance.
    for size in range(4, 24, 2):
        difference = checked_in(da.ones(size, chunks=2), "a") - checked_in(da.ones(size, chunks=2), "b")
        with propagate_pools(), measure_traffic() as traffic:
            plan = explain(difference)
            difference.compute()
        assert plan.bytes_between_pools.keys() == traffic.bytes_between_pools.keys()


def test_explain_knows_where_persisted_data_is(sites: Any) -> None:
    kept = checked_in(da.arange(8.0, chunks=2), "a").persist()
    wait(kept)
    with pool("b"):
        total = (kept + 1).sum()
    assert explain(total).bytes_between_pools["a", "b"] == kept.nbytes
    assert explain(kept + 1).tasks_by_pool.keys() == {"a"}


def test_threads_that_leave_their_blocks_in_any_order_leave_the_setting_as_it_was() -> None:
    before = setting("propagate")
    first, second = propagate_pools(), propagate_pools()
    with first:
        pass
    assert setting("propagate")
    with second:
        pass
    assert setting("propagate") == before


def test_threads_that_enter_a_first_pool_at_once_hook_dask_once() -> None:
    program = """
import sys, threading
from distributed import Client
from meshcompute import pool
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
def enter():
    barrier.wait()
    with pool("a"):
        pass
threads = [threading.Thread(target=enter) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
hooked = Client._graph_to_futures.__wrapped__
assert not hasattr(hooked, "__wrapped__"), "hooked twice"
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_cannot_be_pickled_is_said_with_the_cure(sites: Any) -> None:
    with pool("a"):
        with pytest.raises(TypeError, match=r"cannot pickle .*lock.*make it inside the function"):
            delayed(checked)(threading.Lock(), "a").compute()
        assert delayed(checked)(1, "a").compute() == 1
