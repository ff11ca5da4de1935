"""Placing again on a live cluster, when a pool is lost or comes, and when links change."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask import delayed
from distributed import wait
from waiting import wait_until

from meshcompute import pool, propagate_pools


def gate(path: str) -> int:
    """Hold what depends on it until a file is there."""
    while not Path(path).exists():
        time.sleep(0.02)
    return 0


def values(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, dtype="u1")


def joined(*parts: Any) -> int:
    return sum(int(np.size(part)) for part in parts)


def pool_of_task(client: Any, key: str) -> str | None:
    """Pool that a task is held to."""

    def ask(dask_scheduler: Any, key: str) -> str | None:
        ts = dask_scheduler.tasks.get(key)
        return getattr(ts.resource_restrictions, "pool", None) if ts is not None else None

    return client.run_on_scheduler(ask, key=key)


def kill(sites: Any, site: str) -> None:
    for name, pid in list(sites.mesh.pids.items()):
        if name.rsplit("-", 2)[0] == site:
            os.kill(pid, 9)


def test_links_that_change_move_what_has_not_started(sites: Any, tmp_path: Path) -> None:
    def links(**rates: str) -> list[dict[str, str]]:
        return [{"from": a, "to": b, "bandwidth": rate} for pair, rate in rates.items() for a, b in [pair.split("_")]]

    opened = tmp_path / "open"
    with pool("a"):
        x = delayed(values)(3_000_000, dask_key_name="drift-x")
        wait_here = delayed(gate)(str(opened), dask_key_name="drift-gate")
    with pool("b"):
        y = delayed(values)(2_000_000, dask_key_name="drift-y")
    total = delayed(joined)(x, y, wait_here, dask_key_name="drift-total")
    with propagate_pools(), dask.config.set({"meshcompute.objective": "seconds"}):
        with dask.config.set({"meshcompute.links": links(a_b="1 GB/s", b_a="1 kB/s")}):
            future = sites.client.compute(total)
            wait_until(lambda: pool_of_task(sites.client, "drift-x"), "the graph")
        assert pool_of_task(sites.client, future.key) == "b"
        with dask.config.set({"meshcompute.links": links(a_b="1 kB/s", b_a="1 GB/s")}):
            sites.client.submit(joined, pure=False).result()  # whatever comes next brings the news
        wait_until(lambda: pool_of_task(sites.client, future.key) == "a", "the task to be placed again")
    opened.touch()
    assert future.result() == 5_000_001


def test_a_task_of_two_replicas_goes_to_the_other_when_its_pool_is_lost(start_sites: Any, tmp_path: Path) -> None:
    sites = start_sites(pools=("a", "b", "c"), isolated=False)
    opened = tmp_path / "open"
    client = sites.client
    with pool("c"):
        wait_here = delayed(gate)(str(opened), dask_key_name="lost-gate")
    with pool("a", "b"):
        replica = delayed(joined)(wait_here, dask_key_name="lost-replica")
    with propagate_pools():
        future = client.compute(replica)
        first = wait_until(lambda: pool_of_task(client, future.key), "the graph")
        assert first in ("a", "b")
        kill(sites, first)
        other = {"a": "b", "b": "a"}[first]
        wait_until(lambda: pool_of_task(client, future.key) == other, "the task to be placed again", 60)
        opened.touch()
        wait(future, timeout=60)
    assert future.result() == 1
    assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.pool_counts["placed_again"]) >= 1
