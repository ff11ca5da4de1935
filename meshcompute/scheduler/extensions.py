"""Extensions of a scheduler that know pools: stealing, the Active Memory Manager, P2P shuffles.

Covers the subclasses that :mod:`meshcompute.scheduler.state` exchanges for distributed's own. A part of the one
door to distributed's scheduler internals. Does not cover the scheduler itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from distributed.active_memory_manager import ActiveMemoryManagerExtension
from distributed.core import Status
from distributed.shuffle._core import P2PBarrierTask, barrier_key
from distributed.shuffle._scheduler_plugin import ShuffleSchedulerPlugin
from distributed.stealing import WorkStealing

from meshcompute.pools import POOL_PREFIX, Held
from meshcompute.scheduler.queues import drop_pool, is_pinned, or_stock, pool_of

__all__ = ["EXTENSIONS", "is_barrier"]

Method = TypeVar("Method", bound=Callable[..., Any])


def _override(method: Method) -> Method:
    """Mark a method for the check of internals."""
    method.overrides = True  # type: ignore[attr-defined]
    return method


def is_barrier(ts: Any) -> bool:
    """Whether a task is the barrier of a P2P shuffle or rechunk."""
    return isinstance(ts.run_spec, P2PBarrierTask)


class PoolStealing(WorkStealing):
    """Work stealing that never takes a task out of its pool, whatever other restrictions allow."""

    @_override
    def put_key_in_stealable(self, ts: Any) -> None:
        # Stolen half-way through its fetch from another pool, it makes the value cross a second time.
        held = ts.resource_restrictions
        if type(held) is not Held or not held.is_fetching:
            super().put_key_in_stealable(ts)

    @_override
    def _get_thief(self, scheduler: Any, ts: Any, potential_thieves: set[Any], *, occupancies: Any) -> Any:
        if pool_of(ts) is None:
            return super()._get_thief(scheduler, ts, potential_thieves, occupancies=occupancies)
        thieves = potential_thieves & (scheduler.valid_workers(ts) or set())
        if not thieves and ts.loose_restrictions:
            # Stock falls back to any thief. Restrictions are loose about names of workers, never about pools.
            thieves = self._thieves_of_pool(scheduler, ts, potential_thieves)
        if not thieves:
            scheduler.pool_counts["steals_refused"] += 1
            return None
        return super()._get_thief(scheduler, ts, thieves, occupancies=occupancies)

    @or_stock(frozenset[Any]())
    def _thieves_of_pool(self, scheduler: Any, ts: Any, potential_thieves: set[Any]) -> Any:
        return potential_thieves & scheduler.pool_lanes.of(ts).workers


class PoolMemoryManager(ActiveMemoryManagerExtension):
    """An Active Memory Manager that knows which copies are local to whom."""

    @_override
    def _find_dropper(self, ts: Any, candidates: set[Any] | None, pending_drop: set[Any]) -> Any:
        kept = self._last_copies(ts, pending_drop)
        if kept:
            candidates = (ts.who_has if candidates is None else candidates) - kept
            if not candidates:
                self.scheduler.pool_counts["replicas_kept"] += 1
                return None
        return super()._find_dropper(ts, candidates, pending_drop)

    @_override
    def _find_recipient(self, ts: Any, candidates: set[Any] | None, pending_repl: set[Any]) -> Any:
        local = self._local_recipients(ts, candidates, pending_repl)
        if not local and getattr(ts.resource_restrictions, "stays", False):
            return None
        return super()._find_recipient(ts, local or candidates, pending_repl)

    @or_stock(frozenset[Any]())
    def _last_copies(self, ts: Any, pending_drop: set[Any]) -> frozenset[Any]:
        """Copies that are the last ones of a pool that needs one: where the value belongs, and where it is awaited."""
        holders = (ts.who_has or set()) - pending_drop
        if len(holders) < 2:
            return frozenset()
        kept: list[Any] = []
        pools = {name for ws in holders for name in ws.resources if name.startswith(POOL_PREFIX)}
        own = pool_of(ts)
        for name in pools:
            members = self.scheduler.resources.get(name, ())
            local: list[Any] = [ws for ws in holders if ws.address in members and ws.status == Status.running]
            if len(local) != 1:
                continue
            pool = name.removeprefix(POOL_PREFIX)
            if pool == own or any(pool_of(waiter) == pool for waiter in ts.waiters or ()):
                kept += local
        return frozenset(kept)

    @or_stock(frozenset())
    def _local_recipients(
        self, ts: Any, candidates: set[Any] | None, pending_repl: set[Any]
    ) -> frozenset[Any] | set[Any]:
        own = pool_of(ts)
        if own is None:
            return frozenset()
        members = self.scheduler.resources.get(POOL_PREFIX + own, ())
        running = self.scheduler.running if candidates is None else candidates & self.scheduler.running
        return {ws for ws in running if ws.address in members} - (ts.who_has or set()) - pending_repl


class PoolShuffles(ShuffleSchedulerPlugin):
    """P2P shuffles whose outputs land where their tasks may run.

    Notes
    -----
    Stock spreads the outputs over all workers of the cluster, or over the workers that the barrier is restricted
    to by name. An output task that is held to a pool and assigned to a worker elsewhere waits for ever.
    """

    @_override
    def _calculate_worker_for(self, spec: Any) -> Any:
        barrier = self.scheduler.tasks[barrier_key(spec.id)]
        if barrier.worker_restrictions:
            return super()._calculate_worker_for(spec)
        addresses = self._addresses_for_outputs(barrier)
        if not addresses:
            return super()._calculate_worker_for(spec)
        # Only for this call: which workers there are is decided now, again after every restart of the shuffle.
        barrier.worker_restrictions = addresses
        try:
            return super()._calculate_worker_for(spec)
        finally:
            barrier.worker_restrictions = None

    @or_stock(None)
    def _addresses_for_outputs(self, barrier: Any) -> list[str] | None:
        """Workers that may run every output; None where pools do not matter."""
        scheduler = self.scheduler
        tasks = [barrier, *barrier.dependents]
        for ts in tasks:
            lane = scheduler.pool_lanes.of(ts)
            if lane is not None and not lane.n_present and not is_pinned(ts):
                drop_pool(ts)
                scheduler.pool_counts["released"] += 1
        lanes = {lane for ts in barrier.dependents if (lane := scheduler.pool_lanes.of(ts)) is not None}
        if not lanes and (lane := scheduler.pool_lanes.of(barrier)) is not None:
            lanes = {lane}
        if not lanes:
            return None
        workers = set.intersection(*(lane.workers or scheduler.pool_lanes.present(lane.demands) for lane in lanes))
        scheduler.pool_counts["shuffles_confined"] += 1
        return sorted(ws.address for ws in workers)


#: By the name under which a scheduler keeps the stock extension.
EXTENSIONS: dict[str, Any] = {"amm": PoolMemoryManager, "shuffle": PoolShuffles, "stealing": PoolStealing}
