"""Placing again on a live scheduler: read what has not started, and hold it to other pools.

Covers when that is done and how: seldom, in slices of the event loop, the decision in the thread that Dask keeps for
graphs. A part of the one door to distributed's scheduler internals. Does not cover the decision
(:mod:`meshcompute.scheduler.adapting`).

Notes
-----
Between reading and changing, the scheduler goes on: what has started meanwhile, or is gone, is left as it is. So a move
that comes too late costs bytes, never a result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dask
from dask._task_spec import Alias
from dask.utils import parse_timedelta
from distributed.metrics import monotonic
from distributed.utils import offload

from meshcompute.errors import SettingError
from meshcompute.links import LinkTable
from meshcompute.pools import Held, pools_of_resources
from meshcompute.scheduler.adapting import Situation, has_drifted, plan_moves
from meshcompute.scheduler.extensions import is_barrier
from meshcompute.scheduler.queues import pool_of

__all__ = ["LOOK_SECONDS", "Adapter"]

logger = logging.getLogger(__name__)

#: How often it is looked whether pools or links are others: some microseconds each time.
LOOK_SECONDS = 1.0
_LEAST_SECONDS = 5.0  # between two plans
_MAX_SHARE = 0.05  # of the time, for reading, planning and changing together
_SLICE = 2000  # tasks at a time on the event loop: some milliseconds
# A graph that large is through with its pools before a new plan of it would be made.
_MOST_TASKS = 50_000

_AWAITED = {"waiting", "queued", "no-worker", "processing"}
_UNSTARTED = {"released", "waiting", "queued", "no-worker"}  # what is released may have to run again


class Adapter:
    """Places the tasks of one scheduler again.

    Parameters
    ----------
    scheduler
        A running :class:`meshcompute.scheduler.state.PoolScheduler`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._pools = self._present()
        self._threads = self._count_threads()
        self._links: LinkTable = scheduler.pool_links
        self._not_before = 0.0
        self._is_adapting = False

    def _present(self) -> tuple[str, ...]:
        resources = self._scheduler.resources
        return pools_of_resources(name for name, holders in resources.items() if holders)

    def _count_threads(self) -> dict[str, float]:
        threads: dict[str, float] = {}
        for ws in self._scheduler.running:
            if (pool := self._scheduler.pool_of_worker(ws)) is not None:
                threads[pool] = threads.get(pool, 0.0) + ws.nthreads
        return threads

    def look(self) -> None:
        """See whether pools, their threads or links have changed, and start to place again if that matters."""
        if self._is_adapting or monotonic() < self._not_before:
            return
        pools, threads, links = self._present(), self._count_threads(), self._scheduler.pool_links
        is_as_it_was = pools == self._pools and (threads == self._threads or links.objective != "seconds")
        if is_as_it_was and (links is self._links or not has_drifted(self._links, links, pools)):
            return
        self._pools, self._threads, self._links = pools, threads, links
        if len(pools) and self._scheduler.tasks:
            self._is_adapting = True
            self._scheduler._ongoing_background_tasks.call_soon(self._adapt_or_say)

    async def _adapt_or_say(self) -> None:
        start = monotonic()
        try:
            await self._adapt()
        except SettingError as exc:  # a pool has joined that nobody has given a price
            logger.warning("Tasks that have not started stay where they are: %s", exc)
        except Exception:
            logger.exception("Tasks could not be placed again")
        finally:
            spent = monotonic() - start
            self._not_before = start + max(_LEAST_SECONDS, spent / _MAX_SHARE)
            self._is_adapting = False

    async def _adapt(self) -> None:
        situation = await self._observe()
        if situation is None:
            return
        moves = await offload(plan_moves, situation, self._links)
        n = await self._apply(moves)
        if n:
            logger.info("Tasks that had not started were placed again. tasks=%d pools=%s", n, ",".join(self._pools))
            self._scheduler.pool_counts["placed_again"] += n

    async def _observe(self) -> Situation | None:
        tasks = list(self._scheduler.tasks.values())
        movable: list[Any] = []
        for start in range(0, len(tasks), 10 * _SLICE):
            movable += [ts for ts in tasks[start : start + 10 * _SLICE] if self._options(ts)]
            if len(movable) > _MOST_TASKS:
                return None
            await asyncio.sleep(0)
        if not movable:
            return None
        # In an order that does not depend on hashes: the same situation has the same plan.
        movable.sort(key=lambda ts: str(ts.key))
        index = {ts: i for i, ts in enumerate(movable)}
        for i, ts in enumerate(movable):
            for neighbour in sorted((*ts.dependencies, *ts.dependents), key=lambda other: str(other.key)):
                index.setdefault(neighbour, len(index))
            if i % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        held: dict[int, str] = {}
        dependencies, nbytes, pools = [], [], []
        for i, ts in enumerate(index):
            options = self._options(ts) if i < len(movable) else ()
            is_there = ts.state == "memory"
            dependencies.append([] if is_there else sorted(index[dep] for dep in ts.dependencies if dep in index))
            nbytes.append(self._nbytes(ts))
            if options:
                held[i] = ts.resource_restrictions.pool
            pools.append(options or self._place_of(ts))
            if i % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        situation = Situation(
            keys=[ts.key for ts in index], dependencies=dependencies, nbytes=nbytes, pools=pools, movable=held
        )
        return situation if self._links.objective != "seconds" else await self._with_times(situation, tasks, index)

    async def _with_times(self, situation: Situation, tasks: list[Any], index: Mapping[Any, int]) -> Situation:
        """Add how long tasks take, and for every pool the work that it has beside the tasks of the situation."""
        unknown = parse_timedelta(dask.config.get("distributed.scheduler.unknown-task-duration"))
        others = dict.fromkeys(self._pools, 0.0)
        seconds = [0.0] * len(index)
        for i, ts in enumerate(tasks):
            if ts.state in _AWAITED:
                known = ts.prefix.duration_average
                time = known if known >= 0 else unknown
                if ts in index:
                    seconds[index[ts]] = time
                elif (pool := pool_of(ts)) in others:
                    others[pool] += time
            if i % (10 * _SLICE) == 10 * _SLICE - 1:
                await asyncio.sleep(0)
        n = len(others)
        return replace(
            situation,
            keys=[*situation.keys, *(f"other work of {pool}" for pool in others)],
            dependencies=[*situation.dependencies, *([] for _ in range(n))],
            nbytes=[*situation.nbytes, *[0.0] * n],
            pools=[*situation.pools, *((pool,) for pool in others)],
            seconds=[*seconds, *others.values()],
            threads=self._threads,
        )

    def _options(self, ts: Any) -> tuple[str, ...]:
        """Pools among which a task may be placed again; none where it may not."""
        held = ts.resource_restrictions
        if type(held) is not Held or ts.state not in _UNSTARTED or ts.worker_restrictions or ts.host_restrictions:
            return ()
        if is_barrier(ts) or any(is_barrier(dep) for dep in ts.dependencies):
            return ()  # a P2P shuffle delivers into one pool, which was settled when the graph came
        if not held.is_pinned:
            return self._pools
        return tuple([pool for pool in held.replicas if pool in self._pools])

    def _place_of(self, ts: Any) -> tuple[str, ...]:
        """Pools where a value is, or where the task that makes it runs; none if that is open."""
        held = ts.resource_restrictions
        workers = ts.who_has or ([ts.processing_on] if ts.processing_on else [])
        pools = {pool for ws in workers if (pool := self._scheduler.pool_of_worker(ws)) is not None}
        return tuple(sorted(pools)) or ((held.pool,) if type(held) is Held else ())

    def _nbytes(self, ts: Any) -> float:
        if ts.nbytes >= 0:
            return float(ts.nbytes)
        if isinstance(ts.run_spec, Alias) or any(is_barrier(reader) for reader in ts.dependents):
            return sum([self._nbytes(dep) for dep in ts.dependencies])  # what a shuffle's sender returns is a number
        size: float = self._scheduler.pool_sizes.expected(ts.group.name)
        return size

    async def _apply(self, moves: dict[Any, str]) -> int:
        scheduler = self._scheduler
        stimulus_id = f"meshcompute-placed-again-{monotonic()}"
        shared: dict[tuple[Any, ...], Held] = {}
        n, keys = 0, list(moves)
        for start in range(0, len(keys), _SLICE):
            again: dict[Any, str] = {}
            for key in keys[start : start + _SLICE]:
                ts, pool = scheduler.tasks.get(key), moves[key]
                if ts is None or pool not in self._options(ts):
                    continue
                old = ts.resource_restrictions
                is_fetching = any(pool not in self._place_of(dep) for dep in ts.dependencies)
                kind = id(old), pool, is_fetching
                if kind not in shared:
                    shared[kind] = old.moved(pool, is_fetching=is_fetching)
                if ts.state in ("queued", "no-worker"):  # decided about again, under its new pool
                    again[key] = "released"
                ts.resource_restrictions = shared[kind]
                n += 1
            if again:
                scheduler.transitions(again, stimulus_id)
            await asyncio.sleep(0)
        if n:
            scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)
        return n
