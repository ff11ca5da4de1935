"""The exact optimum of a given graph: the fewest bytes, by the cost of their links, that any choice of sites moves.

Covers two sites by a minimum cut (maximum flow), and more by an integer program. Independent of
:mod:`meshcompute.placement.placing`, which is judged by it.

How, for two sites: a value v at site a that a reader r at site b wants crosses once, whoever else wants it there, so a
node between stands for "v is wanted at b", and likewise for a::

    v ──n·cost(a,b)──► wanted at b ──∞──► r           v ◄──n·cost(b,a)── wanted at a ◄──∞── r

References
----------
scipy.sparse.csgraph.maximum_flow (capacities are int32; scipy 1.17), scipy.optimize.milp (HiGHS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from placement_graphs import Links, Problem, single_site_cost
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_LARGEST = 2**31 - 1
_GAP = 1e-4  # to the bound: nearer than that is exact, as far as numbers go


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What is known of the best cost.

    Attributes
    ----------
    cost
        Of the best plan that was found.
    bound
        No plan costs less.
    """

    cost: float
    bound: float

    @property
    def is_exact(self) -> bool:
        """Whether the two are one, as far as numbers go."""
        return self.cost <= self.bound * (1 + 2 * _GAP) + 1


def optimum(problem: Problem, links: Links, time_limit_seconds: float) -> Optimum:
    """Find the least cost.

    Parameters
    ----------
    problem
        The graph.
    links
        Sites, and what a byte costs between them.
    time_limit_seconds
        Of the integer program, which then says what it found until then.
    """
    vertex_of = problem.groups()
    allowed: list[set[int]] = [set(range(len(links.sites))) for _ in problem.pins]
    for task, pin in enumerate(problem.pins):
        if pin is not None:
            allowed[vertex_of[task]] &= set(pin)
    nets = []  # (bytes, vertex that makes the value, vertices that read it)
    readers: list[set[int]] = [set() for _ in problem.pins]
    for task, values in enumerate(problem.dependencies):
        for value in values:
            if vertex_of[value] != vertex_of[task]:
                readers[value].add(vertex_of[task])
    for value, found in enumerate(readers):
        if found and problem.nbytes[value] > 0:
            nets.append((problem.nbytes[value], vertex_of[value], sorted(found)))
    if not nets:
        return Optimum(cost=0.0, bound=0.0)
    bound = math.inf
    sites: list[int] | None
    if len(links.sites) == 2:
        sites = _by_flow(allowed, nets, links)
    else:
        sites, bound = _by_integers(allowed, nets, links, time_limit_seconds)
    cost = single_site_cost(problem, links)  # a plan, too, and sometimes the best one
    if sites is not None:
        cost = min(cost, problem.cost([sites[vertex] for vertex in vertex_of], links))
    return Optimum(cost=cost, bound=min(bound, cost))


def _by_flow(allowed: Sequence[set[int]], nets: Sequence[tuple[float, int, list[int]]], links: Links) -> list[int]:
    """Give a site for every vertex by a minimum cut: the first site is the source's side."""
    n = len(allowed)
    source, sink = n, n + 1
    there, back = links.costs[0][1], links.costs[1][0]
    arcs: list[tuple[int, int, float]] = []
    endless = float(sum(nbytes for nbytes, _, _ in nets) * max(there, back) + 1)
    for vertex, sites in enumerate(allowed):
        if sites == {0}:
            arcs.append((source, vertex, endless))
        elif sites == {1}:
            arcs.append((vertex, sink, endless))
    node = n + 2
    for nbytes, maker, found in nets:
        wanted_there, wanted_back = node, node + 1
        node += 2
        arcs.append((maker, wanted_there, nbytes * there))
        arcs.append((wanted_back, maker, nbytes * back))
        for reader in found:
            arcs.append((wanted_there, reader, endless))
            arcs.append((reader, wanted_back, endless))
    scale = min(1.0, _LARGEST / 2 / endless)
    rows, columns, capacities = zip(*arcs, strict=True) if arcs else ((), (), ())
    whole = np.maximum(1, np.round(np.array(capacities) * scale)).astype(np.int32)
    network = scipy.sparse.csr_array((whole, (rows, columns)), shape=(node, node), dtype=np.int32)
    residual = network - maximum_flow(network, source, sink).flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    side = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
    return [0 if vertex in side else 1 for vertex in range(n)]


def _by_integers(
    allowed: Sequence[set[int]],
    nets: Sequence[tuple[float, int, list[int]]],
    links: Links,
    time_limit_seconds: float,
) -> tuple[list[int] | None, float]:
    """Give a site for every vertex, if any were found, and a bound, by an integer program.

    Its variables: is vertex v at site p, is value e sent from site s to site d.
    """
    n_sites = len(links.sites)
    sites = range(n_sites)
    lower: list[float] = []
    upper: list[float] = []
    costs: list[float] = []
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficients times variables >= bound

    def variable(cost: float, least: float = 0.0, most: float = 1.0) -> int:
        lower.append(least)
        upper.append(most)
        costs.append(cost)
        return len(costs) - 1

    used = sorted({v for _, maker, found in nets for v in (maker, *found)})
    at = {v: [variable(0.0, float(allowed[v] == {p}), float(p in allowed[v])) for p in sites] for v in used}
    n_whole = len(costs)
    for v in used:
        rows.append((dict.fromkeys(at[v], 1.0), 1.0))
        rows.append((dict.fromkeys(at[v], -1.0), -1.0))
    for nbytes, maker, found in nets:
        for d in sites:
            if not any(d in allowed[reader] for reader in found):
                continue
            # What reads at d is supplied from where the value is; at d itself it is for nothing.
            supplies = {}
            for s in sites:
                if s not in allowed[maker]:
                    continue
                if s == d:
                    supplies[at[maker][s]] = 1.0
                    continue
                sent = variable(nbytes * links.costs[s][d])
                rows.append(({at[maker][s]: 1.0, sent: -1.0}, 0.0))
                supplies[sent] = 1.0
            rows.extend(({**supplies, at[reader][d]: -1.0}, 0.0) for reader in found if d in allowed[reader])
    data = [value for row, _ in rows for value in row.values()]
    columns = [column for row, _ in rows for column in row]
    numbers = [i for i, (row, _) in enumerate(rows) for _ in row]
    matrix = scipy.sparse.csr_array((data, (numbers, columns)), shape=(len(rows), len(costs)))
    scale = max(costs) or 1.0
    found_plan = milp(
        np.array(costs) / scale,
        constraints=LinearConstraint(matrix, lb=np.array([bound for _, bound in rows])),
        bounds=Bounds(np.array(lower), np.array(upper)),
        integrality=np.array([1] * n_whole + [0] * (len(costs) - n_whole)),
        options={"time_limit": time_limit_seconds, "mip_rel_gap": _GAP},
    )
    bound = max(0.0, float(found_plan.mip_dual_bound or 0.0)) * scale
    if found_plan.x is None:
        return None, bound
    plan = [min(options) for options in allowed]
    for v in used:
        plan[v] = max(sites, key=lambda p, v=v: float(found_plan.x[at[v][p]]))
    return plan, bound
