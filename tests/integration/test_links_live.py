"""Links on a live cluster: settings and measured rates reach the plan, and the run keeps to it."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import pytest
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
