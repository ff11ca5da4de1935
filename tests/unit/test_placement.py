"""Placement: pins hold, plans repeat, and few bytes cross.

Covers random graphs (hypothesis), the optimum by enumeration on tiny graphs and by a maximum flow on the workloads that
a scientist writes. Does not cover what Dask does with a plan.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dask._task_spec import Task, convert_legacy_graph
from dask.base import collections_to_expr
from dask.highlevelgraph import HighLevelGraph
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_flow

from meshcompute.graphs.sizes import estimate_nbytes
from meshcompute.placement.placing import FREE, ContradictingPinsError, Graph, bytes_between
from meshcompute.placement.placing import place as placement_of

SIZES = (0.0, 1.0, 10.0, 100.0, 1000.0)


def place(graph: Graph, n_pools: int) -> list[int]:
    return placement_of(graph, n_pools).pools


def total_bytes(graph: Graph, pools: Sequence[int]) -> float:
    return sum(bytes_between(graph, pools).values())


def random_graph(rng: random.Random, n: int, n_pools: int, *, share_pinned: float, reach: int, grouped: bool) -> Graph:
    dependencies = [
        sorted({rng.randrange(max(0, task - reach), task) for _ in range(rng.randrange(4))}) if task else []
        for task in range(n)
    ]
    pins: list[tuple[int, ...] | None] = []
    for _ in range(n):
        if rng.random() >= share_pinned:
            pins.append(None)
        elif rng.random() < 0.2:
            pins.append(tuple(sorted(rng.sample(range(n_pools), min(2, n_pools)))))
        else:
            pins.append((rng.randrange(n_pools),))
    free = [task for task in range(n) if pins[task] is None]
    together = [rng.sample(free, 2)] if grouped and len(free) > 1 else []
    # Shuffled, because nobody promises that inputs have the lower numbers.
    names = list(range(n))
    rng.shuffle(names)
    shuffled: list[list[int]] = [[] for _ in range(n)]
    renamed_pins: list[tuple[int, ...] | None] = [None] * n
    for task in range(n):
        shuffled[names[task]] = [names[value] for value in dependencies[task]]
        renamed_pins[names[task]] = pins[task]
    return Graph(
        dependencies=shuffled,
        nbytes=[rng.choice(SIZES) for _ in range(n)],
        pins=renamed_pins,
        together=[[names[task] for task in group] for group in together],
    )


@st.composite
def graphs(draw: st.DrawFn, n_pools: int = 3) -> Graph:
    return random_graph(
        random.Random(draw(st.integers(0, 2**32))),
        draw(st.integers(1, 60)),
        n_pools,
        share_pinned=draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])),
        reach=draw(st.sampled_from([2, 10, 60])),
        grouped=draw(st.booleans()),
    )


def connected_to_a_pin(graph: Graph) -> set[int]:
    neighbours: list[set[int]] = [set() for _ in graph.nbytes]
    for task, values in enumerate(graph.dependencies):
        for value in values:
            neighbours[task].add(value)
            neighbours[value].add(task)
    for group in graph.together:
        for one, other in itertools.permutations(group, 2):
            neighbours[one].add(other)
    found = {task for task, pin in enumerate(graph.pins) if pin is not None}
    queue = list(found)
    while queue:
        for neighbour in neighbours[queue.pop()] - found:
            found.add(neighbour)
            queue.append(neighbour)
    return found


def topological(graph: Graph) -> list[int]:
    order: list[int] = []
    done: set[int] = set()

    def visit(task: int) -> None:
        if task not in done:
            done.add(task)
            for value in graph.dependencies[task]:
                visit(value)
            order.append(task)

    for task in range(len(graph.nbytes)):
        visit(task)
    return order


def greedy_plan(graph: Graph, n_pools: int) -> list[int]:
    """Place task by task where most of its input lies; what has no placed input follows a consumer."""
    pools = [FREE if pin is None or len(pin) > 1 else pin[0] for pin in graph.pins]
    order = topological(graph)
    for task in order:
        pin = graph.pins[task]
        held = [0.0] * n_pools
        known = [value for value in graph.dependencies[task] if pools[value] != FREE]
        for value in known:
            held[pools[value]] += graph.nbytes[value]
        if pools[task] == FREE and (known or pin is not None):
            pools[task] = max(range(n_pools) if pin is None else pin, key=held.__getitem__)
    for _ in graph.nbytes:
        for task in reversed(order):
            for value in graph.dependencies[task]:
                if pools[value] == FREE != pools[task]:
                    pools[value] = pools[task]
                if pools[task] == FREE != pools[value]:
                    pools[task] = pools[value]
    return pools


def single_pool_plans(graph: Graph, n_pools: int) -> list[list[int]]:
    found = connected_to_a_pin(graph)
    return [
        [
            FREE if task not in found else pool if pin is None or pool in pin else pin[0]
            for task, pin in enumerate(graph.pins)
        ]
        for pool in range(n_pools)
    ]


def optimum(graph: Graph, n_pools: int) -> float:
    """Try every plan."""
    found = sorted(connected_to_a_pin(graph))
    choices = [range(n_pools) if (pin := graph.pins[task]) is None else pin for task in found]
    best = math.inf
    for combination in itertools.product(*choices):
        pools = [FREE] * len(graph.nbytes)
        for task, pool in zip(found, combination, strict=True):
            pools[task] = pool
        best = min(best, total_bytes(graph, pools))
    return best


def minimum_cut(graph: Graph) -> float:
    """Solve two pools exactly: a net is an arc of its bytes, entered and left by arcs that cannot be cut."""
    n, first, second = len(graph.nbytes), 3 * len(graph.nbytes), 3 * len(graph.nbytes) + 1
    node = [task if pin is None else (first, second)[pin[0]] for task, pin in enumerate(graph.pins)]
    readers: list[list[int]] = [[] for _ in range(n)]
    for task, values in enumerate(graph.dependencies):
        for value in values:
            readers[value].append(task)
    unit = max(1.0, sum(graph.nbytes) / 2**30)  # the solver's capacities are int32
    arcs: dict[tuple[int, int], int] = {}
    for value in range(n):
        entry, leave = n + 2 * value, n + 2 * value + 1
        arcs[entry, leave] = round(graph.nbytes[value] / unit)
        for task in (value, *readers[value]):
            arcs[node[task], entry] = arcs[leave, node[task]] = 2**31 - 1
    rows, columns = zip(*arcs, strict=True)
    capacities = coo_matrix((np.array(list(arcs.values()), dtype=np.int32), (rows, columns)), shape=(3 * n + 2,) * 2)
    return float(maximum_flow(capacities.tocsr(), first, second).flow_value) * unit


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_pins_are_never_violated_and_only_what_no_pin_reaches_stays_free(graph: Graph) -> None:
    pools = place(graph, 3)
    found = connected_to_a_pin(graph)
    for task, (pool, pin) in enumerate(zip(pools, graph.pins, strict=True)):
        assert (pool == FREE) == (task not in found)
        assert pin is None or pool in pin
    for group in graph.together:
        assert len({pools[task] for task in group}) == 1


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_the_same_graph_always_gets_the_same_plan(graph: Graph) -> None:
    copy = Graph(
        dependencies=[tuple(values) for values in graph.dependencies],
        nbytes=tuple(graph.nbytes),
        pins=tuple(graph.pins),
        together=graph.together,
    )
    assert place(graph, 3) == place(graph, 3) == place(copy, 3)


def without_empty_values(graph: Graph) -> Graph:
    """Ties are decided in favour of what sends fewer messages; without empty values there is nothing to decide."""
    sizes = [nbytes or 0.5 for nbytes in graph.nbytes]
    return Graph(dependencies=graph.dependencies, nbytes=sizes, pins=graph.pins)


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_a_plan_moves_no_more_bytes_than_the_best_single_pool(graph: Graph) -> None:
    graph = without_empty_values(graph)
    placed = total_bytes(graph, place(graph, 3))
    assert all(placed <= total_bytes(graph, plan) for plan in single_pool_plans(graph, 3))


def test_a_plan_hardly_ever_moves_more_bytes_than_the_greedy_rule() -> None:
    rng = random.Random(0)
    n_graphs, n_worse, ours, greedy = 400, 0, 0.0, 0.0
    for _ in range(n_graphs):
        shares, reaches = (0.05, 0.3, 0.9), (2, 10, 60)
        graph = without_empty_values(
            random_graph(
                rng, rng.randint(2, 60), 3, share_pinned=rng.choice(shares), reach=rng.choice(reaches), grouped=False
            )
        )
        placed, rival = total_bytes(graph, place(graph, 3)), total_bytes(graph, greedy_plan(graph, 3))
        n_worse += placed > rival
        ours += placed
        greedy += rival
    print(f"worse than greedy: {n_worse} of {n_graphs}; bytes in all {ours / greedy:.3f} x greedy's")
    assert n_worse <= 0.01 * n_graphs
    assert ours <= 0.95 * greedy


@pytest.mark.parametrize("n_pools", [2, 3])
def test_plans_of_tiny_graphs_are_nearly_always_optimal(n_pools: int) -> None:
    rng = random.Random(n_pools)
    ratios = []
    while len(ratios) < 150:
        graph = random_graph(rng, rng.randint(4, 9), n_pools, share_pinned=0.4, reach=9, grouped=False)
        best, placed = optimum(graph, n_pools), total_bytes(graph, place(graph, n_pools))
        assert placed >= best
        if best:
            ratios.append(placed / best)
    n_optimal = sum(ratio == 1.0 for ratio in ratios)
    print(f"{n_pools} pools: {n_optimal} of {len(ratios)} optimal, worst {max(ratios):.3f} x the optimum")
    assert n_optimal >= 0.97 * len(ratios)
    assert max(ratios) <= 1.5


@pytest.mark.parametrize("n_pools", [2, 3])
def test_a_graph_whose_values_have_one_consumer_each_is_placed_optimally(n_pools: int) -> None:
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(2, 8)
        dependencies: list[list[int]] = [[] for _ in range(n)]
        for task in range(n - 1):
            dependencies[rng.randrange(task + 1, n)].append(task)
        graph = Graph(
            dependencies=dependencies,
            nbytes=[rng.choice(SIZES) for _ in range(n)],
            pins=[(rng.randrange(n_pools),) if rng.random() < 0.5 else None for _ in range(n)],
        )
        assert total_bytes(graph, place(graph, n_pools)) == optimum(graph, n_pools)


def test_unpinned_inputs_follow_their_consumers() -> None:
    #    mask ─┬─ at 1 (pinned) ── result
    #  lookup ─┘
    graph = Graph(dependencies=[[], [], [0, 1], [2]], nbytes=[5.0, 5.0, 1.0, 1.0], pins=[None, None, (1,), None])
    assert place(graph, 2) == [1, 1, 1, 1]


def test_a_value_counts_once_for_each_pool_that_reads_it() -> None:
    graph = Graph(dependencies=[[], [0], [0], [0], [0]], nbytes=[7.0, 1, 1, 1, 1], pins=[(0,), (1,), (1,), (2,), (0,)])
    assert bytes_between(graph, place(graph, 3)) == {(0, 1): 7.0, (0, 2): 7.0}


def test_one_big_transfer_is_preferred_to_many_that_sum_up_to_more() -> None:
    # Four values of 3 bytes at pool 1 meet one of 10 bytes at pool 0: the big one moves, although each meeting
    # alone would rather go to it.
    graph = Graph(
        dependencies=[[], [], [], [], [], *([0, other] for other in range(1, 5))],
        nbytes=[10.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0],
        pins=[(0,), (1,), (1,), (1,), (1,), None, None, None, None],
    )
    assert bytes_between(graph, place(graph, 2)) == {(0, 1): 10.0}


def test_tasks_with_replicas_run_where_their_consumers_are() -> None:
    graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[9.0, 1.0, 1.0], pins=[(0, 2), (2,), None])
    assert place(graph, 3) == [2, 2, 2]


def test_tasks_with_replicas_only_share_one_of_their_pools() -> None:
    graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[9.0, 1.0, 1.0], pins=[(0, 1), (0, 1), None])
    assert len(set(place(graph, 2))) == 1


def test_groups_may_overlap_and_take_their_pool_from_the_one_pinned_member() -> None:
    graph = Graph(
        dependencies=[[], [], [], [2], []],
        nbytes=[1.0] * 5,
        pins=[None, None, None, (1,), None],
        together=[[0, 1], [1, 2, 2], [4]],
    )
    assert place(graph, 2) == [1, 1, 1, 1, FREE]


def test_a_group_with_a_path_between_its_members_is_placed_as_one() -> None:
    graph = Graph(
        dependencies=[[], [0], [1], [2]],
        nbytes=[4.0, 2.0, 4.0, 1.0],
        pins=[None, (0,), None, (1,)],
        together=[[0, 2]],
    )
    pools = place(graph, 2)
    assert pools[0] == pools[2]
    assert bytes_between(graph, pools) == {(0, 1): 4.0}


def test_contradictions_are_an_error_that_names_the_tasks() -> None:
    group = Graph(dependencies=[[], [], []], nbytes=[1.0] * 3, pins=[(0,), None, (1,)], together=[[0, 1, 2]])
    with pytest.raises(ContradictingPinsError, match=r"\[0, 1, 2\]"):
        place(group, 2)
    with pytest.raises(ContradictingPinsError, match="Task 1 is pinned") as caught:
        place(Graph(dependencies=[[], []], nbytes=[1.0, 1.0], pins=[None, (5,)]), 2)
    assert caught.value.tasks == (1,)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -1.0])
def test_an_unknown_size_counts_as_the_mean_of_the_known_ones(unknown: float) -> None:
    graph = Graph(dependencies=[[], [], [0, 1]], nbytes=[unknown, 4.0, 2.0], pins=[(0,), (1,), None])
    assert bytes_between(graph, place(graph, 2)) == {(0, 1): 3.0}


def test_values_without_bytes_do_not_cross_for_nothing() -> None:
    graph = Graph(dependencies=[[], [0], [1], [2]], nbytes=[0.0] * 4, pins=[(0,), None, None, (0,)])
    assert place(graph, 2) == [0, 0, 0, 0]


def test_graphs_without_tasks_pins_or_pools_are_left_free() -> None:
    assert place(Graph(dependencies=[], nbytes=[], pins=[]), 2) == []
    assert place(Graph(dependencies=[[], [0]], nbytes=[1.0, 1.0], pins=[None, None]), 0) == [FREE, FREE]
    assert bytes_between(Graph(dependencies=[[], [0]], nbytes=[1.0, 1.0], pins=[None, None]), [FREE, FREE]) == {}


# What a scientist writes, as it runs. Sources are blocks that a site's files would yield.


def _load(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype="float32")


def source(name: str, shape: tuple[int, ...], chunks: Any) -> da.Array:
    blocks = da.core.normalize_chunks(chunks, shape, dtype="float32")
    dsk = {}
    for index in itertools.product(*(range(len(lengths)) for lengths in blocks)):
        key = (f"source-{name}", *index)
        dsk[key] = Task(key, _load, tuple(lengths[i] for lengths, i in zip(blocks, index, strict=True)))
    graph = HighLevelGraph.from_collections(f"source-{name}", dsk)
    return da.Array(graph, f"source-{name}", blocks, dtype="float32")


def graph_of(collections: Sequence[Any], pool_of_block: Callable[[tuple[Any, ...]], int]) -> Graph:
    expression = collections_to_expr(list(collections)).finalize_compute().optimize()
    dsk = convert_legacy_graph(expression.__dask_graph__())
    layers = {name: layer for c in collections for name, layer in c.__dask_graph__().layers.items()}
    sizes = estimate_nbytes(dsk, layers)
    number = {key: task for task, key in enumerate(dsk)}
    pins: list[tuple[int, ...] | None] = []
    for key, node in dsk.items():
        inner = node.args[0] if isinstance(node, Task) and node.has_subgraph() else {}
        sources = [k for k in (key, *inner) if isinstance(k, tuple) and str(k[0]).startswith("source-")]
        pins.append((pool_of_block(sources[0]),) if sources else None)
    return Graph(
        dependencies=[[number[value] for value in node.dependencies] for node in dsk.values()],
        nbytes=[sizes[key] for key in dsk],
        pins=pins,
    )


def workloads() -> Iterator[Any]:
    def by_name(key: tuple[Any, ...]) -> int:
        return int(key[0] == "source-b")

    def first_half(key: tuple[Any, ...]) -> int:
        return int(key[1] >= 15)

    def alternating(key: tuple[Any, ...]) -> int:
        return int(key[1] % 2)

    def in_runs(key: tuple[Any, ...]) -> int:
        return int(key[1] // 3 % 2)

    members, observations = source("a", (18, 33, 96, 128), (1, 11, 96, 128)), source("b", (96, 128), (96, 128))
    series = source("s", (120, 90, 180), (4, 90, 180))
    times = xr.date_range("2000-01-01", periods=120, freq="15D")
    labelled = xr.DataArray(series, dims=("time", "y", "x"), coords={"time": times})
    a, b = source("a", (64, 90, 180), (4, 90, 180)), source("b", (64, 90, 180), (4, 90, 180))
    rows = source("s", (200, 500), (2, 500))
    p, q = source("a", (400, 800), (100, 200)), source("b", (400, 800), (100, 200))
    monthly = labelled.groupby("time.month")
    for name, pool_of_block, collection in [
        ("mean over members, one level, minus observations", by_name, members[:, 3].mean(0) - observations),
        ("mean over time of a series split between sites", first_half, series.mean(0)),
        ("anomaly, then standard deviation", first_half, (series - series.mean(0)).std(0)),
        ("anomaly squared, maximum", first_half, ((series - series.mean(0)) ** 2).max(0)),
        ("monthly climatology", first_half, monthly.mean()),
        ("anomaly from the climatology", first_half, monthly - monthly.mean()),
        ("sum of a + b", by_name, (a + b).sum()),
        ("mean of chunks that alternate between sites", alternating, rows.mean(0)),
        ("standard deviation of chunks that alternate", alternating, rows.std(0)),
        ("mean of chunks in runs of three", in_runs, rows.mean(0)),
        (
            "covariance of two matrices",
            by_name,
            da.tensordot(p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True), axes=([1], [1])),
        ),
        ("correlation", by_name, ((a - a.mean(0)) * (b - b.mean(0))).mean(0) / (a.std(0) * b.std(0))),
        ("root mean square error", by_name, np.sqrt(((a - b) ** 2).mean((1, 2)))),
        ("running mean", first_half, labelled.rolling(time=5).mean().mean("time")),
        ("cumulative sum", first_half, series.cumsum(0)),
        ("rechunk, then standard deviation", first_half, series.rechunk((120, 30, 30), method="tasks").std(0)),
    ]:
        yield pytest.param(collection, pool_of_block, id=name)


@pytest.mark.parametrize(("collection", "pool_of_block"), list(workloads()))
def test_workloads_cross_as_few_bytes_as_the_minimum_cut(
    collection: Any, pool_of_block: Callable[[tuple[Any, ...]], int]
) -> None:
    graph = graph_of([collection], pool_of_block)
    assert {pin for pin in graph.pins if pin is not None} == {(0,), (1,)}
    plan = placement_of(graph, 2)
    assert plan.is_proved
    placed, exact = total_bytes(graph, plan.pools), minimum_cut(graph)
    assert placed == pytest.approx(plan.cost)
    greedy = total_bytes(graph, greedy_plan(graph, 2))
    print(f"{len(graph.nbytes)} tasks: {placed / 1e6:.3f} MB, greedy {greedy / 1e6:.3f}, optimum {exact / 1e6:.3f}")
    # Within the rounding of the exact solver's whole numbers.
    assert placed <= exact * 1.001 + len(graph.nbytes)


def test_long_chains_and_broadcasts_are_placed_without_recursion_and_in_linear_time() -> None:
    def reduction(n: int) -> Graph:
        # n blocks alternate in runs between two pools; anomalies from their mean, then their variance.
        dependencies: list[list[int]] = [[] for _ in range(n)]
        level = [len(dependencies) + block for block in range(n)]
        dependencies += [[block] for block in range(n)]
        while len(level) > 1:
            groups = [level[start : start + 4] for start in range(0, len(level), 4)]
            level = [len(dependencies) + group for group in range(len(groups))]
            dependencies += groups
        mean = level[0]
        dependencies += [[block, mean] for block in range(n)]
        for _ in range(n):
            dependencies.append([len(dependencies) - 1])
        pins: list[tuple[int, ...] | None] = [(block // 5 % 2,) for block in range(n)]
        pins += [None] * (len(dependencies) - n)
        return Graph(dependencies=dependencies, nbytes=[1e6] * n + [1e4] * (len(dependencies) - n), pins=pins)

    for n in (3_000, 30_000):
        graph = reduction(n)
        began = time.process_time()
        pools = place(graph, 2)
        spent = time.process_time() - began
        n_tasks = len(graph.nbytes)
        print(f"{n_tasks} tasks: {spent / n_tasks * 1e6:.1f} microseconds of CPU per task")
        assert total_bytes(graph, pools) <= total_bytes(graph, greedy_plan_flat(graph))


def greedy_plan_flat(graph: Graph) -> list[int]:
    """Place task by task where most of its input lies, for graphs whose inputs come first."""
    pools: list[int] = []
    for values, pin in zip(graph.dependencies, graph.pins, strict=True):
        held = [0.0, 0.0]
        for value in values:
            held[pools[value]] += graph.nbytes[value]
        pools.append(pin[0] if pin is not None else held.index(max(held)))
    return pools
