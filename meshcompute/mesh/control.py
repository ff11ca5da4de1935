"""Talk to a site's control daemon.

Covers the typed client of the protocol over a unix socket (:class:`SiteClient`) and a connection to one site that
comes back after it broke (:class:`SiteControl`): OpenSSH's forwarding, else the daemon's own ``connect`` command, or
a socket of this host. Errors of aiohttp, ssh and the daemon are mapped here and nowhere else. Does not cover what a
cluster needs of its sites (:mod:`meshcompute.mesh.plan`) nor in which order (:mod:`meshcompute.mesh.cluster`).

Notes
-----
Every request of the protocol can be repeated, so a request that got no answer is sent again, a bounded number of
times, on a connection made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from meshcompute.mesh.sites import SiteAddress, SiteRefusedError, SiteUnreachableError
from meshcompute.mesh.sshtunnel import SshBridge, SshTunnel, choose_socket_folder, diagnose
from meshcompute.protocol import (
    API_VERSION,
    ClusterSpec,
    ClusterStatus,
    ErrorResponse,
    Health,
    LeaseRequest,
    SiteInfo,
)

__all__ = ["SiteClient", "SiteControl"]

logger = logging.getLogger("meshcompute.control")

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

REQUEST_TIMEOUT_SECONDS = 20.0
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.2  # doubled with every attempt
CONNECTIONS_PER_SITE = 4  # through a bridge each is a process

_CLUSTERS = TypeAdapter(list[ClusterStatus])
# What a connection that broke, or was never made, looks like from here.
_BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError, TimeoutError)


class SiteClient:
    """The protocol, typed, over one unix socket.

    Parameters
    ----------
    path
        The socket.
    site
        The site as a person wrote it, for messages.
    timeout_seconds
        How long one request may take.

    Notes
    -----
    Use it in an ``async with`` block. What the daemon refuses is a :class:`meshcompute.mesh.sites.SiteRefusedError`; a
    connection that breaks is aiohttp's error or OSError.
    """

    def __init__(
        self, path: str | Path, *, site: str = "local", timeout_seconds: float = REQUEST_TIMEOUT_SECONDS
    ) -> None:
        self.path = str(path)
        self.site = site
        self.timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self.path, limit=CONNECTIONS_PER_SITE)
        timeout = aiohttp.ClientTimeout(total=self.timeout_seconds)
        self._session = aiohttp.ClientSession(
            "http://site", connector=connector, timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def site_info(self) -> SiteInfo:
        """Ask what the site is and offers.

        Returns
        -------
        SiteInfo
            The answer.

        Raises
        ------
        SiteUnreachableError
            The daemon speaks another version of the protocol.
        """
        try:
            raw = await self._request("GET", "/v1/site")
        except SiteRefusedError as exc:
            if exc.kind != "not_found":
                raise
            # The version is part of every path, so a daemon of another one knows none of ours.
            message = (
                f"its daemon does not know version {API_VERSION} of the protocol, which this meshcompute speaks; "
                "install the same release at both ends"
            )
            raise SiteUnreachableError(self.site, "wrong_version", message) from exc
        return self._read(SiteInfo, raw)

    async def health(self) -> Health:
        """Ask whether the daemon can do its work.

        Returns
        -------
        Health
            The answer.
        """
        return self._read(Health, await self._request("GET", "/v1/health"))

    async def put(self, cluster_id: str, spec: ClusterSpec) -> ClusterStatus:
        """Tell the site what it should have of a cluster.

        Parameters
        ----------
        cluster_id
            32 hexadecimal digits.
        spec
            The desired state, whole.

        Returns
        -------
        ClusterStatus
            What is true so far.
        """
        return self._read(ClusterStatus, await self._request("PUT", f"/v1/clusters/{cluster_id}", body=spec))

    async def clusters(self) -> list[ClusterStatus]:
        """List the caller's clusters at this site; an operator sees all.

        Returns
        -------
        list of ClusterStatus
            One for each.
        """
        raw = await self._request("GET", "/v1/clusters")
        try:
            return _CLUSTERS.validate_json(raw)
        except ValidationError as exc:
            raise self._misunderstood("a list of clusters", exc) from exc

    async def status(self, cluster_id: str) -> ClusterStatus:
        """Ask what the site has of a cluster.

        Parameters
        ----------
        cluster_id
            32 hexadecimal digits.

        Returns
        -------
        ClusterStatus
            What is true now.
        """
        return self._read(ClusterStatus, await self._request("GET", f"/v1/clusters/{cluster_id}"))

    async def renew(self, cluster_id: str, epoch: int) -> ClusterStatus:
        """Renew the site's lease for a cluster.

        Parameters
        ----------
        cluster_id
            32 hexadecimal digits.
        epoch
            The cluster's epoch.

        Returns
        -------
        ClusterStatus
            What is true now.
        """
        body = LeaseRequest(epoch=epoch)
        return self._read(ClusterStatus, await self._request("POST", f"/v1/clusters/{cluster_id}/lease", body=body))

    async def delete(self, cluster_id: str, epoch: int) -> ClusterStatus:
        """Tell the site to remove all of a cluster.

        Parameters
        ----------
        cluster_id
            32 hexadecimal digits.
        epoch
            No desired state up to this epoch is accepted any more.

        Returns
        -------
        ClusterStatus
            Its phase is ``removing`` or ``gone``.
        """
        query = {"epoch": str(epoch)}
        return self._read(ClusterStatus, await self._request("DELETE", f"/v1/clusters/{cluster_id}", query=query))

    async def logs(self, cluster_id: str, worker: str, lines: int = 200) -> str:
        """Read the end of a worker's or the scheduler's log.

        Parameters
        ----------
        cluster_id
            32 hexadecimal digits.
        worker
            Name of a worker or container, or ``scheduler``.
        lines
            How many lines at most.

        Returns
        -------
        str
            What it wrote.
        """
        query = {"worker": worker, "lines": str(lines)}
        raw = await self._request("GET", f"/v1/clusters/{cluster_id}/logs", query=query)
        return raw.decode(errors="replace")

    async def _request(
        self, method: str, path: str, *, body: BaseModel | None = None, query: dict[str, str] | None = None
    ) -> bytes:
        if self._session is None:
            raise RuntimeError("SiteClient is not open: use it in an `async with` block")
        data = None if body is None else body.model_dump_json().encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        async with self._session.request(method, path, data=data, params=query, headers=headers) as response:
            raw = await response.read()
            if response.status < 400:
                return raw
            try:
                error = ErrorResponse.model_validate_json(raw).error
            except ValidationError:
                said = " ".join(raw[:200].decode(errors="replace").split())
                message = f"{method} {path} was answered with HTTP {response.status} and no reason ({said!r})"
                raise SiteRefusedError(self.site, "internal", message) from None
            raise SiteRefusedError(self.site, error.kind, error.message)

    def _read(self, model: type[Model], raw: bytes) -> Model:
        try:
            return model.model_validate_json(raw)
        except ValidationError as exc:
            raise self._misunderstood(model.__name__, exc) from exc

    def _misunderstood(self, what: str, exc: ValidationError) -> SiteUnreachableError:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        message = (
            f"its daemon's answer is not {what} as this meshcompute knows it ({where}: {first['msg']}); "
            "install the same release at both ends"
        )
        return SiteUnreachableError(self.site, "wrong_version", message)


class SiteControl:
    """One site, reached and kept within reach.

    Parameters
    ----------
    address
        The site.
    ssh
        The program and arguments of its own, e.g. ``("ssh", "-F", file)``.
    site_command
        How ``meshcompute-site`` is called at the site.
    timeout_seconds
        How long one request may take.

    Notes
    -----
    The constructor stores, :meth:`open` acts. Requests may run at the same time.
    """

    def __init__(
        self,
        address: SiteAddress,
        *,
        ssh: Sequence[str] = ("ssh",),
        site_command: str = "meshcompute-site",
        timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        self.address = address
        self._ssh = tuple(ssh)
        self._site_command = site_command
        self._timeout_seconds = timeout_seconds
        self._path: Path | None = None
        self._transport: SshTunnel | SshBridge | None = None
        self._client: SiteClient | None = None
        self._forwarding_is_off = False
        self._generation = 0  # counts connections, so that of many requests that saw one break only the first acts
        self._lock = asyncio.Lock()
        self.info: SiteInfo | None = None

    @property
    def transport(self) -> str:
        """How the site is reached: ``local``, ``forwarding`` or ``connect``."""
        if self.address.is_local:
            return "local"
        return "connect" if self._forwarding_is_off else "forwarding"

    async def open(self) -> SiteInfo:
        """Reach the site's daemon and ask what it is.

        Returns
        -------
        SiteInfo
            What the site is and offers.

        Raises
        ------
        SiteUnreachableError
            It cannot be had, and why.
        SiteRefusedError
            The daemon does not want this caller.
        """
        try:
            self.info = await self.call(SiteClient.site_info)
        except BaseException:
            await self.close()
            raise
        return self.info

    async def close(self) -> None:
        """Let go of the site. Nothing is changed there. Calling it again does nothing."""
        async with self._lock:
            await self._disconnect()

    async def call(self, request: Callable[[SiteClient], Awaitable[T]], *, attempts: int = ATTEMPTS) -> T:
        """Send a request, again on a new connection if the old one broke.

        Parameters
        ----------
        request
            Gets the client, e.g. ``lambda client: client.status(cluster_id)``.
        attempts
            How often at most.

        Returns
        -------
        object
            What the request returns.

        Raises
        ------
        SiteUnreachableError
            No attempt got an answer; the cause is looked for only then.
        SiteRefusedError
            The daemon answered with an error.
        """
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, attempts + 1):
            client, generation = await self._connected()
            try:
                return await request(client)
            except (SiteRefusedError, SiteUnreachableError):  # the second is an OSError, too
                raise
            except _BROKEN as exc:
                logger.debug("no answer site=%s attempt=%d error=%r", self.address, attempt, exc)
                await self._broke(generation)
                if attempt == attempts:
                    raise self._unreachable(exc) from exc
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable: attempts is at least 1")

    async def _connected(self) -> tuple[SiteClient, int]:
        async with self._lock:
            if self._client is not None and (self._transport is None or self._transport.is_alive):
                return self._client, self._generation
            await self._disconnect()
            try:
                path = await self._make_way()
                self._client = SiteClient(path, site=str(self.address), timeout_seconds=self._timeout_seconds)
                await self._client.__aenter__()
            except BaseException:
                await self._disconnect()
                raise
            self._generation += 1
            return self._client, self._generation

    async def _make_way(self) -> Path:
        """Bring the daemon's socket to this host, and return its path here."""
        if self.address.is_local:
            return Path(self.address.socket)
        self._path = choose_socket_folder() / "site.sock"
        if not self._forwarding_is_off:
            self._transport = SshTunnel(self.address, self._path, ssh=self._ssh)
            try:
                await self._transport.start()
                if await _answers(self._path):
                    return self._path
            except SiteUnreachableError as exc:
                if exc.cause != "other":
                    raise
            # Something is wrong, and only a command on that host can tell what.
            await self._transport.stop()
            self._transport = None
            cause = await diagnose(self.address, ssh=self._ssh, site_command=self._site_command)
            if cause is not None:
                raise cause
            self._path = choose_socket_folder() / "site.sock"
        self._transport = SshBridge(self.address, self._path, ssh=self._ssh, site_command=self._site_command)
        await self._transport.start()
        if not await _answers(self._path):
            message = (
                "its daemon answers on its own host, but neither sshd's forwarding of sockets nor the command "
                f"{self._site_command} connect brings it here; its operator sets AllowStreamLocalForwarding yes in "
                "sshd_config, or permits that command"
            )
            raise SiteUnreachableError(str(self.address), "forwarding_forbidden", message)
        if not self._forwarding_is_off:
            logger.info("sshd forbids forwarding, talking through meshcompute-site connect site=%s", self.address)
        self._forwarding_is_off = True
        return self._path

    async def _broke(self, generation: int) -> None:
        async with self._lock:
            if generation == self._generation:
                await self._disconnect()

    async def _disconnect(self) -> None:
        client, transport, path = self._client, self._transport, self._path
        self._client = self._transport = self._path = None  # at once: who is cancelled below leaves nothing half closed
        try:
            if client is not None:
                await client.__aexit__(None, None, None)
        finally:
            if transport is not None:
                await transport.stop()
            if path is not None:
                with contextlib.suppress(OSError):  # the tunnel's guard may have been first
                    path.parent.rmdir()

    def _unreachable(self, exc: BaseException) -> SiteUnreachableError:
        site = str(self.address)
        if self.address.is_local:
            path = self.address.socket
            if isinstance(exc, OSError) and exc.errno in (errno.EACCES, errno.EPERM):
                message = f"this account may not use the daemon's socket {path}; its operator sets mode 0666 for it"
                return SiteUnreachableError(site, "refused_key", message)
            if isinstance(exc, OSError) and not isinstance(exc, TimeoutError):
                message = (
                    f"no control daemon answers at {path} of this host; install it with scripts/install-site.sh "
                    "--role scheduler, or start it with systemctl start meshcompute-site"
                )
                return SiteUnreachableError(site, "no_daemon", message)
        said = str(exc) or type(exc).__name__
        message = (
            f"the connection was made, but its daemon gave no answer, {ATTEMPTS} times within "
            f"{self._timeout_seconds:g} s each ({said}); its log there says more (journalctl -u meshcompute-site)"
        )
        return SiteUnreachableError(site, "no_answer", message)


async def _answers(path: Path) -> bool:
    """Whether anybody at the other end of a forwarded socket speaks: sshd closes it at once where it may not."""
    async with SiteClient(path, timeout_seconds=REQUEST_TIMEOUT_SECONDS) as client:
        try:
            await client.health()
        except (SiteRefusedError, SiteUnreachableError):
            return True  # an error is an answer
        except _BROKEN:
            return False
    return True
