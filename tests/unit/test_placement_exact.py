"""Placement against exact solvers: equal for two pools, close for more, and what holds for every plan.

Covers random graphs against enumeration and an integer program, costs per link, results,
computing time, and processes without numpy or scipy. Does not cover everyday workloads
(:mod:`tests.unit.test_placement`).
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from meshcompute.placement.exact import solve
from meshcompute.placement.heuristics import plan_heuristically
from meshcompute.placement.objective import terms_of
from meshcompute.placement.placing import FREE, Flat, Graph, Links, Placement, place

SIZES = (0.5, 1.0, 10.0, 100.0, 1000.0)


def random_graph(rng: random.Random, n: int, n_pools: int, *, share_pinned: float = 0.4, reach: int = 9) -> Graph:
    dependencies = [
        sorted({rng.randrange(max(0, task - reach), task) for _ in range(rng.randrange(4))}) if task else []
        for task in range(n)
    ]
    pins: list[tuple[int, ...] | None] = [None] * n
    for task in range(n):
        if rng.random() < share_pinned:
            n_replicas = 2 if rng.random() < 0.2 else 1
            pins[task] = tuple(sorted(rng.sample(range(n_pools), n_replicas)))
    return Graph(
        dependencies=dependencies,
        nbytes=[rng.choice(SIZES) for _ in range(n)],
        pins=pins,
        wanted=[n - 1],
    )


def even(n_pools: int) -> Links:
    return Links.of_bytes(n_pools)


def uneven(rng: random.Random, n_pools: int) -> Links:
    def table() -> list[list[float]]:
        return [[rng.choice((0.3, 1.0, 2.0, 7.0)) for _ in range(n_pools)] for _ in range(n_pools)]

    return Links(
        per_byte=table(),
        per_message=table(),
        per_byte_to_client=[rng.choice((0.0, 1.0, 5.0)) for _ in range(n_pools)],
    )


def cost_of(graph: Graph, pools: Sequence[int], links: Links) -> float:
    """Count what crosses, value by value; work is not counted."""
    total = 0.0
    readers: list[set[int]] = [set() for _ in graph.nbytes]
    for task, values in enumerate(graph.dependencies):
        for value in values:
            readers[value].add(pools[task])
    for value, nbytes in enumerate(graph.nbytes):
        home = pools[value]
        for pool in readers[value] - {home, FREE}:
            total += nbytes * links.per_byte[home][pool]
            total += links.per_message[home][pool] if links.per_message is not None else 0.0
        if value in graph.wanted and home != FREE and links.per_byte_to_client is not None:
            total += nbytes * links.per_byte_to_client[home]
    return total


def by_enumeration(graph: Graph, links: Links, n_pools: int, placed: Placement) -> float:
    choices = [
        [FREE] if pool == FREE else list(range(n_pools) if pin is None else pin)
        for pool, pin in zip(placed.pools, graph.pins, strict=True)
    ]
    return min(cost_of(graph, pools, links) for pools in itertools.product(*choices))


def by_integer_program(graph: Graph, n_pools: int) -> float:
    """Find the fewest bytes: x[v, p] says that v is in p, y[v, p] that its value goes to p, which is not its own."""
    n = len(graph.nbytes)
    rows, columns, entries, low, high = [], [], [], [], []

    def constrain(terms: Sequence[tuple[int, float]], least: float, most: float) -> None:
        for column, factor in terms:
            rows.append(len(low))
            columns.append(column)
            entries.append(factor)
        low.append(least)
        high.append(most)

    upper = np.ones(2 * n * n_pools)
    for task, pin in enumerate(graph.pins):
        constrain([(task * n_pools + pool, 1.0) for pool in range(n_pools)], 1.0, 1.0)
        for pool in range(n_pools):
            if pin is not None and pool not in pin:
                upper[task * n_pools + pool] = 0.0
    for task, values in enumerate(graph.dependencies):
        for value, pool in itertools.product(values, range(n_pools)):
            goes = (n + value) * n_pools + pool
            constrain([(goes, 1.0), (task * n_pools + pool, -1.0), (value * n_pools + pool, 1.0)], 0.0, np.inf)
    weights = np.concatenate([np.zeros(n * n_pools), np.repeat(graph.nbytes, n_pools)])
    matrix = coo_matrix((entries, (rows, columns)), shape=(len(low), 2 * n * n_pools)).tocsr()
    found = milp(
        weights,
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.concatenate([np.ones(n * n_pools), np.zeros(n * n_pools)]),
        bounds=Bounds(0.0, upper),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success
    return float(found.fun)


def assert_holds(graph: Graph, placed: Placement, links: Links) -> None:
    for pool, pin in zip(placed.pools, graph.pins, strict=True):
        assert pool == FREE or pin is None or pool in pin
        assert pool != FREE or pin is None
    assert placed.cost == pytest.approx(cost_of(graph, placed.pools, links), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_two_pools_get_the_plan_that_costs_least_whatever_links_and_results_cost(seed: int) -> None:
    rng = random.Random(seed)
    for turn in range(60):
        graph = random_graph(rng, rng.randint(2, 11), 2, share_pinned=rng.choice((0.2, 0.5, 0.8)))
        links = even(2) if turn % 2 else uneven(rng, 2)
        placed = place(graph, 2, links)
        assert_holds(graph, placed, links)
        assert placed.cost == pytest.approx(by_enumeration(graph, links, 2, placed), rel=1e-9, abs=1e-6)
        assert placed.is_proved


def test_two_pools_get_the_fewest_bytes_of_larger_graphs_too() -> None:
    rng = random.Random(0)
    for _ in range(25):
        graph = random_graph(rng, rng.randint(40, 120), 2, share_pinned=0.2, reach=rng.choice((5, 30)))
        placed = place(graph, 2)
        assert placed.is_proved
        assert placed.cost == pytest.approx(by_integer_program(graph, 2), rel=1e-6)


@pytest.mark.parametrize("n_pools", [3, 5])
def test_more_pools_stay_within_the_bound_and_close_to_the_optimum_on_average(n_pools: int) -> None:
    rng = random.Random(n_pools)
    ratios = []
    for _ in range(40):
        graph = random_graph(rng, rng.randint(10, 60), n_pools, share_pinned=0.25, reach=rng.choice((5, 30)))
        placed = place(graph, n_pools)
        assert_holds(graph, placed, even(n_pools))
        least = by_integer_program(graph, n_pools)
        assert placed.bound <= least * (1 + 1e-6) + 1e-6
        assert least * (1 - 1e-6) <= placed.cost <= (2 - 2 / n_pools) * least * (1 + 1e-6) + 1e-6
        ratios.append(placed.cost / least if least else 1.0)
    print(f"{n_pools} pools: mean {np.mean(ratios):.4f}, worst {max(ratios):.3f} x the optimum")
    assert np.mean(ratios) <= 1.05


def test_more_pools_with_uneven_links_are_close_to_the_optimum_on_average() -> None:
    rng = random.Random(3)
    ratios = []
    for _ in range(120):
        graph, links = random_graph(rng, rng.randint(3, 8), 3), uneven(rng, 3)
        placed = place(graph, 3, links)
        assert_holds(graph, placed, links)
        least = by_enumeration(graph, links, 3, placed)
        assert placed.bound <= least * (1 + 1e-9) + 1e-6
        ratios.append(placed.cost / least if least else 1.0)
    print(f"mean {np.mean(ratios):.4f}, worst {max(ratios):.3f} x the optimum")
    assert np.mean(ratios) <= 1.05


@pytest.mark.parametrize("scale", [1.0, 2.0**31 + 1, 1e15, 1e-9])
def test_sizes_beyond_the_integers_of_the_solver_change_nothing(scale: float) -> None:
    rng = random.Random(7)
    for _ in range(30):
        graph = random_graph(rng, 11, 2)
        large = Graph(
            dependencies=graph.dependencies,
            nbytes=[nbytes * scale for nbytes in graph.nbytes],
            pins=graph.pins,
        )
        links = even(2)
        placed = place(large, 2)
        assert placed.cost == pytest.approx(by_enumeration(large, links, 2, placed), rel=1e-9)


def grid(side: int) -> Graph:
    """Blocks that read their neighbours' halos, twice, with sizes that no unit divides."""
    rng = random.Random(0)
    dependencies: list[list[int]] = [[] for _ in range(side * side)]
    pins: list[tuple[int, ...] | None] = [(rng.randrange(2),) for _ in range(side * side)]
    for _ in range(2):
        first = len(dependencies) - side * side
        for row, column in itertools.product(range(side), range(side)):
            near = [(row + a, column + b) for a, b in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))]
            dependencies.append([first + r * side + c for r, c in near if 0 <= r < side and 0 <= c < side])
            pins.append(None)
    return Graph(dependencies=dependencies, nbytes=[rng.random() + 0.1 for _ in dependencies], pins=pins)


