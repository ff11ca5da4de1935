"""From a task graph to a plan, by reduction and minimum cuts.

Covers the composition: the graph as arrays, what is decided without a search, the search for the rest, and what is
known about the plan. Does not cover schedulers without numpy or scipy (:mod:`meshcompute.placement.heuristics`), which
is why :func:`meshcompute.placement.placing.place` imports this module where it needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshcompute.placement.bisection import bisect
from meshcompute.placement.contraction import Contraction
from meshcompute.placement.core import Core, components
from meshcompute.placement.multiway import search
from meshcompute.placement.objective import FREE, ContradictingPinsError, Flat, Placement, Terms

__all__ = ["solve"]

Array = np.ndarray[Any, Any]


def solve(terms: Terms) -> Placement:
    """Find a plan that costs as little as possible.

    Parameters
    ----------
    terms
        The graph, the pools and what crossing costs.

    Returns
    -------
    Placement
        The plan; for two pools there is none that costs less, unless what is left for the search is very large.

    Raises
    ------
    ContradictingPinsError
        A pin without an existing pool, or a group whose tasks share no allowed pool.
    """
    n = len(terms.nbytes)
    values, readers = _edges(terms.dependencies, n)
    masks = _masks(terms.pins, terms.n_pools)
    vertex_of, masks_of_vertices = _merged(n, terms.together, masks)
    pinned = masks_of_vertices >= 0
    group = components(len(pinned), vertex_of[values], vertex_of[readers])
    reaches = np.zeros(int(group.max(initial=-1)) + 1, dtype=bool)
    reaches[group[pinned]] = True
    used = np.bitwise_or.reduce(masks_of_vertices[pinned], initial=0)
    pools = np.array(terms.pools({p for p in range(terms.n_pools) if used >> p & 1}), dtype=np.int64)
    labels = np.full(len(pinned), FREE)
    cost = bound = 0.0
    if len(pools) == 1:
        labels = np.where(reaches[group], pools[0], FREE)
    elif len(pools):
        core = _core(terms, pools, (values, readers), vertex_of, masks_of_vertices)
        core.prices[~reaches[group]] = 0.0  # they stay free
        contraction = Contraction(core)
        single = pinned & (masks_of_vertices & (masks_of_vertices - 1) == 0)
        bits = masks_of_vertices[:, None] >> pools & 1
        contraction.fix(np.flatnonzero(single), np.argmax(bits[single], axis=1))
        rest = contraction.run()
        found, least = np.zeros(0, dtype=np.int64), 0.0
        if len(rest.prices):
            found, least = (bisect if len(pools) == 2 else search)(rest)
        plan = contraction.expand(found)
        labels = np.where(reaches[group], pools[plan], FREE)
        cost = core.cost(plan)
        # Whatever was decided before the search is the same in both, so the gap is that of the search.
        bound = max(0.0, cost - max(0.0, rest.cost(found) - least))
    return Placement(pools=labels[vertex_of].tolist(), cost=cost, bound=bound)


def _edges(dependencies: Sequence[Sequence[int]] | Flat, n: int) -> tuple[Array, Array]:
    if isinstance(dependencies, Flat):
        indptr = np.asarray(dependencies.indptr, dtype=np.int64)
        counts = indptr[1:] - indptr[:-1]
        values = np.asarray(dependencies.indices, dtype=np.int64)
    else:
        counts = np.fromiter(map(len, dependencies), dtype=np.int64, count=n)
        values = np.fromiter(itertools.chain.from_iterable(dependencies), dtype=np.int64, count=int(counts.sum()))
    return values, np.repeat(np.arange(n), counts)


def _masks(pins: Sequence[tuple[int, ...] | None], n_pools: int) -> Array:
    """Write every pin as a bit mask of pools, -1 for none."""
    known: dict[tuple[int, ...] | None, int] = {}
    for pin in set(pins):
        known[pin] = -1 if pin is None else sum(1 << pool for pool in set(pin) if 0 <= pool < n_pools)
        if not known[pin]:
            raise ContradictingPinsError([pins.index(pin)])
    return np.fromiter(map(known.__getitem__, pins), dtype=np.int64, count=len(pins))


def _merged(n: int, groups: Sequence[Sequence[int]], masks: Array) -> tuple[Array, Array]:
    """Make one vertex of each group; groups that overlap are one."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return np.arange(n), masks
    heads = np.repeat([group[0] for group in groups], [len(group) for group in groups])
    vertex_of = components(n, heads, np.fromiter(itertools.chain.from_iterable(groups), dtype=np.int64))
    merged = np.full(int(vertex_of.max()) + 1, -1)
    np.bitwise_and.at(merged, vertex_of, masks)
    if not merged.all():
        raise ContradictingPinsError(np.flatnonzero(vertex_of == int(np.argmin(merged != 0))).tolist())
    return vertex_of, merged


def _core(terms: Terms, pools: Array, edges: tuple[Array, Array], vertex_of: Array, masks: Array) -> Core:
    values, readers = edges
    sizes = np.asarray(terms.nbytes, dtype=float)
    k, m = len(pools), len(masks)
    prices = np.zeros((m, k))
    for task, by_pool in terms.prices.items():
        prices[vertex_of[task]] += np.asarray(by_pool)[pools]
    if terms.work is not None:
        work = np.bincount(vertex_of, weights=terms.work, minlength=m)
        prices += work[:, None] * np.asarray(terms.rates)[pools]
    several = masks >= 0
    several &= masks & (masks - 1) != 0
    prices[several] = np.where(masks[several, None] >> pools & 1, prices[several], np.inf)
    if len(masks) == len(vertex_of):
        nets, ends = values, readers
    else:
        ends = vertex_of[readers]
        crossing = ends != vertex_of[values]
        nets, ends = np.divmod(np.unique(values[crossing] * m + ends[crossing]), m)
    costs = np.asarray(terms.costs, dtype=float)[np.ix_(pools, pools)]
    weights, matrices = [sizes], [costs]
    if terms.per_message is not None:
        weights.append(np.ones(len(sizes)))
        matrices.append(np.asarray(terms.per_message, dtype=float)[np.ix_(pools, pools)])
    for matrix in matrices:
        np.fill_diagonal(matrix, 0.0)
    return Core(
        prices=prices,
        sources=vertex_of.copy(),
        weights=weights,
        costs=matrices,
        present=np.zeros(len(sizes), dtype=np.int64),
        nets=nets,
        readers=ends,
    )
