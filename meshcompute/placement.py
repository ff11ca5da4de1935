"""Choose a pool for every task so that few bytes cross between pools.

Covers the decision alone, over integers: which task feeds which, how many bytes each yields, which pools may run it.
Does not cover where these numbers come from (keys, sizes and pins of a Dask graph), nor what is done with the answer.

What is minimised: the bytes of every value, times the number of pools other than its own that need it. A value counts
once per destination pool, however many tasks there read it: the (lambda - 1) metric of a hypergraph whose nets are
the values. Tasks that may run in one pool only are fixed. For two pools it is a minimum cut, for more a multiway cut.

How::

    tree    costs flow from inputs to consumers, then choices flow back: exact when every value has one consumer
    greedy  each task where most of its input lies, as a scheduler would decide it task by task
    single  every free task in one pool, the best one
    then    the best of the three, improved by moves at its boundary that may climb for a while (Fiduccia, Mattheyses)

All of it grows linearly with tasks and edges, and the same graph always gets the same plan.

References
----------
C. M. Fiduccia, R. M. Mattheyses, "A linear-time heuristic for improving network partitions", DAC 1982.
U. V. Catalyurek, C. Aykanat, "Hypergraph-partitioning-based decomposition for parallel sparse-matrix vector
multiplication", IEEE TPDS 10(7), 1999 (the connectivity metric).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshcompute.hypergraph import FREE, ContradictingPinsError, Hypergraph, Partition, known_sizes

__all__ = ["FREE", "ContradictingPinsError", "Graph", "bytes_between", "place"]

# Up to so many tasks, every start is improved and not the best one alone.
_SMALL = 1000
_PRECISION = 1e-12  # relative error of a sum of sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What placement needs to know about a task graph. Tasks are the integers 0 ... n - 1.

    Attributes
    ----------
    dependencies
        For every task, the tasks whose values it reads, each once, shape (n,). No cycles.
    nbytes
        For every task, the bytes of its value when it is sent, shape (n,). Unknown (NaN, infinite or negative) counts
        as the mean of the known ones.
    pins
        For every task, the pools that may run it, or None for any, shape (n,).
    together
        Groups of tasks that have to run in one pool.
    """

    dependencies: Sequence[Sequence[int]]
    nbytes: Sequence[float]
    pins: Sequence[tuple[int, ...] | None]
    together: Sequence[Sequence[int]] = ()


def place(graph: Graph, n_pools: int) -> list[int]:
    """Choose a pool for every task.

    Parameters
    ----------
    graph
        The task graph.
    n_pools
        How many pools there are; pools are 0 ... n_pools - 1.

    Returns
    -------
    list of int
        A pool for every task, shape (n,); :data:`FREE` for tasks that no path, its edges taken in either direction,
        connects to a pinned one.

    Raises
    ------
    ContradictingPinsError
        A pin without an existing pool, or a group of ``graph.together`` whose tasks share no allowed pool.

    Notes
    -----
    Never more bytes than putting all free tasks into the best single pool, and hardly ever more than placing each
    task where most of its input lies. Optimal when every value has one consumer.
    """
    problem = Hypergraph(graph.dependencies, graph.nbytes, graph.pins, graph.together, n_pools)
    if problem.n_pools <= 1 or not problem.movable:
        return problem.plan([0] * len(problem.pins))
    pools, unavoidable = (_two_pool_tree_plan if problem.n_pools == 2 else _tree_plan)(problem)
    if problem.cost(pools) <= unavoidable * (1.0 + _PRECISION):
        return problem.plan(pools)
    starts = [pools, _greedy_plan(problem), _heaviest_first_plan(problem), _single_pool_plan(problem)]
    if len(starts[0]) > _SMALL:
        starts = [min(starts, key=problem.cost)]
    for start in starts:
        Partition(problem, start).improve()
    return problem.plan(min(starts, key=problem.cost))


