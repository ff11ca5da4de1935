"""What a cluster holds right now, as the planner needs to know it.

Covers three views with one face: a scheduler's own state (:class:`SchedulerView`), what a client can ask for
(:class:`ClientView`), and nothing at all (:class:`EmptyView`). Does not cover any decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dask._task_spec import GraphNode
from dask.typing import Key

from meshcompute.learning import Kind
from meshcompute.pools import pools_of_resources

__all__ = ["ClientView", "EmptyView", "Known", "SchedulerView", "View", "answer_view"]


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

    def learnt(self, kinds: Iterable[Kind]) -> Mapping[Kind, float]:
        """Tell the mean measured sizes of those kinds of tasks that have run before."""

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Note which groups of tasks will run, to learn their sizes."""


class EmptyView:
    """No cluster."""

    def pools(self) -> tuple[str, ...]:
        """Name no pool."""
        return ()

    def known(self, key: Key) -> Known | None:
        """Know nothing."""
        return None

    def learnt(self, kinds: Iterable[Kind]) -> Mapping[Kind, float]:
        """Have learnt nothing."""
        return {}

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Expect nothing."""


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

    def learnt(self, kinds: Iterable[Kind]) -> Mapping[Kind, float]:
        """Tell the mean measured sizes of those kinds of tasks that have run before."""
        found: dict[Kind, float] = self._scheduler.pool_sizes.learnt(kinds)
        return found

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Note which groups of tasks will run, to learn their sizes."""
        self._scheduler.pool_sizes.expect(kind_by_group)


class ClientView:
    """What a client knows: asked of its scheduler.

    Parameters
    ----------
    ask
        Calls :func:`answer_view` on the scheduler.
    keys
        Keys that the client holds.
    """

    def __init__(self, ask: Callable[..., dict[str, Any]], keys: list[Key]) -> None:
        self._ask = ask
        answer = ask(keys=keys)
        self._pools = {address: pools_of_resources(names) for address, names in answer["resources"].items()}
        self._held: dict[Key, tuple[int, list[str]]] = answer["held"]

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""
        return tuple(sorted({pool for pools in self._pools.values() for pool in pools}))

    def known(self, key: Key) -> Known | None:
        """Tell what is in memory under a key."""
        if key not in self._held:
            return None
        nbytes, addresses = self._held[key]
        holders = {pool for address in addresses for pool in self._pools.get(address, ())}
        return Known(nbytes=float(nbytes), pools=tuple(sorted(holders)))

    def learnt(self, kinds: Iterable[Kind]) -> Mapping[Kind, float]:
        """Ask for the mean measured sizes of those kinds of tasks that have run before."""
        found = self._ask(kinds=[tuple(kind) for kind in kinds])["learnt"]
        return {Kind(*kind): nbytes for kind, nbytes in found.items()}

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Expect nothing: what is explained does not run."""


def answer_view(keys: Iterable[Key] = (), kinds: Iterable[tuple[Any, ...]] = (), dask_scheduler: Any = None) -> Any:
    """Answer a client's view, on its scheduler, which may have nothing of ours: this travels by value.

    Parameters
    ----------
    keys
        Keys of which size and holders are wanted, where they are in memory.
    kinds
        Kinds of tasks of which the mean measured size is wanted, as plain tuples.
    dask_scheduler
        The scheduler, filled in by Dask.

    Returns
    -------
    dict
        ``resources``: names by address of worker; ``held``: (bytes, addresses of holders) by key; ``learnt``: bytes by
        kind.
    """
    book = getattr(dask_scheduler, "pool_sizes", None)
    states = [ts for key in keys if (ts := dask_scheduler.tasks.get(key)) is not None and ts.state == "memory"]
    return {
        "resources": {address: list(ws.resources) for address, ws in dask_scheduler.workers.items()},
        "held": {ts.key: (ts.get_nbytes(), [ws.address for ws in ts.who_has or ()]) for ts in states},
        "learnt": {} if book is None else {tuple(kind): nbytes for kind, nbytes in book.learnt(kinds).items()},
    }
