"""What a cluster holds right now, as the planner needs to know it.

Covers three views with one face: a scheduler's own state (:class:`SchedulerView`), what a client can ask for
(:class:`ClientView`), and nothing at all (:class:`EmptyView`). Does not cover any decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dask._task_spec import GraphNode
from dask.typing import Key

from meshcompute.pools import pools_of_resources

__all__ = ["ClientView", "EmptyView", "Known", "SchedulerView", "View"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A task that the cluster knows already.

    Attributes
    ----------
    nbytes
        Size of its value in memory, -1 if it is not there yet.
    pools
        Pools whose workers hold the value, or the pool where it is going to run.
    task
        What it runs, None where that is not known.
    """

    nbytes: float
    pools: tuple[str, ...]
    task: GraphNode | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether the value can be read now."""
        return self.nbytes >= 0


class View(Protocol):
    """What the planner asks of a cluster."""

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""

    def known(self, key: Key) -> Known | None:
        """Tell what is known about a task, None if nothing."""


class EmptyView:
    """No cluster."""

    def pools(self) -> tuple[str, ...]:
        """Name no pool."""
        return ()

    def known(self, key: Key) -> Known | None:
        """Know nothing."""
        return None


class SchedulerView:
    """A scheduler's state, read from another thread of its process.

    Parameters
    ----------
    scheduler
        A ``distributed.Scheduler``.

    Notes
    -----
    Single look-ups are safe beside the event loop. A view that is a moment old costs bytes at worst, never
    correctness: a task already known keeps its inputs, and the guard corrects the rest.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""
        return pools_of_resources(name for name, holders in list(self._scheduler.resources.items()) if holders)

    def known(self, key: Key) -> Known | None:
        """Tell what the scheduler knows about a task."""
        ts = self._scheduler.tasks.get(key)
        if ts is None:
            return None
        if ts.state == "memory":
            holders = {pool for ws in list(ts.who_has or ()) for pool in pools_of_resources(ws.resources)}
            return Known(nbytes=float(ts.get_nbytes()), pools=tuple(sorted(holders)), task=ts.run_spec)
        if ts.run_spec is None:
            return None
        return Known(nbytes=-1.0, pools=pools_of_resources(ts.resource_restrictions), task=ts.run_spec)


class ClientView:
    """What a client knows: asked of its scheduler once.

    Parameters
    ----------
    resources_by_worker
        Worker resources by address.
    who_has
        Addresses of the holders by key, of values in memory.
    nbytes
        Sizes by key, of values in memory.
    """

    def __init__(
        self,
        resources_by_worker: dict[str, Iterable[str]],
        who_has: dict[Key, Iterable[str]],
        nbytes: dict[Key, int],
    ) -> None:
        self._pools = {address: pools_of_resources(names) for address, names in resources_by_worker.items()}
        self._who_has = who_has
        self._nbytes = nbytes

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""
        return tuple(sorted({pool for pools in self._pools.values() for pool in pools}))

    def known(self, key: Key) -> Known | None:
        """Tell what is in memory under a key."""
        if key not in self._nbytes:
            return None
        holders = {pool for address in self._who_has.get(key, ()) for pool in self._pools.get(address, ())}
        return Known(nbytes=float(self._nbytes[key]), pools=tuple(sorted(holders)))
