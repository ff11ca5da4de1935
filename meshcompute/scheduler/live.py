"""What a cluster holds right now, as the planner needs to know it.

Covers three views with one face: a scheduler's own state (:class:`SchedulerView`), what a client can ask for
(:class:`ClientView`), and nothing at all (:class:`EmptyView`); and which scheduler runs in this process. Does not cover
any decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import dask
from dask._task_spec import GraphNode
from dask.typing import Key
from dask.utils import parse_timedelta

from meshcompute.graphs.learning import Kind
from meshcompute.links import Link, LinkTable
from meshcompute.pools import pools_of_resources

__all__ = ["ClientView", "EmptyView", "Known", "SchedulerView", "View", "answer_view", "find_scheduler"]


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
    stays
        Pools that the value must not leave; none: it may go anywhere.
    """

    nbytes: float
    pools: tuple[str, ...]
    task: GraphNode | None = None
    stays: tuple[str, ...] = ()

    @property
    def is_in_memory(self) -> bool:
        """Whether the value can be read now."""
        return self.nbytes >= 0


class View(Protocol):
    """What the planner asks of a cluster."""

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""

    def among(self, keys: Iterable[Key]) -> list[Key]:
        """Pick those keys of which something may be known."""

    def known(self, key: Key) -> Known | None:
        """Tell what is known about a task, None if nothing."""

    def learnt(self, kind_by_group: Mapping[str, Kind]) -> Mapping[str, float]:
        """Tell the mean measured sizes, by group, of those that have run before, they themselves or their kind."""

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Note which groups of tasks will run, to learn their sizes."""

    def links(self, given: tuple[Link, ...] | None, objective: str) -> LinkTable:
        """Tell what is known of links; what a client says of them counts before what the scheduler was told."""

    def threads(self) -> Mapping[str, float]:
        """Count the threads of every pool."""

    def durations(self, names: Iterable[str]) -> dict[str, float]:
        """Tell how many seconds tasks of these kinds take, or are taken to take."""

    def watch_borders(self) -> None:
        """Note that there are values that must not leave their pools."""


class EmptyView:
    """No cluster."""

    def pools(self) -> tuple[str, ...]:
        """Name no pool."""
        return ()

    def among(self, keys: Iterable[Key]) -> list[Key]:
        """Pick no key."""
        return []

    def known(self, key: Key) -> Known | None:
        """Know nothing."""
        return None

    def learnt(self, kind_by_group: Mapping[str, Kind]) -> Mapping[str, float]:
        """Have learnt nothing."""
        return {}

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Expect nothing."""

    def links(self, given: tuple[Link, ...] | None, objective: str) -> LinkTable:
        """Know only what was given."""
        return LinkTable(given=given or (), objective=objective)

    def threads(self) -> Mapping[str, float]:
        """Know of no thread."""
        return {}

    def durations(self, names: Iterable[str]) -> dict[str, float]:
        """Take every task to take the same time."""
        return dict.fromkeys(names, _unknown_seconds())

    def watch_borders(self) -> None:
        """Have nothing to watch."""


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

    def among(self, keys: Iterable[Key]) -> list[Key]:
        """Pick the keys of tasks that the scheduler knows."""
        tasks = self._scheduler.tasks
        return [key for key in keys if key in tasks]

    def known(self, key: Key) -> Known | None:
        """Tell what the scheduler knows about a task."""
        ts = self._scheduler.tasks.get(key)
        if ts is None:
            return None
        if ts.state == "memory":
            holders = {pool for ws in list(ts.who_has or ()) for pool in pools_of_resources(ws.resources)}
            nbytes, pools = float(ts.get_nbytes()), tuple(sorted(holders))
        elif ts.run_spec is None:
            return None
        else:
            nbytes, pools = -1.0, pools_of_resources(ts.resource_restrictions)
        stays = getattr(ts.resource_restrictions, "stays", ())
        return Known(nbytes=nbytes, pools=pools, task=ts.run_spec, stays=stays)

    def learnt(self, kind_by_group: Mapping[str, Kind]) -> Mapping[str, float]:
        """Tell the mean measured sizes, by group, of those that have run before, they themselves or their kind."""
        found: dict[str, float] = self._scheduler.pool_sizes.learnt(kind_by_group)
        return found

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Note which groups of tasks will run, to learn their sizes."""
        self._scheduler.pool_sizes.expect(kind_by_group)

    def links(self, given: tuple[Link, ...] | None, objective: str) -> LinkTable:
        """Tell what is known of links; what a client says of them counts before what the scheduler was told."""
        links = self._scheduler.pool_links
        said = links.given if given is None else given
        return LinkTable(given=said, measured=links.measured, objective=objective)

    def watch_borders(self) -> None:
        """Let the scheduler refuse what would take values out of their pools, from now on."""
        self._scheduler.has_borders = True

    def threads(self) -> Mapping[str, float]:
        """Count the threads of every pool."""
        return _threads(
            (pools_of_resources(ws.resources), ws.nthreads) for ws in list(self._scheduler.workers.values())
        )

    def durations(self, names: Iterable[str]) -> dict[str, float]:
        """Tell how many seconds tasks of these kinds take, or are taken to take."""
        prefixes, unknown = self._scheduler.task_prefixes, _unknown_seconds()
        found = {name: prefixes[name].duration_average if name in prefixes else -1.0 for name in names}
        return {name: seconds if seconds >= 0 else unknown for name, seconds in found.items()}


def _threads(workers: Iterable[tuple[Iterable[str], int]]) -> dict[str, float]:
    threads: dict[str, float] = {}
    for pools, nthreads in workers:
        for pool in pools:
            threads[pool] = threads.get(pool, 0.0) + nthreads
    return threads


def _unknown_seconds() -> float:
    """How long distributed takes a task to take of which it knows nothing."""
    return float(parse_timedelta(dask.config.get("distributed.scheduler.unknown-task-duration", "500ms")))


def find_scheduler(scheduler_id: str) -> Any:
    """Find a scheduler of this process.

    Parameters
    ----------
    scheduler_id
        Its id.

    Returns
    -------
    Scheduler or None
        The one with this id, or else the only one that runs here: a client does not know the id yet that sends a graph
        before it is connected, or while its scheduler is started again.
    """
    from distributed import Scheduler
    from distributed.core import Status

    running = [s for s in list(Scheduler._instances) if s.status is Status.running]
    return next((s for s in running if s.id == scheduler_id), running[0] if len(running) == 1 else None)


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
        self._rates: dict[tuple[str, str], float] = answer["rates"]
        self._links_given: list[dict[str, Any]] = answer["links"]
        self._nthreads: dict[str, int] = answer["nthreads"]
        self._held: dict[Key, tuple[int, list[str], tuple[str, ...]]] = answer["held"]

    def pools(self) -> tuple[str, ...]:
        """Name the pools that have a worker, sorted."""
        return tuple(sorted({pool for pools in self._pools.values() for pool in pools}))

    def among(self, keys: Iterable[Key]) -> list[Key]:
        """Pick the keys of values in memory."""
        return [key for key in keys if key in self._held]

    def known(self, key: Key) -> Known | None:
        """Tell what is in memory under a key."""
        if key not in self._held:
            return None
        nbytes, addresses, stays = self._held[key]
        holders = {pool for address in addresses for pool in self._pools.get(address, ())}
        return Known(nbytes=float(nbytes), pools=tuple(sorted(holders)), stays=tuple(stays))

    def learnt(self, kind_by_group: Mapping[str, Kind]) -> Mapping[str, float]:
        """Ask for the mean measured sizes, by group, of those that have run before, they themselves or their kind."""
        found: dict[str, float] = self._ask(kinds={group: tuple(kind) for group, kind in kind_by_group.items()})[
            "learnt"
        ]
        return found

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Expect nothing: what is explained does not run."""

    def links(self, given: tuple[Link, ...] | None, objective: str) -> LinkTable:
        """Tell what is known of links; what this client says of them counts before what the scheduler was told."""
        said = tuple([Link(**link) for link in self._links_given]) if given is None else given
        return LinkTable(given=said, measured=self._rates, objective=objective)

    def threads(self) -> Mapping[str, float]:
        """Count the threads of every pool."""
        return _threads((self._pools[address], n) for address, n in self._nthreads.items())

    def watch_borders(self) -> None:
        """Leave it to the scheduler, when the work is sent."""

    def durations(self, names: Iterable[str]) -> dict[str, float]:
        """Ask how many seconds tasks of these kinds take."""
        found, unknown = self._ask(names=list(names))["durations"], _unknown_seconds()
        return {name: seconds if seconds >= 0 else unknown for name, seconds in found.items()}


