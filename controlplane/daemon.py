"""The daemon of a site: the one place where everything is put together.

Covers which data plane and runtime a ``site.toml`` means, the socket, start and end. Does not cover what any of them
does. At the start what runs is adopted, and what carries our mark but belongs to no cluster is removed. The end of the
daemon is not the end of its clusters: gateways and workers stay, until their own deadlines or the next daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from controlplane.api import Api
from controlplane.clock import Clock, SystemClock
from controlplane.config import SiteConfig
from controlplane.errors import ConfigError, SiteError, StoreError
from controlplane.identity import account_of
from controlplane.loop import Loop
from controlplane.network.base import DataPlane
from controlplane.site import Site
from controlplane.state import Owner, Store
from controlplane.workers.base import WorkerRuntime
from meshcompute.protocol import API_VERSION, Condition, Limits, SiteInfo

__all__ = ["Daemon", "SocketTakenError", "own_version"]

logger = logging.getLogger(__name__)

REMOVE_SECONDS = 60.0  # for everything, when the operator ends all clusters
SHUTDOWN_SECONDS = 2.0  # for requests that are under way when the daemon ends
SOCKET_MODE = 0o666  # who may do what is decided by who it is, and by nothing that can be read at the door
PACKAGES_SECONDS = 5.0  # how long an answer waits for the versions of an image's packages, once


class SocketTakenError(SiteError):
    """Another daemon listens at the socket, or something else is in its place."""


def own_version() -> str:
    """Version of this software."""
    try:
        return importlib.metadata.version("meshcompute")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def make_plane(config: SiteConfig, clock: Clock) -> DataPlane:
    """Make the data plane that a ``site.toml`` means."""
    if config.network == "loopback":
        from controlplane.network.loopback import LoopbackPlane

        return LoopbackPlane()
    from controlplane.network.gateway import NamespacePlane

    # As containers are, gateways are known by the state folder: that is what makes a daemon the same after a restart.
    mark = hashlib.sha256(os.path.realpath(config.state_folder).encode()).hexdigest()[:8]
    return NamespacePlane(config.network_options.wireguard, instance=f"{config.pool}-{mark}", clock=clock)


def make_runtime(config: SiteConfig, clock: Clock) -> WorkerRuntime:
    """Make the worker runtime that a ``site.toml`` means."""
    folder = Path(config.state_folder) / "units"
    if config.runtime == "process":
        from controlplane.workers.process import ProcessRuntime

        options = config.process
        return ProcessRuntime(
            folder,
            **({"python": options.python} if options.python else {}),
            views=options.views,
            hidden_folders=options.hidden_folders,
            environment=options.environment,
            monotonic=clock.monotonic,
        )
    from controlplane.workers.docker import DockerRuntime

    return DockerRuntime(folder, base_url=config.engine_url, image=config.workers.image, monotonic=clock.monotonic)


def is_udp_port_taken(port: int) -> bool:
    """Whether another program of this host has a UDP port, for IPv4 or IPv6."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - as WireGuard does
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return True
    return False