def test_a_large_cut_of_fractions_is_proved() -> None:
    # More arcs than are sent to the last bit, few enough for one cut.
    placed = place(grid(45), 2)
    assert placed.cost > 0
    assert placed.is_proved


def test_flat_arrays_get_the_plan_that_lists_get() -> None:
    graph = random_graph(random.Random(1), 60, 3)
    indptr = np.cumsum([0, *map(len, graph.dependencies)])
    indices = np.array(list(itertools.chain.from_iterable(graph.dependencies)), dtype=np.int64)
    flat = Graph(dependencies=Flat(indptr, indices), nbytes=np.array(graph.nbytes), pins=graph.pins)
    assert place(flat, 3).pools == place(graph, 3).pools
    assert plan_heuristically(terms_of(flat, 3, None)).pools == plan_heuristically(terms_of(graph, 3, None)).pools


@pytest.mark.parametrize("search", [solve, plan_heuristically])
def test_every_search_keeps_pins_and_tells_what_its_plan_costs(search) -> None:
    rng = random.Random(5)
    for turn in range(150):
        n_pools = rng.choice((2, 3, 4))
        graph = random_graph(rng, rng.randint(1, 40), n_pools, share_pinned=rng.choice((0.0, 0.1, 0.5)))
        links = even(n_pools) if turn % 2 else uneven(rng, n_pools)
        placed = search(terms_of(graph, n_pools, links))
        assert_holds(graph, placed, links)
        assert placed.bound <= placed.cost * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize("missing", ["numpy", "scipy"])
