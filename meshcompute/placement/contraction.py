"""Decide what can be decided without a search, so that little is left for one.

Covers the contraction of a :class:`~meshcompute.placement.core.Core` in rounds, each of which is a few passes of numpy
over what is left: vertices that lose nothing by going to one pool go there, groups that lose nothing by sharing a pool
are joined, and leaves hand their costs on. Some best plan agrees with every such decision. Does not cover the search
that places the rest (:mod:`meshcompute.placement.mincut`, :mod:`meshcompute.placement.multiway`).

Needs numpy and scipy: imported where :func:`meshcompute.placement.placing.place` has found both.

Rules, each exact for any number of pools and any costs::

    settle  a value of a placed vertex with one unplaced reader costs that reader a price per pool: no net any more
    fix     a vertex goes to its cheapest pool if no other is worth what the move can cost its nets at most
    leaf    a vertex with one net, and one neighbour in it, becomes a price per pool of that neighbour (tree algorithm)
    join    all vertices of a value go to one of them, or to the pool that holds it, if the value outweighs everything
            else that those which move touch

"Moving this vertex there never costs more, wherever the others are" stays true while others move, which is why all
decisions of a round can be made at once.

References
----------
T. Verbelen et al., "Graph partitioning algorithms for optimizing software deployment in mobile cloud computing", FGCS
29(2), 2013 (contraction by dominance, there for graphs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from meshcompute.placement.core import Core, attractive, components

__all__ = ["Contraction"]

Array = np.ndarray[Any, Any]

_TOLERANCE = 1e-12  # relative error of a sum of sizes
_LARGE = 20_000  # vertices from which a round must be worth its passes
_WORTH = 0.02  # share of the vertices that such a round has to decide
_MAX_ROUNDS = 200
_FEW_POOLS = 3  # so many have a table for every kind of net
_MAX_KINDS = 256  # kinds of nets for which one table of harms is made


class Contraction:
    """A core that shrinks, and the notes by which a plan of what is left becomes a plan of all.

    Parameters
    ----------
    core
        The hypergraph. It is left as it is.
    """

    __slots__ = ("_names", "_notes", "_size", "core")

    def __init__(self, core: Core) -> None:
        # Weights, nets and readers are never written to.
        self.core = replace(core, prices=core.prices.copy(), sources=core.sources.copy(), present=core.present.copy())
        self._size = len(core.prices)
        self._names = np.arange(self._size)
        self._notes: list[tuple[Array, Array, Array | None]] = []

    def run(self) -> Core:
        """Apply the rules until they decide nothing more, or too little for a pass over everything.

        Returns
        -------
        Core
            What is left.
        """
        for _ in range(_MAX_ROUNDS):
            before = len(self._names)
            if not self._round() or (before > _LARGE and before - len(self._names) < _WORTH * before):
                break
        self._settle()
        return self.core

    def fix(self, vertices: Array, labels: Array) -> None:
        """Place vertices of the core.

        Parameters
        ----------
        vertices
            Their numbers in the core, shape (n,).
        labels
            Their pools, shape (n,).
        """
        fixed = np.full(len(self._names), -1)
        fixed[vertices] = labels
        self._apply(fixed, np.arange(len(fixed)))

    def merge(self, partners: Array) -> None:
        """Let vertices of the core share a pool, whether or not that costs nothing.

        Parameters
        ----------
        partners
            For every vertex, one with which it will share, or itself, shape (m,).
        """
        self._apply(np.full(len(partners), -1), partners)

    def expand(self, labels: Array) -> Array:
        """Make a plan of everything from a plan of the core.

        Parameters
        ----------
        labels
            Pool of every vertex of the core, shape (m,).

        Returns
        -------
        ndarray of int
            Pool of every vertex that there was at first.
        """
        plan = np.zeros(self._size, dtype=np.int64)
        plan[self._names] = labels
        for vertices, values, table in reversed(self._notes):
            if table is None:
                plan[vertices] = np.where(values < 0, ~values, plan[np.maximum(values, 0)])
            else:
                plan[vertices] = table[np.arange(len(vertices)), plan[values]]
        return plan

    def _keep_nets(self, keep: Array) -> None:
        core = self.core
        number = np.cumsum(keep) - 1
        core.sources, core.present = core.sources[keep], core.present[keep]
        core.weights = [weights[keep] for weights in core.weights]
        kept = keep[core.nets]
        core.readers, core.nets = core.readers[kept], number[core.nets[kept]]

    def _settle(self) -> Array:
        """Turn nets that are a matter of one vertex into prices, drop those that cost nothing; count their readers."""
        core, k = self.core, self.core.n_pools
        counts = np.bincount(core.nets, minlength=len(core.sources))
        everywhere = core.present == (1 << k) - 1
        single = (counts == 1) & (core.sources < 0) & ~everywhere
        if single.any():
            reader = np.empty(len(counts), dtype=np.int64)
            reader[core.nets] = core.readers
            reader, home, present = reader[single], ~core.sources[single], core.present[single]
            for weights, costs in zip(core.weights, core.costs, strict=True):
                amount = weights[single]
                for pool in range(k):
                    price = np.where((present >> pool) & 1, 0.0, amount * costs[home, pool])
                    core.prices[:, pool] += np.bincount(reader, weights=price, minlength=len(core.prices))
        keep = (counts > 0) & ~everywhere & ~single
        if not keep.all():
            self._keep_nets(keep)
            counts = counts[keep]
        return counts

    def _round(self) -> bool:
        """Apply every rule once. Tell whether anything was decided."""
        counts = self._settle()
        core = self.core
        m = len(core.prices)
        if not m:
            return False
        own = core.sources >= 0
        yields = np.bincount(core.sources[own], minlength=m)
        degrees = np.bincount(core.readers, minlength=m) + yields
        kinds = _Kinds(core, counts, own)
        best = attractive(core)
        harms = self._harms(best, kinds)
        fixed = np.where(self._margins(best) >= harms * (1.0 - _TOLERANCE), best, -1)
        self._fix_readers(best, harms, counts, fixed)
        parents = np.arange(m)
        flat = core.prices.max(axis=1) == core.prices.min(axis=1)
        # A last task, or a first one, whose only value has several readers: it goes where that value is.
        ends = (degrees[core.readers] == 1) & flat[core.readers] & (yields[core.readers] == 0)
        ends &= fixed[core.readers] < 0
        home = core.sources[core.nets[ends]]
        fixed[core.readers[ends]] = np.where(home < 0, ~home, -1)
        parents[core.readers[ends]] = np.where(home < 0, core.readers[ends], home)
        pairs = np.flatnonzero((counts == 1) & own)
        reader = np.empty(len(counts), dtype=np.int64)
        reader[core.nets] = core.readers
        leaves = self._leaves(pairs, reader, degrees, fixed)
        self._join(kinds, counts, fixed, parents, leaves)
        changed = bool(leaves.any() or (fixed >= 0).any() or (parents != np.arange(m)).any())
        if changed:
            parents[leaves] = np.flatnonzero(leaves)
            self._apply(fixed, parents, leaves)
        return changed

    def _margins(self, best: Array) -> Array:
        """Find how much more the cheapest other pool of each vertex costs than its candidate."""
        prices = self.core.prices
        rows = np.arange(len(prices))
        others = prices.copy()
        others[rows, best] = np.inf
        return np.asarray(_difference(others.min(axis=1), prices[rows, best]))

    def _fix_readers(self, best: Array, harms: Array, counts: Array, fixed: Array) -> None:
        """Place all readers of a value where it is, if it outweighs what all of them can lose by that."""
        core = self.core
        homes = ~core.sources
        able = (homes >= 0) & (core.present == 1 << np.maximum(homes, 0))
        able[core.nets[(best[core.readers] != homes[core.nets]) | (fixed[core.readers] >= 0)]] = False
        if not able.any():
            return
        gains = np.zeros(len(able))
        for weights, costs in zip(core.weights, core.costs, strict=True):
            nearest = (costs + np.diag(np.full(len(costs), np.inf))).min(axis=1)
            gains += weights * nearest[np.maximum(homes, 0)]
        rows = np.arange(len(best))
        losses = harms + _difference(core.prices[rows, best], core.prices.min(axis=1))
        total = np.bincount(core.nets, weights=losses[core.readers], minlength=len(able))
        able &= (gains >= total * (1.0 - _TOLERANCE)) & (counts > 0)
        chosen = core.readers[able[core.nets]]
        fixed[chosen] = best[chosen]

    def _harms(self, best: Array, kinds: _Kinds) -> Array:
        """Bound what a vertex's nets can cost more when it moves to its candidate, wherever the others are."""
        core, k = self.core, self.core.n_pools
        m = len(best)
        there = best[core.readers]
        unpaid = (core.present[core.nets] >> there) & 1 == 0
        nets, readers, there = core.nets[unpaid], core.readers[unpaid], there[unpaid]
        homes = np.where(core.sources < 0, ~core.sources, k)[nets]
        harms = np.zeros(m)
        for weights, costs in zip(core.weights, core.costs, strict=True):
            dearest = np.vstack([costs, costs.max(axis=0)])
            harms += np.bincount(readers, weights=weights[nets] * dearest[homes, there], minlength=m)
            table = kinds.harms(costs)[kinds.of_nets, best[kinds.sources]]
            harms += np.bincount(kinds.sources, weights=weights[kinds.nets] * table, minlength=m)
        return harms

    def _leaves(self, pairs: Array, reader: Array, degrees: Array, fixed: Array) -> Array:
        """Hand the prices of leaves on to their neighbours. Returns which vertices were leaves."""
        core = self.core
        source, target = core.sources[pairs], reader[pairs]
        is_open = (fixed[source] < 0) & (fixed[target] < 0)
        as_reader = is_open & (degrees[target] == 1)
        as_source = is_open & (degrees[source] == 1) & ~as_reader
        leaves = np.zeros(len(core.prices), dtype=bool)
        for chosen, is_reader in ((as_reader, True), (as_source, False)):
            nets = pairs[chosen]
            leaf, other = (target[chosen], source[chosen]) if is_reader else (source[chosen], target[chosen])
            if not len(nets):
                continue
            leaves[leaf] = True
            table = np.empty((len(nets), core.n_pools), dtype=np.int16)
            messages = np.empty((len(nets), core.n_pools))
            for pool in range(core.n_pools):  # of the neighbour
                offers = core.prices[leaf]
                for weights, costs in zip(core.weights, core.costs, strict=True):
                    for own in range(core.n_pools):
                        paid = costs[pool, own] if is_reader else costs[own, pool]
                        there = own if is_reader else pool
                        offers[:, own] += np.where((core.present[nets] >> there) & 1, 0.0, weights[nets] * paid)
                # Of equally cheap pools, the neighbour's own.
                mine = offers[:, pool] <= offers.min(axis=1) * (1.0 + _TOLERANCE)
                table[:, pool] = np.where(mine, pool, np.argmin(offers, axis=1))
                messages[:, pool] = offers[np.arange(len(nets)), table[:, pool]]
            messages -= messages.min(axis=1, keepdims=True)  # what is due in any case would drown the differences
            for pool in range(core.n_pools):
                core.prices[:, pool] += np.bincount(other, weights=messages[:, pool], minlength=len(core.prices))
            self._notes.append((self._names[leaf], self._names[other], table))
        return leaves

    def _join(self, kinds: _Kinds, counts: Array, fixed: Array, parents: Array, leaves: Array) -> None:
        """Let all vertices of a value follow one of them, if it outweighs whatever else they touch can be worth."""
        core, k = self.core, self.core.n_pools
        m, n = len(core.prices), len(core.sources)
        total = _difference(core.prices.max(axis=1), core.prices.min(axis=1))
        homes = np.where(core.sources < 0, ~core.sources, k)
        gains, as_reader, as_source = np.zeros(n), np.zeros(n), np.zeros(len(kinds.nets))
        for weights, costs in zip(core.weights, core.costs, strict=True):
            as_reader += weights * np.append(costs.max(axis=1), costs.max())[homes]
            as_source += weights[kinds.nets] * kinds.harms(costs).max(axis=1)[kinds.of_nets]
            gains += weights * costs[~np.eye(k, dtype=bool)].min()
        total += np.bincount(core.readers, weights=as_reader[core.nets], minlength=m)
        total += np.bincount(kinds.sources, weights=as_source, minlength=m)
        able = (core.sources >= 0) & (core.present == 0)
        is_busy = (fixed >= 0) | leaves | (parents != np.arange(m))
        # What each member would lose at most, were it to follow; all but one of a net have to.
        of_source = np.zeros(n)
        of_source[kinds.nets] = total[kinds.sources] - as_source
        of_readers = total[core.readers] - as_reader[core.nets]
        able[core.nets[is_busy[core.readers]]] = False
        able[kinds.nets[is_busy[kinds.sources]]] = False
        gains *= 1.0 + _TOLERANCE
        too_much = np.bincount(core.nets, weights=of_readers > gains[core.nets], minlength=n) + (of_source > gains)
        able &= too_much <= 1
        if not able.any():
            return
        chosen = np.flatnonzero(able[core.nets])
        own = np.flatnonzero(able)
        nets, members = np.append(core.nets[chosen], own), np.append(core.readers[chosen], core.sources[own])
        losses = np.append(of_readers[chosen], of_source[own])
        worst = np.full(n, -np.inf)
        np.maximum.at(worst, nets, losses)
        root = np.full(n, -1)
        is_worst = losses == worst[nets]
        root[nets[is_worst]] = members[is_worst]
        follows = members != root[nets]
        nets, members, losses = nets[follows], members[follows], losses[follows]
        with np.errstate(invalid="ignore"):
            able &= np.bincount(nets, weights=losses, minlength=n) <= gains
        follows = able[nets]
        nets, members = nets[follows], members[follows]
        # Whoever could follow in several nets does so in the last, and a net moves as one or not at all.
        choice = np.full(m, -1)
        np.maximum.at(choice, members, nets)
        able[nets[choice[members] != nets]] = False
        follows = able[nets]
        parents[members[follows]] = root[nets[follows]]

    def _apply(self, fixed: Array, parents: Array, leaves: Array | None = None) -> None:
        """Write the decisions of a round down, and number what is left anew."""
        core = self.core
        m, k = core.prices.shape
        moved = np.flatnonzero(parents != np.arange(m))
        root = np.arange(m)
        if len(moved):
            group = components(m, moved, parents[moved])
            first = np.full(int(group.max()) + 1, m)
            np.minimum.at(first, group, np.arange(m))
            placed = np.full(len(first), -1)
            placed[group[fixed >= 0]] = fixed[fixed >= 0]
            root, fixed = first[group], placed[group]
        alone = root == np.arange(m)
        stays = alone & (fixed < 0)
        if leaves is not None:
            stays &= ~leaves
        number = np.where(stays, np.cumsum(stays) - 1, -1)
        gone = ~stays if leaves is None else ~stays & ~leaves
        self._notes.append((self._names[gone], np.where(fixed >= 0, ~fixed, self._names[root])[gone], None))
        # Where each vertex is now: its number, ~pool when placed. A leaf is gone, with its only net.
        now = np.where(fixed >= 0, ~fixed, number[root])
        if len(moved):
            merged = np.bincount(root[~stays & (fixed < 0)], minlength=m) > 0
            joining = np.flatnonzero(merged[root] & (fixed < 0))
            for pool in range(k):
                sums = np.bincount(root[joining], weights=core.prices[joining, pool], minlength=m)
                core.prices[:, pool] = np.where(merged, sums, core.prices[:, pool])
        core.prices = core.prices[stays]
        self._names = self._names[stays]
        self._rewire(now, leaves, has_merged=bool(len(moved)))

    def _rewire(self, now: Array, leaves: Array | None, *, has_merged: bool) -> None:
        core, k = self.core, self.core.n_pools
        if leaves is not None and leaves.any():
            ending = np.zeros(len(core.sources), dtype=bool)
            ending[core.nets[leaves[core.readers]]] = True
            own = core.sources >= 0
            ending[own] |= leaves[core.sources[own]]
            self._keep_nets(~ending)
        own = core.sources >= 0
        placed = np.flatnonzero(own)[now[core.sources[own]] < 0]
        core.sources[own] = now[core.sources[own]]
        core.present[placed] |= 1 << ~core.sources[placed]
        readers = now[core.readers]
        for pool in range(k):
            reached = np.zeros(len(core.sources), dtype=bool)
            reached[core.nets[readers == ~pool]] = True
            reached &= (core.present >> pool) & 1 == 0
            core.present[reached] |= 1 << pool
            charged = np.flatnonzero(reached & (core.sources >= 0))
            if len(charged):
                sums = [
                    np.bincount(core.sources[charged], weights=weights[charged], minlength=len(core.prices))
                    for weights in core.weights
                ]
                rows = np.flatnonzero(np.bincount(core.sources[charged], minlength=len(core.prices)))
                for amounts, costs in zip(sums, core.costs, strict=True):
                    core.prices[rows] += amounts[rows, None] * costs[:, pool]
        keep = (readers >= 0) & (readers != core.sources[core.nets])
        core.nets, core.readers = core.nets[keep], readers[keep]
        if has_merged and len(core.nets):
            m = max(1, len(core.prices))
            key = np.unique(core.nets * m + core.readers)
            core.nets, core.readers = np.divmod(key, m)
            self._unite_parallel()

    def _unite_parallel(self) -> None:
        """Make one net of those between the same two vertices: together they may outweigh what each does not."""
        core = self.core
        counts = np.bincount(core.nets, minlength=len(core.sources))
        single = np.flatnonzero((counts == 1) & (core.sources >= 0) & (core.present == 0))
        reader = np.empty(len(counts), dtype=np.int64)
        reader[core.nets] = core.readers
        _, first, group = np.unique(
            core.sources[single] * max(1, len(core.prices)) + reader[single], return_index=True, return_inverse=True
        )
        if len(first) == len(single):
            return
        core.weights = [weights.copy() for weights in core.weights]
        for weights in core.weights:
            weights[single[first]] = np.bincount(group, weights=weights[single])
        keep = np.ones(len(counts), dtype=bool)
        keep[single] = False
        keep[single[first]] = True
        self._keep_nets(keep)


