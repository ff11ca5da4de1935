"""The cheapest split of a core between two pools, by a maximum flow.

Covers the network whose cuts are plans, its flow to the last bit that sizes have, and both extreme minimum cuts. Does
not cover which vertices are left to split (:mod:`meshcompute.placement.contraction`) or more than two pools
(:mod:`meshcompute.placement.multiway`).

Needs numpy and scipy. scipy's capacities are 32-bit integers, and larger ones silently give no flow, so sizes are
scaled, and what the rounding left is sent in further rounds with a finer unit. There are no infinite capacities: placed
vertices are the terminals themselves, and the arcs around a value are as wide as the value.

The network: who is on the source's side is in pool 0. For a value of s read by x and y, where it pays from 0 to 1::

              ┌─► x        s in 0 and any reader in 1: one of these arcs is cut, cheapest the first;
    s ──► a ──┤            from 1 to 0 the same with all arcs turned around.
              └─► y

References
----------
E. L. Lawler, "Cutsets and partitions of hypergraphs", Networks 3(3), 1973.
E. A. Dinic, "Algorithm for solution of a problem of maximum flow in networks with power estimation", 1970.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from meshcompute.placement.core import Core

__all__ = ["Network", "split"]

Array = np.ndarray[Any, Any]

_LARGEST = 2**29  # of a capacity in the first round: an arc, its opposite and a flow fit into int32 together
_RELATIVE = 2.0**-50  # what is narrower, compared with the widest arc, is nothing: a double has 53 bits
_MANY = 20_000  # arcs from which sending the last bits would be felt,
_NEGLIGIBLE = 2.0**-30  # if they are no more than this share of the flow


class Network:
    """A flow network under construction. Nodes 0 and 1 are source and sink.

    Parameters
    ----------
    n_vertices
        How many nodes stand for vertices; they are 2 ... n_vertices + 1.
    """

    __slots__ = ("_capacities", "_heads", "_tails", "n_nodes")

    def __init__(self, n_vertices: int) -> None:
        self.n_nodes = n_vertices + 2
        self._tails: list[Array] = []
        self._heads: list[Array] = []
        self._capacities: list[Array] = []

    def connect(self, tails: Array, heads: Array, capacities: Array) -> None:
        """Add arcs; several between the same two nodes add up.

        Parameters
        ----------
        tails, heads
            Nodes, shape (n,).
        capacities
            Not negative, shape (n,).
        """
        self._tails.append(tails)
        self._heads.append(heads)
        self._capacities.append(capacities)

    def gather(self, sources: Array, capacities: Array, nets: Array, readers: Array, *, is_reversed: bool) -> None:
        """Add a node per net between its source and its readers, or the other way round.

        Parameters
        ----------
        sources
            Node of every net, shape (n,).
        capacities
            Of every net, shape (n,).
        nets, readers
            Number of a net and node of a reader, shape (i,).
        is_reversed
            From the readers to the source.
        """
        counts = np.bincount(nets, minlength=len(sources))
        several = counts > 1
        middle = np.where(several, self.n_nodes + np.cumsum(several) - 1, sources)
        self.n_nodes += int(several.sum())
        arcs = [
            (sources[several], middle[several], capacities[several]),
            (middle[nets], readers, capacities[nets]),
        ]
        for tails, heads, widths in arcs:
            self.connect(heads if is_reversed else tails, tails if is_reversed else heads, widths)

    def cut(self, *, is_largest: bool = False, is_rough: bool = False) -> tuple[Array, float]:
        """Find a minimum cut.

        Parameters
        ----------
        is_largest
            Of all minimum cuts, the one with the largest source side in place of the smallest.
        is_rough
            Stop where what is left is less than 2**-29 of the widest arc, per arc.

        Returns
        -------
        ndarray of bool
            Which nodes are on the source's side, shape (n_nodes,).
        float
            The flow that was sent: no cut is narrower.
        """
        tails, heads, widths = (np.concatenate(x) for x in (self._tails, self._heads, self._capacities))
        residual, flow, unit = _residual(tails, heads, widths, self.n_nodes, is_rough=is_rough)
        graph = residual.T.tocsr() if is_largest else residual
        graph.data = np.where(graph.data >= unit, 1.0, 0.0)  # less was left because nothing finer was sent
        graph.eliminate_zeros()
        reached = np.zeros(self.n_nodes, dtype=bool)
        order = breadth_first_order(graph, 1 if is_largest else 0, return_predecessors=False)
        reached[order] = True
        return (~reached if is_largest else reached), flow


def _residual(
    tails: Array, heads: Array, widths: Array, n_nodes: int, *, is_rough: bool
) -> tuple[csr_matrix, float, float]:
    """Send as much as possible from node 0 to node 1; tell what room is left on every arc and its opposite."""
    keep = tails != heads
    tails, heads, widths = tails[keep], heads[keep], widths[keep]
    both = (np.concatenate([widths, np.zeros(len(widths))]), (np.append(tails, heads), np.append(heads, tails)))
    room = coo_matrix(both, shape=(n_nodes, n_nodes)).tocsr()
    room.sort_indices()
    largest = float(room.data.max(initial=0.0))
    if largest <= 0.0:
        return room, 0.0, 1.0
    # Units are powers of two, so that what is left is exact.
    unit = 2.0 ** math.ceil(math.log2(largest / _LARGEST))
    if unit <= 1.0 and bool((room.data == np.floor(room.data)).all()):
        unit = 1.0
    sent = 0.0
    while True:
        # What is wider than all that can still be sent may be narrowed: in the first round no arc is, and in each
        # later one at most one old unit per arc is left to send.
        capacities = np.minimum(np.floor(room.data / unit), 2 * _LARGEST - 1).astype(np.int32)
        graph = csr_matrix((capacities, room.indices, room.indptr), shape=room.shape)
        flow = maximum_flow(graph, 0, 1).flow
        flow.sort_indices()
        room.data -= flow.data * unit
        sent += float(flow[0].sum(dtype=np.int64)) * unit
        is_exact = not (room.data % unit).any()
        is_enough = len(widths) > _MANY and unit * len(widths) <= _NEGLIGIBLE * sent
        if is_rough or is_exact or is_enough or unit <= largest * _RELATIVE:
            return room, sent, unit
        unit /= 2.0 ** max(1, math.floor(math.log2(_LARGEST / (len(widths) + 1))))


def split(core: Core, *, is_rough: bool = False) -> tuple[Array, float]:
    """Find the cheapest plan of a core for two pools.

    Parameters
    ----------
    core
        What is to be placed.
    is_rough
        As in :meth:`Network.cut`.

    Returns
    -------
    ndarray of int
        Pool of every vertex, shape (m,).
    float
        What no plan costs less than: what is due in any case, and the flow. Equal but for the rounding of sums.
    """
    m = len(core.prices)
    network = Network(m)
    lean = core.prices[:, 1] - core.prices[:, 0]
    vertices = np.arange(2, m + 2)
    first, second = vertices[lean > 0], vertices[lean < 0]
    network.connect(np.zeros_like(first), first, lean[lean > 0])
    network.connect(second, np.ones_like(second), -lean[lean < 0])
    nodes = np.where(core.sources < 0, ~core.sources, core.sources + 2)
    for pool, other in ((0, 1), (1, 0)):
        pays = (nodes != other) & ((core.present >> other) & 1 == 0)
        number = np.cumsum(pays) - 1
        chosen = pays[core.nets]
        network.gather(
            nodes[pays],
            core.paid(pays, pool, other),
            number[core.nets[chosen]],
            core.readers[chosen] + 2,
            is_reversed=pool == 1,
        )
    sides, flow = network.cut(is_rough=is_rough)
    return np.where(sides[2 : m + 2], 0, 1), float(core.prices.min(axis=1).sum()) + flow
