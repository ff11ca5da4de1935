"""Graphs that have the structure of everyday work, with links that differ, against the exact optimum.

Covers products of all with all, sources with replicas, climatologies, neighbours and plain random graphs, each with
links of several kinds, against an integer program. Does not cover real workloads (:mod:`tests.unit.test_placement`)
or the smallest graphs (:mod:`tests.unit.test_placement_exact`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from meshcompute.placement.placing import FREE, Graph, Links, Placement, place

Pin = tuple[int, ...] | None


class Sketch:
    """A graph under construction."""

    def __init__(self) -> None:
        self.dependencies: list[list[int]] = []
        self.nbytes: list[float] = []
        self.pins: list[Pin] = []

    def add(self, inputs: Sequence[int], nbytes: float, pin: Pin = None) -> int:
        self.dependencies.append(sorted(set(inputs)))
        self.nbytes.append(nbytes)
        self.pins.append(pin)
        return len(self.nbytes) - 1

    def reduce(self, tasks: Sequence[int], nbytes: float) -> int:
        while len(tasks) > 1:
            tasks = [self.add(tasks[start : start + 4], nbytes) for start in range(0, len(tasks), 4)]
        return tasks[0]

    def graph(self) -> Graph:
        return Graph(dependencies=self.dependencies, nbytes=self.nbytes, pins=self.pins)


def products_of_all_with_all(rng: random.Random, n_pools: int) -> Graph:
    """Matrices, one in each pool, less their means; the first with each of the others, block by block, summed up."""
    sketch, n = Sketch(), rng.randint(2, 3)
    nbytes, share = rng.choice((10.0, 100.0)), rng.choice((0.005, 0.05))
    centred = []
    for pool in range(n_pools):
        blocks = [sketch.add([], nbytes, (pool,)) for _ in range(n)]
        mean = sketch.reduce([sketch.add([block], nbytes * share) for block in blocks], nbytes * share)
        centred.append([sketch.add([block, mean], nbytes) for block in blocks])
    sums = []
    for other in centred[1:]:
        pairs = zip(centred[0], other, strict=True)
        sums.append(sketch.reduce([sketch.add(pair, nbytes * share) for pair in pairs], nbytes * share))
    sketch.add(sums, nbytes * share)
    return sketch.graph()


def sources_with_replicas(rng: random.Random, n_pools: int) -> Graph:
    """Blocks that two pools have, each masked and combined with a block that one pool has; their mean."""
    sketch, n = Sketch(), rng.randint(4, 12)
    nbytes, mask = rng.choice((10.0, 100.0)), sketch.add([], rng.choice((0.5, 5.0)))
    pair = tuple(sorted(rng.sample(range(n_pools), 2)))
    joined = []
    for block in range(n):
        replica = sketch.add([mask], 2 * nbytes, pair)
        other = sketch.add([], nbytes * rng.choice((1.0, 2.0)), (block * n_pools // n,))
        joined.append(sketch.add([replica, other], nbytes))
    sketch.reduce(joined, nbytes)
    return sketch.graph()


def climatology(rng: random.Random, n_pools: int) -> Graph:
    """Blocks in order over the pools, cut up by month; the parts of each month put together and reduced."""
    sketch, n, n_months = Sketch(), rng.randint(6, 9), rng.choice((2, 3))
    nbytes, counted = rng.choice((10.0, 100.0)), sketch.add([], 0.5)
    blocks = [sketch.add([], nbytes, (block * n_pools // n,)) for block in range(n)]
    parts = [[sketch.add([block], nbytes) for block in blocks[month::n_months]] for month in range(n_months)]
    sums = [sketch.reduce([sketch.add([part], nbytes) for part in some], nbytes) for some in parts]
    sketch.add([sketch.add([total, counted], nbytes) for total in sums], nbytes)
    return sketch.graph()


def neighbours(rng: random.Random, n_pools: int) -> Graph:
    """Three rounds in which each block reads those beside it."""
    sketch, n = Sketch(), rng.randint(5, 9)
    before = [sketch.add([], rng.choice((5.0, 10.0)), (block * n_pools // n,)) for block in range(n)]
    for _ in range(3):
        before = [sketch.add(before[max(0, i - 1) : i + 2], rng.choice((5.0, 10.0, 20.0))) for i in range(n)]
    return sketch.graph()


def anything(rng: random.Random, n_pools: int) -> Graph:
    sketch, reach = Sketch(), rng.choice((5, 30))
    for task in range(rng.randint(5, 40)):
        near = range(max(0, task - reach), task)
        pin = tuple(sorted(rng.sample(range(n_pools), rng.choice((1, 1, 1, 2))))) if rng.random() < 0.25 else None
        sketch.add(rng.sample(near, min(len(near), rng.randrange(4))), rng.choice((0.5, 1.0, 10.0, 100.0)), pin)
    return sketch.graph()


KINDS: tuple[Callable[[random.Random, int], Graph], ...] = (
    products_of_all_with_all,
    sources_with_replicas,
    climatology,
    neighbours,
    anything,
)


def one_poor_pool(n_pools: int) -> Links:
    """Links as in the benchmark: the last pool sends at five times the cost; downhill is cheaper than uphill."""
    last = n_pools - 1
    costs = [[1.0 if p < q else 1.5 for q in range(n_pools)] for p in range(n_pools)]
    costs[0][last], costs[last] = 2.0, [5.0] * n_pools
    return Links(per_byte=costs)


def of_any_cost(rng: random.Random, n_pools: int) -> Links:
    def table() -> list[list[float]]:
        return [[rng.choice((0.3, 1.0, 2.0, 7.0)) for _ in range(n_pools)] for _ in range(n_pools)]

    return Links(per_byte=table(), per_message=table())


def links_of(kind: str, rng: random.Random, n_pools: int) -> Links:
    if kind == "equal":
        return Links.of_bytes(n_pools)
    return one_poor_pool(n_pools) if kind == "one poor pool" else of_any_cost(rng, n_pools)


def paid(links: Links, nbytes: float, home: int, pool: int) -> float:
    message = 0.0 if links.per_message is None else links.per_message[home][pool]
    return 0.0 if home == pool else nbytes * links.per_byte[home][pool] + message


def cost_of(graph: Graph, pools: Sequence[int], links: Links) -> float:
    goes = {
        (value, pools[task])
        for task, values in enumerate(graph.dependencies)
        for value in values
        if FREE not in (pools[task], pools[value])
    }
    return sum(paid(links, graph.nbytes[value], pools[value], pool) for value, pool in sorted(goes))


def least_cost(graph: Graph, n_pools: int, links: Links) -> float:
    """Solve an integer program. Is v in p; is v's value sent from p to q: as soon as v is in p and a reader in q."""
    n, k = len(graph.nbytes), n_pools
    rows, columns, entries, low = [], [], [], []

    def constrain(terms: Sequence[tuple[int, float]], least: float) -> None:
        for column, factor in terms:
            rows.append(len(low))
            columns.append(column)
            entries.append(factor)
        low.append(least)

    def sent(value: int, home: int, pool: int) -> int:
        return n * k + (value * k + home) * k + pool

    upper = np.ones(n * k + n * k * k)
    for task, pin in enumerate(graph.pins):
        constrain([(task * k + pool, 1.0) for pool in range(k)], 1.0)
        constrain([(task * k + pool, -1.0) for pool in range(k)], -1.0)
        for pool in range(k):
            upper[task * k + pool] = float(pin is None or pool in pin)
    read = {value for values in graph.dependencies for value in values}
    for task, values in enumerate(graph.dependencies):
        for value, pool in itertools.product(values, range(k)):
            constrain([*((sent(value, home, pool), 1.0) for home in range(k)), (task * k + pool, -1.0)], 0.0)
    for value, home, pool in itertools.product(sorted(read), range(k), range(k)):
        constrain([(value * k + home, 1.0), (sent(value, home, pool), -1.0)], 0.0)
    prices = [paid(links, graph.nbytes[v], p, q) for v in range(n) for p in range(k) for q in range(k)]
    matrix = coo_matrix((entries, (rows, columns)), shape=(len(low), len(upper))).tocsr()
    found = milp(
        np.concatenate([np.zeros(n * k), prices]),
        constraints=LinearConstraint(matrix, low, np.inf),
        integrality=np.concatenate([np.ones(n * k), np.zeros(n * k * k)]),
        bounds=Bounds(0.0, upper),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success
    return float(found.fun)


def assert_holds(graph: Graph, placed: Placement, links: Links, least: float) -> None:
    assert all(pin is None or pool in pin for pin, pool in zip(graph.pins, placed.pools, strict=True))
    assert placed.cost == pytest.approx(cost_of(graph, placed.pools, links), rel=1e-9, abs=1e-6)
    assert placed.bound <= least * (1 + 1e-6) + 1e-6
    assert placed.cost >= least * (1 - 1e-6) - 1e-6


@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.sampled_from(["equal", "one poor pool", "any"]))
@settings(max_examples=60, deadline=None)
def test_two_pools_get_the_least_cost(seed: int, kind: Callable[..., Graph], kind_of_links: str) -> None:
    rng = random.Random(seed)
    graph, links = kind(rng, 2), links_of(kind_of_links, rng, 2)
    placed, least = place(graph, 2, links), least_cost(graph, 2, links)
    assert_holds(graph, placed, links, least)
    assert placed.is_proved
    assert placed.cost == pytest.approx(least, rel=1e-6, abs=1e-6)


