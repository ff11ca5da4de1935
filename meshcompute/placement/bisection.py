"""Split a core of any size between two pools, in steps none of which is long.

Covers how a core that is too large for one cut is made small, and the cuts of its parts that improve what comes of
that. Does not cover the cut itself (:mod:`meshcompute.placement.mincut`), which is all there is to do for most graphs,
or more than two pools (:mod:`meshcompute.placement.multiway`).

Why: a maximum flow through a deep network takes time that grows with the square of its size, in one call that holds the
interpreter, and with it the scheduler. So a large core is coarsened, vertices that share the heaviest values first,
until it can be cut, and then improved part by part: each vertex is in a part of bounded size, which is cut again with
all others where they are. All of it grows linearly, and each cut can only lower the costs. The plan is no longer
proved, but hardly ever costs two hundredths more than the least.

References
----------
G. Karypis et al., "Multilevel hypergraph partitioning: applications in VLSI domain", IEEE TVLSI 7(1), 1999.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee

from meshcompute.placement.contraction import Contraction
from meshcompute.placement.core import Core, best_start
from meshcompute.placement.mincut import split

__all__ = ["bisect", "is_large"]

Array = np.ndarray[Any, Any]

#: Nets and their readers that one cut takes. Measured on one CPU: 0.05 s for a stencil, 0.2 s for a deep random graph
#: with no structure; four times as many, 0.4 s and 2.5 s.
MAX_MEMBERS = 30_000
_PART = 8000  # the same, of a part that is cut again
_SWEEPS = 3
_MAX_LEVELS = 30
_TOLERANCE = 1e-12  # relative error of a sum of sizes
_FEW = 0.1  # share of the vertices that a round of merging should not fall short of


def bisect(core: Core, *, is_rough: bool = False) -> tuple[Array, float]:
    """Find a cheap plan of a core for two pools, the cheapest one up to a certain size.

    Parameters
    ----------
    core
        What is to be placed.
    is_rough
        Whether what is lost to the rounding of sizes, 2**-29 of the largest, does not matter.

    Returns
    -------
    ndarray of int
        Pool of every vertex, shape (m,).
    float
        What no plan costs less than, as far as that is known.
    """
    if not len(core.prices):
        return np.zeros(0, dtype=np.int64), 0.0
    if not is_large(core):
        return split(core, is_rough=is_rough)
    contraction = Contraction(core)
    rest = contraction.run()
    least = float(rest.prices.min(axis=1).sum())
    if not len(rest.prices):
        found = np.zeros(0, dtype=np.int64)
    elif not is_large(rest):
        found, least = split(rest, is_rough=is_rough)
    else:
        found = _in_parts(rest, min(_coarsely(rest), best_start(rest), key=rest.cost))
    plan = contraction.expand(found)
    return plan, core.cost(plan) - (rest.cost(found) - least)


def is_large(core: Core) -> bool:
    """Tell whether a core is too large for one cut.

    Parameters
    ----------
    core
        What is to be placed.
    """
    return len(core.nets) + len(core.sources) > MAX_MEMBERS


def _coarsely(core: Core) -> Array:
    """Merge vertices until what is left can be cut at once."""
    coarse = Contraction(core)
    for _ in range(_MAX_LEVELS):
        rest = coarse.core
        if not is_large(rest):
            return coarse.expand(split(rest, is_rough=True)[0] if len(rest.prices) else np.zeros(0, dtype=np.int64))
        before = len(rest.prices)
        coarse.merge(_partners(rest))
        if len(coarse.run().prices) > (1.0 - _FEW) * before:
            break  # everybody reads everything: no part is better than all
    return coarse.expand(best_start(coarse.core))


def _partners(core: Core) -> Array:
    """Find the neighbour with whom each vertex had best share a pool: itself if there is none, shape (m,)."""
    m = len(core.prices)
    inner = core.sources[core.nets] >= 0
    nets = core.nets[inner]
    first, second = np.sort([core.sources[nets], core.readers[inner]], axis=0)
    off = ~np.eye(core.n_pools, dtype=bool)
    worth = np.sum([w * c[off].mean() for w, c in zip(core.weights, core.costs, strict=True)], axis=0)
    worth /= np.maximum(np.bincount(core.nets, minlength=len(worth)), 1)
    pairs, group = np.unique(first * m + second, return_inverse=True)
    first, second = np.divmod(pairs, m)
    least = core.prices.min(axis=1)
    loss = (core.prices[first] + core.prices[second]).min(axis=1) - least[first] - least[second]
    gain = np.tile(np.bincount(group, weights=worth[nets]) - loss, 2)
    ends, others = np.append(first, second), np.append(second, first)
    order = np.lexsort((others, -gain, ends))
    best = order[np.diff(ends[order], prepend=-1) > 0]
    best = best[gain[best] > -np.inf]
    worthwhile = best[gain[best] > 0.0]
    if len(worthwhile) >= _FEW * m:
        best = worthwhile
    partners = np.arange(m)
    partners[ends[best]] = others[best]
    return partners


def _in_parts(core: Core, labels: Array) -> Array:
    """Cut parts of a core again, each with all else where it is, until that saves nothing or was done often enough."""
    parts = _Parts(core, labels)
    for turn in range(_SWEEPS):
        if not parts.sweep(turn % 2 * (_PART // 2)):
            break
    return parts.labels


def _groups(group_of: Array, n_groups: int) -> list[Array]:
    order = np.argsort(group_of, kind="stable")
    return np.split(order, np.searchsorted(group_of[order], np.arange(1, n_groups)))


class _Parts:
    """A plan of a core that is improved part by part; neighbours are in one part where that is possible.

    Parameters
    ----------
    core
        What is to be placed.
    labels
        Pool of every vertex, shape (m,).
    """

    def __init__(self, core: Core, labels: Array) -> None:
        m, k = core.prices.shape
        self.core = core
        self.labels = labels.copy()
        self._own = np.flatnonzero(core.sources >= 0)
        self._makers = core.sources[self._own]
        inner = core.sources[core.nets] >= 0
        edges = np.ones(int(inner.sum()), dtype=np.int8), (core.sources[core.nets[inner]], core.readers[inner])
        graph = csr_matrix(edges, shape=(m, m))
        self._order = np.asarray(reverse_cuthill_mckee((graph + graph.T).tocsr(), symmetric_mode=True))
        members = np.bincount(core.readers, minlength=m) + np.bincount(self._makers, minlength=m)
        self._ends = np.cumsum(members[self._order])
        # How many readers of each net are in each pool.
        readers = core.nets * k + labels[core.readers]
        self._counts = np.bincount(readers, minlength=len(core.sources) * k).reshape(-1, k)
        self._part_of, self._number = np.zeros(m, dtype=np.int64), np.zeros(m, dtype=np.int64)

    def sweep(self, shift: int) -> bool:
        """Cut every part once, from the first to the last. Tell whether anything was saved."""
        self._part_of[self._order] = (self._ends + shift) // _PART
        n_parts = int(self._part_of.max()) + 1
        groups = (self._part_of, self._part_of[self.core.readers], self._part_of[self._makers])
        has_saved = False
        for vertices, pairs, made in zip(*(_groups(group, n_parts) for group in groups), strict=True):
            has_saved |= bool(len(vertices)) and self._cut(vertices, pairs, self._own[made])
        return has_saved

    def _cut(self, vertices: Array, pairs: Array, made: Array) -> bool:
        """Place some vertices anew, given which pairs they read in and which nets they yield."""
        core, k = self.core, self.core.n_pools
        self._number[vertices] = np.arange(len(vertices))
        readers = core.readers[pairs]
        nets, net = np.unique(np.append(core.nets[pairs], made), return_inverse=True)
        net = net[: len(pairs)]

        def counted() -> Array:
            return np.bincount(net * k + self.labels[readers], minlength=len(nets) * k).reshape(-1, k)

        outside = self._counts[nets] - counted()
        sources = core.sources[nets]
        makers = np.maximum(sources, 0)
        is_inside = (sources >= 0) & (self._part_of[makers] == self._part_of[vertices[0]])
        homes = np.where(sources < 0, ~sources, self.labels[makers])
        present, prices = core.present[nets], core.prices[vertices]
        for pool in range(k):
            asked = (outside[:, pool] > 0) & ((present >> pool) & 1 == 0)
            paying = np.flatnonzero(asked & is_inside)
            for home in range(k):
                paid = core.paid(nets[paying], home, pool)
                prices[:, home] += np.bincount(self._number[makers[paying]], weights=paid, minlength=len(vertices))
            present = np.where(asked, present | (1 << pool), present)
        part = Core(
            prices=prices,
            sources=np.where(is_inside, self._number[makers], ~homes),
            weights=[weights[nets] for weights in core.weights],
            costs=core.costs,
            present=np.where(is_inside, present, present | (1 << homes)),
            nets=net,
            readers=self._number[readers],
        )
        found = split(part, is_rough=True)[0]
        has_saved = part.cost(found) < part.cost(self.labels[vertices]) * (1.0 - _TOLERANCE)
        if has_saved:
            self.labels[vertices] = found
            self._counts[nets] = outside + counted()
        return has_saved