def bytes_between(graph: Graph, pools_by_task: Sequence[int]) -> dict[tuple[int, int], float]:
    """Sum up the bytes that a plan moves between pools.

    Parameters
    ----------
    graph
        The task graph.
    pools_by_task
        A pool for every task, shape (n,). Tasks that are :data:`FREE` neither send nor receive.

    Returns
    -------
    dict
        Bytes by (source pool, destination pool). Each value counts once per destination. No pair of a pool with
        itself; pairs between which no value moves are left out.
    """
    totals: dict[tuple[int, int], float] = {}
    seen: set[tuple[int, int]] = set()
    sizes = known_sizes(graph.nbytes)
    for task, inputs in enumerate(graph.dependencies):
        destination = pools_by_task[task]
        if destination == FREE:
            continue
        for value in inputs:
            source = pools_by_task[value]
            if source in (destination, FREE) or (value, destination) in seen:
                continue
            seen.add((value, destination))
            totals[source, destination] = totals.get((source, destination), 0.0) + sizes[value]
    return totals


def _tree_plan(problem: Hypergraph) -> tuple[list[int], float]:
    """Pass costs from inputs to consumers, then choose from the last tasks back to the first.

    ``costs[v][p]`` is what it costs upstream to have vertex v in pool p, less what it costs in any case. A value with
    several consumers splits its costs evenly between them; with one consumer each, the choice is exact.

    Returns
    -------
    list of int
        The plan.
    float
        What every plan costs at least: the sum of what was found to be due in any case.
    """
    unavoidable = 0.0
    pools_range = range(problem.n_pools)
    nbytes, consumers, outputs, pins = problem.nbytes, problem.consumers, problem.outputs, problem.pins
    n = len(pins)
    costs: list[list[float] | None] = [None] * n
    messages: list[list[float] | None] = [None] * n
    chosen = [FREE] * n
    for vertex in problem.order:
        pin = pins[vertex]
        if pin is not None and len(pin) == 1:
            chosen[vertex] = only = pin[0]
            for value in problem.inputs[vertex]:
                received = messages[value]
                if received is not None:
                    unavoidable += received[only]
            for net in outputs[vertex]:
                if readers := len(consumers[net]):
                    message = [nbytes[net] / readers] * problem.n_pools
                    message[only] = 0.0
                    messages[net] = message
            continue
        total: list[float] | None = None
        for value in problem.inputs[vertex]:
            received = messages[value]
            if received is not None:
                total = received if total is None else [a + b for a, b in zip(total, received)]  # noqa: B905
        if pin is not None:
            total = total or [0.0] * problem.n_pools
            total = [total[pool] if pool in pin else math.inf for pool in pools_range]
        if total is None:
            continue
        costs[vertex] = total
        least = min(total)
        unavoidable += least
        for net in outputs[vertex]:
            if readers := len(consumers[net]):
                limit = nbytes[net]
                if readers == 1:
                    messages[net] = [min(limit, cost - least) for cost in total]
                else:
                    messages[net] = [min(cost - least, limit) / readers for cost in total]
    for vertex in reversed(problem.order):
        if chosen[vertex] != FREE:
            continue
        total = costs[vertex]
        best = FREE
        for net in outputs[vertex]:
            needed = {chosen[consumer] for consumer in consumers[net]}
            needed.discard(FREE)
            if not needed:
                continue
            if total is None:
                total = [0.0] * problem.n_pools
            limit = nbytes[net]
            total = [cost if pool in needed else cost + limit for pool, cost in enumerate(total)]
        if total is not None:
            best = total.index(min(total))
        chosen[vertex] = best
    return problem.completed(chosen), unavoidable


