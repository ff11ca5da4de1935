"""The one door to netlink: links, addresses and routes, in any network namespace.

Covers what a gateway needs of pyroute2, by names of interfaces and paths of namespaces. Does not cover WireGuard's own
configuration (:mod:`controlplane.network.wireguard`).

Everything is idempotent. A netlink socket keeps its namespace alive, so it is open for one block only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from controlplane.errors import ApplyError

__all__ = ["LinkError", "LinkState", "Links", "open_links"]

CLONE_NEWNET = 0x40000000  # linux/sched.h
IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once; nobody else can have an address of ours
_HINTS = {
    errno.EPERM: " The daemon needs CAP_NET_ADMIN and CAP_SYS_ADMIN.",
    errno.EACCES: " IPv6 is switched off there: set the sysctl net.ipv6.conf.all.disable_ipv6=0 (docker run --sysctl).",
}
RTN_UNICAST = 1  # linux/rtnetlink.h
RTN_UNREACHABLE = 7
LOOPBACK_INDEX = 1
_libc = ctypes.CDLL(None, use_errno=True)


class LinkError(ApplyError):
    """The kernel refused something.

    Parameters
    ----------
    action
        What was tried.
    code
        The kernel's error number.
    """

    def __init__(self, action: str, code: int) -> None:
        super().__init__(action, code)
        self.action = action
        self.code = code

    def __str__(self) -> str:
        hint = _HINTS.get(self.code, "")
        return f"{self.action} failed: {os.strerror(self.code)}.{hint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """An interface; ``peer_index`` is the other end of a veth, in its own namespace's numbers."""

    name: str
    index: int
    kind: str | None
    mtu: int
    is_up: bool
    peer_index: int | None


@contextmanager
def _opened(namespace: str) -> Iterator[int]:
    """Open a namespace, given by its path."""
    try:
        number = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise LinkError(f"Opening the network namespace {namespace}", exc.errno or errno.EIO) from exc
    try:
        yield number
    finally:
        os.close(number)


def _socket_in(namespace: str) -> socket.socket:
    """Make a netlink socket in another namespace, which only the thread that makes it enters."""
    made: list[socket.socket | OSError] = []

    def enter(number: int) -> None:
        try:
            if _libc.setns(number, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.append(socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE))
        except OSError as exc:
            made.append(exc)

    with _opened(namespace) as number:
        thread = threading.Thread(target=enter, args=(number,), name="enter-namespace")
        thread.start()
        thread.join()
    if isinstance(made[0], OSError):
        raise LinkError(f"Entering the network namespace {namespace}", made[0].errno or errno.EIO) from made[0]
    return made[0]


@asynccontextmanager
async def open_links(namespace: str | None = None) -> AsyncIterator[Links]:
    """Open the interfaces of a namespace, given by its path; None is our own."""
    options: dict[str, Any] = {} if namespace is None else {"fileno": _socket_in(namespace).detach()}
    async with AsyncIPRoute(groups=0, **options) as netlink:
        yield Links(netlink)


