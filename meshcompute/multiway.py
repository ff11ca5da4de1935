"""Place a core in more than two pools.

Covers minimum cuts that isolate one pool from all others, whose sides are final; expansions, which let one pool take
whatever it is cheaper to have there, by one cut each; and what no plan costs less than. Does not cover the cuts
themselves (:mod:`meshcompute.mincut`) or single moves (:mod:`meshcompute.localsearch`).

Why isolating cuts are final where every pair of pools costs the same: take any plan and give pool p all of S, the side
of p in a minimum cut between p and the rest. A value pays one more pool only if it was none of p's and S holds a part
of it; it pays at least one less if it was partly in p and S holds the rest. So the costs rise by no more than the cut
around p does, and as the cut of S is minimal, that is nothing.

With one pool per isolated side and the best single pool for the rest, a plan costs at most 2 - 2/k times the optimum:
the cuts cost no more than what surrounds each pool in the best plan, which counts every value at most twice as often as
it crosses. Other costs have no such bound: there the cuts are a way to find good moves, judged by what they cost.

References
----------
E. Dahlhaus et al., "The complexity of multiterminal cuts", SIAM J. Comput. 23(4), 1994.
Y. Boykov, O. Veksler, R. Zabih, "Fast approximate energy minimization via graph cuts", IEEE TPAMI 23(11), 2001.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from meshcompute.contraction import Contraction
from meshcompute.core import Core, attractive
from meshcompute.localsearch import Board, Partition
from meshcompute.mincut import Network

__all__ = ["search"]

Array = np.ndarray[Any, Any]

_TOLERANCE = 1e-12
_MAX_CYCLES = 4
# Arcs of all cuts together. Up to some ten thousand vertices nothing is left out; a million would take longer to place
# than to run otherwise, and a cut may hold the interpreter as long as it takes.
_MAX_ARCS = 3_000_000
_SMALL = 2000  # vertices that single moves, in plain Python, are worth trying on


def search(core: Core) -> tuple[Array, float]:
    """Find a cheap plan of a core for more than two pools.

    Parameters
    ----------
    core
        What is to be placed.

    Returns
    -------
    ndarray of int
        Pool of every vertex, shape (m,).
    float
        What no plan costs less than.
    """
    least = float(core.prices.min(axis=1).sum())
    if not _is_uniform(core):
        level, _ = search(_levelled(core))
        budget = _MAX_ARCS if _n_arcs(core) * core.n_pools <= _MAX_ARCS else 0
        found = _expanded(core, min(level, _best_start(core), key=core.cost), budget)
        return (_moved(core, found) if len(found) <= _SMALL else found), least
    isolated = Contraction(core)
    budget = _MAX_ARCS
    for pool in range(core.n_pools):
        budget -= _n_arcs(isolated.core)
        if budget < 0:
            break
        side = np.flatnonzero(_isolated(isolated.core, pool))
        isolated.fix(side, np.full(len(side), pool))
    contraction = Contraction(isolated.core)
    rest = contraction.run()
    found = _expanded(rest, _best_start(rest), budget)
    if len(found) <= _SMALL:
        found = _moved(rest, found)
    return isolated.expand(contraction.expand(found)), least


def _levelled(core: Core) -> Core:
    """Let every pair of pools cost the same, the mean: there the rules decide much more, and hardly ever far off."""
    k = core.n_pools
    everything = np.arange(len(core.sources))
    pairs = [(p, q) for p in range(k) for q in range(k) if p != q]
    mean = np.sum([core.paid(everything, p, q) for p, q in pairs], axis=0) / len(pairs)
    return replace(core, weights=[mean], costs=[1.0 - np.eye(k)])


def _n_arcs(core: Core) -> int:
    return 3 * (len(core.nets) + len(core.sources)) + len(core.prices)


def _is_uniform(core: Core) -> bool:
    off = ~np.eye(core.n_pools, dtype=bool)
    return all(np.ptp(costs[off]) == 0.0 for costs in core.costs)


def _members(core: Core) -> tuple[Array, Array]:
    """List every net with the vertices that read or yield its value."""
    own = np.flatnonzero(core.sources >= 0)
    return np.append(core.nets, own), np.append(core.readers, core.sources[own])


def _shared_prices(core: Core, weights: Array) -> Array:
    """Tell the prices of vertices where a value costs its weight for every pool that has it, but one.

    Prices of a vertex count the pools that get its value anyway, and not its own. Counted as "pools that have it, less
    one", it pays for its own pool, too: that is less for the vertex wherever nobody has the value anyway.
    """
    prices = core.prices.copy()
    own = core.sources >= 0
    for pool in range(core.n_pools):
        is_new = own & ((core.present >> pool) & 1 == 0)
        prices[:, pool] -= np.bincount(core.sources[is_new], weights=weights[is_new], minlength=len(prices))
    return prices


def _isolated(core: Core, pool: int) -> Array:
    """Find the largest set of vertices that a minimum cut leaves with a pool, shape (m,)."""
    m = len(core.prices)
    weights = core.paid(np.arange(len(core.sources)), 0, 1)
    nets, members = _members(core)
    prices = _shared_prices(core, weights)
    # Prices as edges to the pools: a vertex pays all those to pools other than its own.
    is_barred = np.isinf(prices)
    lowest = np.where(is_barred, np.inf, prices).min(axis=1)
    most = np.where(is_barred, -np.inf, prices).max(axis=1)
    # Where it must not be, it would have to pay more than all its values can be worth.
    fine = most - lowest + np.bincount(members, weights=weights[nets], minlength=m)
    most += np.where(is_barred.any(axis=1), fine, 0.0)
    edges = np.where(is_barred, 0.0, most[:, None] - prices)
    network = Network(m)
    vertices = np.arange(2, m + 2)
    network.connect(np.zeros(m, dtype=np.int64), vertices, edges[:, pool])
    network.connect(vertices, np.ones(m, dtype=np.int64), edges.sum(axis=1) - edges[:, pool])
    fixed = core.present
    has_pool = (fixed >> pool) & 1 == 1
    has_other = fixed & ~(1 << pool) != 0
    for chosen, hub, is_reversed in (
        (has_pool & ~has_other, 0, False),
        (has_other & ~has_pool, 1, True),
    ):
        number = np.cumsum(chosen) - 1
        kept = chosen[nets]
        network.gather(
            np.full(int(chosen.sum()), hub),
            weights[chosen],
            number[nets[kept]],
            members[kept] + 2,
            is_reversed=is_reversed,
        )
    free = fixed == 0
    number = np.cumsum(free) - 1
    kept = free[core.nets]
    for is_reversed in (False, True):
        network.gather(
            core.sources[free] + 2,
            weights[free],
            number[core.nets[kept]],
            core.readers[kept] + 2,
            is_reversed=is_reversed,
        )
    return network.cut(is_largest=True)[0][2 : m + 2]


def _best_start(core: Core) -> Array:
    """Take the cheapest of: every vertex where it is cheapest, or where most of its inputs are, or all in one pool."""
    cheapest = np.argmin(core.prices, axis=1)
    single = [np.where(np.isinf(core.prices[:, pool]), cheapest, pool) for pool in range(core.n_pools)]
    return min([cheapest, attractive(core), *single], key=core.cost)


def _expanded(core: Core, labels: Array, budget: int) -> Array:
    """Let pools take vertices, one pool after the other, until that saves nothing or the budget of arcs is spent."""
    cost = core.cost(labels)
    since = 0
    for turn in range(_MAX_CYCLES * core.n_pools):
        budget -= _n_arcs(core)
        if not len(labels) or since == core.n_pools or budget < 0:
            break
        offer = _expansion(core, labels, turn % core.n_pools)
        since += 1
        if (offered := core.cost(offer)) < cost * (1.0 - _TOLERANCE):
            labels, cost, since = offer, offered, 0
    return labels


def _moved(core: Core, labels: Array) -> Array:
    """Improve a plan by single moves."""
    m, k = core.prices.shape
    prices = core.prices.copy()
    readers: list[list[int]] = [[] for _ in core.sources]
    inputs: list[list[int]] = [[] for _ in range(m + k)]  # vertices, then one for each pool
    outputs: list[list[int]] = [[] for _ in range(m + k)]
    for net, reader in zip(core.nets.tolist(), core.readers.tolist(), strict=True):
        readers[net].append(reader)
        inputs[reader].append(net)
    sources = [source if source >= 0 else m + ~source for source in core.sources.tolist()]
    own = np.flatnonzero(core.sources >= 0)
    for pool in range(k):
        # What a value pays to this pool is in the prices of its source; here it is a reader again.
        there = own[(core.present[own] >> pool) & 1 == 1]
        for home in range(k):
            np.subtract.at(prices[:, home], core.sources[there], core.paid(there, home, pool))
        for net in np.flatnonzero((core.present >> pool) & 1).tolist():
            if sources[net] != m + pool:
                readers[net].append(m + pool)
                inputs[m + pool].append(net)
    for net, source in enumerate(sources):
        outputs[source].append(net)
    weights = [w.tolist() for w in core.weights]
    costs = [c.tolist() for c in core.costs]
    barred = np.isinf(prices)
    allowed = [tuple(np.flatnonzero(~row).tolist()) if row.any() else None for row in barred]
    board = Board(
        n_pools=k,
        inputs=inputs,
        outputs=outputs,
        readers=readers,
        sources=sources,
        pay=lambda net, p, q: sum(w[net] * c[p][q] for w, c in zip(weights, costs, strict=True)),
        allowed=[*allowed, *((pool,) for pool in range(k))],
        prices=dict(enumerate(prices.tolist())),
        movable=range(m),
    )
    pools = [*labels.tolist(), *range(k)]
    Partition(board, pools).improve()
    moved = np.array(pools[:m], dtype=np.int64)
    return min((labels, moved), key=core.cost)


def _expansion(core: Core, labels: Array, pool: int) -> Array:
    """Find the best plan in which every vertex keeps its pool or goes to a given one.

    Exact where every pair of pools costs the same; else a guess, for which each value pays what it would from where it
    is made now.
    """
    m, k = core.prices.shape
    homes = core.homes(labels)
    prices = _shared_prices(core, _levelled(core).weights[0])
    nodes = np.where(labels == pool, 1, np.where(np.isinf(prices[:, pool]), 0, np.arange(2, m + 2)))
    network = Network(m)
    movable = nodes > 1
    rise = prices[movable, pool] - prices[movable, labels[movable]]
    ends = nodes[movable]
    network.connect(np.zeros(int((rise > 0).sum()), dtype=np.int64), ends[rise > 0], rise[rise > 0])
    network.connect(ends[rise < 0], np.ones(int((rise < 0).sum()), dtype=np.int64), -rise[rise < 0])
    nets, members = _members(core)
    # A pool that some member of a net keeps is paid, unless the net has it anyway.
    kept = labels[members]
    open_ = ((core.present[nets] >> kept) & 1 == 0) & (kept != pool)
    groups, group = np.unique(nets[open_] * k + kept[open_], return_inverse=True)
    of_group, label = np.divmod(groups, k)
    towards = np.where(label == homes[of_group], pool, label)
    paid = core.paid(of_group, homes[of_group], towards)
    network.gather(np.ones(len(groups), dtype=np.int64), paid, group, nodes[members[open_]], is_reversed=True)
    # So is the pool that expands, if any member goes there.
    asks = (core.present >> pool) & 1 == 0
    asks[nets[kept == pool]] = False
    number = np.cumsum(asks) - 1
    chosen = asks[nets]
    paid = core.paid(asks, homes[asks], pool)
    network.gather(
        np.zeros(int(asks.sum()), dtype=np.int64), paid, number[nets[chosen]], nodes[members[chosen]], is_reversed=False
    )
    sides, _ = network.cut(is_rough=True)
    moved = np.where(nodes > 1, ~sides[nodes], nodes == 1)
    return np.where(moved, pool, labels)