class Daemon:
    """A site, ready to serve.

    Parameters
    ----------
    config
        What the operator decided.
    plane
        The data plane; None for the one that the configuration means.
    runtime
        What runs the workers; None for the one that the configuration means.
    clock
        The time.
    """

    def __init__(
        self,
        config: SiteConfig,
        *,
        plane: DataPlane | None = None,
        runtime: WorkerRuntime | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self._plane = plane or make_plane(config, self._clock)
        self._runtime = runtime or make_runtime(config, self._clock)
        self._asking: asyncio.Task[dict[str, str]] | None = None
        self._asked_at = 0.0
        account = _account(config)
        self.site = Site(
            config=config,
            store=Store(Path(config.state_folder)),
            clock=self._clock,
            runtime=self._runtime,
            account=account,
            is_port_taken=is_udp_port_taken,
        )

    async def serve(self, stop: asyncio.Event, *, has_to_stop_clusters: bool = False) -> None:
        """Serve until told to stop.

        Parameters
        ----------
        stop
            Set by whoever wants the end.
        has_to_stop_clusters
            Whether the end of the daemon is the end of its clusters, too.

        Raises
        ------
        SiteError
            If the state folder or the socket cannot be had.
        """
        with self._locked_state():
            self.site.open()
            loop = self._new_loop()
            api = Api(
                site=self.site,
                own_uid=os.geteuid(),
                site_info=self.site_info,
                health=lambda: self._health(loop),
                failures=lambda: loop.n_failures,
            )
            runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
            await runner.setup()
            listener = listen(self.config.socket)
            inode = _inode_of(self.config.socket)
            working = asyncio.create_task(loop.run())
            self._ask_packages()  # now, and not when the first client waits for it
            try:
                await web.SockSite(runner, listener).start()
                notify_systemd("READY=1")
                logger.info("serving pool=%s socket=%s", self.config.pool, self.config.socket)
                await _wait_for_first(stop, working)
                notify_systemd("STOPPING=1")
                if has_to_stop_clusters:
                    await runner.cleanup()  # first: nobody may ask for a new cluster meanwhile
                    await self._remove_all(loop)
            finally:
                _unlink_own(self.config.socket, inode)
                await runner.cleanup()
                await _cancelled(working)
                assert self._asking is not None
                await _cancelled(self._asking)
                await self._plane.close()
                logger.info("ended pool=%s clusters_left=%d", self.config.pool, len(self.site.cluster_ids()))

    async def drain(self) -> bool:
        """End all clusters without serving, for an operator who removes the software.

        Returns
        -------
        bool
            Whether nothing is left.
        """
        with self._locked_state():
            self.site.open()
            loop = self._new_loop()
            await loop.sweep()
            working = asyncio.create_task(loop.run())
            try:
                return await self._remove_all(loop)
            finally:
                await _cancelled(working)
                await self._plane.close()

    async def site_info(self) -> SiteInfo:
        """Say what the site is and offers."""
        config = self.config
        return SiteInfo(
            pool=config.pool,
            version=own_version(),
            api_version=API_VERSION,
            role=config.role,
            limits=Limits(
                workers=config.limits.workers,
                threads_per_worker=config.limits.threads_per_worker,
                memory_bytes_per_worker=config.limits.memory_bytes_per_worker,
                clusters=config.limits.clusters,
            ),
            data_folders=config.workers.data_folders,
            images=config.workers.allowed_images,
            wireguard_backend=getattr(self._plane, "backend", "none"),
            runtime=config.runtime,
            network=config.network,
            packages=await self._packages(),
            endpoints=config.network_options.endpoints,
        )

    async def _packages(self) -> dict[str, str]:
        """Versions of what workers run with; none as long as the engine does not say."""
        if self._asking is None or self._asking.done():
            self._ask_packages()
        assert self._asking is not None
        remaining = self._asked_at + PACKAGES_SECONDS - self._clock.monotonic()
        await asyncio.wait([self._asking], timeout=max(0.0, remaining))
        return self._asking.result() if self._asking.done() else {}

    def _ask_packages(self) -> None:
        async def ask() -> dict[str, str]:
            try:
                return await self._runtime.packages(None)
            except SiteError as exc:
                logger.debug("versions are not known reason=%s", exc)
                return {}

        self._asking = asyncio.create_task(ask())
        self._asked_at = self._clock.monotonic()

    def _new_loop(self) -> Loop:
        loop = Loop(plane=self._plane, runtime=self._runtime, wishes=self.site, clock=self._clock)
        self.site.use(loop)
        return loop

    async def _remove_all(self, loop: Loop) -> bool:
        self.site.end_all("the operator ended all clusters of this site")
        is_gone = await loop.wait_gone(REMOVE_SECONDS)
        if not is_gone:
            left = ", ".join(self.site.cluster_ids())
            logger.error("not everything could be removed clusters=%s seconds=%g", left, REMOVE_SECONDS)
        return is_gone

    def _health(self, loop: Loop) -> list[Condition]:
        problem = loop.engine_problem
        conditions = [
            Condition(
                kind="engine",
                is_true=problem is None,
                reason="Answers" if problem is None else problem.reason,
                message="The engine answers." if problem is None else problem.message,
            )
        ]
        conditions += [
            Condition(kind="sweep", is_true=False, reason=found.reason, message=found.message)
            for found in loop.problems
            if found.kind != "engine"
        ]
        conditions += [
            Condition(kind="state", is_true=False, reason="Unreadable", message=f"{text}.")
            for text in self.site.problems
        ]
        return conditions

    @contextlib.contextmanager
    def _locked_state(self) -> Iterator[None]:
        """Be the only daemon of a state folder."""
        folder = Path(self.config.state_folder)
        try:
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StoreError(
                f"Cannot use the state folder {folder}: {exc.strerror}. Run the daemon as the account that owns it, or "
                "name another state_folder in site.toml."
            ) from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(
                f"Another daemon uses the state folder {folder}. End it first (systemctl stop meshcompute-site), or "
                "name another state_folder and socket in site.toml."
            ) from None
        try:
            yield
        finally:
            os.close(descriptor)


def _account(config: SiteConfig) -> Owner | None:
    if not config.workers.user:
        return None
    found = account_of(config.workers.user)
    if config.runtime == "process" and os.geteuid() not in {0, found.uid}:
        raise ConfigError("site.toml", "workers.user", f"only root can run workers as {config.workers.user!r}")
    return Owner(uid=found.uid, gid=found.gid, user=config.workers.user, groups=found.groups)


def listen(path: str) -> socket.socket:
    """Make the socket that everybody of this host may connect to.

    Parameters
    ----------
    path
        Where to put it. A socket at which nobody listens is replaced.

    Returns
    -------
    socket.socket
        The listening socket.

    Raises
    ------
    SocketTakenError
        If somebody listens there, or it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise SocketTakenError(
                        f"Another daemon listens at {path}. End it first (systemctl stop meshcompute-site), or name "
                        "another socket in site.toml."
                    )
            Path(path).unlink()
        listener.bind(path)
        Path(path).chmod(SOCKET_MODE)
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise SocketTakenError(
            f"Cannot listen at {path}: {exc.strerror}. Name another socket in site.toml, or make its folder writable "
            "for the daemon."
        ) from exc
    except SocketTakenError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _inode_of(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return 0


def _unlink_own(path: str, inode: int) -> None:
    """Remove our socket, but not that of a daemon which has come after us."""
    with contextlib.suppress(OSError):
        if _inode_of(path) == inode:
            Path(path).unlink()


def notify_systemd(message: str) -> None:
    """Tell systemd how far we are, if it wants to know (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.connect(address)
        peer.sendall(message.encode())


async def _wait_for_first(stop: asyncio.Event, working: asyncio.Task[None]) -> None:
    """Wait for the wish to stop; if the loop ends instead, that is a defect, and is raised."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        working.result()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
