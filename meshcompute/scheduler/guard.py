"""The Guard: a scheduler plugin that keeps the promises about pools while work runs.

Covers pools that are missing or get lost, announcements that workers are coming, P2P shuffles in a graph that
comes in, and counters. Does not cover how a scheduler places and queues (:mod:`meshcompute.scheduler.state`), nor
which pool a task should get (:mod:`meshcompute.planning`).

Notes
-----
A task is ours when its ``resource_restrictions`` are of the class :class:`meshcompute.pools.Held`, which a plan brings
along; or which a task without a plan gets whose resources name ``pool-<name>`` and whose annotation ``pool`` is
``{"name": <name>, "pinned": bool}``. Pinned by the user, it waits for its pool and fails with a clear error; placed by
a planner, it leaves a pool that is lost. Everything else on the scheduler is left as in stock Dask.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import monotonic
from distributed.protocol.pickle import dumps
from tornado.ioloop import PeriodicCallback

from meshcompute.errors import UnknownPoolError, UnmetDemandError
from meshcompute.pools import pools_of_resources, resource_of, split_resources
from meshcompute.scheduler.extensions import is_barrier
from meshcompute.scheduler.queues import assign_pool, is_pinned, pool_of
from meshcompute.scheduler.replacing import LOOK_SECONDS, Adapter
from meshcompute.scheduler.state import PoolScheduler, enlist
from meshcompute.settings import setting_seconds

__all__ = ["Guard", "shuffle_pool"]

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.25  # as often as distributed looks for workers that are missing
_MAX_CHECK_SECONDS = 0.1  # of the event loop at a time; a hundred thousand tasks may be waiting
_MAX_CHECK_SHARE = 0.2  # of the event loop in the long run


def shuffle_pool(
    outputs: Iterable[tuple[str | None, bool]], barrier: str | None, inputs: Iterable[str | None]
) -> str | None:
    """Choose the one pool where a P2P shuffle delivers.

    Parameters
    ----------
    outputs
        Pool of every output, with whether it is pinned there.
    barrier
        Pool of the barrier.
    inputs
        Pool of every transfer.

    Returns
    -------
    str or None
        In this order: where outputs are pinned, the barrier's pool, where most outputs were placed, where all
        inputs are. None: pools do not matter, and the shuffle is spread over the cluster as in stock.

    Notes
    -----
    One pool for all: which workers get outputs is decided once per shuffle, without regard to single outputs.
    """
    outputs = list(outputs)
    pinned = Counter(pool for pool, is_pinned_there in outputs if pool is not None and is_pinned_there)
    placed = Counter(pool for pool, _ in outputs if pool is not None)
    if pinned:
        return pinned.most_common(1)[0][0]
    if barrier is not None:
        return barrier
    if placed:
        return placed.most_common(1)[0][0]
    pools = set(inputs)
    return pools.pop() if len(pools) == 1 else None


class Guard(SchedulerPlugin):
    """Keep tasks in their pools, and say so clearly where that is impossible.

    Parameters
    ----------
    scheduler
        A running scheduler.

    Notes
    -----
    Use :meth:`install`.
    """

    name = "meshcompute"
    idempotent = True

    def __init__(self, scheduler: Any) -> None:
        # Until when, on the monotonic clock, workers of a pool are announced.
        self._expected_until: dict[str, float] = {}
        self._no_check_before = 0.0
        self._scheduler: PoolScheduler = enlist(scheduler, self.is_expected)

    @classmethod
    def install(cls, scheduler: Any) -> Guard:
        """Install the Guard on a scheduler, on its event loop. Idempotent.

        Parameters
        ----------
        scheduler
            A running scheduler, of a stock ``dask scheduler`` or any cluster.

        Returns
        -------
        Guard
            The one that guards this scheduler, new or not.

        Raises
        ------
        MeshError
            The installed version of distributed has other internals. The scheduler is as it was.
        """
        present = scheduler.plugins.get(cls.name)
        if isinstance(present, Guard):
            return present
        guard = cls(scheduler)
        scheduler.add_plugin(guard, name=cls.name)
        scheduler.handlers["meshcompute_expect_workers"] = guard._handle_expect_workers
        scheduler.stream_handlers["meshcompute_expect_workers"] = guard._handle_expect_workers
        check = PeriodicCallback(guard.check_waiting, _CHECK_SECONDS * 1000)
        scheduler.periodic_callbacks["meshcompute-missing-pools"] = check
        check.start()
        look = PeriodicCallback(Adapter(scheduler).look, LOOK_SECONDS * 1000)
        scheduler.periodic_callbacks["meshcompute-adapting"] = look
        look.start()
        return guard

    # ------------------------------------------------------------------ announcements

    def expect_workers(self, pool: str, seconds: float) -> None:
        """Announce that workers of a pool are coming: work that is held to it waits, instead of failing.

        Parameters
        ----------
        pool
            Name of the pool, without its prefix.
        seconds
            For how long from now. 0 takes an announcement back.
        """
        if seconds > 0:
            self._expected_until[pool] = monotonic() + seconds
        else:
            self._expected_until.pop(pool, None)

    def _handle_expect_workers(self, pool: str, seconds: float, **_: Any) -> None:
        # Stream handlers are called with the name of the client, too.
        self.expect_workers(pool, seconds)

    def is_expected(self, pool: str) -> bool:
        """Whether workers of a pool are announced now."""
        until = self._expected_until.get(pool)
        if until is None:
            return False
        if until < monotonic():
            del self._expected_until[pool]
            return False
        return True

    # ------------------------------------------------------------------ graphs come in

    def update_graph(self, scheduler: Any, *, tasks: list[Any], **_: Any) -> None:
        """Make every P2P shuffle of a new graph deliver into one pool."""
        for key in tasks:
            if type(key) is str and key.startswith("shuffle-barrier-"):
                try:
                    self._confine_shuffle(self._scheduler.tasks[key])
                except Exception:
                    logger.exception("A shuffle could not be confined to a pool. key=%s", key)

    def _confine_shuffle(self, ts: Any) -> None:
        if not is_barrier(ts) or ts.state != "released":
            return
        # Two shuffles that share outputs (a hash join) have to deliver to the same workers.
        barriers, outputs, todo = {ts}, set(), [ts]
        while todo:
            for output in todo.pop().dependents:
                if output in outputs:
                    continue
                outputs.add(output)
                for other in output.dependencies:
                    if other not in barriers and is_barrier(other):
                        barriers.add(other)
                        todo.append(other)
        pool = shuffle_pool(
            [(p, p is not None and is_pinned(output)) for output in outputs for p in [pool_of(output)]],
            next((p for barrier in barriers if (p := pool_of(barrier)) is not None), None),
            [pool_of(transfer) for barrier in barriers for transfer in barrier.dependencies],
        )
        if pool is None:
            return
        for task in (*barriers, *outputs):
            current = pool_of(task)
            if task.state != "released" or current == pool or (current is not None and is_pinned(task)):
                continue
            if task.worker_restrictions or task.host_restrictions:
                continue
            assign_pool(task, pool, pinned=False)
            self._scheduler.pool_counts["shuffle_tasks_moved"] += 1

    # ------------------------------------------------------------------ pools get lost or are missing

    def remove_worker(self, scheduler: Any, worker: str, *, stimulus_id: str, **_: Any) -> None:
        """Release placed tasks of a pool that has just lost its last worker."""
        scheduler = self._scheduler
        recommendations: dict[Any, str] = {}
        for lane in scheduler.pool_lanes.fresh():
            if not lane.n_present:
                # Released tasks that are still wanted are decided about again: placed ones go elsewhere, pinned
                # ones wait for a worker where the missing pool is noticed.
                recommendations |= {ts.key: "released" for ts in scheduler.queued.tasks_of(lane)}
        for ts in scheduler.unrunnable:
            lane = scheduler.pool_lanes.of(ts)
            if lane is not None and not lane.n_present and not is_pinned(ts):
                recommendations[ts.key] = "processing"
        if recommendations:
            # Dask processes recommendations last first.
            keys = sorted(recommendations, key=lambda key: scheduler.tasks[key].priority, reverse=True)
            scheduler.transitions({key: recommendations[key] for key in keys}, stimulus_id)
            scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)

    def check_waiting(self) -> None:
        """Fail pinned tasks whose pool did not come in time, and release placed ones."""
        start = monotonic()
        if not self._scheduler.unrunnable or start < self._no_check_before:
            return
        try:
            self._check_waiting(start)
        except Exception:
            logger.exception("Waiting tasks could not be checked for missing pools")
        end = monotonic()
        self._no_check_before = end + (end - start) * (1 / _MAX_CHECK_SHARE - 1)

    def _check_waiting(self, now: float) -> None:
        scheduler = self._scheduler
        timeout_seconds = setting_seconds("missing-pool-timeout")
        stimulus_id = f"meshcompute-missing-pool-{now}"
        failed: set[str] = set()
        for ts, since in list(scheduler.unrunnable.items()):
            if scheduler.pool_refused and ts.state == "no-worker" and ts.key in scheduler.pool_refused:
                self._fail_with(ts, scheduler.pool_refused.pop(ts.key), stimulus_id)
                continue
            if ts.state != "no-worker" or (lane := scheduler.pool_lanes.of(ts)) is None:
                continue
            if self.is_expected(lane.pool) or self._has_present_worker(ts, lane):
                continue
            if not lane.n_present and not is_pinned(ts):
                scheduler.transitions({ts.key: "processing"}, stimulus_id)
            elif now - since >= timeout_seconds:
                error = self._fail(ts, timeout_seconds, stimulus_id)
                if lane.pool not in failed:  # the others have the same story
                    logger.error("%s", error)
                failed.add(lane.pool)
            if monotonic() - now > _MAX_CHECK_SECONDS:
                break
        if failed:
            scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)

    def _has_present_worker(self, ts: Any, lane: Any) -> bool:
        """Whether some worker could take a task as soon as it runs again."""
        if not lane.n_present:
            return False
        named = ts.worker_restrictions
        if not named or ts.loose_restrictions or ts.host_restrictions:
            return True
        return any(ws.address in named for ws in self._scheduler.pool_lanes.present(lane.demands))

    def _fail(self, ts: Any, timeout_seconds: float, stimulus_id: str) -> UnknownPoolError:
        scheduler = self._scheduler
        pool = pool_of(ts)
        assert pool is not None
        pools = [name for name in pools_of_resources(scheduler.resources) if scheduler.resources[resource_of(name)]]
        _, demands = split_resources(ts.resource_restrictions)
        error: UnknownPoolError
        if pool in pools:
            workers = ts.worker_restrictions or ()
            error = UnmetDemandError(pool, pools, timeout_seconds, ts.key, demands, workers)
        else:
            error = UnknownPoolError(pool, pools, timeout_seconds, ts.key)
        self._fail_with(ts, error, stimulus_id)
        scheduler.pool_counts["unknown_pool_errors"] += 1
        return error

    def _fail_with(self, ts: Any, error: Exception, stimulus_id: str) -> None:
        recommendations = self._scheduler.transition(
            ts.key, "erred", exception=dumps(error), exception_text=str(error), cause=ts.key, stimulus_id=stimulus_id
        )
        # At once: it takes most others that wait for the same pool out of the list.
        self._scheduler.transitions(recommendations, stimulus_id)

    # ------------------------------------------------------------------ what tests and reports ask

    def restart(self, scheduler: Any) -> None:
        """Forget what belongs to tasks that are gone."""
        self._scheduler.pool_lanes.invalidate()

    def statistics(self) -> dict[str, Any]:
        """Counters since the Guard was installed.

        Returns
        -------
        dict
            ``finished`` tasks of pools, ``wrong_pool`` (those that ran elsewhere: always 0), ``released`` from a
            lost pool, ``steals_refused``, ``inherited`` (children that got their parent's pool),
            ``shuffle_tasks_moved``, ``shuffles_confined``, ``replicas_kept``, ``unknown_pool_errors``,
            ``failures`` (decisions that Dask had to take), and ``queued``, pool to number of tasks queued now.
        """
        names = (
            "finished wrong_pool released steals_refused inherited shuffle_tasks_moved shuffles_confined "
            "replicas_kept placed_again unknown_pool_errors failures"
        )
        counts: dict[str, Any] = {name: self._scheduler.pool_counts[name] for name in names.split()}
        counts["queued"] = self._scheduler.queued.counts()
        return counts
