"""What ``wg`` reads and writes, as plain data.

Covers arguments of ``wg set`` and the output of ``wg show dump``, and what the latter says about a gateway. Does not
cover running it (:mod:`controlplane.network.wireguard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network

from controlplane.network.peers import AddPeer, RemovePeer, SetAllowed, SetEndpoint, Step
from controlplane.network.topology import PeerConfig, PeerState, site_of

__all__ = [
    "InterfaceDump",
    "PeerDump",
    "PrivateKey",
    "configured_peers",
    "parse_dump",
    "peer_states",
    "render_steps",
    "worker_keys",
]

_NONE = "(none)"
_HOST_LENGTH = 128


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


def _is_worker(peer: PeerDump) -> bool:
    """Whether this is a worker of this site and no gateway: it has one address, where gateways have networks."""
    return bool(peer.allowed) and all(network.prefixlen == _HOST_LENGTH for network in peer.allowed)


def worker_keys(dump: InterfaceDump, address: IPv6Address) -> list[str]:
    """List the public keys that have a worker's address."""
    return [peer.public_key for peer in dump.peers if IPv6Network(address) in peer.allowed]


def configured_peers(
    dump: InterfaceDump, prefix: IPv6Network, endpoint_by_key: Mapping[str, str]
) -> tuple[PeerConfig, ...]:
    """Read the gateways among the peers of an interface as what was configured.

    Parameters
    ----------
    dump
        The interface.
    prefix
        Of the cluster.
    endpoint_by_key
        Endpoints as they were set. Where a peer roamed to since then is not for us to undo.
    """
    peers = []
    for peer in dump.peers:
        if _is_worker(peer):
            continue
        networks = tuple(network for network in peer.allowed if isinstance(network, IPv6Network))
        sites = [site for network in networks if (site := site_of(prefix, network)) is not None]
        found = PeerConfig(
            site=sites[0] if sites else -1,
            public_key=peer.public_key,
            endpoint=peer.endpoint,
            allowed=networks,
            keepalive_seconds=peer.keepalive_seconds,
        )
        if peer.endpoint is not None:
            found = replace(found, endpoint=endpoint_by_key.get(peer.public_key, peer.endpoint))
        peers.append(found)
    return tuple(peers)


def peer_states(dump: InterfaceDump, site_by_key: Mapping[str, int], now: float) -> tuple[PeerState, ...]:
    """Say what an interface knows of the other gateways, by number of the site.

    Parameters
    ----------
    dump
        The interface.
    site_by_key
        Sites of the peers that were configured; of others, the site is that of their only network.
    now
        Seconds since 1970.
    """
    states = []
    for peer in dump.peers:
        if _is_worker(peer):
            continue
        site = site_by_key.get(peer.public_key)
        if site is None and len(peer.allowed) == 1:
            network = peer.allowed[0]
            site = site_of(IPv6Network(network).supernet(new_prefix=48), network) if network.version == 6 else None
        handshake = peer.handshake_unix_seconds
        states.append(
            PeerState(
                site=site,
                public_key=peer.public_key,
                endpoint=peer.endpoint,
                latest_handshake_age_seconds=max(0.0, now - handshake) if handshake else None,
                received_nbytes=peer.received_nbytes,
                sent_nbytes=peer.sent_nbytes,
            )
        )
    return tuple(sorted(states, key=lambda state: (state.site is None, state.site or 0, state.public_key)))
