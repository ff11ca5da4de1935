"""Change how many workers the sites of a running cluster have.

Covers retiring workers before their site ends them, and adapting sites to what their workers do. Does not cover how
many there should be (:mod:`meshcompute.mesh.scaling` decides).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

from distributed.deploy.cluster import Cluster

from meshcompute.mesh.members import MeshSites
from meshcompute.mesh.scaling import SiteLoad, adapted_containers, containers_for
from meshcompute.mesh.sites import SiteError

__all__ = ["Scaler"]

logger = logging.getLogger("meshcompute.cluster")


class Scaler:
    """Scales and adapts the sites of one cluster.

    Parameters
    ----------
    cluster
        The cluster, as Dask sees it.
    mesh
        Its sites.
    timeout_seconds
        How long a site may take to start or end workers.
    say
        Called with a line for people when a site has another number of workers.
    """

    def __init__(
        self, cluster: Cluster, mesh: MeshSites, *, timeout_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._mesh = mesh
        self._timeout_seconds = timeout_seconds
        self._say = say
        self._adapting: dict[int, asyncio.Task[None]] = {}

    async def scale(self, workers_by_site: Mapping[int, int]) -> None:
        """Bring sites to numbers of workers, and wait until they have them.

        Parameters
        ----------
        workers_by_site
            Worker processes; each site rounds up to whole containers.
        """
        each = {site: self._processes_per_container(site) for site in workers_by_site}
        wanted = {site: containers_for(workers, each[site]) for site, workers in workers_by_site.items()}
        self.forget(workers_by_site)
        for site, containers in wanted.items():
            await self._set(site, containers)

    async def adapt(self, sites: Collection[int], minimum: int, maximum: int, interval_seconds: float) -> None:
        """Look at sites from now on, and change the number of their containers.

        Parameters
        ----------
        sites
            Their numbers.
        minimum, maximum
            Containers of each.
        interval_seconds
            How long between two looks.
        """
        self.forget(sites)
        for site in sites:
            self._adapting[site] = asyncio.create_task(self._adapt(site, minimum, maximum, interval_seconds))

    def stop(self) -> None:
        """Adapt nothing any more."""
        self.forget(list(self._adapting))

    def forget(self, sites: Collection[int]) -> None:
        """Adapt sites no more.

        Parameters
        ----------
        sites
            Their numbers.
        """
        for site in sites:
            if site in self._adapting:
                self._adapting.pop(site).cancel()

    def _processes_per_container(self, site: int) -> int:
        return len(self._mesh.statuses[site].workers) // self._mesh.plan.workers[site].containers

    async def _set(self, site: int, containers: int) -> None:
        if containers == self._mesh.plan.workers[site].containers:
            return
        each = self._processes_per_container(site)
        leaving = {worker.name for worker in self._mesh.statuses[site].workers[containers * each :]}
        here = self._cluster.scheduler_info["workers"].items()
        addresses = [address for address, info in here if info["name"] in leaving]
        if addresses:
            # What they hold moves to others first; the site ends them, so that it does not start them again.
            await self._cluster.scheduler_comm.retire_workers(workers=addresses, close_workers=False, remove=False)
        await self._mesh.set_containers(site, containers, deadline=time.monotonic() + self._timeout_seconds)
        self._say(f"{self._mesh.name_of(site)}: {containers * each} workers")

    async def _adapt(self, site: int, minimum: int, maximum: int, interval_seconds: float) -> None:
        before: SiteLoad | None = None
        while True:
            try:
                before = load = await self._load(site, before)
                await self._set(site, adapted_containers(load, minimum=minimum, maximum=maximum))
            except (SiteError, OSError) as exc:
                logger.warning("cannot adapt site=%s error=%s", self._mesh.name_of(site), exc)
            await asyncio.sleep(interval_seconds)

    async def _load(self, site: int, before: SiteLoad | None) -> SiteLoad:
        names = {worker.name for worker in self._mesh.statuses[site].workers}
        known = await self._cluster.scheduler_comm.identity(n_workers=-1)
        workers = [worker for worker in known["workers"].values() if worker["name"] in names]
        counts = [worker["metrics"].get("task_counts", {}) for worker in workers]
        n_executing = sum(count.get("executing", 0) for count in counts)
        n_waiting = sum(count.get("ready", 0) + count.get("constrained", 0) for count in counts)
        n_threads = sum(worker["nthreads"] for worker in workers)
        containers = self._mesh.plan.workers[site].containers
        if before is not None and before.containers != containers:
            before = None  # it was scaled: what was seen before counts no more
        is_busy = n_threads > 0 and n_executing >= n_threads and n_waiting > 0
        return SiteLoad(
            containers=containers,
            n_threads=n_threads,
            n_executing=n_executing,
            n_waiting=n_waiting,
            n_idle_looks=0 if n_executing or n_waiting else 1 + (before.n_idle_looks if before else 0),
            n_busy_looks=1 + (before.n_busy_looks if before else 0) if is_busy else 0,
        )
