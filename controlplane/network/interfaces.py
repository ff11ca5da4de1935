"""Make a WireGuard interface whose encrypted socket stays in the host's namespace, in another namespace.

Covers both backends: the kernel's, and wireguard-go under a keeper. Does not cover peers and routes.

An interface belongs to the namespace that it was made in as far as its encrypted packets go, wherever it is moved:
that is how a namespace that has nothing but the cluster's network gets its packets to other sites.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from controlplane.errors import ApplyError
from controlplane.network.keepers import KeeperClient
from controlplane.network.links import LinkError, open_links
from controlplane.network.wireguard import WireGuard

__all__ = ["Backend", "InterfaceMaker", "PortTakenError", "namespace_of"]

logger = logging.getLogger(__name__)

Backend = Literal["kernel", "userspace", "auto"]


class PortTakenError(ApplyError):
    """A UDP port that a gateway was told to listen at belongs to somebody else.

    Parameters
    ----------
    port
        The port.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port

    def __str__(self) -> str:
        return (
            f"UDP port {self.port} is taken on this host. Choose another one (network_options.udp_ports in site.toml)."
        )


def namespace_of(pid: int) -> str:
    """Name the network namespace of a process, as a path."""
    return f"/proc/{pid}/ns/net"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an interface should be, and under which name."""

    namespace: str
    name: str


class InterfaceMaker:
    """Makes and finds WireGuard interfaces.

    Parameters
    ----------
    backend
        WireGuard of the kernel, wireguard-go, or the first of them that works; that is found out once.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def is_there(self, name: str, place: Place, keeper: KeeperClient) -> bool:
        """Whether an interface that was made as ``name`` works at its place."""
        async with open_links(place.namespace) as links:
            link = await links.find(place.name)
        if link is None:
            return False
        return link.kind == "wireguard" or name in (await keeper.status()).processes

    async def make(self, name: str, place: Place, keeper: KeeperClient, *, mtu: int) -> None:
        """Make an interface and move it to its place, up and without a key.

        Raises
        ------
        ApplyError
            Neither backend could.
        """
        async with open_links() as outside:
            # What an earlier try left, which may have been killed at any point.
            if name in (await keeper.status()).processes:
                await keeper.kill(name)
            await outside.delete(name)
            async with open_links(place.namespace) as inside:
                await inside.delete(place.name)
            if self.backend != "userspace":
                try:
                    await outside.add_wireguard(name)
                    self.backend = "kernel"
                except LinkError as exc:
                    if self.backend == "kernel" or exc.code != errno.EOPNOTSUPP:
                        raise
                    self.backend = "userspace"
                    logger.info("this kernel has no WireGuard, so wireguard-go does it")
            if self.backend == "userspace":
                await keeper.spawn(name)
            # wireguard-go hears of this here, and not of what happens in another namespace.
            await outside.set_up(name, mtu=mtu)
            await outside.move(name, place.namespace, rename=place.name)
        async with open_links(place.namespace) as inside:
            await inside.set_up(place.name, mtu=mtu)

    async def door(self, name: str, place: Place, keeper: KeeperClient) -> WireGuard:
        """Find ``wg``'s way to an interface: a control socket in the keeper's mounts, or the kernel's namespace."""
        async with open_links(place.namespace) as links:
            link = await links.find(place.name)
        if link is not None and link.kind == "wireguard":
            return WireGuard(place.name, _enter(f"--net={place.namespace}"))
        return WireGuard(name, _enter(f"--mount=/proc/{keeper.pid}/ns/mnt"))


def _enter(option: str) -> Sequence[str]:
    return ("nsenter", option)


def check_port(port: int) -> None:
    """See that nobody has a UDP port, on IPv4 or IPv6: wireguard-go would go on without one.

    Raises
    ------
    PortTakenError
        Somebody has.
    """
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - as WireGuard does
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((any_address, port))
            except OSError as exc:
                if exc.errno == errno.EADDRINUSE:
                    raise PortTakenError(port) from exc