def test_a_process_without_the_library_says_so_and_plans_all_the_same(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from meshcompute.placement.placing import Graph, Links, place\n"
        "graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[9.0, 1.0, 1.0], pins=[(0,), (1,), None])\n"
        "found = place(graph, 2)\n"
        "print(found.pools, found.note)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("[0, 1, 0] placed by a heuristic")
    assert missing in done.stdout
    assert missing in done.stderr


def test_other_processes_make_the_same_plan() -> None:
    program = (
        "import random, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_placement_exact import random_graph, uneven\n"
        "from meshcompute.placement.placing import place\n"
        "rng = random.Random(2)\n"
        "for n_pools in (2, 3, 5):\n"
        "    graph = random_graph(rng, 80, n_pools)\n"
        "    print(place(graph, n_pools), place(graph, n_pools, uneven(rng, n_pools)))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, os.path.dirname(__file__)],  # noqa: PTH120 - for sys.path of another process
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(printed) == 1


def test_results_are_made_where_the_way_to_the_client_is_cheap() -> None:
    graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[2.0, 1.0, 5.0], pins=[(0,), (1,), None], wanted=[2])
    assert place(graph, 2, Links.of_bytes(2)).pools == [0, 1, 0]
    near = Links(per_byte=[[0, 1], [1, 0]], per_byte_to_client=[1.0, 0.0])
    assert place(graph, 2, near).pools == [0, 1, 1]


def test_dear_directions_are_avoided_and_latency_counts() -> None:
    graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[2.0, 3.0, 1.0], pins=[(0,), (1,), None])
    assert place(graph, 2).pools == [0, 1, 1]
    assert place(graph, 2, Links.of_money([[0.0, 9.0], [1.0, 0.0]])).pools == [0, 1, 0]
    slow = Links.of_seconds([[1.0, 1.0], [1.0, 1.0]], [[0.0, 9.0], [0.0, 0.0]])
    assert place(graph, 2, slow).pools == [0, 1, 0]


def chains(n: int) -> Graph:
    """Blocks at pool 0, a long task on each, and what all of them yield together."""
    dependencies = [*([] for _ in range(n)), *([block] for block in range(n)), list(range(n, 2 * n))]
    return Graph(
        dependencies=dependencies,
        nbytes=[1e6] * n + [1e4] * n + [10.0],
        pins=[(0,)] * n + [None] * (n + 1),
        seconds=[0.0] * n + [1.0] * n + [0.0],
    )


def test_a_pool_with_few_threads_hands_work_on_where_the_link_is_fast() -> None:
    graph = chains(40)
    threads = [2, 6]
    fast = place(graph, 2, Links.of_seconds([[1e8, 1e8], [1e8, 1e8]], threads=threads))
    moved = sum(fast.pools[40:80])
    assert 24 <= moved <= 36  # 30 would keep both pools busy equally long
    assert fast.cost == pytest.approx(
        cost_of(graph, fast.pools, Links(per_byte=[[0, 1e-8], [1e-8, 0]])) + max((40 - moved) / 2, moved / 6), rel=1e-6
    )
    slow = place(graph, 2, Links.of_seconds([[1e5, 1e5], [1e5, 1e5]], threads=threads))
    assert sum(slow.pools) == 0


def test_plans_that_weigh_work_are_close_to_the_optimum_on_average() -> None:
    rng = random.Random(11)
    ratios = []
    for _ in range(60):
        graph = random_graph(rng, rng.randint(3, 9), 2)
        work = [rng.choice((0.0, 10.0, 1000.0)) for _ in graph.nbytes]
        threads = [rng.choice((1, 2, 8)) for _ in range(2)]
        graph = Graph(dependencies=graph.dependencies, nbytes=graph.nbytes, pins=graph.pins, seconds=work)
        links = Links(per_byte=[[0, 1], [1, 0]], threads=threads)

        def total(pools, graph=graph, links=links, work=work, threads=threads):
            loads = [sum(w for w, p in zip(work, pools, strict=True) if p == pool) for pool in range(2)]
            return cost_of(graph, pools, links) + max(load / n for load, n in zip(loads, threads, strict=True))

        placed = place(graph, 2, links)
        choices = [
            [FREE] if pool == FREE else list(range(2) if pin is None else pin)
            for pool, pin in zip(placed.pools, graph.pins, strict=True)
        ]
        least = min(total(pools) for pools in itertools.product(*choices))
        assert placed.cost == pytest.approx(total(placed.pools), rel=1e-9, abs=1e-6)
        assert placed.bound <= least * (1 + 1e-9) + 1e-6
        ratios.append(placed.cost / least if least else 1.0)
    print(f"mean {np.mean(ratios):.4f}, worst {max(ratios):.3f} x the optimum")
    assert np.mean(ratios) <= 1.05