@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.sampled_from([3, 4]))
@settings(max_examples=40, deadline=None)
def test_more_pools_with_equal_links_stay_within_the_proven_bound(
    seed: int, kind: Callable[..., Graph], k: int
) -> None:
    graph, links = kind(random.Random(seed), k), Links.of_bytes(k)
    placed, least = place(graph, k, links), least_cost(graph, k, links)
    assert_holds(graph, placed, links, least)
    assert placed.cost <= (2 - 2 / k) * least * (1 + 1e-6) + 1e-6


def ratios_of(kind: Callable[..., Graph], n_pools: int, kind_of_links: str) -> list[float]:
    rng = random.Random(n_pools)
    ratios = []
    for _ in range(4):
        graph, links = kind(rng, n_pools), links_of(kind_of_links, rng, n_pools)
        placed, least = place(graph, n_pools, links), least_cost(graph, n_pools, links)
        assert_holds(graph, placed, links, least)
        ratios.append(placed.cost / least if least else 1.0)
    print(f"{kind.__name__}: mean {np.mean(ratios):.4f}, worst {max(ratios):.3f} x the optimum")
    return ratios


@pytest.mark.parametrize("kind_of_links", ["equal", "one poor pool"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_pools", [3, 5])
def test_more_pools_are_close_to_the_least_cost_on_average(
    n_pools: int, kind: Callable[..., Graph], kind_of_links: str
) -> None:
    assert np.mean(ratios_of(kind, n_pools, kind_of_links)) <= 1.05


@pytest.mark.parametrize("n_pools", [3, 5])
def test_links_of_any_cost_where_detours_are_cheaper_are_close_to_the_least_cost_on_average(n_pools: int) -> None:
    assert np.mean([ratio for kind in KINDS for ratio in ratios_of(kind, n_pools, "any")]) <= 1.05


def stencil(rng: random.Random, n_pools: int) -> Graph:
    """Rounds in which each block of a plane reads the four beside it; rows or squares of blocks are at one pool."""
    sketch, side = Sketch(), rng.randint(4, 6)
    is_striped = rng.random() < 0.5

    def home(row: int, column: int) -> int:
        return row * n_pools // side if is_striped else (2 * row // side * 2 + 2 * column // side) % n_pools

    blocks = {
        at: sketch.add([], rng.choice((5.0, 10.0)), (home(*at),)) for at in itertools.product(range(side), repeat=2)
    }
    for _ in range(rng.randint(1, 3)):
        near = {(r, c): [(r, c), (r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)] for r, c in blocks}
        blocks = {
            at: sketch.add([blocks[other] for other in near[at] if other in blocks], rng.choice((5.0, 10.0, 20.0)))
            for at in blocks
        }
    return sketch.graph()


@pytest.mark.parametrize("n_pools", [3, 5])
def test_stencils_over_links_of_three_magnitudes_are_close_to_the_least_cost(n_pools: int) -> None:
    # Of 299 such graphs, also larger and with halos, the mean was 1.011 and the worst 1.58; of these, 1.03 and 1.61.
    ratios = []
    for seed in range(20):
        rng = random.Random(seed)
        graph = stencil(rng, n_pools)
        links = Links(per_byte=[[10 ** rng.uniform(-1.5, 1.5) for _ in range(n_pools)] for _ in range(n_pools)])
        placed, least = place(graph, n_pools, links), least_cost(graph, n_pools, links)
        assert_holds(graph, placed, links, least)
        ratios.append(placed.cost / least)
    print(f"mean {np.mean(ratios):.4f}, worst {max(ratios):.3f} x the optimum")
    assert np.mean(ratios) <= 1.05
    assert max(ratios) <= 2.0
