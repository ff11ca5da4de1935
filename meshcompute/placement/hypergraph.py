"""The hypergraph that placement works on where there is no numpy.

Covers vertices (tasks, or tasks that must share a pool), nets (values, with the vertices that yield and read them),
and what a choice of pools costs. Does not cover how one is found (:mod:`meshcompute.placement.heuristics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshcompute.placement.localsearch import Board
from meshcompute.placement.objective import FREE, ContradictingPinsError, Terms, rows_of

__all__ = ["Hypergraph"]


class Hypergraph:
    """The hypergraph behind a task graph.

    A vertex is a task, or the tasks that must share a pool, named by the first of them. A net is a value, named by
    the task that yields it: it joins the vertex of that task and the vertices that read it. Pools that no pin names
    cannot help, so pools are numbered anew, 0 ... n_pools - 1, among
    those that :meth:`Terms.pools` tells.

    Parameters
    ----------
    terms
        The graph, the pools and what crossing costs.
    """

    __slots__ = (
        "consumers",
        "costs",
        "inputs",
        "movable",
        "n_pools",
        "nbytes",
        "order",
        "outputs",
        "per_message",
        "pins",
        "pools",
        "prices",
        "reached_from",
        "vertex_of",
    )

    def __init__(self, terms: Terms) -> None:
        n_tasks = len(terms.nbytes)
        pins = list(terms.pins)
        self.nbytes = list(terms.nbytes)
        # Nets that a vertex reads, and that it yields.
        self.inputs: list[Sequence[int]] = list(rows_of(terms.dependencies))
        self.outputs: list[tuple[int, ...]] = [(task,) for task in range(n_tasks)]
        self.vertex_of: list[int] | None = None
        merged = self._merge(terms.together, pins) if any(len(group) > 1 for group in terms.together) else pins
        self.pins = self._renumbered(merged, terms)
        self._price(terms)
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

    def _renumbered(self, pins: list[tuple[int, ...] | None], terms: Terms) -> list[tuple[int, ...] | None]:
        used = {pin for pin in pins if pin is not None}
        self.pools = terms.pools({pool for pin in used for pool in pin})
        self.n_pools = len(self.pools)
        number = {pool: index for index, pool in enumerate(self.pools)}
        renumbered: dict[tuple[int, ...] | None, tuple[int, ...] | None] = {None: None}
        for pin in used:
            renumbered[pin] = tuple(sorted({number[pool] for pool in pin if pool in number}))
            if not renumbered[pin]:
                raise ContradictingPinsError([pins.index(pin)])
        return [renumbered[pin] for pin in pins]

    def _price(self, terms: Terms) -> None:
        """Translate costs and prices to the new numbers; prices of merged tasks add up."""
        pools, vertex_of = self.pools, self.vertex_of
        self.costs = [[terms.costs[p][q] for q in pools] for p in pools]
        table = terms.per_message
        self.per_message = None if table is None else [[table[p][q] for q in pools] for p in pools]
        self.prices: dict[int, list[float]] = {}
        for task, by_pool in terms.prices.items():
            mine = self.prices.setdefault(task if vertex_of is None else vertex_of[task], [0.0] * len(pools))
            for index, pool in enumerate(pools):
                mine[index] += by_pool[pool]
        for task, seconds in enumerate(terms.work or ()):
            mine = self.prices.setdefault(task if vertex_of is None else vertex_of[task], [0.0] * len(pools))
            for index, pool in enumerate(pools):
                mine[index] += seconds * terms.rates[pool]

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

    def pay(self, net: int, source: int, destination: int) -> float:
        """Tell what a net costs from a pool to another."""
        paid = self.nbytes[net] * self.costs[source][destination]
        return paid if self.per_message is None else paid + self.per_message[source][destination]

    def cost(self, pools: Sequence[int], nets: Iterable[int] | None = None) -> float:
        """Sum up what a choice of pools costs, prices included, of all nets or of some."""
        consumers, vertex_of = self.consumers, self.vertex_of
        total = sum(by_pool[pools[vertex]] for vertex, by_pool in self.prices.items() if pools[vertex] != FREE)
        for net in range(len(consumers)) if nets is None else nets:
            home = pools[net if vertex_of is None else vertex_of[net]]
            for reader in consumers[net]:
                if pools[reader] != home:
                    there = {pools[other] for other in consumers[net]} - {home}
                    total += sum(self.pay(net, home, pool) for pool in sorted(there))
                    break
        return total

    def board(self) -> Board:
        """Give the hypergraph to a local search."""
        sources = range(len(self.consumers)) if self.vertex_of is None else self.vertex_of
        return Board(
            n_pools=self.n_pools,
            inputs=self.inputs,
            outputs=self.outputs,
            readers=self.consumers,
            sources=sources,
            pay=self.pay,
            allowed=self.pins,
            prices={vertex: by_pool for vertex, by_pool in self.prices.items() if vertex in self.reached_from},
            movable=self.movable,
        )

    def plan(self, pools: Sequence[int]) -> list[int]:
        """Translate a choice per vertex into a pool per task, with the caller's pool numbers."""
        names, vertex_of = self.pools, self.vertex_of
        chosen = [FREE] * len(self.pins)
        for vertex in self.reached_from:
            pin = self.pins[vertex]
            chosen[vertex] = names[pin[0] if pin is not None and len(pin) == 1 else pools[vertex]]
        return chosen if vertex_of is None else [chosen[vertex] for vertex in vertex_of]
