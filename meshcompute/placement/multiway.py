"""Place a core in more than two pools.

Covers minimum cuts that isolate one pool from all others, whose sides are final; choices of every vertex between two
pools of its own, by one cut each: stay or go to a given pool (an expansion), the one or the other of two pools (a
swap); and what no plan costs less than. Does not cover the cuts themselves (:mod:`meshcompute.placement.bisection`) or
single moves (:mod:`meshcompute.placement.localsearch`).

Why isolating cuts are final where every pair of pools costs the same: take any plan and give pool p all of S, the side
of p in a minimum cut between p and the rest. A value pays one more pool only if it was none of p's and S holds a part
of it; it pays at least one less if it was partly in p and S holds the rest. So the costs rise by no more than the cut
around p does, and as the cut of S is minimal, that is nothing.

With one pool per isolated side and the best single pool for the rest, a plan costs at most 2 - 2/k times the optimum:
the cuts cost no more than what surrounds each pool in the best plan, which counts every value at most twice as often as
it crosses. Other costs have no such bound: there the cuts are a way to find good moves, judged by what they cost. A
swap is a cut whatever links cost; so is an expansion to a pool from which nothing is cheaper to send than from where it
is now. Elsewhere an expansion is the cut of an upper bound that is right for the plan as it is, so it never costs more.

The time grows linearly: arcs of all cuts together have a budget. In a large core a pool is offered only what lies a few
values away from it; in a small one whose links differ, the search begins from several plans, and the best end counts.

References
----------
E. Dahlhaus et al., "The complexity of multiterminal cuts", SIAM J. Comput. 23(4), 1994.
Y. Boykov, O. Veksler, R. Zabih, "Fast approximate energy minimization via graph cuts", IEEE TPAMI 23(11), 2001.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from meshcompute.placement.bisection import bisect, is_large
from meshcompute.placement.contraction import Contraction
from meshcompute.placement.core import Core, attractive, best_start
from meshcompute.placement.localsearch import Board, Partition
from meshcompute.placement.mincut import Network

__all__ = ["search"]

Array = np.ndarray[Any, Any]

_TOLERANCE = 1e-12
_MAX_CYCLES = 4
# Arcs of all cuts together: so many, and as many times those of the whole core, so that the time grows linearly.
_ARCS = 120_000
_EVEN_SHARE = 5.0
_LARGE_SHARE = 2.0  # of a core of which no pool was isolated
_NEARBY_SHARE = 1.0  # where links differ, with offers to those nearby,
_EVERYWHERE_SHARE = 4.0  # and to all
_PASSES = 0.25  # arcs of the whole core that take as long as what an offer to a part of it has to look through
_ARCS_PER_CUT = 3000  # that take as long as what there is to do for the smallest cut
_ARCS_OF_STARTS = 20_000  # of a core that is worth more than one start
_ARCS_OF_ROUND = 600_000  # of one offer of each pool to all vertices
_THICK = 3  # readers of a value, on average, from which a few values reach far
_HOPS = 2  # values between a pool and those whom it gets an offer for: more saved nothing, one lost a little
_SMALL = 1000  # vertices that single moves, in plain Python, are worth trying on


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
    return (_even if _is_uniform(core) else _uneven)(core), least


def _even(core: Core) -> Array:
    """Find a plan where every pair of pools costs the same."""
    isolated = Contraction(core)
    budget = _ARCS + _EVEN_SHARE * _n_arcs(core)
    for pool in range(core.n_pools):
        budget -= _n_arcs(isolated.core)
        if budget < 0 or is_large(isolated.core):
            break
        side = np.flatnonzero(_isolated(isolated.core, pool))
        isolated.fix(side, np.full(len(side), pool))
    contraction = Contraction(isolated.core)
    rest = contraction.run()
    if is_large(rest):
        budget = min(budget, _LARGE_SHARE * _n_arcs(rest))
    found = _expanded(rest, best_start(rest), budget)
    return isolated.expand(contraction.expand(_moved(rest, found)))


def _uneven(core: Core) -> Array:
    """Find a plan where pairs of pools differ: of small cores the best one that several starts lead to."""
    starts = [_even(_levelled(core)), best_start(core)]
    if _n_arcs(core) <= _ARCS_OF_STARTS:
        starts.append(attractive(core))
        found = min((_expanded(core, start, _ARCS) for start in starts), key=core.cost)
    else:
        share = _NEARBY_SHARE if _is_local(core) else _EVERYWHERE_SHARE
        found = _expanded(core, min(starts, key=core.cost), _ARCS + share * _n_arcs(core))
    return _moved(core, found)


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


def _expanded(core: Core, labels: Array, budget: float) -> Array:
    """Offer vertices another pool, by one cut for all, until no offer saves anything or the budget is spent.

    First each pool in turn may take whatever is near it and cheaper there; where links differ, vertices of each two
    pools may also change sides, which is always an exact cut.
    """
    k = core.n_pools
    if not len(labels):
        return labels
    cost = core.cost(labels)
    offers: list[tuple[int, int, bool]] = [(pool, pool, False) for pool in range(k)]
    if not _is_uniform(core):
        offers += [(pool, pool, True) for pool in range(k)]
        offers += [(first, second, False) for first in range(k) for second in range(first)]
    arcs_per_vertex = _n_arcs(core) / len(labels)
    is_local = _is_local(core)
    since = 0
    for turn in range(_MAX_CYCLES * len(offers)):
        if since == len(offers) or budget < 0:
            break
        first, second, is_source_paying = offers[turn % len(offers)]
        if first == second:
            near = _near(core, labels, first) if is_local else True
            stay, go = labels, np.where(near, first, labels)
        else:
            both = (labels == first) | (labels == second)
            if is_local:
                both &= np.where(labels == first, _near(core, labels, second), _near(core, labels, first))
            stay, go = np.where(both, first, labels), np.where(both, second, labels)
        since += 1
        n_open = int(np.count_nonzero(stay != go))
        if not n_open:
            continue
        passes = _PASSES * len(labels) if is_local else 0.0
        budget -= arcs_per_vertex * (n_open + passes) + _ARCS_PER_CUT
        offer = _chosen(core, stay, go, is_source_paying=is_source_paying)
        if (offered := core.cost(offer)) < cost * (1.0 - _TOLERANCE):
            labels, cost, since = offer, offered, 0
    return labels


def _is_local(core: Core) -> bool:
    """Tell whether a pool is offered only to what is near it: where that costs little, as measured, or all too much."""
    n_arcs = _n_arcs(core)
    if _is_uniform(core) or len(core.nets) > _THICK * len(core.sources):
        return n_arcs > _ARCS_OF_STARTS
    return core.n_pools * n_arcs > _ARCS_OF_ROUND


def _near(core: Core, labels: Array, pool: int) -> Array:
    """Find the vertices a few values away from what is in a pool, or that would be cheaper there, shape (m,)."""
    own = core.sources >= 0
    nets = (core.homes(labels) == pool) | ((core.present >> pool) & 1 == 1)
    nets[core.nets[labels[core.readers] == pool]] = True
    found = core.prices[:, pool] < core.prices[np.arange(len(labels)), labels]
    for _ in range(_HOPS):
        nets[core.nets[found[core.readers]]] = True
        nets[own] |= found[core.sources[own]]
        found[core.readers[nets[core.nets]]] = True
        found[core.sources[own & nets]] = True
    return found


def _moved(core: Core, labels: Array) -> Array:
    """Improve a plan by single moves, if there are not too many to try."""
    m, k = core.prices.shape
    if not 0 < m <= _SMALL:
        return labels
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
        pay=_payer(weights, costs),
        allowed=[*allowed, *((pool,) for pool in range(k))],
        prices=dict(enumerate(prices.tolist())),
        movable=range(m),
    )
    pools = [*labels.tolist(), *range(k)]
    Partition(board, pools).improve()
    moved = np.array(pools[:m], dtype=np.int64)
    return min((labels, moved), key=core.cost)


def _payer(weights: list[list[float]], costs: list[list[list[float]]]) -> Callable[[int, int, int], float]:
    """Give a function of a net and two pools that sums up kinds of cost; the usual single kind without a sum."""
    if len(weights) > 1:
        return lambda net, p, q: sum(w[net] * c[p][q] for w, c in zip(weights, costs, strict=True))
    (weight,), (table,) = weights, costs
    return lambda net, p, q: weight[net] * table[p][q]


def _chosen(core: Core, stay: Array, go: Array, *, is_source_paying: bool = False) -> Array:
    """Find the best plan in which every vertex is in the one or the other of two pools of its own.

    Parameters
    ----------
    core
        What is to be placed.
    stay, go
        The two pools of every vertex, shape (m,). No pool may be both one in which some vertices would stay and one to
        which others would go.
    is_source_paying
        What to assume where a value gets cheaper for those who stay when its source goes: that costs grow together is
        what makes a choice a cut, and here they do not. The dearer way is paid by the source as long as it stays,
        whoever reads; else by those who read, wherever the source is. Both are too much, and neither is where all stay.

    Returns
    -------
    ndarray of int
        Pool of every vertex, shape (m,).
    """
    rows = np.arange(len(stay))
    go = np.where(np.isinf(core.prices[rows, go]), stay, go)
    stay = np.where(np.isinf(core.prices[rows, stay]), go, stay)
    is_open = stay != go
    if not is_open.any():
        return stay
    number = np.cumsum(is_open) - 1
    prices = np.stack([core.prices[rows, stay], core.prices[rows, go]], axis=1)[is_open]
    makers = np.maximum(core.sources, 0)
    sources = np.where((core.sources >= 0) & is_open[makers], number[makers], -1)
    before, after = core.homes(stay), core.homes(go)
    halves = _Halves(prices)
    # Who reads anyway makes the value's source pay.
    nets, k = core.nets, core.n_pools
    present = core.present.copy()
    settled = ~is_open[core.readers]
    known = np.unique(nets[settled] * k + stay[core.readers[settled]])
    known_nets, known_pools = np.divmod(known, k)
    unpaid = ((present[known_nets] >> known_pools) & 1 == 0) & (sources[known_nets] >= 0)
    halves.charge(
        sources[known_nets[unpaid]],
        core.paid(known_nets[unpaid], before[known_nets[unpaid]], known_pools[unpaid]),
        core.paid(known_nets[unpaid], after[known_nets[unpaid]], known_pools[unpaid]),
    )
    np.bitwise_or.at(present, known_nets, 1 << known_pools)
    for side, labels in ((0, stay), (1, go)):
        there = labels[core.readers]
        asks = ~settled & ((present[nets] >> there) & 1 == 0)
        groups, group = np.unique(nets[asks] * k + there[asks], return_inverse=True)
        of_group, pools = np.divmod(groups, k)
        paid = core.paid(of_group, before[of_group], pools), core.paid(of_group, after[of_group], pools)
        halves.ask(side, sources[of_group], paid, (group, number[core.readers[asks]]), is_source_paying)
    sides, _ = bisect(halves.core(), is_rough=True)
    labels = stay.copy()
    labels[is_open] = np.where(sides == 1, go[is_open], stay[is_open])
    return labels


class _Halves:
    """The two-pool core of a choice under construction: those who stay are in pool 0, those who go in pool 1."""

    def __init__(self, prices: Array) -> None:
        self.prices = prices
        self._sources: list[Array] = []
        self._weights: list[list[Array]] = [[], []]
        self._nets: list[Array] = []
        self._readers: list[Array] = []
        self._n_nets = 0

    def charge(self, sources: Array, stay: Array, go: Array) -> None:
        """Let vertices pay for either."""
        for side, paid in ((0, stay), (1, go)):
            self.prices[:, side] += np.bincount(sources, weights=paid, minlength=len(self.prices))

    def ask(
        self, side: int, sources: Array, paid: tuple[Array, Array], pairs: tuple[Array, Array], is_source_paying: bool
    ) -> None:
        """Let values cost something if any of their readers is on one side: this much if the source stays, or goes."""
        same, other = paid[side], paid[1 - side]
        falls = np.maximum(same - other, 0.0)
        if is_source_paying and falls.any():
            paying = np.flatnonzero(falls)
            self.prices[:, side] += np.bincount(sources[paying], weights=falls[paying], minlength=len(self.prices))
            same = same - falls
        self._add(side, np.full(len(sources), ~(1 - side)), same, pairs)
        self._add(side, sources, np.maximum(other - same, 0.0), pairs)

    def _add(self, side: int, sources: Array, weights: Array, pairs: tuple[Array, Array]) -> None:
        nets, readers = pairs
        keep = weights > 0.0
        number = np.cumsum(keep) - 1 + self._n_nets
        kept = keep[nets]
        self._nets.append(number[nets[kept]])
        self._readers.append(readers[kept])
        self._sources.append(sources[keep])
        self._weights[side].append(weights[keep])
        self._weights[1 - side].append(np.zeros(int(keep.sum())))
        self._n_nets += int(keep.sum())

    def core(self) -> Core:
        """Put together what was added: a kind of cost for each of the two ways."""
        sources = np.concatenate(self._sources)
        return Core(
            prices=self.prices,
            sources=sources,
            weights=[np.concatenate(weights) for weights in self._weights],
            costs=[np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])],  # to pool 0, to pool 1
            present=np.where(sources < 0, 1 << np.maximum(~sources, 0), 0),
            nets=np.concatenate(self._nets),
            readers=np.concatenate(self._readers),
        )
