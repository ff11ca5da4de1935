"""Choose a pool for every task so that little crosses between pools.

Covers the decision alone, over integers: which task feeds which, how many bytes each yields, which pools may run it,
what crossing costs. Does not cover where these numbers come from (keys, sizes and pins of a Dask graph), nor what is
done with the answer.

What is minimised: the cost of every value from its pool to each other pool that needs it. A value counts once per
destination pool, however many tasks there read it: the (lambda - 1) metric of a hypergraph whose nets are the values.
Tasks that may run in one pool only are fixed. For two pools it is a minimum cut, for more a multiway cut.

How::

    contract   what some best plan decides anyway, in rounds over flat arrays: trees and everyday graphs whole
    two pools  the rest is a minimum cut, found by a maximum flow: no plan costs less. What is too large for one cut is
               coarsened, cut and improved part by part: hardly ever 2 % more than the least
    more       cuts that isolate one pool each, then expansions and swaps, then single moves: at most 2 - 2/k times the
               least where all pairs of pools cost the same, and hardly ever more than the least
    without    a scheduler that has no numpy or no scipy gets a heuristic's plan, and the plan says so

The same graph always gets the same plan, in every process.

References
----------
E. L. Lawler, "Cutsets and partitions of hypergraphs", Networks 3(3), 1973.
E. Dahlhaus et al., "The complexity of multiterminal cuts", SIAM J. Comput. 23(4), 1994.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from meshcompute.placement.balancing import balanced
from meshcompute.placement.heuristics import plan_heuristically
from meshcompute.placement.objective import (
    FREE,
    ContradictingPinsError,
    Flat,
    Graph,
    Links,
    Placement,
    Terms,
    known_sizes,
    rows_of,
    terms_of,
)

__all__ = [
    "FREE",
    "ContradictingPinsError",
    "Flat",
    "Graph",
    "Links",
    "Placement",
    "bytes_between",
    "place",
]

logger = logging.getLogger(__name__)

_MAX_POOLS = 62  # bits of a mask of pools


def place(graph: Graph, n_pools: int, links: Links | None = None) -> Placement:
    """Choose a pool for every task.

    Parameters
    ----------
    graph
        The task graph.
    n_pools
        How many pools there are; pools are 0 ... n_pools - 1.
    links
        What crossing costs; None: every byte costs one.

    Returns
    -------
    Placement
        A pool for every task, what the plan costs, and what no plan costs less than.

    Raises
    ------
    ContradictingPinsError
        A pin without an existing pool, or a group of ``graph.together`` whose tasks share no allowed pool.

    Notes
    -----
    Fastest with dependencies as :class:`Flat` arrays of numpy, sizes as an array, and equal pins as the same object.
    """
    terms = terms_of(graph, n_pools, links)
    search, note = _search() if n_pools <= _MAX_POOLS else (plan_heuristically, f"more than {_MAX_POOLS} pools")
    threads = None if links is None else links.threads
    if threads is None or graph.seconds is None or not any(graph.seconds):
        found = search(terms)
    else:
        found = balanced(terms, graph.seconds, threads, search)
    return replace(found, note=note) if note else found


@functools.cache
def _search() -> tuple[Callable[[Terms], Placement], str]:
    """Find out, once, which search this process can run."""
    try:
        module = importlib.import_module("meshcompute.placement.exact")
    except ImportError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in ("numpy", "scipy"):
            raise
        note = f"placed by a heuristic: this process has no {exc.name.partition('.')[0]}"
        logger.warning("%s; install numpy and scipy where the scheduler runs to move the fewest bytes", note)
        return plan_heuristically, note
    search: Callable[[Terms], Placement] = module.solve
    return search, ""


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
    for task, inputs in enumerate(rows_of(graph.dependencies)):
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
