"""A hypergraph as flat arrays, and what a plan of it costs.

Covers the record that contraction shrinks and that cuts are made of, and connected components. Needs numpy and scipy.
Does not cover decisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["Core", "attractive", "best_start", "components"]

Array = np.ndarray[Any, Any]

_MAX_LEVELS = 100  # of vertices that read from one another


def components(n: int, first: Array, second: Array) -> Array:
    """Number the connected components of an undirected graph.

    Parameters
    ----------
    n
        How many vertices there are.
    first, second
        The two ends of every edge, shape (n_edges,).

    Returns
    -------
    ndarray of int
        Component of every vertex, shape (n,).
    """
    ones = np.ones(len(first), dtype=np.int8)
    graph = csr_matrix((ones, (first, second)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1])


@dataclass(slots=True, kw_only=True)
class Core:
    """A hypergraph whose vertices have no pool yet. k pools, m vertices, n nets, i pairs of a net and a reader.

    Attributes
    ----------
    prices
        What it costs to have a vertex in a pool, beside what its nets cost; infinite where it must not be,
        shape (m, k).
    sources
        Vertex that yields the value of a net, or ``~pool`` where that has been placed, shape (n,).
    weights
        Per kind of cost, how much of it a net has: bytes, messages; each of shape (n,).
    costs
        Per kind of cost, what one unit costs from pool to pool, shape (k, k), zero on the diagonal.
    present
        Bit mask of the pools that hold or get the value anyway, and have been charged for it, shape (n,).
    nets, readers
        A net and a vertex that reads it and has no pool yet, each pair once, never the net's source, shape (i,).
    """

    prices: Array
    sources: Array
    weights: list[Array]
    costs: list[Array]
    present: Array
    nets: Array
    readers: Array

    @property
    def n_pools(self) -> int:
        """How many pools there are."""
        return int(self.prices.shape[1])

    def cost(self, labels: Array) -> float:
        """Sum up what a choice of pools costs, beyond what has been charged to prices before.

        Parameters
        ----------
        labels
            Pool of every vertex, shape (m,).
        """
        total = float(self.prices[np.arange(len(labels)), labels].sum())
        homes = self.homes(labels)
        there = labels[self.readers]
        crossing = (homes[self.nets] != there) & ((self.present[self.nets] >> there) & 1 == 0)
        pairs = np.unique(self.nets[crossing] * self.n_pools + there[crossing])
        nets, there = np.divmod(pairs, self.n_pools)
        return total + float(self.paid(nets, homes[nets], there).sum())

    def homes(self, labels: Array) -> Array:
        """Tell in which pool each value is, shape (n,).

        Parameters
        ----------
        labels
            Pool of every vertex, shape (m,).
        """
        own = self.sources >= 0
        homes = ~self.sources
        homes[own] = labels[self.sources[own]]
        return homes

    def paid(self, nets: Array, homes: Array | int, destinations: Array | int) -> Array:
        """Tell what nets pay from pools to pools, shape (n,).

        Parameters
        ----------
        nets
            Numbers of nets, or a mask, shape (n,).
        homes, destinations
            Pools, one for all or shape (n,).
        """
        each = [w[nets] * c[homes, destinations] for w, c in zip(self.weights, self.costs, strict=True)]
        return np.asarray(np.sum(each, axis=0, dtype=float))


def attractive(core: Core) -> Array:
    """Find the pool that attracts each vertex most: by its prices, and by the values that it reads from there.

    Parameters
    ----------
    core
        The hypergraph.

    Returns
    -------
    ndarray of int
        A pool for every vertex, shape (m,).
    """
    m, k = core.prices.shape
    homes = ~core.sources[core.nets]
    placed = homes >= 0
    pull = np.zeros(m * k)
    for weights, costs in zip(core.weights, core.costs, strict=True):
        worth = weights[core.nets[placed]] * costs.max(axis=1)[homes[placed]]
        pull += np.bincount(core.readers[placed] * k + homes[placed], weights=worth, minlength=m * k)
    return np.asarray(np.argmin(core.prices - pull.reshape(m, k), axis=1))


def best_start(core: Core) -> Array:
    """Take the cheapest of: a tree's plan, all where they are cheapest, or where most of their inputs are, or together.

    Parameters
    ----------
    core
        The hypergraph.

    Returns
    -------
    ndarray of int
        A pool for every vertex, shape (m,).
    """
    cheapest = np.argmin(core.prices, axis=1)
    single = [np.where(np.isinf(core.prices[:, pool]), cheapest, pool) for pool in range(core.n_pools)]
    return min([_treelike(core), cheapest, attractive(core), *single], key=core.cost)


def _treelike(core: Core) -> Array:
    """Choose pools as if every value had a copy for each reader, so that the graph is a tree; exact where it is one.

    Notes
    -----
    Costs flow from inputs to readers, each of which gets its share, then choices flow back, level by level. The end of
    a path that is longer than all levels does not wait for its beginning.
    """
    m, k = core.prices.shape
    own = np.flatnonzero(core.sources >= 0)
    makers = np.maximum(core.sources, 0)
    counts = np.maximum(np.bincount(core.nets, minlength=len(core.sources)), 1)
    levels = np.zeros(m, dtype=np.int64)
    inner = core.sources[core.nets] >= 0
    tails, heads = makers[core.nets[inner]], core.readers[inner]
    for _ in range(_MAX_LEVELS):
        later = levels[tails] + 1
        behind = later > levels[heads]
        if not behind.any():
            break
        np.maximum.at(levels, heads[behind], later[behind])
    levels = np.minimum(levels, _MAX_LEVELS)
    n_levels = int(levels.max(initial=0)) + 1
    unpaid = (core.present[:, None] >> np.arange(k)) & 1 == 0
    shares = np.maximum(np.bincount(makers[own], weights=counts[own], minlength=m), 1.0)

    def messages(nets: Array, upstream: Array) -> Array:
        """Tell how much more a reader costs in each pool, given what the maker of its input does, shape (n, k)."""
        offers = np.full((len(nets), k), np.inf)
        amounts = [weights[nets, None] * unpaid[nets] / counts[nets, None] for weights in core.weights]
        for home in range(k):
            paid = np.sum([a * costs[home] for a, costs in zip(amounts, core.costs, strict=True)], axis=0)
            np.minimum(offers, upstream[:, home, None] + paid, out=offers)
        return np.asarray(offers - offers.min(axis=1, keepdims=True))

    received = np.zeros((len(core.sources), k))
    placed = np.flatnonzero(core.sources < 0)
    received[placed] = messages(placed, np.where(~core.sources[placed, None] == np.arange(k), 0.0, np.inf))
    pairs_read = _by_level(levels[core.readers], n_levels)
    nets_made = [own[chosen] for chosen in _by_level(levels[makers[own]], n_levels)]
    pairs_made = _by_level(np.where(inner, levels[makers[core.nets]], n_levels), n_levels)
    costs = core.prices.copy()
    for level in range(n_levels):
        pairs, nets = pairs_read[level], nets_made[level]
        np.add.at(costs, core.readers[pairs], received[core.nets[pairs]])
        received[nets] = messages(nets, costs[makers[nets]] / shares[makers[nets], None])
    labels = np.argmin(costs, axis=1)
    for level, vertices in reversed(list(enumerate(_by_level(levels, n_levels)))):
        nets, there = core.nets[pairs_made[level]], labels[core.readers[pairs_made[level]]]
        asked = np.unique((nets * k + there)[unpaid[nets, there]])
        nets, there = np.divmod(asked, k)
        for home in range(k):
            np.add.at(costs[:, home], makers[nets], core.paid(nets, home, there))
        labels[vertices] = np.argmin(costs[vertices], axis=1)
    return np.asarray(labels)


def _by_level(levels: Array, n_levels: int) -> list[Array]:
    order = np.argsort(levels, kind="stable")
    return np.split(order, np.searchsorted(levels[order], np.arange(1, n_levels + 1)))[:n_levels]
