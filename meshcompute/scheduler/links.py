"""What a live scheduler knows of links: rates that transfers showed, and what it takes to fetch a task's inputs.

Covers the part of the subclass of distributed's scheduler (:mod:`meshcompute.scheduler.state`) that measures links
between pools and counts with them when a worker is chosen. A part of the one door to distributed's scheduler
internals. Does not cover placement, which counts with the same links (:mod:`meshcompute.links`).

Notes
-----
Workers tell the scheduler with every heartbeat how fast each of their last fetches of more than a megabyte was, and
from whom (``Worker._update_metrics_received_data``). Stock adds that up per pair of workers, only to draw it, and
counts with one bandwidth for the whole cluster (distributed#2743).
"""

from __future__ import annotations

import logging
from typing import Any

from distributed.metrics import monotonic
from distributed.scheduler import Scheduler

from meshcompute.errors import SettingError
from meshcompute.links import Link, LinkTable, RateBook, parse_links
from meshcompute.pools import pools_of_resources
from meshcompute.scheduler.queues import or_stock
from meshcompute.settings import setting

__all__ = ["LinkScheduler"]

logger = logging.getLogger(__name__)

_UPDATE_SECONDS = 2.0  # a heartbeat brings rates at most twice a second


class LinkScheduler(Scheduler):
    """A scheduler that knows links between pools.

    Notes
    -----
    Never made by its constructor: see :class:`meshcompute.scheduler.state.PoolScheduler`.
    """

    #: Measured rates.
    pool_rates: RateBook
    #: What is given, and what was measured up to a moment ago.
    pool_links: LinkTable
    _links_given: tuple[Link, ...]
    _links_due: float
    _pool_by_worker: dict[Any, str | None]

    def start_links(self) -> None:
        """Begin to measure. Called once, on the event loop."""
        self.pool_rates = RateBook()
        self._pool_by_worker = {}
        self._links_due = 0.0
        try:
            self._links_given = parse_links(setting("links"))
        except SettingError:
            logger.exception("The links of the scheduler's own configuration are left out")
            self._links_given = ()
        self.pool_links = LinkTable(given=self._links_given)

    def give_links(self, links: tuple[Link, ...] | None, objective: str | None) -> None:
        """Take over what a client says of links.

        Parameters
        ----------
        links
            As of its setting ``meshcompute.links``; None: it has none, and what was said before stays.
        objective
            The same for its setting ``meshcompute.objective``.
        """
        given = self._links_given if links is None else links
        objective = objective or self.pool_links.objective
        if given != self._links_given or objective != self.pool_links.objective:
            self._links_given = given
            self.pool_links = LinkTable(given=given, measured=self.pool_rates.rates(), objective=objective)

    def pool_of_worker(self, ws: Any) -> str | None:
        """Name of a worker's pool, of several the first."""
        try:
            return self._pool_by_worker[ws]
        except KeyError:
            pools = pools_of_resources(ws.resources)
            pool = self._pool_by_worker[ws] = pools[0] if pools else None
            return pool

    def add_resources(self, worker: str, resources: dict[str, float] | None = None) -> Any:
        self._pool_by_worker.clear()
        return super().add_resources(worker, resources)

    def remove_resources(self, worker: str) -> None:
        self._pool_by_worker.clear()
        super().remove_resources(worker)

    def heartbeat_worker(self, *, address: str, metrics: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = super().heartbeat_worker(address=address, metrics=metrics, **kwargs)
        if metrics["bandwidth"]["workers"]:
            self._note_rates(address, metrics["bandwidth"]["workers"])
        return answer

    @or_stock(None)
    def _note_rates(self, address: str, rates: dict[str, tuple[float, int]]) -> None:
        receiver = self.workers.get(address)
        destination = self.pool_of_worker(receiver) if receiver is not None else None
        if destination is None:
            return
        for other, (total, n) in rates.items():
            sender = self.workers.get(other)
            source = self.pool_of_worker(sender) if sender is not None else None
            if source is not None and n:
                self.pool_rates.add(source, destination, total / n)
        now = monotonic()
        if now >= self._links_due:
            self._links_due = now + _UPDATE_SECONDS
            self.pool_links = LinkTable(
                given=self._links_given, measured=self.pool_rates.rates(), objective=self.pool_links.objective
            )

    def get_comm_cost(self, ts: Any, ws: Any) -> float:
        if ts.dependencies:  # also of a task without a pool, which placement has left open
            seconds = self._seconds_to_fetch(ts, ws)
            if seconds is not None:
                return seconds
        return float(super().get_comm_cost(ts, ws))

    @or_stock(None)
    def _seconds_to_fetch(self, ts: Any, ws: Any) -> float | None:
        """Seconds until a worker has a task's inputs, each by the best link; None where nothing is known of links."""
        links, here = self.pool_links, self.pool_of_worker(ws)
        if here is None or not (links.given or links.measured):
            return None
        has = ws.has_what
        seconds = 0.0
        for dep in ts.dependencies:
            if dep in has:
                continue
            nbytes = dep.get_nbytes()
            pools = {self.pool_of_worker(holder) for holder in dep.who_has or ()}
            if not pools or here in pools or None in pools:
                seconds += nbytes / self.bandwidth
            else:
                seconds += min([links.seconds(pool, here, nbytes) for pool in pools if pool is not None])
        return seconds