def _difference(high: Array, low: Array) -> Array:
    """Subtract, where both may be infinite: no pool is left to compare with then."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(np.isinf(high), np.inf, high - low))


class _Kinds:
    """The nets of unplaced vertices, by the pools that get the value anyway and whether there is one more reader."""

    __slots__ = ("codes", "nets", "of_nets", "sources")

    def __init__(self, core: Core, counts: Array, own: Array) -> None:
        self.nets = np.flatnonzero(own)
        self.sources = core.sources[self.nets]
        codes = core.present[self.nets] * 2 + (counts[self.nets] == 1)
        if core.n_pools <= _FEW_POOLS:
            self.codes, self.of_nets = np.arange(2 << core.n_pools), codes
            return
        self.codes, self.of_nets = np.unique(codes, return_inverse=True)
        if len(self.codes) > _MAX_KINDS:  # as if nothing were present: a larger bound
            self.codes, self.of_nets = np.arange(2), codes & 1

    def harms(self, costs: Array) -> Array:
        """Bound what one unit can cost more when the source moves to a pool, shape (n_kinds, k)."""
        return _harms_of_sources(costs, self.codes)


def _harms_of_sources(costs: Array, codes: Array) -> Array:
    # Moving from q to p, each pool l that reads the value is served from p in place of q.
    k = len(costs)
    rises = np.maximum(costs[:, None, :] - costs[None, :, :], 0.0)  # p, q, l
    unpaid = (codes[:, None] >> 1 >> np.arange(k)) & 1 == 0
    table = np.empty((len(codes), k))
    for row, code in enumerate(codes):
        each = rises * unpaid[row]
        table[row] = (each.max(axis=2) if code & 1 else each.sum(axis=2)).max(axis=1)
    return table
