"""Links on a live cluster: settings and measured rates reach the plan, and the run keeps to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, wait
from waiting import wait_until

from meshcompute import errors, explain, measure_traffic, pool, propagate_pools


def joined(n_a: int, n_b: int) -> Any:
    """Bring together two arrays of so many kB at pools a and b, which takes one of them across."""
    with pool("a"):
        x = da.random.random((n_a, 125), chunks=-1)
    with pool("b"):
        y = da.random.random((n_b, 125), chunks=-1)
    return da.map_blocks(lambda p, q: p[:1, :1] + q[:1, :1], x, y, dtype=float, chunks=((1,), (1,)))


def directions(plan_or_traffic: Any) -> set[tuple[str, str]]:
    """Pairs of pools between which more than messages move."""
    return {pair for pair, n in plan_or_traffic.bytes_between_pools.items() if "client" not in pair and n > 100_000}


SLOW_FROM_B = [
    {"from": "*", "to": "*", "bandwidth": "1 GB/s", "cost": 0.0},
    {"from": "b", "to": "a", "bandwidth": "1 MB/s", "latency": "50 ms", "cost": 0.09},
]


def test_the_fewest_bytes_move_where_nothing_else_is_asked_for(sites: Any) -> None:
    with propagate_pools(), dask.config.set({"meshcompute.links": SLOW_FROM_B}):
        plan = explain(joined(1000, 500))
    assert directions(plan) == {("b", "a")}
    assert plan.seconds_between_pools["b", "a"] == pytest.approx(0.55, rel=0.01)
    assert plan.money_between_pools["b", "a"] == pytest.approx(0.09 * 500e3 / 1e9, rel=0.01)
    assert "0.55" in str(plan)


@pytest.mark.parametrize("objective", ["seconds", "money"])
def test_with_another_objective_the_larger_value_takes_the_better_link(objective: str, sites: Any) -> None:
    with (
        propagate_pools(),
        dask.config.set({"meshcompute.links": SLOW_FROM_B, "meshcompute.objective": objective}),
        measure_traffic() as traffic,
    ):
        x = joined(1000, 500)
        plan = explain(x)
        x.compute()
    assert directions(plan) == directions(traffic) == {("a", "b")}


def test_money_without_prices_fails_before_anything_runs(sites: Any) -> None:
    with (
        propagate_pools(),
        dask.config.set({"meshcompute.objective": "money", "meshcompute.links": [{"from": "a", "to": "b", "cost": 1}]}),
    ):
        with pytest.raises(errors.SettingError, match="b -> a has no cost"):
            explain(joined(100, 50))
        with pytest.raises(errors.SettingError, match="b -> a has no cost"):
            joined(100, 50).compute()


def test_rates_are_learnt_from_transfers_and_shown(sites: Any) -> None:
    """A fetch of more than a megabyte tells; workers report with their next heartbeat."""

    def rates(dask_scheduler: Any) -> dict[Any, float]:
        return dict(dask_scheduler.pool_links.measured)

    with propagate_pools():
        joined(8000, 4000).compute()
        measured = wait_until(lambda: sites.client.run_on_scheduler(rates), "a rate of the link b -> a")
        plan = explain(joined(8000, 4000))
    assert ("b", "a") in measured
    assert plan.seconds_between_pools["b", "a"] == pytest.approx(4e6 / measured["b", "a"], rel=0.5)


# ---------------------------------------------------------------------- what placement leaves open


@pytest.fixture(scope="module", params=["meshcompute on the scheduler", "a stock scheduler"])
def three(request: pytest.FixtureRequest, start_sites: Callable[..., Any]) -> Iterator[Client]:
    """A client of a mesh with one worker in each of the pools a, b and c."""
    options = {}
    if request.param == "a stock scheduler":
        stock = request.getfixturevalue("stock_python")
        options = {"scheduler_python": stock, "worker_python": stock}
    mesh = start_sites(pools=("a", "b", "c"), isolated=False, workers_per_site=1, **options).mesh
    with Client(mesh.scheduler_address) as client:
        yield client


def zeros(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, dtype="u1")


def total_size(*parts: Any) -> int:
    return sum(part.size for part in parts)


def pools_of(client: Client, future: Any) -> set[str]:
    """Pools that hold a value."""
    names = {address: w["name"] for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}
    return {names[address].rsplit("-", 2)[0] for address in client.who_has([future])[future.key]}


def slow(*pairs: str) -> list[dict[str, str]]:
    """Settings: all links at 1 GB/s but for some."""
    links = [{"from": "*", "to": "*", "bandwidth": "1 GB/s"}]
    return links + [{"from": a, "to": b, "bandwidth": "1 MB/s"} for a, b in pairs]


@pytest.mark.parametrize("is_placed", [False, True], ids=["pinned alone", "all placed"])
@pytest.mark.parametrize("near", ["a", "b"])
def test_of_two_replicas_the_one_with_the_better_link_to_its_reader_is_read(
    near: str, is_placed: bool, three: Client
) -> None:
    far = {"a": "b", "b": "a"}[near]
    with (
        propagate_pools() if is_placed else nullcontext(),
        dask.config.set({"meshcompute.links": slow(far + "c")}),
        measure_traffic(three) as traffic,
    ):
        with pool("a", "b"):
            x = dask.delayed(zeros)(1_000_000)
        with pool("c"):
            future = three.compute(dask.delayed(total_size)(x))
        assert future.result() == 1_000_000
    assert directions(traffic) == {(near, "c")}


def test_a_task_that_nobody_has_placed_runs_where_its_inputs_are_soonest(three: Client) -> None:
    """Stock would take it to the most bytes: it counts with one rate for the whole cluster."""
    for rates, expected in ((slow("ab"), "a"), (slow("ba"), "b"), (slow(), "b")):
        with dask.config.set({"meshcompute.links": rates}):
            with pool("a"):
                x = three.submit(zeros, 2_000_000, pure=False)
            with pool("b"):
                y = three.submit(zeros, 3_000_000, pure=False)
            wait([x, y])
            there = three.submit(total_size, x, y, pure=False)
            wait(there)
            assert pools_of(three, there) == {expected}
