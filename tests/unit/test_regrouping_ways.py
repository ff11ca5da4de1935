"""Parts of regrouped reductions on their way: merged where ways meet, if links differ in price; without a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask.local import get_sync
from hypothesis import given, settings
from hypothesis import strategies as st
from regrouped import blocks_of, expression, plan, sent, series

from meshcompute.clients import pool
from meshcompute.graphs.reductiontrees import cheapest_ways
from meshcompute.links import Link
from meshcompute.planning import Assignment

#: Sending straight to d is dear, but from c; c is near to all.
DEAR = {("*", "*"): 5.0, ("a", "b"): 1.0, ("b", "c"): 1.0, ("c", "d"): 1.0}


def table_of(prices: dict[tuple[str, str], float]) -> dict[str, Any]:
    links = [Link(source=a, destination=b, cost_per_gigabyte=price) for (a, b), price in prices.items()]
    return {"links": tuple(links), "objective": "money"}


def spent(assignment: Assignment) -> float:
    """Bytes times price of what a plan sends between pools."""
    pools = assignment.pool_by_key
    prices = [(key, assignment.links.cost(pools[key], to, 1e9) or 0.0) for key, to in sent(assignment)]
    return sum(assignment.nbytes_by_key[key] * price for key, price in prices)


def wanted_at_d(make: Callable[[da.Array], da.Array], pools: str = "abcd", n: int = 24) -> tuple[da.Array, Any]:
    """A reduction of a series in several pools, whose result is needed where something large lies."""
    blocks = blocks_of(n, (2, 5))
    with pool("d"):
        large = da.from_array(np.ones((20_000, 5)), chunks=(20_000, 5))
    truth = np.concatenate(blocks)
    return (large * make(series(blocks, pools))).sum(0), (np.ones((20_000, 5)) * make(truth)).sum(0)


REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "std": lambda x: x.std(0),
    "max": lambda x: x.max(0),
    "argmax": lambda x: x.argmax(0),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_parts_go_the_cheap_way_and_are_merged_where_ways_meet(name: str) -> None:
    lazy, truth = wanted_at_d(REDUCTIONS[name])
    expr = expression(lazy)
    chained, straight = plan(expr, **table_of(DEAR)), plan(expr, **table_of({("*", "*"): 1.0}))
    np.testing.assert_allclose(get_sync(dict(chained.tasks), list(chained.keys))[0], truth, rtol=1e-9)
    parts = [key for key in chained.tasks if "part-" in str(key)]
    merging = {chained.pool_by_key[key] for key in chained.tasks.keys() - straight.tasks.keys() if key in parts}
    assert {"b", "c"} <= merging
    crossings = {
        (chained.pool_by_key[dep], chained.pool_by_key[key])
        for key, task in chained.tasks.items()
        for dep in task.dependencies
        if chained.pool_by_key.get(dep, "") != chained.pool_by_key[key] and dep in parts
    }
    assert crossings == {("a", "b"), ("b", "c"), ("c", "d")}
    part = max(chained.nbytes_by_key[key] for key in parts)
    assert spent(chained) <= 3 * part
    assert chained.nbytes_by_key.keys() >= chained.tasks.keys() - chained.relays.keys()


def test_links_of_one_price_send_parts_straight() -> None:
    expr = expression(wanted_at_d(REDUCTIONS["mean"])[0])
    priced, plain = plan(expr, **table_of({("*", "*"): 7.0})), plan(expr)
    assert priced.tasks.keys() == plain.tasks.keys()


def test_what_must_not_leave_its_pool_for_another_does_not_go_by_it() -> None:
    """Of a, which must not leave but for d; c would be the cheap way."""
    parts = []
    for i, block in enumerate(blocks_of(24, (2, 5))):
        name = "abcd"[i % 4]
        with pool(*("ad" if name == "a" else name), **({"never_leave": True} if name == "a" else {})):
            parts.append(da.from_array(block, chunks=block.shape))
    with pool("d"):
        large = da.from_array(np.ones((20_000, 5)), chunks=(20_000, 5))
    x = (large * da.concatenate(parts).sum(0)).sum(0)
    chained = plan(expression(x), **table_of(DEAR))
    pools = chained.pool_by_key
    confined = {key for key, held in chained.held_by_key.items() if held.stays}
    assert confined
    assert {pools[key] for key in confined} <= {"a", "d"}
    readers = {pools[key] for key, task in chained.tasks.items() if task.dependencies & confined}
    assert readers <= {"a", "d"}


@settings(max_examples=60)
@given(
    pools=st.lists(st.sampled_from("abcd"), min_size=4, max_size=24),
    prices=st.lists(st.integers(1, 9), min_size=12, max_size=12),
    name=st.sampled_from(sorted(REDUCTIONS)),
)
def test_any_prices_give_right_results_for_no_more_money(pools: list[str], prices: list[int], name: str) -> None:
    lazy, truth = wanted_at_d(REDUCTIONS[name], "".join(pools), len(pools))
    table = table_of(dict(zip(itertools.permutations("abcd", 2), map(float, prices), strict=True)))
    given, regrouped = (plan(expression(lazy), is_regrouping=on, **table) for on in (False, True))
    np.testing.assert_allclose(get_sync(dict(regrouped.tasks), list(regrouped.keys))[0], truth, rtol=1e-9)
    assert spent(regrouped) <= spent(given) * (1 + 1e-9) + 1e-9


@given(n=st.integers(1, 8), data=st.data())
def test_ways_reach_the_reader_and_cost_no_more_than_straight_ones(n: int, data: st.DataObject) -> None:
    senders, reader = "abcdefgh"[:n], "z"
    cost = {
        pair: data.draw(st.floats(0.0, 9.0, allow_subnormal=False))
        for pair in itertools.permutations(senders + reader, 2)
    }
    ways = cheapest_ways(senders, reader, lambda a, b: cost[a, b])
    assert ways.keys() == set(senders)
    for sender in senders:
        passed = [sender]
        while passed[-1] != reader:
            passed.append(ways[passed[-1]])
            assert len(passed) <= n + 1
    assert sum(cost[pair] for pair in ways.items()) <= sum(cost[a, reader] for a in senders) + 1e-9
