"""The hypergraph that placement works on, and moves in it that save bytes.

Covers vertices (tasks, or tasks that must share a pool), nets (values, with the vertices that yield and read them),
what a choice of pools costs, and the improvement of one. Does not cover where to start from
(:mod:`meshcompute.placement`).

References
----------
C. M. Fiduccia, R. M. Mattheyses, "A linear-time heuristic for improving network partitions", DAC 1982.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

__all__ = ["FREE", "ContradictingPinsError", "Hypergraph", "Partition", "known_sizes"]

FREE = -1  # pool of a task that nothing pinned is connected to

# A value without bytes still costs a message when it crosses. Far below a byte even when every task yields such one.
_EMPTY_NBYTES = 2.0**-30
# A value read by more tasks than this (a broadcast) does not wake all of its readers when one of them moves.
_BROADCAST = 64
_MAX_PASSES = 8
# How many moves in a row may bring no new best before a pass ends.
_PATIENCE = 200


class ContradictingPinsError(ValueError):
    """No pool is allowed for a task, or for all tasks that must share one.

    Parameters
    ----------
    tasks
        The tasks concerned: one, or a group of ``Graph.together``.
    """

    def __init__(self, tasks: Sequence[int]) -> None:
        super().__init__(tuple(tasks))
        self.tasks = tuple(tasks)

    def __str__(self) -> str:
        if len(self.tasks) == 1:
            return f"Task {self.tasks[0]} is pinned, but to none of the pools that exist."
        return f"Tasks {list(self.tasks)} must share one pool, but no pool is allowed for all of them."


def known_sizes(nbytes: Sequence[float]) -> list[float]:
    """Replace unknown sizes by the mean of the known ones."""
    sizes = [float(size) for size in nbytes]
    unknown = [task for task, size in enumerate(sizes) if not 0.0 <= size < math.inf]
    if unknown:
        known = [size for size in sizes if 0.0 <= size < math.inf]
        mean = sum(known) / len(known) if known else 0.0
        for task in unknown:
            sizes[task] = mean
    return sizes


class Hypergraph:
    """The hypergraph behind a task graph.

    A vertex is a task, or the tasks that must share a pool, named by the first of them. A net is a value, named by
    the task that yields it: it joins the vertex of that task and the vertices that read it. Pools that no pin names
    cannot help, so pools are numbered anew, 0 ... n_pools - 1, among those that a pin names.
    """

    __slots__ = (
        "consumers",
        "inputs",
        "movable",
        "n_pools",
        "nbytes",
        "order",
        "outputs",
        "pins",
        "pools",
        "reached_from",
        "vertex_of",
    )

    def __init__(
        self,
        dependencies: Sequence[Sequence[int]],
        nbytes: Sequence[float],
        pins: Sequence[tuple[int, ...] | None],
        together: Sequence[Sequence[int]],
        n_pools: int,
    ) -> None:
        n_tasks = len(nbytes)
        self.nbytes = [size or _EMPTY_NBYTES for size in known_sizes(nbytes)]
        # Nets that a vertex reads, and that it yields.
        self.inputs: list[Sequence[int]] = list(dependencies)
        self.outputs: list[tuple[int, ...]] = [(task,) for task in range(n_tasks)]
        self.vertex_of: list[int] | None = None
        merged = self._merge(together, list(pins)) if any(len(group) > 1 for group in together) else list(pins)
        self.pins = self._renumbered(merged, n_pools)
        self.consumers: list[list[int]] = [[] for _ in range(n_tasks)]
        consumers = self.consumers
        is_sorted = True
        for vertex, values in enumerate(self.inputs):
            for value in values:
                consumers[value].append(vertex)
                if value >= vertex:
                    is_sorted = False
        self.order: Sequence[int] = range(n_tasks) if is_sorted else self._topological()
        self._reach()

    def _merge(
        self, groups: Sequence[Sequence[int]], pins: list[tuple[int, ...] | None]
    ) -> list[tuple[int, ...] | None]:
        """Make one vertex of each group; groups that overlap are one."""
        vertex_of = list(range(len(pins)))

        def find(task: int) -> int:
            while vertex_of[task] != task:
                vertex_of[task] = task = vertex_of[vertex_of[task]]
            return task

        for group in groups:
            for task in group[1:]:
                first, second = sorted((find(group[0]), find(task)))
                vertex_of[second] = first
        members: dict[int, list[int]] = {}
        for task in {task for group in groups for task in group}:
            members.setdefault(find(task), []).append(task)
        for task in range(len(pins)):
            vertex_of[task] = find(task)
        self.inputs = [
            inputs
            if all(vertex_of[value] == value for value in inputs) and vertex_of[task] == task
            else [value for value in inputs if vertex_of[value] != vertex_of[task]]
            for task, inputs in enumerate(self.inputs)
        ]
        for vertex, tasks in members.items():
            tasks.sort()
            allowed = [set(pin) for task in tasks if (pin := pins[task]) is not None]
            common = set.intersection(*allowed) if allowed else set()
            if allowed and not common:
                raise ContradictingPinsError(tasks)
            reads = {value for task in tasks for value in self.inputs[task] if vertex_of[value] != vertex}
            for task in tasks:
                self.inputs[task], self.outputs[task], pins[task] = (), (), None
            self.inputs[vertex] = sorted(reads)
            self.outputs[vertex] = tuple(tasks)
            pins[vertex] = tuple(sorted(common)) if allowed else None
        self.vertex_of = vertex_of
        return pins

    def _renumbered(self, pins: list[tuple[int, ...] | None], n_pools: int) -> list[tuple[int, ...] | None]:
        used = {pin for pin in pins if pin is not None}
        self.pools = sorted({pool for pin in used for pool in pin if 0 <= pool < n_pools})
        self.n_pools = len(self.pools)
        number = {pool: index for index, pool in enumerate(self.pools)}
        renumbered: dict[tuple[int, ...] | None, tuple[int, ...] | None] = {None: None}
        for pin in used:
            renumbered[pin] = tuple(sorted({number[pool] for pool in pin if pool in number}))
            if not renumbered[pin]:
                raise ContradictingPinsError([pins.index(pin)])
        return [renumbered[pin] for pin in pins]

    def _topological(self) -> list[int]:
        """Order vertices so that inputs come first; cycles, which groups can make, are cut where they are met."""
        source = self.vertex_of if self.vertex_of is not None else range(len(self.inputs))
        missing = [len(values) for values in self.inputs]
        order = [vertex for vertex, count in enumerate(missing) if count == 0]
        for vertex in order:
            for net in self.outputs[vertex]:
                for consumer in self.consumers[net]:
                    missing[consumer] -= 1
                    if missing[consumer] == 0:
                        order.append(consumer)
        if len(order) < len(missing):
            done = set(order)
            order.extend(vertex for vertex in range(len(missing)) if vertex not in done and source[vertex] == vertex)
        return order

    def _reach(self) -> None:
        """Find the vertices that are connected to a pin, and through which neighbour, nearest first."""
        vertex_of, consumers, outputs = self.vertex_of, self.consumers, self.outputs
        queue = [vertex for vertex, pin in enumerate(self.pins) if pin is not None]
        reached_from: dict[int, int] = dict(zip(queue, queue, strict=True))
        for vertex in queue:
            for value in self.inputs[vertex]:
                source = value if vertex_of is None else vertex_of[value]
                if source not in reached_from:
                    reached_from[source] = vertex
                    queue.append(source)
            for net in outputs[vertex]:
                for consumer in consumers[net]:
                    if consumer not in reached_from:
                        reached_from[consumer] = vertex
                        queue.append(consumer)
        self.reached_from = reached_from
        self.movable = [vertex for vertex in queue if (pin := self.pins[vertex]) is None or len(pin) > 1]

    def completed(self, pools: list[int]) -> list[int]:
        """Give vertices that have no pool yet the one of the neighbour through which they were reached."""
        for vertex, neighbour in self.reached_from.items():
            if pools[vertex] == FREE:
                pin = self.pins[vertex]
                pools[vertex] = pools[neighbour] if pin is None else pin[0]
        return pools

    def nets_of(self, vertex: int) -> tuple[int, ...]:
        """List the nets that a vertex belongs to."""
        return (*self.inputs[vertex], *self.outputs[vertex])

    def cost(self, pools: Sequence[int], nets: Iterable[int] | None = None) -> float:
        """Sum up the bytes that cross, of all nets or of some."""
        consumers, vertex_of = self.consumers, self.vertex_of
        total = 0.0
        for net in range(len(consumers)) if nets is None else nets:
            home = pools[net if vertex_of is None else vertex_of[net]]
            for reader in consumers[net]:
                if pools[reader] != home:
                    total += self.nbytes[net] * (len({home, *[pools[other] for other in consumers[net]]}) - 1)
                    break
        return total

    def plan(self, pools: Sequence[int]) -> list[int]:
        """Translate a choice per vertex into a pool per task, with the caller's pool numbers."""
        names, vertex_of = self.pools, self.vertex_of
        chosen = [FREE] * len(self.pins)
        for vertex in self.reached_from:
            pin = self.pins[vertex]
            chosen[vertex] = names[pin[0] if pin is not None and len(pin) == 1 else pools[vertex]]
        return chosen if vertex_of is None else [chosen[vertex] for vertex in vertex_of]


