"""The one door to WireGuard's tools: keys, configuration, and what an interface knows.

Covers ``wg`` for interfaces of the kernel and of wireguard-go alike. Does not cover making interfaces
(:mod:`controlplane.network.links`, :mod:`controlplane.network.keeper`) nor deciding about peers
(:mod:`controlplane.network.peers`).

Facts that shape it (wireguard-tools 1.0.20210914, wireguard-go 0.0.20220316):

- ``wg syncconf`` without the private key erases it, so peers change by ``wg set``.
- wireguard-go's control socket keeps the name that the interface was made with, wherever the interface goes.
- ``wg`` resolves names of hosts where it runs, which is no place that has a resolver: endpoints must be numbers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

from controlplane.command import run
from controlplane.errors import ApplyError
from controlplane.network.peers import AddPeer, RemovePeer, SetAllowed, SetEndpoint, Step
from controlplane.network.topology import PeerConfig

__all__ = [
    "InterfaceDump",
    "PeerDump",
    "PrivateKey",
    "WireGuard",
    "generate_key",
    "parse_dump",
    "public_key_of",
    "render_steps",
    "resolve",
]

_NONE = "(none)"


class PrivateKey:
    """A private key, which shows itself to nobody who does not ask for it by name."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "PrivateKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("A private key stays in the process that uses it.")

    def reveal(self) -> str:
        """Give the key away, to WireGuard."""
        return self._text


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDump:
    """A peer as ``wg show dump`` has it; a handshake time of 0 is "never"."""

    public_key: str
    endpoint: str | None
    allowed: tuple[IPv4Network | IPv6Network, ...]
    handshake_unix_seconds: int
    received_nbytes: int
    sent_nbytes: int
    keepalive_seconds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceDump:
    """An interface as ``wg show dump`` has it."""

    private_key: PrivateKey | None
    public_key: str | None
    listen_port: int
    peers: tuple[PeerDump, ...]


async def generate_key() -> PrivateKey:
    """Make a new private key."""
    return PrivateKey((await run(["wg", "genkey"])).stdout.strip())


async def public_key_of(key: PrivateKey) -> str:
    """Compute the public key that goes with a private one."""
    return (await run(["wg", "pubkey"], stdin=key.reveal() + "\n")).stdout.strip()


async def resolve(endpoint: str) -> str:
    """Find the address that an endpoint's name stands for; IPv4 first, as most sites have it.

    Raises
    ------
    ApplyError
        The name is not known.
    """
    host, _colon, port = endpoint.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise ApplyError(
            f"The name in a peer's endpoint {endpoint!r} is not known here ({exc}). Write an address instead."
        ) from exc
    family, _type, _protocol, _name, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    number = str(address[0])
    return f"[{number}]:{port}" if family == socket.AF_INET6 else f"{number}:{port}"


class WireGuard:
    """``wg`` for one interface.

    Parameters
    ----------
    name
        Of the interface, as it was made.
    wrapper
        Command that enters the namespaces where ``wg`` finds the interface.
    """

    def __init__(self, name: str, wrapper: Sequence[str] = ()) -> None:
        self.name = name
        self._wrapper = tuple(wrapper)

    async def set_key(self, key: PrivateKey) -> None:
        """Give the interface its private key, through a pipe."""
        await run([*self._wrapper, "wg", "set", self.name, "private-key", "/dev/fd/0"], stdin=key.reveal() + "\n")

    async def set_port(self, listen_port: int) -> None:
        """Listen at this UDP port; the interface should be up, or a port that is taken is not noticed."""
        await run([*self._wrapper, "wg", "set", self.name, "listen-port", str(listen_port)])

    async def apply(self, steps: Iterable[Step]) -> None:
        """Do these steps, in this order. Endpoints must be numbers."""
        arguments = render_steps(steps)
        if arguments:
            await run([*self._wrapper, "wg", "set", self.name, *arguments])

    async def show(self) -> InterfaceDump:
        """Read everything that the interface knows."""
        return parse_dump((await run([*self._wrapper, "wg", "show", self.name, "dump"])).stdout)


def render_steps(steps: Iterable[Step]) -> list[str]:
    """Write steps as arguments of ``wg set``."""
    arguments = []
    for step in steps:
        peer = step.peer
        arguments += ["peer", peer.public_key]
        if isinstance(step, RemovePeer):
            arguments.append("remove")
            continue
        if isinstance(step, AddPeer | SetEndpoint) and peer.endpoint is not None:
            arguments += ["endpoint", peer.endpoint]
        if isinstance(step, AddPeer | SetAllowed):
            arguments += ["allowed-ips", ",".join(str(network) for network in peer.allowed)]
        if not isinstance(step, SetEndpoint | SetAllowed):
            arguments += ["persistent-keepalive", str(peer.keepalive_seconds or 0)]
    return arguments


def parse_dump(text: str) -> InterfaceDump:
    """Read the output of ``wg show NAME dump``."""
    first, *rest = text.splitlines()
    private_key, public_key, listen_port, _mark = first.split("\t")
    peers = []
    for line in rest:
        key, _shared, endpoint, allowed, handshake, received, sent, keepalive = line.split("\t")
        peers.append(
            PeerDump(
                public_key=key,
                endpoint=None if endpoint == _NONE else endpoint,
                allowed=tuple(ip_network(network) for network in allowed.split(",") if network != _NONE),
                handshake_unix_seconds=int(handshake),
                received_nbytes=int(received),
                sent_nbytes=int(sent),
                keepalive_seconds=None if keepalive == "off" else int(keepalive),
            )
        )
    return InterfaceDump(
        private_key=None if private_key == _NONE else PrivateKey(private_key),
        public_key=None if public_key == _NONE else public_key,
        listen_port=int(listen_port),
        peers=tuple(peers),
    )


def peer_config_of(site: int, peer: PeerDump) -> PeerConfig:
    """Read an observed peer as a configuration of it."""
    return PeerConfig(
        site=site,
        public_key=peer.public_key,
        endpoint=peer.endpoint,
        allowed=tuple(network for network in peer.allowed if isinstance(network, IPv6Network)),
        keepalive_seconds=peer.keepalive_seconds,
    )
