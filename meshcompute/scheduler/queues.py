"""Workers and queued tasks of a scheduler, kept per lane. A part of the door to distributed's scheduler internals.

Covers what a task's pool is on the scheduler (:func:`pool_of`), which workers can take it (:class:`Lane`) and the
two collections of a scheduler that have to know lanes: its queue and its set of workers with free slots. Does not
cover any decision: :mod:`meshcompute.scheduler.state` asks, and acts.

Notes
-----
A *lane* is a set of demands on workers, for example ``{"pool-ecmwf": 0}`` or ``{"pool-ecmwf": 0, "GPU": 1}``,
with the workers that meet it. Tasks of one lane are interchangeable for the scheduler, tasks of two are not: the
front task of one cluster-wide queue could belong to a full pool while another pool idles.

So one lane may start tasks before those of another lane that come first. Where what it makes is read in other pools,
those set the pace (a join of two sites' data runs at one of them, and the other one only loads): values that wait for
tasks elsewhere are a lane's *exports*, and with two rounds of them about, it waits for its turn in the common order.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSet
from typing import Any, TypeVar, cast

from distributed.collections import HeapSet

from meshcompute.pools import ANNOTATION, POOL_PREFIX, Held

__all__ = [
    "IdleWorkers",
    "Lane",
    "Lanes",
    "PoolQueue",
    "assign_pool",
    "drop_pool",
    "hold_as_noted",
    "is_pinned",
    "or_stock",
    "pool_of",
]

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision", bound=Callable[..., Any])

# Beyond this many lanes, those without queued tasks are forgotten: amounts such as MEMORY=1.37e9 can differ per task.
_MAX_LANES = 64
# What a lane may be ahead of the common order, in rounds of its workers' slots.
_ROUNDS = 2


def or_stock(default: Any) -> Callable[[Decision], Decision]:
    """Make a decision about pools harmless when it fails: log it, so that the stock path can decide.

    Parameters
    ----------
    default
        What is returned instead. The caller takes the stock path then.

    Returns
    -------
    callable
        A decorator for methods of a scheduler or of an extension of one, methods that decide and change nothing.
    """

    def decorate(decide: Decision) -> Decision:
        @functools.wraps(decide)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return decide(self, *args, **kwargs)
            except Exception:
                counts = getattr(self, "scheduler", self).pool_counts
                counts["failures"] += 1
                if counts["failures"] <= 10:  # one per task would fill the disk
                    logger.exception("A decision about pools failed, Dask decides. decision=%s", decide.__name__)
                return default

        return cast("Decision", wrapper)

    return decorate


def pool_of(ts: Any) -> str | None:
    """Name of the pool that a task is held to, None for every task that is not ours.

    Parameters
    ----------
    ts
        The scheduler's state of a task.

    Returns
    -------
    str or None
        The pool, without its prefix. A resource demand that somebody wrote by hand, without the annotation, is
        left to Dask.
    """
    held = ts.resource_restrictions
    return held.pool if type(held) is Held else None


def is_pinned(ts: Any) -> bool:
    """Whether a task of a pool was pinned there by its user, rather than placed."""
    return bool(ts.resource_restrictions.is_pinned)


def hold_as_noted(ts: Any) -> None:
    """Hold a task to a pool if its annotations say so: ``{"pool": {"name": ..., "pinned": bool}}``, and the resource.

    Parameters
    ----------
    ts
        The scheduler's state of a task that came without a plan.
    """
    note = ts.annotations.get(ANNOTATION) if ts.annotations else None
    if type(note) is not dict:  # users may annotate with a "pool" of their own
        return
    name, demands = note.get("name"), ts.resource_restrictions
    if name and demands and POOL_PREFIX + name in demands:
        ts.resource_restrictions = Held(
            name, demands, is_pinned=bool(note.get("pinned")), is_fetching=bool(note.get("fetches"))
        )


def assign_pool(ts: Any, pool: str, *, pinned: bool) -> None:
    """Hold a task to a pool, whatever pool it had. Other demands stay.

    Parameters
    ----------
    ts
        The scheduler's state of a task that is neither running nor queued.
    pool
        Name of the pool, without its prefix.
    pinned
        False where it may leave the pool if the pool is lost.
    """
    # New dictionaries: one and the same serves all tasks of a layer, or of a plan.
    ts.resource_restrictions = Held(pool, ts.resource_restrictions, is_pinned=pinned)


def drop_pool(ts: Any) -> None:
    """Release a task from its pool. Other demands stay, and its children inherit no pool."""
    rest = {
        name: amount for name, amount in (ts.resource_restrictions or {}).items() if not name.startswith(POOL_PREFIX)
    }
    ts.resource_restrictions = rest or None


class Lane:
    """Demands on workers, and the workers that meet them.

    Parameters
    ----------
    pool
        Name of the pool, without its prefix.
    demands
        Resource name to the amount that a task needs.
    """

    __slots__ = ("demands", "exports", "idle", "lanes", "n_present", "nthreads", "pool", "ring", "slots", "workers")

    def __init__(self, pool: str, demands: Mapping[str, float]) -> None:
        #: Who keeps it up to date; nobody any more once it is forgotten.
        self.lanes: Lanes | None = None
        self.pool = pool
        self.demands = dict(demands)
        #: Workers that meet the demands and run.
        self.workers: set[Any] = set()
        #: The same, in an order.
        self.ring: list[Any] = []
        #: Those of them with a free slot, as Dask counts slots.
        self.idle: set[Any] = set()
        #: Threads of the workers.
        self.nthreads = 0
        #: Workers that meet the demands, paused and retiring ones included.
        self.n_present = 0
        #: Queued tasks that the workers start at once, as Dask counts slots.
        self.slots = 0.0
        #: Values of this lane, or relays of them, that tasks of other pools wait for, or did.
        self.exports: weakref.WeakSet[Any] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Lane {self.demands} workers={len(self.workers)} idle={len(self.idle)}>"

    def is_ahead(self) -> bool:
        """Whether as many values wait for tasks of other pools as the workers make in two rounds.

        Notes
        -----
        One round is worked on while the next one is on its way.
        """
        n, done = 0, []
        for ts in self.exports:
            if ts.state != "memory" or all(pool_of(waiter) == self.pool for waiter in ts.waiters or ()):
                done.append(ts)
                continue
            n += 1
            if n >= _ROUNDS * self.slots:
                break
        self.exports.difference_update(done)
        return n >= _ROUNDS * self.slots


class Lanes:
    """All lanes of one scheduler, brought up to date when they are asked for.

    Parameters
    ----------
    scheduler
        The scheduler whose workers are meant.
    is_in_use
        Whether a lane must be kept, because tasks are queued for it.
    """

    def __init__(self, scheduler: Any, is_in_use: Callable[[Lane], bool]) -> None:
        self._scheduler = scheduler
        self._is_in_use = is_in_use
        self._by_demands: dict[frozenset[tuple[str, float]], Lane] = {}
        self._of_worker: dict[Any, list[Lane]] = {}
        self._is_stale = False

    def invalidate(self) -> None:
        """Note that workers came, went or changed what they offer."""
        self._is_stale = True

    def of(self, ts: Any) -> Lane | None:
        """Lane of a task, None for a task that has no pool.

        Parameters
        ----------
        ts
            The scheduler's state of a task.

        Returns
        -------
        Lane or None
            The lane, up to date.
        """
        held = ts.resource_restrictions
        if type(held) is not Held:
            return None
        if self._is_stale:
            self.refresh()
        lane: Lane | None = held.lane
        if lane is None or lane.lanes is not self:
            lane = held.lane = self._meeting(held)
        return lane

    def _meeting(self, held: Held) -> Lane:
        key = frozenset(held.items())
        lane = self._by_demands.get(key)
        if lane is None:
            if len(self._by_demands) >= _MAX_LANES:
                self._forget()
            lane = self._by_demands[key] = Lane(held.pool, held)
            lane.lanes = self
            self._fill(lane)
        return lane

    def _forget(self) -> None:
        for key, lane in list(self._by_demands.items()):
            if not self._is_in_use(lane):
                lane.lanes = None
                del self._by_demands[key]
        for ws, lanes in self._of_worker.items():
            self._of_worker[ws] = [lane for lane in lanes if lane.lanes is self]

    def note_value(self, ts: Any) -> None:
        """Note that a task has ended: its value may be one that other pools wait for.

        Parameters
        ----------
        ts
            The scheduler's state of a task that has a pool.
        """
        lane = self.of(ts)
        if lane is None or len(self._by_demands) < 2:
            return
        if any(pool_of(waiter) != lane.pool for waiter in ts.waiters or ()):
            lane.exports.add(ts)
        if ts.resource_restrictions.is_fetching and ts.prefix.name.startswith("relay-"):
            for source in filter(None, map(self.of, ts.dependencies)):  # there it is gone, and here it waits
                source.exports.add(ts)

    def refresh(self) -> None:
        """Find the workers of every lane again."""
        self._is_stale = False
        self._of_worker = {}
        for lane in self._by_demands.values():
            self._fill(lane)

    def _fill(self, lane: Lane) -> None:
        present = self.present(lane.demands)
        lane.n_present = len(present)
        lane.workers = present & self._scheduler.running
        lane.ring = sorted(lane.workers, key=lambda ws: str(ws.address))
        lane.idle = {ws for ws in lane.workers if ws in self._scheduler.idle_task_count}
        lane.nthreads = sum(ws.nthreads for ws in lane.workers)
        rate = self._scheduler.WORKER_SATURATION
        lane.slots = rate if math.isinf(rate) else sum(max(math.ceil(rate * ws.nthreads), 1) for ws in lane.workers)
        for ws in lane.workers:
            self._of_worker.setdefault(ws, []).append(lane)

    def fresh(self) -> list[Lane]:
        """Return every lane, up to date."""
        if self._is_stale:
            self.refresh()
        return list(self._by_demands.values())

    def of_worker(self, ws: Any) -> list[Lane]:
        """Lanes that a running worker serves, as of the last refresh."""
        return self._of_worker.get(ws, [])

    def present(self, demands: Mapping[str, float]) -> set[Any]:
        """Workers that meet demands, running or not.

        Parameters
        ----------
        demands
            Resource name to amount.

        Returns
        -------
        set of WorkerState
            Amounts in use do not count, as in Dask: a worker's own queue waits for them.
        """
        found: set[str] | None = None
        for resource, amount in demands.items():
            offers = self._scheduler.resources.get(resource) or {}
            able = {address for address, offer in offers.items() if offer >= amount}
            found = able if found is None else found & able
        workers = self._scheduler.workers
        return {workers[address] for address in found or () if address in workers}


class IdleWorkers(set[Any]):
    """A scheduler's ``idle_task_count`` that keeps the lanes' own sets of idle workers too.

    Parameters
    ----------
    workers
        The set as it is.
    lanes
        Lanes to keep up to date.
    """

    def __init__(self, workers: set[Any], lanes: Lanes) -> None:
        super().__init__(workers)
        self._lanes = lanes

    def add(self, ws: Any) -> None:
        """Note that a worker has a free slot."""
        super().add(ws)
        for lane in self._lanes.of_worker(ws):
            lane.idle.add(ws)

    def discard(self, ws: Any) -> None:
        """Note that a worker has no free slot or is gone."""
        super().discard(ws)
        for lane in self._lanes.of_worker(ws):
            lane.idle.discard(ws)


_priority = operator.attrgetter("priority")


class PoolQueue(MutableSet[Any]):
    """A scheduler's ``queued`` tasks, in one heap per lane and one for all tasks without a pool.

    Parameters
    ----------
    lane_of
        Lane of a task, None for a task without a pool.
    """

    def __init__(self, lane_of: Callable[[Any], Lane | None]) -> None:
        self._lane_of = lane_of
        self._heaps: dict[Lane | None, Any] = {None: HeapSet(key=_priority)}
        # Where a task was put: its lane may change while it is queued.
        self._lane_by_task: dict[Any, Lane | None] = {}

    def __contains__(self, ts: object) -> bool:
        return ts in self._lane_by_task

    def __len__(self) -> int:
        return len(self._lane_by_task)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._lane_by_task)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} items>"

    def add(self, ts: Any) -> None:
        """Queue a task, with the tasks of its lane."""
        if ts in self._lane_by_task:
            return
        lane = self._lane_of(ts)
        heap = self._heaps.get(lane)
        if heap is None:
            heap = self._heaps[lane] = HeapSet(key=_priority)
        heap.add(ts)
        self._lane_by_task[ts] = lane

    def discard(self, ts: Any) -> None:
        """Take a task out, if it is there."""
        if ts not in self._lane_by_task:
            return
        lane = self._lane_by_task.pop(ts)
        heap = self._heaps[lane]
        heap.discard(ts)
        if not heap and lane is not None:
            del self._heaps[lane]

    def remove(self, ts: Any) -> None:
        """Take a task out; an error if it is not there."""
        if ts not in self._lane_by_task:
            raise KeyError(ts)
        self.discard(ts)

    def clear(self) -> None:
        """Take all tasks out."""
        self._heaps = {None: HeapSet(key=_priority)}
        self._lane_by_task = {}

    def peek(self) -> Any:
        """Return the first of all queued tasks."""
        if not self:
            raise KeyError("peek into empty set")
        return min((heap.peek() for heap in self._heaps.values() if heap), key=_priority)

    def pop(self) -> Any:
        """Take the first of all queued tasks out."""
        ts = self.peek()
        self.discard(ts)
        return ts

    def sorted(self) -> Iterator[Any]:
        """Iterate over all queued tasks, first one first."""
        return iter(sorted(self._lane_by_task, key=_priority))

    def has_pools(self) -> bool:
        """Whether any task with a pool is queued."""
        return len(self._heaps) > 1

    def tasks_of(self, lane: Lane) -> list[Any]:
        """Queued tasks of a lane, in no order."""
        return list(self._heaps.get(lane, ()))

    def counts(self) -> dict[str, int]:
        """Count the queued tasks of every pool that has any."""
        counts: dict[str, int] = {}
        for lane, heap in self._heaps.items():
            if lane is not None:
                counts[lane.pool] = counts.get(lane.pool, 0) + len(heap)
        return counts

    def next_to_start(self, idle: set[Any], refused: set[Lane | None]) -> tuple[Lane | None, Any] | None:
        """Choose the task to start next: the first one whose lane has a free slot, and is not ahead of the others.

        Parameters
        ----------
        idle
            All workers with a free slot.
        refused
            Lanes that are not to be looked at.

        Returns
        -------
        (Lane or None, TaskState) or None
            The task with its lane; None if there is none to start.
        """
        fronts = sorted([(heap.peek().priority, lane) for lane, heap in self._heaps.items() if heap], key=_first)
        for i, (priority, lane) in enumerate(fronts):
            if lane in refused or not (idle if lane is None else lane.idle):
                continue
            if lane is None or not (_has_turn_before(fronts[:i], priority) and lane.is_ahead()):
                return lane, self._heaps[lane].peek()
        return None


_first = operator.itemgetter(0)


def _has_turn_before(fronts: Iterable[tuple[Any, Lane | None]], priority: Any) -> bool:
    """Whether one of other queues' first tasks, which come first, is of the same graph, and will be started."""
    return any((lane is None or lane.workers) and before[:-1] == priority[:-1] for before, lane in fronts)