def _two_pool_tree_plan(problem: Hypergraph) -> tuple[list[int], float]:
    """Do the same as :func:`_tree_plan` for two pools: one number says how much a vertex would rather be in pool 0."""
    nbytes, consumers, outputs, pins = problem.nbytes, problem.consumers, problem.outputs, problem.pins
    unavoidable = 0.0
    leans = [0.0] * len(pins)
    messages = [0.0] * len(pins)
    chosen = [FREE] * len(pins)
    for vertex in problem.order:
        to_first = to_second = 0.0
        for value in problem.inputs[vertex]:
            message = messages[value]
            if message > 0.0:
                to_first += message
            else:
                to_second -= message
        pin = pins[vertex]
        if pin is None or len(pin) == 2:
            unavoidable += min(to_first, to_second)
            lean = leans[vertex] = to_first - to_second
            if lean == 0.0:
                continue
        else:
            chosen[vertex] = pin[0]
            unavoidable += to_first if pin[0] else to_second
            lean = -math.inf if pin[0] else math.inf
        for net in outputs[vertex]:
            if readers := len(consumers[net]):
                limit = nbytes[net]
                messages[net] = (limit if lean > limit else max(lean, -limit)) / readers
    for vertex in reversed(problem.order):
        if chosen[vertex] != FREE:
            continue
        lean = leans[vertex]
        for net in outputs[vertex]:
            needed = {chosen[reader] for reader in consumers[net]}
            needed.discard(FREE)
            if len(needed) == 1:
                lean += -nbytes[net] if 1 in needed else nbytes[net]
        if lean != 0.0:
            chosen[vertex] = 0 if lean > 0.0 else 1
    return problem.completed(chosen), unavoidable


def _greedy_plan(problem: Hypergraph) -> list[int]:
    """Place each task where most of its input lies, inputs first; what has no placed input follows its consumers."""
    nbytes, consumers, outputs, pins = problem.nbytes, problem.consumers, problem.outputs, problem.pins
    vertex_of = problem.vertex_of
    chosen = [FREE] * len(pins)
    for vertex in problem.order:
        pin = pins[vertex]
        if pin is not None and len(pin) == 1:
            chosen[vertex] = pin[0]
            continue
        held = [0.0] * problem.n_pools
        is_known = pin is not None
        for value in problem.inputs[vertex]:
            pool = chosen[value if vertex_of is None else vertex_of[value]]
            if pool != FREE:
                held[pool] += nbytes[value]
                is_known = True
        if pin is not None:
            chosen[vertex] = max(pin, key=held.__getitem__)
        elif is_known:
            chosen[vertex] = held.index(max(held))
    for vertex in reversed(problem.order):
        if chosen[vertex] == FREE:
            for net in outputs[vertex]:
                for consumer in consumers[net]:
                    chosen[vertex] = chosen[consumer]
                    break
    return problem.completed(chosen)


def _heaviest_first_plan(problem: Hypergraph) -> list[int]:
    """Join what the heaviest values touch, unless that would join pools; the light values are left to cross."""
    parent = list(range(len(problem.pins)))
    allowed = list(problem.pins)
    consumers, vertex_of = problem.consumers, problem.vertex_of

    def find(vertex: int) -> int:
        while parent[vertex] != vertex:
            parent[vertex] = vertex = parent[parent[vertex]]
        return vertex

    nbytes = problem.nbytes
    for net in sorted(range(len(nbytes)), key=nbytes.__getitem__, reverse=True):
        readers = consumers[net]
        if not readers:
            continue
        root = find(net if vertex_of is None else vertex_of[net])
        for reader in readers:
            other = find(reader)
            if other == root:
                continue
            mine, theirs = allowed[root], allowed[other]
            if mine is not None and theirs is not None and mine != theirs:
                common = tuple([pool for pool in mine if pool in theirs])
                if not common:
                    continue
                mine = common
            parent[other] = root
            allowed[root] = theirs if mine is None else mine
    plan = [FREE] * len(parent)
    for vertex in problem.reached_from:
        pin = allowed[find(vertex)]
        if pin is not None:
            plan[vertex] = pin[0]
    return problem.completed(plan)


def _single_pool_plan(problem: Hypergraph) -> list[int]:
    """Put every vertex that may be there into one pool, the best one."""
    near_pins = {net for vertex, pin in enumerate(problem.pins) if pin is not None for net in problem.nets_of(vertex)}
    best, least = 0, math.inf
    for pool in range(problem.n_pools):
        plan = [pool if pin is None or pool in pin else pin[0] for pin in problem.pins]
        if (cost := problem.cost(plan, near_pins)) < least:
            best, least = pool, cost
    return [best if pin is None or best in pin else pin[0] for pin in problem.pins]
