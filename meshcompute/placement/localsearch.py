"""Moves of single vertices that make a plan cheaper.

Covers a plan on a board of vertices and nets, what a move saves, and passes of moves that may climb for a while. Does
not cover where a plan comes from. Pure Python: for schedulers without numpy, and for boards of a few thousand vertices.

References
----------
C. M. Fiduccia, R. M. Mattheyses, "A linear-time heuristic for improving network partitions", DAC 1982.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Board", "Partition"]

# A value read by more vertices than this (a broadcast) does not wake all of its readers when one of them moves.
_BROADCAST = 64
_MAX_PASSES = 8
# How many moves in a row may bring no new best before a pass ends.
_PATIENCE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Vertices and the nets between them.

    Attributes
    ----------
    n_pools
        How many pools there are.
    inputs, outputs
        For every vertex, the nets that it reads, and those that it yields.
    readers
        For every net, the vertices that read it, its source not among them.
    sources
        For every net, the vertex that yields it.
    pay
        What a net costs from a pool to another: a function of net, source pool, destination pool.
    allowed
        For every vertex, the pools where it may be, or None for all.
    prices
        For every vertex that has some, what it costs to have it in each pool.
    movable
        Vertices that have a choice.
    """

    n_pools: int
    inputs: Sequence[Sequence[int]]
    outputs: Sequence[Sequence[int]]
    readers: Sequence[Sequence[int]]
    sources: Sequence[int]
    pay: Callable[[int, int, int], float]
    allowed: Sequence[tuple[int, ...] | None]
    prices: dict[int, Sequence[float]]
    movable: Sequence[int]


class Partition:
    """A choice of a pool per vertex, with what is needed to change it step by step.

    Parameters
    ----------
    board
        Vertices and nets.
    pools
        A pool for every vertex, changed in place; negative for vertices that nothing concerns.

    Notes
    -----
    ``counts[p][e]`` is how many readers of net e are in pool p.
    """

    __slots__ = ("board", "counts", "pools")

    def __init__(self, board: Board, pools: list[int]) -> None:
        self.board = board
        self.pools = pools
        self.counts = [[0] * len(board.readers) for _ in range(board.n_pools)]
        for net, readers in enumerate(board.readers):
            for reader in readers:
                if pools[reader] >= 0:
                    self.counts[pools[reader]][net] += 1

    def improve(self) -> None:
        """Move vertices between pools until nothing is gained."""
        for _ in range(_MAX_PASSES):
            if not self._pass():
                return

    def _boundary(self) -> list[int]:
        """List the movable vertices that touch a net which crosses, or that have a price."""
        board, pools = self.board, self.pools
        crossing = bytearray(len(board.readers))
        for net, present in enumerate(zip(*self.counts, strict=True)):
            home = pools[board.sources[net]]
            if len(present) - present.count(0) > (home >= 0 and present[home] > 0):
                crossing[net] = 1
        return [
            vertex
            for vertex in board.movable
            if vertex in board.prices
            or any(crossing[net] for net in board.inputs[vertex])
            or any(crossing[net] for net in board.outputs[vertex])
        ]

    def _best_move(self, vertex: int) -> tuple[float, int]:
        """Find the other pool to which the vertex moves best, and what that saves (negative: costs)."""
        board, counts, pools, pay = self.board, self.counts, self.pools, self.board.pay
        here = pools[vertex]
        inputs = [(net, pools[board.sources[net]]) for net in board.inputs[vertex]]
        saved = 0.0
        row = counts[here]
        for net, home in inputs:
            if row[net] == 1 and home != here:
                saved += pay(net, home, here)
        served = [(net, pool) for net in board.outputs[vertex] for pool in range(board.n_pools) if counts[pool][net]]
        for net, pool in served:
            if pool != here:
                saved += pay(net, here, pool)
        prices = board.prices.get(vertex)
        best, target = -math.inf, here
        allowed = board.allowed[vertex]
        for pool in range(board.n_pools) if allowed is None else allowed:
            if pool == here:
                continue
            row = counts[pool]
            paid = 0.0 if prices is None else prices[pool] - prices[here]
            for net, home in inputs:
                if not row[net] and home != pool:
                    paid += pay(net, home, pool)
            for net, other in served:
                if other != pool:
                    paid += pay(net, pool, other)
            if saved - paid > best:
                best, target = saved - paid, pool
        return best, target

    def _move(self, vertex: int, pool: int) -> None:
        here, there = self.counts[self.pools[vertex]], self.counts[pool]
        for net in self.board.inputs[vertex]:
            here[net] -= 1
            there[net] += 1
        self.pools[vertex] = pool

    def _pass(self) -> bool:
        """Move each vertex at most once, the best first, also at a loss; keep the best state met on the way."""
        movable = set(self.board.movable)
        heap = []
        for vertex in self._boundary():
            gain, pool = self._best_move(vertex)
            heap.append((-gain, vertex, pool))
        heapq.heapify(heap)
        done: list[tuple[int, int]] = []
        locked: set[int] = set()
        gained = best = 0.0
        n_best = 0
        while heap and len(done) - n_best < _PATIENCE:
            expected, vertex, pool = heapq.heappop(heap)
            if vertex in locked:
                continue
            gain, pool = self._best_move(vertex)
            if pool == self.pools[vertex]:
                continue
            if -gain > expected:
                heapq.heappush(heap, (-gain, vertex, pool))
                continue
            done.append((vertex, self.pools[vertex]))
            locked.add(vertex)
            woken = self._woken_by(vertex)
            self._move(vertex, pool)
            gained += gain
            if gained > best:
                best, n_best = gained, len(done)
            for neighbour in sorted(woken):
                if neighbour in movable and neighbour not in locked:
                    gain, pool = self._best_move(neighbour)
                    heapq.heappush(heap, (-gain, neighbour, pool))
        for vertex, pool in reversed(done[n_best:]):
            self._move(vertex, pool)
        return n_best > 0

    def _woken_by(self, vertex: int) -> set[int]:
        """Find the vertices for which a move may change what their own moves save."""
        board = self.board
        found: set[int] = set()
        for net in board.inputs[vertex]:
            found.add(board.sources[net])
            if len(board.readers[net]) <= _BROADCAST:
                found.update(board.readers[net])
        for net in board.outputs[vertex]:
            if len(board.readers[net]) <= _BROADCAST:
                found.update(board.readers[net])
        return found
