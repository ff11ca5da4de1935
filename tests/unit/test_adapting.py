"""Placing again: when a situation differs enough, and which tasks move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.links import LinkTable, parse_links
from meshcompute.scheduler.adapting import Situation, has_drifted, plan_moves


def rates(objective="seconds", **bytes_per_second):
    links = [
        {"from": a, "to": b, "bandwidth": rate} for pair, rate in bytes_per_second.items() for a, b in [pair.split("_")]
    ]
    return LinkTable(given=parse_links(links), objective=objective)


def join(pools=("a", "b"), held="a", **sizes):
    """Two values in memory at a and b, and a task that reads both and has not started."""
    return Situation(
        keys=["x", "y", "join"],
        dependencies=[[], [], [0, 1]],
        nbytes=[sizes.get("x", 10.0), sizes.get("y", 20.0), 1.0],
        pools=[("a",), ("b",), pools],
        movable={2: held},
    )


def test_a_task_moves_to_where_fewer_bytes_cross():
    assert plan_moves(join(), LinkTable()) == {"join": "b"}
    assert plan_moves(join(held="b"), LinkTable()) == {}


def test_a_slow_link_is_worth_more_bytes_on_the_other():
    assert plan_moves(join(held="b"), rates(a_b=1e3, b_a=1e6)) == {"join": "a"}


def test_a_task_leaves_a_pool_that_is_gone():
    assert plan_moves(join(pools=("b", "c"), held="a"), LinkTable()) == {"join": "b"}


def test_what_is_there_or_runs_does_not_move():
    assert (
        plan_moves(Situation(keys=["x"], dependencies=[[]], nbytes=[1.0], pools=[("a",)], movable={}), LinkTable())
        == {}
    )


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_the_same_situation_has_the_same_moves(x, y):
    first, second = (plan_moves(join(x=x, y=y), LinkTable()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("before", "now", "drifted"), [(1e6, 1.9e6, False), (1e6, 2e6, True), (2e6, 0.9e6, True)])
def test_a_rate_has_drifted_when_it_is_another_by_a_factor_of_two(before, now, drifted):
    assert has_drifted(rates(a_b=before), rates(a_b=now), ["a", "b"]) == drifted


def test_rates_do_not_matter_where_only_bytes_count():
    assert not has_drifted(rates("bytes", a_b=1e6), rates("bytes", a_b=1e9), ["a", "b"])


def test_another_price_matters():
    cheap, dear = (
        LinkTable(given=parse_links([{"from": "*", "to": "*", "cost": cost}]), objective="money") for cost in (0, 1)
    )
    assert has_drifted(cheap, dear, ["a", "b"])
    assert not has_drifted(dear, dear, ["a", "b"])


def test_work_is_shared_out_by_threads_where_time_is_what_counts():
    """Ten tasks of a second each, four of them as much work as the pool b has already."""
    n = 10
    situation = Situation(
        keys=["x", *range(n), "other work of b"],
        dependencies=[[], *[[0]] * n, []],
        nbytes=[1.0, *[1.0] * n, 0.0],
        pools=[("a",), *[("a", "b")] * n, ("b",)],
        movable=dict.fromkeys(range(1, n + 1), "a"),
        seconds=[0.0, *[1.0] * n, 4.0],
        threads={"a": 1.0, "b": 1.0},
    )
    moves = plan_moves(situation, rates(a_b=1e9, b_a=1e9))
    assert set(moves.values()) == {"b"}
    assert 2 <= len(moves) <= 4
    assert plan_moves(replace(situation, threads={"a": 10.0, "b": 0.1}), rates(a_b=1e9, b_a=1e9)) == {}


def test_of_replicas_that_cost_as_many_bytes_the_one_with_the_better_link_is_kept():
    situation = Situation(
        keys=["x", "reader"], dependencies=[[], [0]], nbytes=[1e6, 1.0], pools=[("a", "b"), ("c",)], movable={0: "a"}
    )
    assert plan_moves(situation, rates("bytes", a_c=1e6, b_c=1e9)) == {"x": "b"}
    assert plan_moves(situation, rates("bytes", a_c=1e9, b_c=1e6)) == {}
