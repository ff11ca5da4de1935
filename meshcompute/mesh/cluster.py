"""One Dask cluster over several data centres: :class:`MeshCluster`.

Covers the composition: sites (:mod:`meshcompute.mesh.members`), the scheduler and the workers as Dask sees them,
scaling, and that everything is taken down whatever happens here. Does not cover what happens when this process is
killed: then every site ends its part when its lease is over.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import secrets
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import dask
from distributed.core import Status, rpc
from distributed.deploy.cluster import Cluster
from distributed.objects import SchedulerInfo
from distributed.utils import NoOpAwaitable

from meshcompute.errors import MeshError
from meshcompute.mesh.clusterrecord import ClusterRecord, find_record, forget, remember
from meshcompute.mesh.control import SiteControl
from meshcompute.mesh.localports import choose_port
from meshcompute.mesh.members import MeshSites
from meshcompute.mesh.plan import (
    PREFIX_BITS,
    SCHEDULER_SITE,
    MeshPlan,
    check_wishes,
    parse_prefix,
    prefix_of,
    told_plainly,
)
from meshcompute.mesh.records import attached_sites, record_of
from meshcompute.mesh.registration import wait_answering, wait_registered
from meshcompute.mesh.renewals import Renewals
from meshcompute.mesh.scaling import share_workers
from meshcompute.mesh.sites import SiteError, SiteRefusedError, parse_site
from meshcompute.mesh.sitescaling import Scaler
from meshcompute.mesh.versions import installed_versions, render_versions
from meshcompute.protocol import DEFAULT_SOCKET, SchedulerRequest, WorkerRequest

__all__ = ["MeshCluster"]

logger = logging.getLogger("meshcompute.cluster")

CLIENT_PORT = 8786  # Dask's own, so that Client("localhost:8786") finds the cluster
DASHBOARD_PORT = 8787
START_TIMEOUT_SECONDS = 120.0
STATUS_LOOK_SECONDS = 1.0
REMOVE_ALL_SECONDS = 60.0

_OPEN: weakref.WeakSet[MeshCluster] = weakref.WeakSet()


class MeshCluster(Cluster):
    """A Dask cluster whose workers are in several data centres.

    Parameters
    ----------
    sites
        ``user@host[:port]`` of each site, in the order in which they are numbered from 1.
    prefix
        Of the data plane, e.g. ``fda5:c0ff:eeee``; a random one by default.
    allow_partial
        Whether to go on without sites that cannot be had.
    name
        What people call the cluster.
    workers
        What every site should run; its own defaults by default (one container of four processes).
    client_port, dashboard_port
        Ports of this host's loopback address; None takes 8786 and 8787, or free ones if those are taken.
    image
        Image of the scheduler.
    lease_seconds
        How long a site keeps its part without hearing from here.
    mtu
        Of the data plane.
    start_timeout_seconds
        How long everything together may take to be ready.
    scheduler
        How this host's own daemon is reached.
    socket
        Path of the daemons' sockets.
    ssh
        OpenSSH's client and arguments of its own, e.g. ``("ssh", "-F", file)``.
    site_command
        How ``meshcompute-site`` is called at the sites.
    propagate
        Whether clients of this process place every task, as ``propagate_pools()`` does, while this cluster runs.
    quiet
        Whether nothing is printed.
    progress
        Called with each line instead of printing it.
    asynchronous
        Whether this is used in coroutines: ``async with MeshCluster([...], asynchronous=True)``.
    loop
        Event loop to use.

    Notes
    -----
    It is ready when all workers are registered and every link has shaken hands. Leases are renewed in the background;
    closing it, Ctrl-C and the end of the process take everything down.
    """

    def __init__(
        self,
        sites: Sequence[str],
        *,
        prefix: str | None = None,
        allow_partial: bool = False,
        name: str | None = None,
        workers: WorkerRequest | None = None,
        client_port: int | None = None,
        dashboard_port: int | None = None,
        image: str | None = None,
        lease_seconds: float = 120.0,
        mtu: int = 1280,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
        scheduler: str = "local",
        socket: str = DEFAULT_SOCKET,
        ssh: Sequence[str] = ("ssh",),
        site_command: str = "meshcompute-site",
        propagate: bool = True,
        quiet: bool = False,
        progress: Callable[[str], None] | None = None,
        asynchronous: bool = False,
        loop: Any = None,
    ) -> None:
        if isinstance(sites, str) or not sites:
            raise ValueError(f"sites is a list with at least one user@host, not {sites!r}")
        addresses = [parse_site(scheduler, socket=socket), *(parse_site(site, socket=socket) for site in sites)]
        controls = {number: SiteControl(a, ssh=ssh, site_command=site_command) for number, a in enumerate(addresses)}
        cluster_id = uuid.uuid4().hex
        with told_plainly():
            plan = MeshPlan(
                cluster_id=cluster_id,
                name=name or f"mesh-{cluster_id[:8]}",
                prefix=parse_prefix(prefix) if prefix else prefix_of(secrets.randbits(PREFIX_BITS)),
                members=(),
                scheduler=SchedulerRequest(client_port=client_port or CLIENT_PORT, image=image),
                lease_seconds=lease_seconds,
                mtu=mtu,
            )
        check_wishes(plan)  # before any site is asked
        self.mesh = MeshSites(
            controls, plan, workers=workers or WorkerRequest(), allow_partial=allow_partial, say=self._say
        )
        self._ports = (client_port, dashboard_port)
        self._ssh, self._site_command, self._socket = tuple(ssh), site_command, socket
        self._start_timeout_seconds = start_timeout_seconds
        self._propagate = propagate
        self._progress = progress
        self._record: ClusterRecord | None = None
        self._setup(name=plan.name, quiet=quiet, asynchronous=asynchronous, loop=loop, owns=True)

    def _setup(self, *, name: str, quiet: bool, asynchronous: bool, loop: Any, owns: bool) -> None:
        self._owns = owns
        self._began = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._boot: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._scaler = Scaler(self, self.mesh, timeout_seconds=self._start_timeout_seconds, say=self._say)
        self._setting: Any = None
        self._fatal: SiteError | None = None
        self._renewals = Renewals(self.mesh, say=self._say, on_lost=self._on_lost, on_renewed=self._remember)
        super().__init__(asynchronous=asynchronous, loop=loop, quiet=quiet, name=name)
        _OPEN.add(self)
        if not self.asynchronous:
            self._loop_runner.start()
            try:
                self.sync(self._start)
            except BaseException:
                self.close()
                raise

    def __await__(self) -> Generator[Any, None, Self]:
        async def started() -> Self:
            if self.status == Status.created:
                await self._start()
            return self

        return started().__await__()

    @classmethod
    def from_name(cls, name: str | None = None, *, asynchronous: bool = False, loop: Any = None) -> MeshCluster:
        """Attach to a cluster that another process of this person keeps on this host.

        Parameters
        ----------
        name
            Its name; None for the only one that there is.
        asynchronous
            As for a new cluster.
        loop
            As for a new cluster.

        Returns
        -------
        MeshCluster
            Closing it lets go of the cluster and does not end it. It cannot be scaled from here.

        Raises
        ------
        UnknownClusterError
            There is none of that name.
        """
        record = find_record(name)
        self = cls.__new__(cls)
        self.mesh = attached_sites(record, say=self._say)
        self._progress = None
        self._propagate = True
        self._record = record
        self._start_timeout_seconds = START_TIMEOUT_SECONDS
        self._setup(name=record.name, quiet=True, asynchronous=asynchronous, loop=loop, owns=False)
        return self

    # Starting

    async def _start(self) -> None:
        self._boot = asyncio.create_task(self._boot_all() if self._owns else self._attach())
        try:
            await self._boot
        except BaseException:
            await self._close()
            if self._fatal is not None:
                raise self._fatal from None
            raise

    async def _attach(self) -> None:
        assert self._record is not None
        await self.mesh.refresh()
        self.scheduler_comm = rpc(self._record.client_address)
        # A scheduler tells one Cluster only of workers that come and go (its plugin for that has a fixed name), and
        # that is the one that keeps it: this one has to ask.
        self.scheduler_info = SchedulerInfo(await self.scheduler_comm.identity(n_workers=-1))
        self._in_background(self._ask_for_workers())
        self.status = Status.running
        self._set_propagate()

    async def _ask_for_workers(self) -> None:
        while True:
            await asyncio.sleep(STATUS_LOOK_SECONDS)
            with contextlib.suppress(OSError):
                self.scheduler_info = SchedulerInfo(await self.scheduler_comm.identity(n_workers=-1))

    async def _boot_all(self) -> None:
        deadline = self._began + self._start_timeout_seconds
        mesh = self.mesh
        await mesh.reach()
        self._say_versions()
        self._in_background(self._renewals.run())
        try:
            self._choose_ports(CLIENT_PORT, DASHBOARD_PORT)
            await mesh.start(deadline=deadline)
        except SiteRefusedError as exc:
            if exc.kind != "conflict" or None not in self._ports:
                raise
            # Perhaps another boot on this host was a moment faster at the usual ports: so once more, at others.
            self._choose_ports(0, 0)
            await mesh.start(deadline=deadline)
        status = mesh.scheduler_status
        assert status is not None
        assert status.scheduler is not None
        self.scheduler_comm = rpc(status.scheduler.client_address)
        await wait_answering(mesh, self.scheduler_comm, deadline=deadline)
        await super()._start()
        # When the scheduler dies, this connection is the first to know.
        assert self._watch_worker_status_task is not None
        self._watch_worker_status_task.add_done_callback(lambda _task: self._renewals.hurry(SCHEDULER_SITE))
        await wait_registered(mesh, self, deadline=deadline, timeout_seconds=self._start_timeout_seconds, say=self._say)
        self._set_propagate()
        self._record = record_of(mesh, ssh=self._ssh, site_command=self._site_command, socket=self._socket)
        self._remember()
        self._say(f"ready: {len(mesh.worker_names)} workers, scheduler at {status.scheduler.client_address}")
        if status.scheduler.dashboard_address:
            self._say(f"dashboard at {status.scheduler.dashboard_address}")

    def _choose_ports(self, *usual: int) -> None:
        client_port = choose_port("scheduler", self._ports[0], usual[0])
        dashboard_port = choose_port("dashboard", self._ports[1], usual[1], but_not=client_port)
        ports = {"client_port": client_port, "dashboard_port": dashboard_port}
        plan = self.mesh.plan
        self.mesh.plan = replace(plan, scheduler=plan.scheduler.model_copy(update=ports))

    def _set_propagate(self) -> None:
        if self._propagate:
            import meshcompute.clients  # noqa: F401 - hooks the clients that the setting is for

            self._setting = dask.config.set({"meshcompute.propagate": True})

    def _say_versions(self) -> None:
        infos = self.mesh.infos
        names = {name for info in infos.values() for name in info.packages}
        places = {"client": installed_versions(names), "scheduler": infos[SCHEDULER_SITE].packages}
        places |= {info.pool: info.packages for site, info in infos.items() if site != SCHEDULER_SITE}
        table = render_versions(
            {place: packages for place, packages in places.items() if packages}
        )  # others do not say
        if table:
            self._say(f"versions differ (work goes on; the same everywhere is safer):\n{table}")

    # Ending

    def _on_lost(self, site: int, error: SiteError) -> None:
        if self._boot is not None and not self._boot.done():
            self._fatal = error
            self._boot.cancel()
            return
        self._say(str(error))
        names = {worker.name for worker in self.mesh.statuses[site].workers}
        if site != SCHEDULER_SITE:
            self._scaler.forget([site])
            self.mesh.lose(site, error)
        if site != SCHEDULER_SITE and len(self.mesh.controls) > 1:
            self._say(f"going on without {error.site}")
            self._in_background(self._drop_workers(names))
            return
        self._fatal = error
        self._say(f"the {'scheduler' if site == SCHEDULER_SITE else 'last site'} is gone: ending the rest")
        self._in_background(self._close())

    async def _drop_workers(self, names: set[str]) -> None:
        """Tell the scheduler at once what it would learn from silent connections much later."""
        here = self.scheduler_info["workers"].items()
        with contextlib.suppress(OSError):  # it may be gone itself
            for address in [address for address, info in here if info["name"] in names]:
                await self.scheduler_comm.unregister(address=address, expected=True, stimulus_id="site-lost")

    def _remember(self) -> None:
        """Say on disk that the cluster is kept; a folder that went with the person's last session is no harm."""
        if self._record is not None:
            with contextlib.suppress(OSError):
                remember(self._record)

    async def _close(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        was_booting = self._boot is not None and not self._boot.done()
        if was_booting:
            assert self._boot is not None
            self._boot.cancel()
            await asyncio.wait([self._boot])
        self._scaler.stop()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._setting is not None:
            self._setting.__exit__(None, None, None)
        try:
            await super()._close()
        except Exception as exc:  # its scheduler may be gone: whatever that does to Dask, the sites are taken down
            logger.debug("Dask's part did not close in order", exc_info=exc)
        self.status = Status.closing  # Dask's part is; the sites are not yet
        if not self._owns:
            await self.mesh.disconnect()
        else:
            is_gone = await self.mesh.remove()
            forget(self.name)
            self._say("everything is taken down" if is_gone else "the rest goes by itself, see above")
        self.status = Status.closed
        _OPEN.discard(self)

    def close(self, timeout: float | None = None) -> Any:
        """Take the cluster down everywhere, and say so. Calling it again does nothing.

        Parameters
        ----------
        timeout
            How long to wait for it, in seconds.
        """
        if self._ending is not None and self._ending.done():  # Dask's status says "closed" when only its own part is
            self._ending.result()
            return NoOpAwaitable() if self.asynchronous else None
        # Not Dask's own method, which takes every RuntimeError for the end of the loop, and says nothing.
        result = self.sync(self._close, callback_timeout=REMOVE_ALL_SECONDS if timeout is None else timeout)
        if not self.asynchronous:
            self._loop_runner.stop()
        return result

    # Scaling

    def scale(self, n: int | Mapping[str, int], *, site: str | None = None) -> Any:
        """Change the number of workers, and wait until the sites have done so.

        Parameters
        ----------
        n
            Worker processes: of all sites together, of one, or by pool. Sites start whole containers.
        site
            The pool that is meant; all by default.

        Raises
        ------
        ScalingError
            There is no such number of workers.
        MeshError
            There is no such site, or the cluster belongs to another process.
        """
        return self.sync(self._scaler.scale, self._wanted_workers(n, site))

    def _wanted_workers(self, n: int | Mapping[str, int], site: str | None) -> dict[int, int]:
        if isinstance(n, Mapping):
            return {number: count for pool, count in n.items() for number in self._sites_of(pool)}
        if site is not None:
            return dict.fromkeys(self._sites_of(site), n)
        return share_workers(n, {number: self.mesh.infos[number].pool for number in self._sites_of(None)})

    def _sites_of(self, pool: str | None) -> list[int]:
        if not self._owns:
            raise MeshError(f"Cluster {self.name} is kept by another process; scale it there.")
        pools = {site: info.pool for site, info in self.mesh.infos.items() if site != SCHEDULER_SITE}
        found = [site for site, name in pools.items() if pool in (None, name)]
        if not found:
            raise MeshError(f"Cluster {self.name} has no site {pool!r}; it has {', '.join(pools.values())}.")
        return found

    def adapt(self, *, minimum: int = 1, maximum: int, site: str | None = None, interval_seconds: float = 5.0) -> None:
        """Let sites grow while their workers are busy, and shrink while they are idle.

        Parameters
        ----------
        minimum, maximum
            Containers of a site.
        site
            The pool that is meant; all by default.
        interval_seconds
            How long between two looks.
        """

        self.sync(self._scaler.adapt, self._sites_of(site), minimum, maximum, interval_seconds)

    # Looking

    @property
    def dashboard_link(self) -> str:
        """Address of the dashboard on this host; empty if there is none."""
        status = self.mesh.scheduler_status
        return (status.scheduler.dashboard_address or "") if status is not None and status.scheduler is not None else ""

    def site_logs(self, site: str, worker: str | None = None, *, lines: int = 200) -> Any:
        """Read what workers of a site wrote, from the site itself: also of those that never registered.

        Parameters
        ----------
        site
            The pool.
        worker
            Name of a worker; all by default.
        lines
            How many lines of each at most.

        Returns
        -------
        dict
            The end of each log, by the worker's name.
        """
        return self.sync(self._site_logs, site, worker, lines)

    async def _site_logs(self, pool: str, worker: str | None, lines: int) -> dict[str, str]:
        sites = [number for number, info in self.mesh.infos.items() if info.pool == pool and number != SCHEDULER_SITE]
        if not sites:
            raise MeshError(f"Cluster {self.name} has no site {pool!r}.")
        names = [(site, one.name) for site in sites for one in self.mesh.statuses[site].workers]
        wanted = [(site, name) for site, name in names if worker in (None, name)]
        return {name: await self.mesh.logs(site, name, lines) for site, name in wanted}

    def _in_background(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, line: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {line}"
        if self._progress is None:
            self._log(line)
        else:
            self._progress(line)


@atexit.register
def _close_all() -> None:
    """Take down what a person forgot to close; whoever does not get here is covered by the lease."""
    for cluster in list(_OPEN):
        if not cluster.asynchronous and cluster.status != Status.closed:
            with contextlib.suppress(Exception):
                cluster.close(timeout=REMOVE_ALL_SECONDS)