def answer_view(
    keys: Iterable[Key] = (),
    kinds: Mapping[str, tuple[Any, ...]] | None = None,
    names: Iterable[str] = (),
    dask_scheduler: Any = None,
) -> Any:
    """Answer a client's view, on its scheduler, which may have nothing of ours: this travels by value.

    Parameters
    ----------
    keys
        Keys of which size and holders are wanted, where they are in memory.
    kinds
        Groups of tasks of which the mean measured size is wanted: their kinds, as plain tuples, by name.
    names
        Kinds of tasks, as the dashboard names them, of which the mean duration is wanted.
    dask_scheduler
        The scheduler, filled in by Dask.

    Returns
    -------
    dict
        ``resources``: names by address of worker, ``nthreads`` likewise; ``held``: (bytes, holders' addresses, pools
        not to leave) by key; ``learnt``: bytes by group; ``durations``: seconds by kind, -1 where unknown; ``links``:
        what was given, and ``rates``: measured bytes per second by (source, destination).
    """
    book = getattr(dask_scheduler, "pool_sizes", None)
    links = getattr(dask_scheduler, "pool_links", None)
    prefixes = dask_scheduler.task_prefixes
    states = [ts for key in keys if (ts := dask_scheduler.tasks.get(key)) is not None and ts.state == "memory"]
    return {
        "resources": {address: list(ws.resources) for address, ws in dask_scheduler.workers.items()},
        "nthreads": {address: ws.nthreads for address, ws in dask_scheduler.workers.items()},
        "links": [{name: getattr(link, name) for name in link.__slots__} for link in (links.given if links else ())],
        "rates": dict(links.measured) if links else {},
        "durations": {name: prefixes[name].duration_average if name in prefixes else -1.0 for name in names},
        "held": {
            ts.key: (
                ts.get_nbytes(),
                [ws.address for ws in ts.who_has or ()],
                getattr(ts.resource_restrictions, "stays", ()),
            )
            for ts in states
        },
        "learnt": {} if book is None else book.learnt(kinds or {}),
    }
