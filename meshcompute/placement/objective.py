"""What placement is asked: a task graph over integers, what crossing costs, and what must hold.

Covers the records that :func:`meshcompute.placement.placing.place` takes and gives, and costs from
prices or from rates. Does not cover how a plan is found, or values that may not leave their pools: they are pins by
then (:mod:`meshcompute.graphs.sovereignty`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = [
    "FREE",
    "ContradictingPinsError",
    "Flat",
    "Graph",
    "Links",
    "Placement",
    "Terms",
    "known_sizes",
    "rows_of",
    "terms_of",
]

FREE = -1  # pool of a task that nothing pinned is connected to

# A value without bytes still costs a message when it crosses. Far below a byte even when every task yields such one.
_EMPTY_NBYTES = 2.0**-30
#: How far a plan may be from what is known to be the least, as a share, to count as proved: the rounding of sums.
PROVED_WITHIN = 1e-9


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


class Flat(NamedTuple):
    """Dependencies of all tasks, one after the other.

    Attributes
    ----------
    indptr
        Where the dependencies of each task begin, and where the last ones end, shape (n + 1,).
    indices
        The dependencies.
    """

    indptr: Sequence[int]
    indices: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What placement needs to know about a task graph. Tasks are the integers 0 ... n - 1.

    Attributes
    ----------
    dependencies
        For every task, the tasks whose values it reads, each once, shape (n,). No cycles. As :class:`Flat` with arrays
        of numpy, nothing has to be copied.
    nbytes
        For every task, the bytes of its value when it is sent, shape (n,). Unknown (NaN, infinite or negative) counts
        as the mean of the known ones.
    pins
        For every task, the pools that may run it, or None for any, shape (n,). Equal pins should be the same object.
    together
        Groups of tasks that have to run in one pool.
    wanted
        Tasks whose values go to the client.
    seconds
        For every task, how long one thread works on it, shape (n,); for :attr:`Links.threads`. None: no time.
    """

    dependencies: Sequence[Sequence[int]] | Flat
    nbytes: Sequence[float]
    pins: Sequence[tuple[int, ...] | None]
    together: Sequence[Sequence[int]] = ()
    wanted: Sequence[int] = ()
    seconds: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What it costs to send something from pool to pool, in any unit.

    Attributes
    ----------
    per_byte
        Cost of a byte from the pool of the row to that of the column, shape (n_pools, n_pools). Not negative; the
        diagonal does not count.
    per_message
        Cost of each value beside its bytes, shape (n_pools, n_pools).
    per_byte_to_client, per_message_to_client
        The same for results, shape (n_pools,).
    threads
        Threads of every pool, shape (n_pools,). If given, a plan also costs the time that the busiest pool computes,
        and costs have to be seconds.
    """

    per_byte: Sequence[Sequence[float]]
    per_message: Sequence[Sequence[float]] | None = None
    per_byte_to_client: Sequence[float] | None = None
    per_message_to_client: Sequence[float] | None = None
    threads: Sequence[float] | None = None

    @classmethod
    def of_bytes(cls, n_pools: int) -> Links:
        """Let every byte cost the same.

        Parameters
        ----------
        n_pools
            How many pools there are.
        """
        return cls(per_byte=[[float(p != q) for q in range(n_pools)] for p in range(n_pools)])

    @classmethod
    def of_money(cls, prices_per_byte: Sequence[Sequence[float]], to_client: Sequence[float] | None = None) -> Links:
        """Let bytes cost what the networks charge.

        Parameters
        ----------
        prices_per_byte
            From the pool of the row to that of the column, shape (n_pools, n_pools).
        to_client
            From every pool to the client, shape (n_pools,).
        """
        return cls(per_byte=prices_per_byte, per_byte_to_client=to_client)

    @classmethod
    def of_seconds(
        cls,
        bytes_per_second: Sequence[Sequence[float]],
        latencies_seconds: Sequence[Sequence[float]] | None = None,
        *,
        bytes_per_second_to_client: Sequence[float] | None = None,
        latencies_seconds_to_client: Sequence[float] | None = None,
        threads: Sequence[float] | None = None,
    ) -> Links:
        """Let bytes and messages cost the time they take.

        Parameters
        ----------
        bytes_per_second
            From the pool of the row to that of the column, shape (n_pools, n_pools).
        latencies_seconds
            The same for how long a value is on its way beside that.
        bytes_per_second_to_client, latencies_seconds_to_client
            From every pool to the client, shape (n_pools,).
        threads
            Threads of every pool, shape (n_pools,).
        """
        return cls(
            per_byte=[
                [1.0 / rate if p != q else 0.0 for q, rate in enumerate(row)] for p, row in enumerate(bytes_per_second)
            ],
            per_message=latencies_seconds,
            per_byte_to_client=[1.0 / rate for rate in bytes_per_second_to_client]
            if bytes_per_second_to_client
            else None,
            per_message_to_client=latencies_seconds_to_client,
            threads=threads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A plan, and what is known about it.

    Attributes
    ----------
    pools
        A pool for every task, shape (n,); :data:`FREE` for tasks that no path, its edges taken in either direction,
        connects to a pinned one.
    cost
        What it costs, in the unit of the links.
    bound
        What no plan costs less than, as far as that is known.
    note
        Why it may cost more than necessary; empty if it was searched for as it should be.
    """

    pools: list[int]
    cost: float
    bound: float = 0.0
    note: str = ""

    @property
    def is_proved(self) -> bool:
        """Whether no plan costs less."""
        return self.cost <= self.bound * (1.0 + PROVED_WITHIN)


