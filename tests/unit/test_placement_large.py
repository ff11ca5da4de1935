"""Graphs whose core is too large for one cut: no step is long, and little is lost.

Covers graphs without any structure, and stencils. Does not cover how long anything takes: what counts is how much a
single flow is given.
"""

from __future__ import annotations

import itertools
import random

import pytest

from meshcompute.placement import bisection, mincut
from meshcompute.placement.placing import FREE, Graph, Links, bytes_between, place

PER_LAYER = 1500


def tangle(n_layers: int, width: int, reach: int | None, n_pools: int = 2) -> Graph:
    """Read at random from the layer before, from anywhere or from near by; sizes of many magnitudes, pinned ends."""
    rng = random.Random(n_layers)
    dependencies: list[list[int]] = [[] for _ in range(PER_LAYER)]
    for layer, number in itertools.product(range(n_layers - 1), range(PER_LAYER)):
        near = [
            rng.randrange(PER_LAYER) if reach is None else number + rng.randint(-reach, reach) for _ in range(width)
        ]
        dependencies.append(sorted({layer * PER_LAYER + other % PER_LAYER for other in near}))
    n = len(dependencies)
    pools = [(pool,) for pool in range(n_pools)]
    pins: list[tuple[int, ...] | None] = [rng.choice(pools) if task < PER_LAYER else None for task in range(n)]
    for task in rng.sample(range(n - PER_LAYER, n), PER_LAYER // 10):
        pins[task] = rng.choice(pools)
    return Graph(dependencies=dependencies, nbytes=[rng.lognormvariate(9, 2) for _ in range(n)], pins=pins)


TANGLES = {"deep": (16, 2, 10), "wide": (4, 10, None), "near": (6, 6, 20)}


@pytest.fixture
def arcs_of_flows(monkeypatch):
    """Note how many arcs each maximum flow gets."""
    seen = []
    original = mincut.maximum_flow

    def noted(graph, *ends):
        seen.append(graph.nnz)
        return original(graph, *ends)

    monkeypatch.setattr(mincut, "maximum_flow", noted)
    return seen


def bytes_of(graph: Graph, pools: list[int]) -> float:
    return sum(bytes_between(graph, pools).values())


def by_layers(graph: Graph, n_pools: int) -> list[int]:
    """Place each layer where most of its input lies, as the prototype did; pins hold."""
    pools = [FREE if pin is None else pin[0] for pin in graph.pins]
    for start in range(0, len(pools), PER_LAYER):
        held = dict.fromkeys(range(n_pools), 0.0)
        layer = range(start, start + PER_LAYER)
        for value in {value for task in layer for value in graph.dependencies[task]}:
            held[pools[value]] += graph.nbytes[value]
        best = max(held, key=held.__getitem__)
        for task in layer:
            pools[task] = best if pools[task] == FREE else pools[task]
    return pools


@pytest.mark.parametrize("kind", TANGLES)
def test_no_flow_through_a_graph_without_structure_is_large_and_no_rival_is_better(kind, arcs_of_flows) -> None:
    graph = tangle(*TANGLES[kind])
    placed = place(graph, 2)
    assert all(pin is None or pin == (pool,) for pin, pool in zip(graph.pins, placed.pools, strict=True))
    assert placed.cost == pytest.approx(bytes_of(graph, placed.pools), rel=1e-9)
    rivals = [[pool if pin is None else pin[0] for pin in graph.pins] for pool in range(2)]
    for rival in (*rivals, by_layers(graph, 2)):
        assert placed.cost <= bytes_of(graph, rival)
    # Each member of a net takes an arc and its opposite, for either pool.
    assert arcs_of_flows
    assert max(arcs_of_flows) <= 4 * bisection.MAX_MEMBERS
    n_members = len(graph.nbytes) + sum(map(len, graph.dependencies))
    assert sum(arcs_of_flows) <= 16 * n_members


@pytest.mark.parametrize("kind", TANGLES)
def test_a_large_graph_is_nearly_placed_as_one_cut_would(kind, monkeypatch) -> None:
    graph = tangle(*TANGLES[kind])
    placed = place(graph, 2)
    assert not placed.is_proved  # or this would not be a large one
    monkeypatch.setattr(bisection, "MAX_MEMBERS", 10**9)
    exact = place(graph, 2)
    assert exact.is_proved
    assert placed.bound <= exact.cost <= placed.cost <= 1.02 * exact.cost


def test_the_same_large_graph_always_gets_the_same_plan() -> None:
    assert place(tangle(*TANGLES["deep"]), 2) == place(tangle(*TANGLES["deep"]), 2)


@pytest.mark.parametrize("links", [None, Links(per_byte=[[0, 1, 2], [1.5, 0, 1], [5, 5, 0]])])
def test_more_pools_give_no_flow_more_than_two_do(links, arcs_of_flows) -> None:
    graph = tangle(*TANGLES["deep"], n_pools=3)
    placed = place(graph, 3, links)
    assert all(pin is None or pin == (pool,) for pin, pool in zip(graph.pins, placed.pools, strict=True))
    assert max(arcs_of_flows, default=0) <= 4 * bisection.MAX_MEMBERS


@pytest.mark.parametrize("n_pools", [3, 16])
@pytest.mark.parametrize("is_even", [True, False])
def test_what_flows_get_grows_no_faster_than_the_graph(n_pools: int, is_even: bool, arcs_of_flows) -> None:
    links = None if is_even else Links(per_byte=[[1 + (3 * p + q) % 5 for q in range(n_pools)] for p in range(n_pools)])
    for n_layers in (4, 16):
        arcs_of_flows.clear()
        graph = tangle(n_layers, 3, 10, n_pools)
        place(graph, n_pools, links)
        n_members = len(graph.nbytes) + sum(map(len, graph.dependencies))
        print(f"{len(graph.nbytes)} tasks: {sum(arcs_of_flows) / n_members:.1f} arcs per member")
        assert sum(arcs_of_flows) <= 2_000_000 + 60 * n_members
