"""Start, find and talk to the processes that hold gateways.

Covers the other side of :mod:`controlplane.network.keeper`. Does not cover what is configured in a gateway's namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from controlplane.command import run
from controlplane.errors import ApplyError
from controlplane.network import keeper

__all__ = ["ImpostorError", "KeeperClient", "KeeperGoneError", "KeeperStatus", "find_keepers", "start_keeper"]

_UNIX_SOCKETS = Path("/proc/self/net/unix")  # of our own network namespace
_ANSWER_SECONDS = 8.0  # longer than a keeper waits for wireguard-go
_END_SECONDS = 5.0


class KeeperGoneError(ApplyError):
    """There is no such keeper, or it ended while it was asked."""


class ImpostorError(KeeperGoneError):
    """Somebody else took the name of a keeper's socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatus:
    """What a keeper holds: process ids by name of the interface or "services", and what they complained about last."""

    pid: int
    processes: dict[str, int]
    remaining_seconds: float
    log: tuple[str, ...]


def _socket_name(instance: str, cluster_id: str) -> str:
    return f"meshcompute-gateway/{instance}/{cluster_id}"


def find_keepers(instance: str) -> set[str]:
    """List the clusters that have a keeper of this instance in this network namespace."""
    mark = "@" + _socket_name(instance, "")
    words = (line.split() for line in _UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace").splitlines())
    return {line[-1].removeprefix(mark) for line in words if line and line[-1].startswith(mark)}


async def start_keeper(instance: str, cluster_id: str, *, prefix: IPv6Network, deadline_seconds: float) -> None:
    """Start a keeper; when this returns, its namespace is there.

    Raises
    ------
    CommandError
        It could not be started, or there is one already.
    """
    name = _socket_name(instance, cluster_id)
    # -I and -S: nothing of the daemon's environment or packages; the script itself imports the standard library only.
    await run([sys.executable, "-I", "-S", keeper.__file__, name, str(prefix), f"{deadline_seconds:.3f}"])


class KeeperClient:
    """A connection to a keeper, for one block.

    Parameters
    ----------
    instance
        Name of the daemon that it belongs to.
    cluster_id
        The cluster.
    """

    def __init__(self, instance: str, cluster_id: str) -> None:
        self._name = _socket_name(instance, cluster_id)
        self._socket: socket.socket | None = None
        self.pid = 0

    async def __aenter__(self) -> Self:
        """Connect.

        Raises
        ------
        KeeperGoneError
            There is none.
        ImpostorError
            The socket is somebody else's.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(connection, f"\0{self._name}")
        except OSError as exc:
            connection.close()
            raise KeeperGoneError(f"The gateway's process @{self._name} does not answer: {exc}.") from exc
        pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            connection.close()
            raise ImpostorError(
                f"The socket @{self._name} belongs to process {pid} of user {uid}, who took its name. End that process."
            )
        self.pid = pid
        self._socket = connection
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    async def status(self) -> KeeperStatus:
        """Ask what it holds."""
        return await self._ask({"do": "status"})

    async def renew(self, seconds: float) -> KeeperStatus:
        """Move its deadline to so long from now."""
        return await self._ask({"do": "renew", "seconds": seconds})

    async def spawn(self, interface: str) -> KeeperStatus:
        """Let it start wireguard-go for an interface, unless it runs."""
        return await self._ask({"do": "spawn", "name": interface})

    async def relay(self, network: IPv6Network, services: Sequence[tuple[str, int, str, int]]) -> KeeperStatus:
        """Let workers of a network reach these, and nothing else: address and port inside, host and port outside."""
        return await self._ask({"do": "relay", "network": str(network), "services": services})

    async def kill(self, interface: str) -> KeeperStatus:
        """Let it end the wireguard-go of an interface."""
        return await self._ask({"do": "kill", "name": interface})

    async def end(self) -> None:
        """End it, by force if need be, and wait until it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            with contextlib.suppress(ApplyError):
                await self._ask({"do": "end"})
            if not await _is_gone(pidfd, _END_SECONDS):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await _is_gone(pidfd, _END_SECONDS)
        finally:
            os.close(pidfd)

    async def watch(self) -> AsyncIterator[str]:
        """Yield the name of an interface, or "services", whenever its process ended; stop when the keeper has ended."""
        await self._ask({"do": "watch"})
        with contextlib.suppress(KeeperGoneError):
            while True:
                yield (await self._receive())["ended"]

    async def _ask(self, request: dict[str, Any]) -> KeeperStatus:
        assert self._socket is not None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await asyncio.get_running_loop().sock_sendall(self._socket, json.dumps(request).encode())
                answer = await self._receive()
        except TimeoutError as exc:
            raise ApplyError(f"The gateway's process @{self._name} is stuck: end it (kill -9 {self.pid}).") from exc
        except OSError as exc:
            raise KeeperGoneError(f"The gateway's process @{self._name} ended: {exc}.") from exc
        if "error" in answer:
            raise ApplyError(f"The gateway's process could not {request['do']}: {answer['error']}")
        return KeeperStatus(
            pid=answer["pid"],
            processes=answer["processes"],
            remaining_seconds=answer["remaining_seconds"],
            log=tuple(answer["log"]),
        )

    async def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        try:
            packet = await asyncio.get_running_loop().sock_recv(self._socket, keeper.PACKET_NBYTES)
        except ConnectionError:
            packet = b""
        if not packet:
            raise KeeperGoneError(f"The gateway's process @{self._name} ended.")
        answer: dict[str, Any] = json.loads(packet)
        return answer


async def _is_gone(pidfd: int, timeout_seconds: float) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(await asyncio.to_thread(poll.poll, timeout_seconds * 1000))