class Links:
    """The interfaces of one namespace.

    Parameters
    ----------
    netlink
        An open socket of pyroute2.
    """

    def __init__(self, netlink: AsyncIPRoute) -> None:
        self._netlink = netlink

    async def all(self) -> dict[str, LinkState]:
        """Read all interfaces, by name."""
        found = {}
        async for link in await self._netlink.link("dump"):
            found[link.get("ifname")] = LinkState(
                name=link.get("ifname"),
                index=link["index"],
                kind=link.get(("linkinfo", "kind")),
                mtu=link.get("mtu"),
                is_up=bool(link["flags"] & 1),
                peer_index=link.get("link"),
            )
        return found

    async def find(self, name: str) -> LinkState | None:
        """Read one interface; None if there is no such name."""
        return (await self.all()).get(name)

    async def addresses(self, name: str) -> set[IPv6Address]:
        """Read the IPv6 addresses of an interface."""
        index = await self._index(name)
        return {
            IPv6Address(address.get("address"))
            async for address in await self._netlink.addr("dump", family=socket.AF_INET6)
            if address["index"] == index
        }

    async def add_wireguard(self, name: str) -> None:
        """Make a WireGuard interface of the kernel, whose encrypted socket stays in this namespace."""
        await self._do(
            f"Making the WireGuard interface {name}", self._netlink.link("add", ifname=name, kind="wireguard")
        )

    async def add_veth(self, name: str, *, peer: str, peer_namespace: str, mtu: int) -> None:
        """Make a pair of interfaces, one here and one in another namespace."""
        with _opened(peer_namespace) as number:
            other = {"ifname": peer, "net_ns_fd": number, "mtu": mtu}
            await self._do(
                f"Joining {name} with {peer} in {peer_namespace}",
                self._netlink.link("add", ifname=name, kind="veth", peer=other, mtu=mtu),
            )

    async def move(self, name: str, namespace: str, *, rename: str | None = None) -> None:
        """Move an interface to another namespace, under another name if wanted."""
        options = {} if rename is None else {"ifname": rename}
        with _opened(namespace) as number:
            request = self._netlink.link("set", index=await self._index(name), net_ns_fd=number, **options)
            await self._do(f"Moving {name} to {namespace}", request)

    async def set_up(self, name: str, *, mtu: int | None = None) -> None:
        """Switch an interface on, with this largest size of a packet."""
        options = {} if mtu is None else {"mtu": mtu}
        index = await self._index(name)
        await self._do(f"Switching {name} on", self._netlink.link("set", index=index, state="up", **options))

    async def delete(self, name: str) -> None:
        """Delete an interface, if it is there; the other end of a veth goes with it."""
        link = await self.find(name)
        if link is not None:
            await self._do(f"Deleting {name}", self._netlink.link("del", index=link.index), errno.ENODEV)

    async def add_address(self, name: str, address: IPv6Address, prefix_length: int = 128) -> None:
        """Give an interface an address that can be used at once."""
        await self._do(
            f"Adding {address}/{prefix_length} to {name}",
            self._netlink.addr(
                "add",
                index=await self._index(name),
                address=str(address),
                prefixlen=prefix_length,
                family=socket.AF_INET6,
                flags=IFA_F_NODAD,
            ),
            errno.EEXIST,
        )

    async def remove_address(self, name: str, address: IPv6Address, prefix_length: int = 128) -> None:
        """Take an address away, if it is there."""
        index = await self._index(name)
        await self._do(
            f"Removing {address} from {name}",
            self._netlink.addr("del", index=index, address=str(address), prefixlen=prefix_length),
            errno.EADDRNOTAVAIL,
        )

    async def route(self, network: IPv6Network, name: str, *, via: IPv6Address | None = None) -> None:
        """Send what is for a network through an interface."""
        options = {} if via is None else {"gateway": str(via)}
        await self._do(
            f"Routing {network} through {name}",
            self._netlink.route(
                "replace",
                dst=str(network),
                oif=await self._index(name),
                family=socket.AF_INET6,
                type=RTN_UNICAST,
                **options,
            ),
        )

    async def unroute(self, network: IPv6Network) -> None:
        """Take a route away, if it is there."""
        request = self._netlink.route("del", dst=str(network), family=socket.AF_INET6)
        await self._do(f"Removing the route to {network}", request, errno.ESRCH)

    async def refuse(self, network: IPv6Network) -> None:
        """Tell senders at once that what is for this network arrives nowhere, unless a longer route says otherwise."""
        await self._do(
            f"Refusing {network}",
            self._netlink.route(
                "replace", dst=str(network), oif=LOOPBACK_INDEX, family=socket.AF_INET6, type=RTN_UNREACHABLE
            ),
        )

    async def _index(self, name: str) -> int:
        found = await self._netlink.link_lookup(ifname=name)
        if not found:
            raise LinkError(f"Finding the interface {name}", errno.ENODEV)
        return int(found[0])

    @staticmethod
    async def _do(action: str, request: Awaitable[Any], *expected: int) -> None:
        """Wait for an answer; the one place where pyroute2's errors become ours."""
        try:
            await request
        except NetlinkError as exc:
            if exc.code not in expected:
                raise LinkError(action, exc.code) from exc