class Partition:
    """A choice of a pool per vertex, with what is needed to change it step by step.

    ``counts[p][e]`` is how many vertices of net e are in pool p.
    """

    __slots__ = ("counts", "pools", "problem")

    def __init__(self, problem: Hypergraph, pools: list[int]) -> None:
        self.problem = problem
        self.pools = pools
        counts = self.counts = [[0] * len(pools) for _ in range(problem.n_pools)]
        for vertex in problem.reached_from:
            row = counts[pools[vertex]]
            for net in problem.inputs[vertex]:
                row[net] += 1
            for net in problem.outputs[vertex]:
                row[net] += 1

    def improve(self) -> None:
        """Move vertices between pools until nothing is gained."""
        for _ in range(_MAX_PASSES):
            if not self._pass():
                return

    def _boundary(self) -> list[int]:
        """List the movable vertices that touch a net which crosses."""
        counts, problem = self.counts, self.problem
        crossing = bytearray(len(self.pools))
        for net, present in enumerate(zip(*counts, strict=True)):
            if len(present) - present.count(0) > 1:
                crossing[net] = 1
        inputs, outputs = problem.inputs, problem.outputs
        found = []
        for vertex in problem.movable:
            for net in inputs[vertex]:
                if crossing[net]:
                    found.append(vertex)
                    break
            else:
                for net in outputs[vertex]:
                    if crossing[net]:
                        found.append(vertex)
                        break
        return found

    def _best_move(self, vertex: int) -> tuple[float, int]:
        """Find the other pool to which the vertex moves best, and what that saves (negative: costs)."""
        problem, counts = self.problem, self.counts
        nbytes = problem.nbytes
        here = self.pools[vertex]
        nets = problem.nets_of(vertex)
        row = counts[here]
        saved = 0.0
        for net in nets:
            if row[net] == 1:
                saved += nbytes[net]
        best, target = -math.inf, here
        pin = problem.pins[vertex]
        for pool in range(problem.n_pools) if pin is None else pin:
            if pool == here:
                continue
            row = counts[pool]
            paid = 0.0
            for net in nets:
                if not row[net]:
                    paid += nbytes[net]
            if saved - paid > best:
                best, target = saved - paid, pool
        return best, target

    def _move(self, vertex: int, pool: int) -> None:
        problem = self.problem
        here, there = self.counts[self.pools[vertex]], self.counts[pool]
        for net in problem.nets_of(vertex):
            here[net] -= 1
            there[net] += 1
        self.pools[vertex] = pool

    def _pass(self) -> bool:
        """Move each vertex at most once, the best first, also at a loss; keep the best state met on the way."""
        problem = self.problem
        movable = set(problem.movable)
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
            if -gain > expected:
                heapq.heappush(heap, (-gain, vertex, pool))
                continue
            done.append((vertex, self.pools[vertex]))
            locked.add(vertex)
            woken = self._woken_by(vertex, pool)
            self._move(vertex, pool)
            gained += gain
            if gained > best:
                best, n_best = gained, len(done)
            for neighbour in woken:
                if neighbour in movable and neighbour not in locked:
                    gain, pool = self._best_move(neighbour)
                    heapq.heappush(heap, (-gain, neighbour, pool))
        for vertex, pool in reversed(done[n_best:]):
            self._move(vertex, pool)
        return n_best > 0

    def _woken_by(self, vertex: int, pool: int) -> set[int]:
        """Find the vertices for which a move, not made yet, changes what their own moves save."""
        problem = self.problem
        vertex_of, consumers = problem.vertex_of, problem.consumers
        here, there = self.counts[self.pools[vertex]], self.counts[pool]
        found: set[int] = set()
        for net in problem.nets_of(vertex):
            if there[net] < 2 or here[net] < 3:
                if len(consumers[net]) <= _BROADCAST:
                    found.update(consumers[net])
                found.add(net if vertex_of is None else vertex_of[net])
        return found
