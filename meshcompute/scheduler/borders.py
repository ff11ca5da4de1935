"""What a live scheduler refuses, so that values which must not leave their pools do not.

Covers the part of the subclass of distributed's scheduler (:mod:`meshcompute.scheduler.state`) that looks at tasks as
they come in, from any client, and at every way on which the scheduler itself has values moved. A part of the one door
to distributed's scheduler internals. Does not cover plans (:mod:`meshcompute.graphs.sovereignty`).

Refused are: tasks that read such a value elsewhere; ``gather`` by clients, also directly from the workers, whose
addresses they do not get; ``replicate`` and ``rebalance``; copies that the Active Memory Manager would make. A task
that says nothing about pools is held to the value's own pool instead, and what it makes must not leave either.

Not refused, because the scheduler has no part in it: what a task itself sends or writes, ``client.run``, and a program
that talks to a worker's port without asking the scheduler. Who may run code at a site can take data out of it: this
keeps people from doing so by mistake.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dask.utils import key_split

from meshcompute.errors import SovereigntyError
from meshcompute.pools import Held, resource_of
from meshcompute.scheduler.links import LinkScheduler

__all__ = ["BorderScheduler"]

# A resource that no worker has: what a task asks for that was refused, until it is told so.
_REFUSED = "meshcompute-refused"
_MOST_REFUSED = 1000
# States of a task in which nobody counts with what it asks for.
_AT_REST = {"released", "waiting", "memory", "erred"}


class BorderScheduler(LinkScheduler):
    """A scheduler that keeps values in their pools.

    Notes
    -----
    Never made by its constructor: see :class:`meshcompute.scheduler.state.PoolScheduler`.
    """

    #: Whether there ever was a value that must not leave its pools; until then nothing here costs anything.
    has_borders: bool
    #: Why tasks were refused, by key, until they failed.
    pool_refused: dict[Any, SovereigntyError]

    def start_borders(self) -> None:
        """Begin to watch. Called once, on the event loop."""
        self.has_borders = False
        self.pool_refused = {}

    def _stays(self, key: Any) -> tuple[str, ...]:
        ts = self.tasks.get(key)
        held = ts.resource_restrictions if ts is not None else None
        return held.stays if type(held) is Held else ()

    def check_borders(self, tasks: Iterable[Any]) -> None:
        """Hold new tasks to the pools that what they read must not leave, or refuse them.

        Parameters
        ----------
        tasks
            New tasks of one graph, with their dependencies.
        """
        tasks = list(tasks)
        # Inputs first: what one task may not let out, the next of the same graph may not either.
        todo = [ts for ts in tasks if self._confined(ts)]
        new = set(tasks)
        while todo:
            ts = todo.pop()
            if self._is_settled(ts):
                todo += [dts for dts in ts.dependents if dts in new]

    def confine_known(self, plan: Mapping[Any, Held]) -> None:
        """Give values that are here already the borders that a plan gives them; what had left before has left.

        Parameters
        ----------
        plan
            What the tasks of one graph are held to, by key.
        """
        for key in plan.keys() & self.tasks.keys():
            ts, planned = self.tasks[key], plan[key]
            held = ts.resource_restrictions
            if not planned.stays or (type(held) is Held and (held.stays or held.leaves)):
                continue
            if ts.state in _AT_REST:
                ts.resource_restrictions = planned
            elif type(held) is Held:  # queued or at work, by what it asks for: that must stay as it is
                ts.resource_restrictions = Held(
                    held.pool, held, is_pinned=True, is_fetching=held.is_fetching, stays=planned.stays
                )

    @staticmethod
    def _confined(ts: Any) -> list[Any]:
        """List the inputs of a task that must not leave their pools."""
        return [dep for dep in ts.dependencies if getattr(dep.resource_restrictions, "stays", ())]

    def _is_settled(self, ts: Any) -> bool:
        """Settle one task. Returns whether what it makes got other borders than it had."""
        held = ts.resource_restrictions
        if held == {_REFUSED: 1} or (type(held) is Held and held.leaves):
            return False
        confined = self._confined(ts)
        allowed = confined[0].resource_restrictions.stays
        for dep in confined[1:]:
            allowed = tuple([pool for pool in allowed if pool in dep.resource_restrictions.stays])
        if type(held) is Held:
            pools: tuple[str, ...] = (held.pool,)
            if held.stays and held.pool in allowed and set(held.stays) <= set(allowed):
                return False
        else:
            pools = tuple([pool for pool in allowed if self.resources.get(resource_of(pool))]) or allowed
        pool = next((pool for pool in pools if pool in allowed), None)
        if pool is None or not self._may_run(ts, pool):
            where = f" in pool {held.pool}" if type(held) is Held else " on workers elsewhere" if allowed else ""
            names = " and ".join(sorted({repr(str(key_split(dep.key))) for dep in confined}))
            error = SovereigntyError(names, confined[0].resource_restrictions.stays, f"task {ts.key!r}{where}")
            if len(self.pool_refused) > _MOST_REFUSED:  # those that were cancelled before they could fail
                self.pool_refused = {key: why for key, why in self.pool_refused.items() if key in self.tasks}
            self.pool_refused[ts.key] = error
            self.resources.setdefault(_REFUSED, {})
            ts.resource_restrictions = {_REFUSED: 1}
            ts.worker_restrictions = ts.host_restrictions = None
            ts.loose_restrictions = False
            return False
        ts.resource_restrictions = Held(pool, held, is_pinned=True, stays=allowed)
        return True

    def _may_run(self, ts: Any, pool: str) -> bool:
        """Whether the workers that a task names are all of a pool."""
        if ts.host_restrictions:
            return False
        members = self.resources.get(resource_of(pool), ())
        return not ts.worker_restrictions or all(address in members for address in ts.worker_restrictions)

    def refuse_values(self, keys: Iterable[Any], reader: str) -> None:
        """Refuse to hand values out that must not leave their pools.

        Parameters
        ----------
        keys
            Keys of the values.
        reader
            Who wants them.

        Raises
        ------
        SovereigntyError
            One of them must not.
        """
        for key in keys:
            if stays := self._stays(key):
                raise SovereigntyError(repr(str(key)), stays, reader)

    # ------------------------------------------------------------------ the ways on which values move

    async def gather(self, keys: Collection[Any], serializers: list[str] | None = None) -> Any:
        if self.has_borders:
            self.refuse_values(keys, "a client")
        return await super().gather(keys, serializers)

    def get_who_has(self, keys: Iterable[Any] | None = None) -> Any:
        if self.has_borders and keys is not None:  # whoever knows the address could ask the worker itself
            keys = list(keys)
            self.refuse_values(keys, "a client")
        found = super().get_who_has(keys)
        return {key: where for key, where in found.items() if not self._stays(key)} if self.has_borders else found

    async def replicate(self, keys: list[Any], **kwargs: Any) -> Any:
        if self.has_borders:
            self.refuse_values(keys, "replicate(), for workers of all pools,")
        return await super().replicate(keys, **kwargs)

    async def rebalance(self, keys: Iterable[Any] | None = None, **kwargs: Any) -> Any:
        if self.has_borders and keys is None:
            keys = [key for key, ts in self.tasks.items() if ts.who_has and not self._stays(key)]
        elif self.has_borders:
            keys = list(keys or ())
            self.refuse_values(keys, "rebalance(), for workers of all pools,")
        return await super().rebalance(keys, **kwargs)

    async def gather_on_worker(self, worker_address: str, who_has: dict[Any, list[str]]) -> Any:
        refused = self._foreign_to(worker_address, who_has)
        kept = {key: holders for key, holders in who_has.items() if key not in refused}
        return set(refused) | set(await super().gather_on_worker(worker_address, kept))

    def request_acquire_replicas(self, addr: str, keys: Iterable[Any], *, stimulus_id: str) -> None:
        keys = list(keys)
        refused = self._foreign_to(addr, keys)
        super().request_acquire_replicas(addr, [key for key in keys if key not in refused], stimulus_id=stimulus_id)

    def _foreign_to(self, address: str, keys: Iterable[Any]) -> set[Any]:
        """Keys of values that must not get to a worker."""
        if not self.has_borders:
            return set()
        return {
            key
            for key in keys
            if (stays := self._stays(key))
            and not any(address in self.resources.get(resource_of(pool), ()) for pool in stays)
        }
