"""The one door to distributed's scheduler internals: a live scheduler that knows pools.

Covers what has to happen inside the scheduler for tasks that have a pool: choice of a worker, one queue per pool,
stealing, replicas, outputs of P2P shuffles. Does not cover when a pool is missing or what a graph needs
(:mod:`meshcompute.scheduler.guard`), nor what is queued where (:mod:`meshcompute.scheduler.queues`).

Notes
-----
The maintainers of distributed offer no interface for any of this (distributed#4864, distributed#5787), and a
plugin only watches. So the class of the running scheduler, and of three of its extensions, is exchanged for a
subclass. Three rules keep that safe:

- A task without a pool takes the stock path, always; only what it takes to fetch its inputs is known better.
- Every decision of ours may fail: it is logged, and the stock path decides. That path respects resource
  restrictions too, so a pin holds even then.
- :mod:`meshcompute.scheduler.internals` compares what we rely on with what is installed, before anything is touched.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from meshcompute.collecting import uncollected_if_asked
from meshcompute.graphs.learning import SizeBook
from meshcompute.pools import ANNOTATION, PLAN, POOL_PREFIX, Held
from meshcompute.scheduler.borders import BorderScheduler
from meshcompute.scheduler.extensions import EXTENSIONS
from meshcompute.scheduler.internals import check_internals
from meshcompute.scheduler.links import LinkScheduler
from meshcompute.scheduler.queues import (
    IdleWorkers,
    Lane,
    Lanes,
    PoolQueue,
    assign_pool,
    drop_pool,
    hold_as_noted,
    is_pinned,
    or_stock,
    pool_of,
)

__all__ = ["PoolScheduler", "enlist"]

logger = logging.getLogger(__name__)

# Up to so many workers are compared for a task; distributed draws the same line for tasks without restrictions.
_MAX_COMPARED = 20


class PoolScheduler(BorderScheduler):
    """A scheduler that places, queues and counts tasks per pool.

    Notes
    -----
    Never made by its constructor: :func:`enlist` turns a live scheduler into one.
    """

    pool_lanes: Lanes
    pool_counts: Counter[str]
    pool_sizes: SizeBook
    #: Set by the Guard: whether a cluster announces that workers of a pool are coming.
    is_pool_expected: Callable[[str], bool]
    #: Pool and pinnedness of the task that submits the graph which is being taken in.
    _parent: tuple[str, bool] | None
    #: What the tasks of the graph which is being taken in are held to, by key.
    _plan: Mapping[Any, Held]

    # ------------------------------------------------------------------ which workers

    @or_stock(None)
    def _lane(self, ts: Any) -> Lane | None:
        return self.pool_lanes.of(ts)

    def valid_workers(self, ts: Any) -> Any:
        lane = None if ts.host_restrictions else self._lane(ts)
        if lane is None:
            return super().valid_workers(ts)
        if ts.worker_restrictions:
            named = {self.workers[address] for address in ts.worker_restrictions if address in self.workers}
            return named & lane.workers
        return lane.workers  # nobody changes it: distributed only intersects and reads

    def decide_worker_non_rootish(self, ts: Any) -> Any:
        if pool_of(ts) is None:
            return super().decide_worker_non_rootish(ts)
        ws = self._worker_in_lane(ts)
        # The stock path would leave the pool where loose restrictions allow it to.
        return super().decide_worker_non_rootish(ts) if ws is NotImplemented else ws

    @or_stock(NotImplemented)
    def _worker_in_lane(self, ts: Any) -> Any:
        lane = self.pool_lanes.of(ts)
        valid = self.valid_workers(ts)
        if not valid and ts.loose_restrictions and lane is not None:
            valid = lane.workers  # loose about names of workers, never about pools
        if not valid or lane is None:
            return None
        candidates: Collection[Any] = ()
        if not ts.actor:
            candidates = {ws for dts in ts.dependencies for ws in dts.who_has or () if ws in valid}
        if not candidates:
            candidates = valid
            if len(valid) > _MAX_COMPARED and valid is lane.workers:
                candidates = self._some_of(lane)
        if len(candidates) == 1:
            return next(iter(candidates))
        return min(candidates, key=functools.partial(self.worker_objective, ts))

    def _some_of(self, lane: Lane) -> Collection[Any]:
        # Comparing hundreds of workers costs a millisecond per task. A window that moves on with every task
        # spreads the work; where few workers are free, those are the ones to look at.
        if 0 < len(lane.idle) <= _MAX_COMPARED:
            return lane.idle
        start = self.n_tasks % len(lane.ring)
        window = lane.ring[start : start + _MAX_COMPARED]
        return window + lane.ring[: _MAX_COMPARED - len(window)]

    # ------------------------------------------------------------------ ready tasks

    def _is_rootish_in_lane(self, ts: Any, lane: Lane) -> bool:
        # Scheduler.is_rootish, with the lane's threads in place of the cluster's.
        if ts.worker_restrictions or ts.host_restrictions or ts.actor or not ts._queueable:
            return False
        if math.isinf(self.WORKER_SATURATION):
            return False
        if ts.run_spec and ts.run_spec.data_producer:
            return True
        group = ts.group
        return bool(
            len(group) > lane.nthreads * 2
            and len(group.dependencies) < self.rootish_tg_threshold
            and sum(map(len, group.dependencies)) < self.rootish_tg_dependencies_threshold
        )

    @staticmethod
    def _least_busy(lane: Lane) -> Any:
        best, least = None, math.inf
        for ws in lane.idle:
            load = len(ws.processing) / ws.nthreads
            if load == 0:
                return ws
            if load < least:
                best, least = ws, load
        return best

    def _release_if_lost(self, ts: Any, lane: Lane) -> bool:
        """Release a placed task whose pool nobody has any more. Returns whether it did."""
        if is_pinned(ts) or self.is_pool_expected(lane.pool):
            return False
        drop_pool(ts)
        self.pool_counts["released"] += 1
        return True

    @or_stock(None)
    def _next_for(self, ts: Any) -> Any:
        """Where a ready task goes: a worker, a state's name, or None for "as in stock"."""
        lane = self.pool_lanes.of(ts)
        if lane is None or (not lane.n_present and self._release_if_lost(ts, lane)):
            return None
        if not self._is_rootish_in_lane(ts, lane):
            return self.decide_worker_non_rootish(ts) or "no-worker"
        if not lane.workers:
            return "no-worker"
        return (lane.idle and self._least_busy(lane)) or "queued"

    def _transition_waiting_processing(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        there = self._next_for(ts) if type(ts.resource_restrictions) is Held else None
        if there is None:
            return super()._transition_waiting_processing(key, stimulus_id)
        if there == "queued":  # at once: stock goes round through another transition
            return self._transition_waiting_queued(key, stimulus_id)
        if isinstance(there, str):
            return {key: there}, {}, {}
        return self._add_to_processing(ts, there, stimulus_id=stimulus_id)

    def _transition_waiting_queued(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        if pool_of(ts) is None:
            return super()._transition_waiting_queued(key, stimulus_id)
        ts.state = "queued"
        self.queued.add(ts)
        return {}, {}, {}

    def _transition_queued_processing(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        if pool_of(ts) is None:
            return super()._transition_queued_processing(key, stimulus_id)
        lane = self._lane(ts)
        ws = self._least_busy(lane) if lane is not None else self.decide_worker_non_rootish(ts)
        if ws is None:
            return {}, {}, {}
        self.queued.discard(ts)
        return self._add_to_processing(ts, ws, stimulus_id=stimulus_id)

    def _transition_no_worker_processing(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        if pool_of(ts) is None:
            return super()._transition_no_worker_processing(key, stimulus_id)
        there = self._next_for(ts)
        if there == "queued" or pool_of(ts) is None:
            # Workers came and have as much as they can hold, or the task was released from its pool just now:
            # a released task that is still wanted finds its way to a queue or a worker by itself.
            return {key: "released"}, {}, {}
        if there is None or isinstance(there, str):
            return super()._transition_no_worker_processing(key, stimulus_id)
        self.unrunnable.pop(ts, None)
        return self._add_to_processing(ts, there, stimulus_id=stimulus_id)

    def _transition_processing_memory(self, key: Any, stimulus_id: str, **kwargs: Any) -> Any:
        ts = self.tasks[key]
        if ts.resource_restrictions:
            self._count_finished(ts, kwargs.get("worker"), kwargs["nbytes"])
        return super()._transition_processing_memory(key, stimulus_id, **kwargs)

    @or_stock(None)
    def _count_finished(self, ts: Any, worker: str | None, nbytes: int) -> None:
        self.pool_sizes.ended(ts.group.name, nbytes)
        pool = pool_of(ts)
        if pool is not None and worker in self.workers:
            self.pool_counts["finished"] += 1
            self.pool_lanes.note_value(ts)
            if worker not in self.resources.get(POOL_PREFIX + pool, ()):
                self.pool_counts["wrong_pool"] += 1
                logger.error("A task ran outside of its pool. key=%s pool=%s worker=%s", ts.key, pool, worker)

    #: What replaces entries of the table that distributed looks transitions up in.
    pool_transitions: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("waiting", "processing"): _transition_waiting_processing,
        ("waiting", "queued"): _transition_waiting_queued,
        ("queued", "processing"): _transition_queued_processing,
        ("no-worker", "processing"): _transition_no_worker_processing,
        ("processing", "memory"): _transition_processing_memory,
    }

    def stimulus_queue_slots_maybe_opened(self, *, stimulus_id: str) -> None:
        queued: Any = self.queued
        if not queued:
            return
        refused: set[Lane | None] = set()
        while queued.has_pools():
            found = self._next_queued(refused)
            if found is NotImplemented:
                break
            if found is None:
                return
            lane, ts = found
            self.transitions({ts.key: "processing"}, stimulus_id)
            if ts.state == "queued":
                refused.add(lane)  # never ask twice: a loop here would stop the scheduler
        super().stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)

    @or_stock(NotImplemented)
    def _next_queued(self, refused: set[Lane | None]) -> Any:
        self.pool_lanes.fresh()
        return self.queued.next_to_start(self.idle_task_count, refused)

    def validate_queued(self, key: Any) -> None:
        ts = self.tasks[key]
        if pool_of(ts) is None:
            super().validate_queued(key)
        else:
            assert ts in self.queued
            assert not ts.waiting_on
            assert not ts.processing_on

    # ------------------------------------------------------------------ workers come and go

    def add_resources(self, worker: str, resources: dict[str, float] | None = None) -> Any:
        self.pool_lanes.invalidate()
        return super().add_resources(worker, resources)

    def remove_resources(self, worker: str) -> None:
        self.pool_lanes.invalidate()
        super().remove_resources(worker)

    def handle_worker_status_change(self, status: Any, worker: Any, stimulus_id: str) -> None:
        self.pool_lanes.invalidate()  # before: what it does at once must already see the change
        super().handle_worker_status_change(status, worker, stimulus_id)
        self.pool_lanes.invalidate()

    # ------------------------------------------------------------------ graphs come in

    async def update_graph(self, *args: Any, **kwargs: Any) -> None:
        with uncollected_if_asked():  # a planned graph asks for it, when it is unpickled in here
            await super().update_graph(*args, **kwargs)

    def _create_taskstate_from_graph(
        self, *, dsk: dict[Any, Any], submitting_task: Any, annotations_by_type: Any, **kwargs: Any
    ) -> Any:
        parent = self.tasks.get(submitting_task) if submitting_task else None
        pool = pool_of(parent) if parent is not None else None
        self._parent = None if pool is None else (pool, is_pinned(parent))
        self._keep_known(dsk, is_planned=PLAN in annotations_by_type)
        self._plan = annotations_by_type.pop(PLAN, {}).get(PLAN, {})
        if self.has_borders:
            self.confine_known(self._plan)
        try:
            return super()._create_taskstate_from_graph(
                dsk=dsk, submitting_task=submitting_task, annotations_by_type=annotations_by_type, **kwargs
            )
        finally:
            self._parent, self._plan = None, {}

    @or_stock(None)
    def _keep_known(self, dsk: dict[Any, Any], *, is_planned: bool) -> None:
        # Plans add relays, and parts of reductions. The same tasks may be here without them, or with others: brought by
        # another graph, perhaps since this one was planned. They go on to read what they read; Dask would create what
        # nobody reads then, and warn of deadlocks.
        for key in dsk.keys() & self.tasks.keys():
            ts = self.tasks[key]
            if ts.run_spec is None or not (is_planned or type(ts.resource_restrictions) is Held):
                continue
            if dsk[key].dependencies != {dts.key for dts in ts.dependencies}:
                dsk[key] = ts.run_spec

    def _apply_annotations(self, tasks: Any, annotations_by_type: Any, global_annotations: Any = None) -> Any:
        keys = super()._apply_annotations(tasks, annotations_by_type, global_annotations)
        if ANNOTATION in annotations_by_type or (global_annotations and ANNOTATION in global_annotations):
            for ts in tasks:
                hold_as_noted(ts)
        if self._plan:
            held_by_key = self._plan
            for ts in tasks:
                held = held_by_key.get(ts.key)
                if held is not None:
                    ts.resource_restrictions = held
        if self._parent is not None:
            self._inherit(tasks, *self._parent)
        if self.has_borders:
            self.check_borders(tasks)
        return keys

    @or_stock(None)
    def _inherit(self, tasks: Iterable[Any], pool: str, pinned: bool) -> None:
        for ts in tasks:
            if ts.run_spec is None or ts.worker_restrictions or ts.host_restrictions:
                continue  # data, or a place of its own
            if ts.annotations and ANNOTATION in ts.annotations:
                continue
            if any(name.startswith(POOL_PREFIX) for name in ts.resource_restrictions or ()):
                continue  # placed, or somebody's own demand
            assign_pool(ts, pool, pinned=pinned)
            self.pool_counts["inherited"] += 1

    # ------------------------------------------------------------------ where to fetch from

    def _task_to_msg(self, ts: Any) -> dict[str, Any]:
        msg: dict[str, Any] = super()._task_to_msg(ts)
        pool = pool_of(ts)
        if pool is not None:
            for key, holders in msg["who_has"].items():
                if len(holders) > 1:
                    msg["who_has"][key] = self._nearest(pool, holders)
        return msg

    def _nearest(self, pool: str, holders: Collection[str]) -> Collection[str]:
        """Holders in a pool, where there are any; else all."""
        members = self.resources.get(POOL_PREFIX + pool, ())
        return tuple(address for address in holders if address in members) or holders

    def handle_request_refresh_who_has(self, keys: Iterable[Any], worker: str, stimulus_id: str) -> None:
        keys = list(keys)
        near = {} if stimulus_id.startswith("find-missing") else self._nearer_holders(keys, worker)
        if near:
            # Holders were busy, not gone: one of the own pool is worth waiting for. A worker that has lost all
            # holders asks again with another stimulus and hears of all of them.
            self.stream_comms[worker].send({"op": "refresh-who-has", "who_has": near, "stimulus_id": stimulus_id})
            keys = [key for key in keys if key not in near]
        if keys:
            super().handle_request_refresh_who_has(keys, worker, stimulus_id)

    @or_stock({})
    def _nearer_holders(self, keys: list[Any], worker: str) -> dict[Any, list[str]]:
        near: dict[Any, list[str]] = {}
        ws = self.workers.get(worker)
        for key in keys:
            ts = self.tasks.get(key)
            if ws is None or ts is None or len(ts.who_has or ()) < 2:
                continue
            pool = next((p for w in ts.waiters or () if w.processing_on is ws and (p := pool_of(w))), None)
            if pool is not None:
                near[key] = list(self._nearest(pool, [holder.address for holder in ts.who_has]))
        return near


# ---------------------------------------------------------------------- taking a live scheduler over


def enlist(scheduler: Any, is_pool_expected: Callable[[str], bool]) -> PoolScheduler:
    """Turn a live scheduler into one that knows pools.

    Parameters
    ----------
    scheduler
        A running scheduler, of any subclass. Called on its event loop.
    is_pool_expected
        Tells whether a cluster announces that workers of a pool are coming.

    Returns
    -------
    PoolScheduler
        The same object.

    Raises
    ------
    MeshError
        This version of distributed has other internals; the scheduler is as it was.
    """
    check_internals(scheduler)
    if isinstance(scheduler, PoolScheduler):
        scheduler.is_pool_expected = is_pool_expected
        return scheduler
    base = type(scheduler)
    table = {**base._TRANSITIONS_TABLE, **PoolScheduler.pool_transitions}
    # Under its old name, which clients show.
    kind = type(base.__name__, (PoolScheduler, base), {"_TRANSITIONS_TABLE": table, "__module__": __name__})
    lanes = Lanes(scheduler, lambda lane: bool(scheduler.queued.tasks_of(lane)))

    scheduler.pool_lanes = lanes
    scheduler.pool_counts = Counter()
    scheduler.pool_sizes = SizeBook()
    LinkScheduler.start_links(scheduler)
    BorderScheduler.start_borders(scheduler)
    scheduler.is_pool_expected = is_pool_expected
    scheduler._parent, scheduler._plan = None, {}
    scheduler.__class__ = kind
    for ts in scheduler.tasks.values():
        hold_as_noted(ts)
    queue = PoolQueue(scheduler._lane)
    for ts in scheduler.queued.sorted():
        queue.add(ts)
    scheduler.queued = queue
    scheduler.idle_task_count = IdleWorkers(scheduler.idle_task_count, lanes)
    # Handlers were bound when the scheduler was made, to the methods of its old class.
    ours = {name for part in PoolScheduler.__mro__ if issubclass(part, LinkScheduler) for name in vars(part)}
    for handlers in (scheduler.handlers, scheduler.stream_handlers):
        for op, handler in list(handlers.items()):
            if getattr(handler, "__self__", None) is scheduler and handler.__name__ in ours:
                handlers[op] = getattr(scheduler, handler.__name__)
    for name, extension_kind in EXTENSIONS.items():
        extension = scheduler.extensions.get(name)
        if extension is not None:
            old = type(extension)
            extension.__class__ = type(old.__name__, (extension_kind, old), {"__module__": __name__})
    result: PoolScheduler = scheduler
    return result
