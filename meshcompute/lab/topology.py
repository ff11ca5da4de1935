"""What a lab consists of (pure).

Covers hosts with their addresses and what can be chosen about a lab. Does not cover acting on any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Self

__all__ = ["ACCOUNTS", "CONTROL_NETWORK", "SYSTEM_PATH", "Account", "Host", "Lab", "default_hosts"]

CONTROL_NETWORK = IPv4Network("10.8.0.0/24")  # the reference's control plane
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNTS = ("mesh", "guest")  # the first one is the user; the second one is somebody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host of the lab.

    Attributes
    ----------
    name
        Its host name; for a site, also the name of the pool.
    address
        Its address on the WAN. Behind NAT, the address of its router.
    is_site
        Whether it is a site; the client's host is not.
    data
        Folder of the machine that appears, read-only, as ``/data/<name>``; ``None`` makes an empty one in memory.
    has_nat
        Whether the host stands behind a router with NAT from the beginning.
    has_systemd
        Whether systemd is its process 1, as on an operator's host. Then nothing of meshcompute is there: it can be
        installed.
    """

    name: str
    address: IPv4Address
    is_site: bool = True
    data: str | None = None
    has_nat: bool = False
    has_systemd: bool = False

    @property
    def inner_address(self) -> IPv4Address:
        """The address that the host itself has where it stands behind NAT, e.g. 192.168.4.2."""
        return IPv4Address(f"192.168.{int(self.address) & 0xFF}.2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An account that every host has, and the machine has not."""

    name: str
    uid: int
    gid: int


def default_hosts() -> tuple[Host, ...]:
    """Name the hosts of the reference: the client and two sites, at its addresses."""
    return (
        Host(name="client", address=CONTROL_NETWORK[3], is_site=False),
        Host(name="ecmwf", address=CONTROL_NETWORK[4]),
        Host(name="eumetsat", address=CONTROL_NETWORK[2]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A lab as it is asked for.

    Attributes
    ----------
    name
        Two labs at once need two names.
    hosts
        The client's host first.
    shared
        Folder of the machine that the client's host shares, so that what it writes there stays.
    path
        Search path of programs at every host, but those with systemd.
    readable
        Files and folders of the machine that the accounts of hosts can reach, whatever their parents forbid: the
        Python that runs us, if it lies in root's home. The machine's own permissions stay as they are.
    accounts
        The accounts of every host; the client's root logs in at sites as the first one.
    delay_seconds
        Delay one way, between any two hosts.
    rate_bits_per_second
        What each direction between two hosts carries; ``None`` is as fast as it goes.
    loss
        Share of packets that each direction loses.
    engine
        Whether each host has a Docker engine of its own.
    daemon
        Whether each host runs ``meshcompute-site``, but those with systemd.
    image_store
        Folder with the layers of images that every engine knows from the start (see :mod:`meshcompute.lab.images`).
    """

    name: str
    hosts: tuple[Host, ...] = field(default_factory=default_hosts)
    shared: str | None = None
    path: str = SYSTEM_PATH
    accounts: tuple[Account, ...]
    readable: tuple[str, ...] = ()
    delay_seconds: float = 0.0
    rate_bits_per_second: float | None = None
    loss: float = 0.0
    engine: bool = False
    daemon: bool = False
    image_store: str | None = None

    @property
    def client(self) -> Host:
        """The client's host."""
        return next(host for host in self.hosts if not host.is_site)

    @property
    def cgroup(self) -> str:
        """The cgroup below which all containers of the lab are, as seen from the root of each hierarchy."""
        return f"/meshcompute-lab/{self.name}"

    def path_of(self, host: Host) -> str:
        """Tell the search path of programs at a host."""
        return SYSTEM_PATH if host.has_systemd else self.path

    def to_json(self) -> dict[str, Any]:
        """Render for another process."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in {"hosts", "accounts"}}
        plain["accounts"] = [{name: getattr(account, name) for name in account.__slots__} for account in self.accounts]
        plain["hosts"] = [
            {name: getattr(host, name) for name in host.__slots__} | {"address": str(host.address)}
            for host in self.hosts
        ]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` rendered."""
        hosts = tuple(Host(**{**host, "address": IPv4Address(host["address"])}) for host in plain["hosts"])
        accounts = tuple(Account(**account) for account in plain["accounts"])
        readable = tuple(plain["readable"])
        return cls(**{**plain, "hosts": hosts, "accounts": accounts, "readable": readable})