@dataclass(slots=True, kw_only=True)
class Terms:
    """A graph and its links in the form in which a search needs them: checked.

    Attributes
    ----------
    dependencies, nbytes
        As in :class:`Graph`, all sizes known and none zero.
    pins, together
        As in :class:`Graph`.
    n_pools
        How many pools there are.
    costs, per_message
        As in :class:`Links`, with a zero diagonal; None: messages cost nothing.
    prices
        What it costs to have a task in each pool, shape (n_pools,), by task.
    work, rates
        Work of every task, shape (n,), and what a unit of it costs in each pool, shape (n_pools,).
    """

    dependencies: Sequence[Sequence[int]] | Flat
    nbytes: Sequence[float]
    pins: Sequence[tuple[int, ...] | None]
    together: Sequence[Sequence[int]]
    n_pools: int
    costs: list[list[float]]
    per_message: list[list[float]] | None = None
    prices: Mapping[int, Sequence[float]] = field(default_factory=dict)
    work: Sequence[float] | None = None
    rates: Sequence[float] = ()

    def pools(self, pinned: set[int]) -> list[int]:
        """List the pools that can be of use: where every pair costs the same, only those that a pin names.

        Parameters
        ----------
        pinned
            Pools that some pin names.
        """
        tables = [self.costs] if self.per_message is None else [self.costs, self.per_message]
        pairs = [{x for p, row in enumerate(table) for q, x in enumerate(row) if p != q} for table in tables]
        is_plain = not self.prices and self.work is None and all(len(found) <= 1 for found in pairs)
        return [pool for pool in range(self.n_pools) if pool in pinned or (pinned and not is_plain)]


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


def rows_of(dependencies: Sequence[Sequence[int]] | Flat) -> Iterator[Sequence[int]]:
    """Go through the dependencies task by task."""
    if not isinstance(dependencies, Flat):
        yield from dependencies
        return
    indptr = [int(start) for start in dependencies.indptr]
    indices = [int(value) for value in dependencies.indices]
    for start, end in itertools.pairwise(indptr):
        yield indices[start:end]


def terms_of(graph: Graph, n_pools: int, links: Links | None) -> Terms:
    """Put a graph and its links into the form in which a search needs them.

    Parameters
    ----------
    graph
        The task graph.
    n_pools
        How many pools there are.
    links
        What crossing costs; None: every byte the same.
    """
    links = Links.of_bytes(n_pools) if links is None else links
    sizes = [size or _EMPTY_NBYTES for size in known_sizes(graph.nbytes)]
    to_client = links.per_byte_to_client or [0.0] * n_pools
    and_message = links.per_message_to_client or [0.0] * n_pools
    prices = (
        {}
        if not any(to_client) and not any(and_message)
        else {
            task: [sizes[task] * byte + message for byte, message in zip(to_client, and_message, strict=True)]
            for task in graph.wanted
        }
    )
    return Terms(
        dependencies=graph.dependencies,
        nbytes=sizes,
        pins=graph.pins,
        together=graph.together,
        n_pools=n_pools,
        costs=_without_diagonal(links.per_byte),
        per_message=None if links.per_message is None else _without_diagonal(links.per_message),
        prices=prices,
    )


def _without_diagonal(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[0.0 if p == q else float(x) for q, x in enumerate(row)] for p, row in enumerate(matrix)]
