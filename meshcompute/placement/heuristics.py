"""A good plan without a solver: for schedulers that have no numpy or scipy.

Covers four ways to make a plan in one pass, and the best of them improved by moves. Does not cover the search for the
best (:mod:`meshcompute.placement.exact`).

How::

    tree    costs flow from inputs to consumers, then choices flow back: exact when every value has one consumer
    greedy  each task where most of its input lies, as a scheduler would decide it task by task
    heavy   what the heaviest values touch stays together
    single  every free task in one pool, the best one
    then    the best of them, improved by moves at its boundary that may climb for a while

The first three count bytes alone; what they really cost decides between them. All of it grows linearly with tasks and
edges, and the same graph always gets the same plan.

References
----------
U. V. Catalyurek, C. Aykanat, "Hypergraph-partitioning-based decomposition for parallel sparse-matrix vector
multiplication", IEEE TPDS 10(7), 1999 (the connectivity metric).
"""

from __future__ import annotations

import math

from meshcompute.placement.hypergraph import Hypergraph
from meshcompute.placement.localsearch import Partition
from meshcompute.placement.objective import FREE, Placement, Terms

__all__ = ["plan_heuristically"]

# Up to so many tasks, every start is improved and not the best one alone.
_SMALL = 1000
_PRECISION = 1e-12  # relative error of a sum of sizes


def plan_heuristically(terms: Terms) -> Placement:
    """Choose a pool for every task.

    Parameters
    ----------
    terms
        The graph, the pools and what crossing costs.

    Returns
    -------
    Placement
        The plan, proved where every byte costs the same and a tree decides.

    Raises
    ------
    ContradictingPinsError
        A pin without an existing pool, or a group whose tasks share no allowed pool.
    """
    problem = Hypergraph(terms)
    if problem.n_pools <= 1 or not problem.movable:
        pools = [0] * len(problem.pins)
        plan = problem.plan(pools)
        placed = [pin[0] if pin is not None and len(pin) == 1 else 0 for pin in problem.pins]
        placed = [pool if vertex in problem.reached_from else FREE for vertex, pool in enumerate(placed)]
        cost = problem.cost(placed) if problem.n_pools else 0.0
        return Placement(pools=plan, cost=cost, bound=cost)
    pools, unavoidable = (_two_pool_tree_plan if problem.n_pools == 2 else _tree_plan)(problem)
    is_plain = not problem.prices and problem.per_message is None
    is_plain = is_plain and {x for row in problem.costs for x in row} <= {0.0, 1.0}
    cost = problem.cost(pools)
    if is_plain and cost <= unavoidable * (1.0 + _PRECISION):
        return Placement(pools=problem.plan(pools), cost=cost, bound=cost)
    starts = [pools, _greedy_plan(problem), _heaviest_first_plan(problem), _single_pool_plan(problem)]
    if len(starts[0]) > _SMALL:
        starts = [min(starts, key=problem.cost)]
    board = problem.board()
    for start in starts:
        Partition(board, start).improve()
    best = min(starts, key=problem.cost)
    return Placement(pools=problem.plan(best), cost=problem.cost(best), bound=unavoidable if is_plain else 0.0)


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
