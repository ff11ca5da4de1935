"""Placing again on a live cluster: a pool comes or is lost, a worker is lost, links change.

On a scheduler that has meshcompute, and on one that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from dask import delayed
from distributed import Client, wait
from waiting import wait_until

from meshcompute import measure_traffic, pool, propagate_pools
from meshcompute.embedded import EmbeddedMesh

PATIENCE_SECONDS = 60.0


@pytest.fixture(params=["meshcompute on the scheduler", "a stock scheduler"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., EmbeddedMesh]]:
    """Start a mesh with one worker in each of the named pools."""
    options = {}
    if request.param == "a stock scheduler":
        stock = request.getfixturevalue("stock_python")
        options = {"scheduler_python": stock, "worker_python": stock}
    with ExitStack() as stack:

        def start(*pools: str, workers: int = 1) -> EmbeddedMesh:
            stores = {name: tmp_path / name for name in pools}
            for store in stores.values():
                store.mkdir()
            return stack.enter_context(EmbeddedMesh(stores, workers_per_site=workers, threads_per_worker=2, **options))

        yield start


def gate(path: str) -> int:
    """Hold what depends on it until a file is there."""
    while not Path(path).exists():
        time.sleep(0.02)
    return 0


def values(nbytes: int, after: Any = None) -> np.ndarray:
    return np.zeros(nbytes, dtype="u1")


def joined(*parts: Any) -> int:
    return sum(int(np.size(part)) for part in parts)


def held_to(client: Client, *keys: str) -> set[str | None]:
    """Pools that tasks are held to."""

    def ask(dask_scheduler: Any, keys: Any) -> set[str | None]:
        tasks = [dask_scheduler.tasks.get(key) for key in keys]
        return {getattr(ts.resource_restrictions, "pool", None) if ts is not None else None for ts in tasks}

    return client.run_on_scheduler(ask, keys=keys)


def pool_of_task(client: Client, key: str) -> str | None:
    """Pool that a task is held to."""
    (name,) = held_to(client, key)
    return name


def present(client: Client) -> set[str]:
    """Pools that have workers."""
    workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"].values()
    return {worker["name"].rsplit("-", 2)[0] for worker in workers}


def where(client: Client, *futures: Any) -> set[str]:
    """Pools that hold values."""
    names = {address: w["name"] for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}
    holders = client.who_has(list(futures))
    return {names[address].rsplit("-", 2)[0] for addresses in holders.values() for address in addresses}


def lose(mesh: EmbeddedMesh, client: Client, site: str) -> None:
    """End all workers of a site, as a crash would."""
    for name in list(mesh.pids):
        if name.rsplit("-", 2)[0] == site:
            mesh.kill(name)
    wait_until(lambda: site not in present(client), f"pool {site} is lost", PATIENCE_SECONDS)


def links(**rates: str) -> list[dict[str, str]]:
    return [{"from": a, "to": b, "bandwidth": rate} for pair, rate in rates.items() for a, b in [pair.split("_")]]


def placed_again(client: Client) -> int:
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.pool_counts["placed_again"])


def test_a_pool_that_joins_takes_over_what_has_not_started_and_is_cheaper_there(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    mesh = start("a", "b", "c")
    client = mesh.client()
    lose(mesh, client, "c")
    with pool("a"):
        wait_here = delayed(gate)(str(opened), dask_key_name="join-gate")
    with pool("a", "c"):
        x = delayed(values)(3_000_000, wait_here, dask_key_name="join-x")
    with pool("b", "c"):
        y = delayed(values)(2_000_000, wait_here, dask_key_name="join-y")
    total = delayed(joined)(x, y, dask_key_name="join-total")
    keys = "join-x", "join-y", "join-total"
    with propagate_pools():
        future = client.compute(total)
        wait_until(lambda: pool_of_task(client, "join-x"), "the graph", PATIENCE_SECONDS)
        assert pool_of_task(client, "join-x") == "a"
        assert pool_of_task(client, "join-y") == "b"
        mesh.start_worker("c")
        wait_until(lambda: held_to(client, *keys) == {"c"}, "everything to be placed in the new pool", PATIENCE_SECONDS)
        with measure_traffic(client) as traffic:
            opened.touch()
            wait(future, timeout=PATIENCE_SECONDS)
        assert where(client, future) == {"c"}
    assert future.result() == 5_000_000
    assert sum(traffic.bytes_between_pools.values()) < 10_000  # the gate's number alone


def test_a_pool_that_joins_takes_its_share_of_the_work_where_time_is_what_counts(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    mesh = start("a", "c")
    client = mesh.client()
    lose(mesh, client, "c")
    with pool("a"):
        wait_here = delayed(gate)(str(opened), dask_key_name="share-gate")
    parts = [delayed(values)(1000 + i, wait_here, dask_key_name=f"share-{i}") for i in range(40)]
    keys = [part.key for part in parts]
    with propagate_pools(), dask.config.set({"meshcompute.objective": "seconds"}):
        futures = client.compute(parts)
        wait_until(lambda: held_to(client, *keys) == {"a"}, "the graph", PATIENCE_SECONDS)
        mesh.start_worker("c")
        wait_until(lambda: held_to(client, *keys) == {"a", "c"}, "a share in the new pool", PATIENCE_SECONDS)
    opened.touch()
    assert [value.size for value in client.gather(futures)] == [1000 + i for i in range(40)]
    n_moved = placed_again(client)
    assert 10 <= n_moved <= 30  # both pools have two threads


def test_when_a_pool_is_lost_what_has_not_started_goes_where_its_other_replica_is(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    client = (mesh := start("a", "b", "c")).client()
    with pool("c"):
        wait_here = delayed(gate)(str(opened), dask_key_name="lost-gate")
    with pool("a", "b"):
        replica = delayed(values)(3_000_000, dask_key_name="lost-replica")
        second = delayed(values)(1_000_000, dask_key_name="lost-second")
    first = delayed(joined)(replica, dask_key_name="lost-first")
    last = delayed(joined)(replica, second, first, wait_here, dask_key_name="lost-last")
    with propagate_pools():
        future = client.compute(last)
        before = wait_until(lambda: pool_of_task(client, "lost-replica"), "the graph", PATIENCE_SECONDS)
        assert before in ("a", "b")
        assert held_to(client, "lost-first", "lost-last") == {before}

        def is_first_there(dask_scheduler: Any) -> bool:
            return dask_scheduler.tasks["lost-first"].state == "memory"

        wait_until(lambda: client.run_on_scheduler(is_first_there), "a value that can be lost", PATIENCE_SECONDS)
        lose(mesh, client, before)
        other = {"a": "b", "b": "a"}[before]
        keys = "lost-replica", "lost-second", "lost-first", "lost-last"
        wait_until(lambda: held_to(client, *keys) == {other}, "the tasks to be placed again", PATIENCE_SECONDS)
        with measure_traffic(client) as traffic:
            opened.touch()
            wait(future, timeout=PATIENCE_SECONDS)
        assert where(client, future) == {other}
    assert future.result() == 4_000_002
    assert sum(traffic.bytes_between_pools.values()) < 10_000
    assert placed_again(client) >= 3


def test_when_a_worker_is_lost_its_work_stays_in_its_pool(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    client = (mesh := start("a", "b", workers=2)).client()
    with pool("b"):
        wait_here = delayed(gate)(str(opened), dask_key_name="worker-gate")
    with pool("a"):
        x = delayed(values)(3_000_000, dask_key_name="worker-x")
    total = delayed(joined)(x, wait_here, dask_key_name="worker-total")
    with propagate_pools():
        future = client.compute(total)

        def holder(dask_scheduler: Any) -> str | None:
            ts = dask_scheduler.tasks.get("worker-x")
            return next((ws.name for ws in ts.who_has or ()), None) if ts is not None else None

        mesh.kill(lost := wait_until(lambda: client.run_on_scheduler(holder), "a value", PATIENCE_SECONDS))
        before = pool_of_task(client, "worker-total")
        other = {"a-1-0": "a-1-1", "a-1-1": "a-1-0"}[lost]
        wait_until(lambda: client.run_on_scheduler(holder) == other, "the value on the other worker", PATIENCE_SECONDS)
        opened.touch()
        wait(future, timeout=PATIENCE_SECONDS)
        assert where(client, future) == {before}
    assert future.result() == 3_000_001


def test_links_that_are_said_to_have_changed_move_what_has_not_started(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    client = start("a", "b").client()
    with pool("a"):
        x = delayed(values)(3_000_000, dask_key_name="said-x")
        wait_here = delayed(gate)(str(opened), dask_key_name="said-gate")
    with pool("b"):
        y = delayed(values)(2_000_000, dask_key_name="said-y")
    total = delayed(joined)(x, y, wait_here, dask_key_name="said-total")
    with propagate_pools(), dask.config.set({"meshcompute.objective": "seconds"}):
        with dask.config.set({"meshcompute.links": links(a_b="1 GB/s", b_a="1 kB/s")}):
            future = client.compute(total)
            wait_until(lambda: pool_of_task(client, "said-x"), "the graph")
        assert pool_of_task(client, future.key) == "b"
        with dask.config.set({"meshcompute.links": links(a_b="1 kB/s", b_a="1 GB/s")}):
            client.submit(joined, pure=False).result()  # whatever comes next brings the news
        wait_until(lambda: pool_of_task(client, future.key) == "a", "the task to be placed again", PATIENCE_SECONDS)
    opened.touch()
    assert future.result() == 5_000_001


def delay_answers(seconds: float, dask_worker: Any) -> None:
    """Let a worker answer late whoever asks it for values: a link that has become slow."""
    import asyncio

    original = dask_worker.handlers["get_data"]

    async def get_data(comm: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(seconds)
        return await original(comm, **kwargs)

    dask_worker.handlers["get_data"] = get_data


def test_a_link_whose_measured_rate_drifts_moves_what_has_not_started(start: Any, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    client = start("a", "b").client()

    def transfer(source: str, destination: str) -> None:
        with pool(source):
            value = client.submit(values, 2_000_000, pure=False)
        with pool(destination):
            assert client.submit(joined, value, pure=False).result() == 2_000_000

    def measured(dask_scheduler: Any) -> dict[Any, float]:
        return dict(dask_scheduler.pool_links.measured)

    def is_measured(*pair: str) -> bool:
        transfer(*pair)
        return pair in client.run_on_scheduler(measured)

    with propagate_pools(), dask.config.set({"meshcompute.objective": "seconds"}):
        for pair in (("a", "b"), ("b", "a")):
            wait_until(lambda pair=pair: is_measured(*pair), f"a rate of {pair}", PATIENCE_SECONDS)
        with pool("a"):
            x = delayed(values)(3_000_000, dask_key_name="drift-x")
            wait_here = delayed(gate)(str(opened), dask_key_name="drift-gate")
        with pool("b"):
            y = delayed(values)(3_000_000, dask_key_name="drift-y")
        total = delayed(joined)(x, y, wait_here, dask_key_name="drift-total")
        future = client.compute(total)
        here = wait_until(lambda: pool_of_task(client, "drift-total"), "the graph", PATIENCE_SECONDS)
        there = {"a": "b", "b": "a"}[here]
        addresses = client.scheduler_info(n_workers=-1)["workers"]
        senders = [address for address, worker in addresses.items() if worker["name"].startswith(there)]
        client.run(delay_answers, 0.5, workers=senders)  # at most 4 MB/s from there to here

        def has_moved() -> bool:
            transfer(there, here)
            return pool_of_task(client, "drift-total") == there

        wait_until(has_moved, "the task to be placed again", 90)
        rates = client.run_on_scheduler(measured)
    assert rates[there, here] < 5e6 < rates[here, there]
    opened.touch()
    assert future.result() == 6_000_001
    assert where(client, future) == {there}
