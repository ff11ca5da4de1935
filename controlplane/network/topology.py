"""The shape of a cluster's network: addresses, who calls whom, and which peers a gateway has.

Covers decisions over plain data only; nothing here touches the machine. Does not cover how to get from the peers that
an interface has to these (:mod:`controlplane.network.peers`).

::

    P = fdxx:xxxx:xxxx::/48             random for each cluster (RFC 4193)
    P:0::/64   P:0::1 scheduler         site 0 is the client's
    P:1::/64   P:1::1 gateway           P:1::11, P:1::12 ... workers behind it
               P:1::1:xxxx:xxxx         at the gateway: what the operator lets workers of the site reach
    P:2::/64   P:2::1 gateway           P:2::11 ...

Every gateway is a peer of every other one, and is allowed the addresses of its own site. One side of each pair calls
(the initiator); the other one learns from the first packet where it is. Two gateways that both start at once need 7 to
12 seconds for what takes one round trip.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network

from controlplane.config import Service
from controlplane.errors import InvalidSpecError

__all__ = [
    "DEFAULT_MTU",
    "FIRST_WORKER_NODE",
    "GATEWAY_NODE",
    "KEEPALIVE_SECONDS",
    "ROUTER_NODE",
    "GatewayConfig",
    "GatewayState",
    "Link",
    "Member",
    "PeerConfig",
    "PeerState",
    "UnreachablePairError",
    "address_of",
    "initiator_of",
    "interface_of",
    "network_of",
    "parse_prefix",
    "peer_of",
    "peers_of",
    "plan_links",
    "random_prefix",
    "relayed",
    "service_address_of",
    "site_of",
]

GATEWAY_NODE = 1  # of a site's gateway; at site 0, of the scheduler
ROUTER_NODE = 2  # of the gateway of a site whose node 1 is a scheduler in a container of its own
FIRST_WORKER_NODE = 11
DEFAULT_MTU = 1280  # the least that IPv6 allows: passes everywhere
KEEPALIVE_SECONDS = 25  # shorter than any NAT forgets (RFC 4787 asks for 120 s, home routers have been seen at 30)
PREFIX_LENGTH = 48
SITE_LENGTH = 64
MAX_SITE = 0xFFFF
MAX_NODE = 9999  # a node's number is read as it is written in the address
_UNIQUE_LOCAL = IPv6Network("fd00::/8")  # RFC 4193, locally assigned
KEY_CHARACTERS_SHOWN = 8


class UnreachablePairError(InvalidSpecError):
    """Two sites that cannot reach each other, and no third one that both reach.

    Parameters
    ----------
    first, second
        Names of the two.
    """

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)
        self.first = first
        self.second = second

    def __str__(self) -> str:
        return (
            f"Sites {self.first!r} and {self.second!r} cannot be joined: neither can be reached by the other, and no "
            f"third site is reached by both. Open a UDP port at one of them and name it under "
            f"network_options.endpoints in its site.toml, or add a site that both can reach."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A site of a cluster as the others see it; without an endpoint nobody can call it."""

    site: int
    name: str
    public_key: str | None = None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A pair of sites that exchange packets directly, and the one of them that calls."""

    initiator: int
    responder: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """Another gateway as this one should know it; without an endpoint, it calls us."""

    site: int
    public_key: str
    endpoint: str | None
    allowed: tuple[IPv6Network, ...]
    keepalive_seconds: int | None = None

    def __str__(self) -> str:
        return f"peer {self.site} ({self.public_key[:KEY_CHARACTERS_SHOWN]}...)"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What a gateway should be. It ends itself ``deadline_seconds`` after the last time that anybody asked for it.

    ``node`` is the gateway's own number; ``listen_port`` None lets the system choose one; ``services`` are for workers
    of this site only.
    """

    cluster_id: str
    prefix: IPv6Network
    site: int
    mtu: int = DEFAULT_MTU
    listen_port: int | None = None
    peers: tuple[PeerConfig, ...] = ()
    deadline_seconds: float = 120.0
    node: int = GATEWAY_NODE
    services: tuple[Service, ...] = ()

    @property
    def address(self) -> IPv6Address:
        """The gateway's own address."""
        return address_of(self.prefix, self.site, self.node)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """What a gateway knows of a peer; an age of None is "never"."""

    site: int | None
    public_key: str
    endpoint: str | None
    latest_handshake_age_seconds: float | None
    received_nbytes: int
    sent_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    """What is true of a gateway; ``namespace`` is a path, for ``nsenter --net=``."""

    cluster_id: str
    namespace: str | None
    public_key: str | None
    listen_port: int | None
    peers: tuple[PeerState, ...] = ()


# -------------------------------------------------------------------------------------------------------- addresses


def random_prefix() -> IPv6Network:
    """Choose a prefix that nobody else has: 40 random bits after fd00::/8.

    References
    ----------
    RFC 4193, section 3.2.2.
    """
    return IPv6Network(((0xFD << 40 | secrets.randbits(40)) << 80, PREFIX_LENGTH))


def parse_prefix(text: str) -> IPv6Network:
    """Read a cluster's prefix: ``fda5:c0ff:eeee``, ``fda5:c0ff:eeee::`` or ``fda5:c0ff:eeee::/48``.

    Raises
    ------
    InvalidSpecError
        It is no /48 of fd00::/8.
    """
    address, _slash, length = text.partition("/")
    if address and "::" not in address:
        address += "::"
    try:
        network = IPv6Network(f"{address}/{length or PREFIX_LENGTH}")
    except ValueError as exc:
        raise InvalidSpecError(f"{text!r} is no IPv6 prefix ({exc}); write it like 'fda5:c0ff:eeee'") from exc
    if network.prefixlen != PREFIX_LENGTH or not network.subnet_of(_UNIQUE_LOCAL):
        raise InvalidSpecError(f"{text!r} is no /48 of fd00::/8 (RFC 4193); write it like 'fda5:c0ff:eeee'")
    return network


def network_of(prefix: IPv6Network, site: int) -> IPv6Network:
    """Find the /64 of a site: its number is the fourth group.

    Raises
    ------
    InvalidSpecError
        There is no such number.
    """
    if not 0 <= site <= MAX_SITE:
        raise InvalidSpecError(f"Site number {site} does not fit into an address: use 0 to {MAX_SITE}.")
    return IPv6Network((int(prefix.network_address) | site << 64, SITE_LENGTH))


def address_of(prefix: IPv6Network, site: int, node: int) -> IPv6Address:
    """Find the address of a node of a site; node 11 is ``::11``, read as it is written.

    Raises
    ------
    InvalidSpecError
        There is no such site or node number.
    """
    if not 1 <= node <= MAX_NODE:
        raise InvalidSpecError(f"Node number {node} does not fit into an address: use 1 to {MAX_NODE}.")
    return network_of(prefix, site).network_address + int(str(node), 16)


def service_address_of(prefix: IPv6Network, site: int, name: str) -> IPv6Address:
    """Find the address by which workers of a site reach a service: ``P:s::1:xxxx:xxxx``, from its name alone.

    So it stays when the operator names other services, too: running workers know the addresses of their start.
    """
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return network_of(prefix, site).network_address + (1 << 32 | digest)


def site_of(prefix: IPv6Network, place: IPv6Address | IPv6Network) -> int | None:
    """Find the site that an address or a site's network belongs to; None if it is not one of this prefix."""
    network = place if isinstance(place, IPv6Network) else IPv6Network(place)
    if network.prefixlen < SITE_LENGTH or not network.subnet_of(prefix):
        return None
    return int(network.network_address) >> 64 & MAX_SITE


def interface_of(cluster_id: str) -> str:
    """Name a cluster's gateway and its WireGuard interface: at most 15 characters, as Linux wants it."""
    return f"mc-{cluster_id[:8]}"


# ------------------------------------------------------------------------------------------------------ who calls whom


def initiator_of(first: Member, second: Member) -> int | None:
    """Choose who calls: the larger number, unless only the other one cannot be called; None if neither can."""
    lower, upper = sorted((first, second), key=lambda member: member.site)
    if lower.endpoint is not None:
        return upper.site
    return lower.site if upper.endpoint is not None else None


def plan_links(members: Collection[Member], *, broken: Collection[frozenset[int]] = ()) -> dict[frozenset[int], Link]:
    """Find the pairs of sites that exchange packets directly.

    Parameters
    ----------
    members
        All sites of the cluster.
    broken
        Pairs of site numbers of which is known that no packet passes between them.

    Returns
    -------
        The link of every pair that has one; the rest must be relayed.
    """
    links = {}
    ordered = sorted(members, key=lambda member: member.site)
    for number, first in enumerate(ordered):
        for second in ordered[number + 1 :]:
            pair = frozenset((first.site, second.site))
            initiator = initiator_of(first, second)
            if initiator is not None and pair not in broken:
                links[pair] = Link(initiator=initiator, responder=next(iter(pair - {initiator})))
    return links


def relayed(members: Collection[Member], *, broken: Collection[frozenset[int]] = ()) -> dict[frozenset[int], int]:
    """Choose a relay for every pair of sites that has no link of its own.

    The smallest number of those that both reach, and the client's own host (0) last: it has the thinnest line.

    Returns
    -------
        Site number of the relay by pair.

    Raises
    ------
    UnreachablePairError
        A pair has neither a link nor a relay.
    """
    links = plan_links(members, broken=broken)
    ordered = sorted(members, key=lambda member: member.site)
    relays = {}
    for number, first in enumerate(ordered):
        for second in ordered[number + 1 :]:
            pair = frozenset((first.site, second.site))
            if pair in links:
                continue
            both_reach = [
                member.site
                for member in ordered
                if frozenset((member.site, first.site)) in links and frozenset((member.site, second.site)) in links
            ]
            if not both_reach:
                raise UnreachablePairError(first.name, second.name)
            relays[pair] = min(both_reach, key=lambda site: (site == 0, site))
    return relays


def peer_of(
    prefix: IPv6Network,
    *,
    site: int,
    public_key: str,
    endpoint: str | None,
    is_initiator: bool,
    behind: Iterable[int] = (),
) -> PeerConfig:
    """Describe a peer: whoever is called is given an endpoint and a keepalive, whoever calls us neither.

    Parameters
    ----------
    prefix
        Of the cluster.
    site, public_key, endpoint
        Of the peer.
    is_initiator
        Whether *this* side calls.
    behind
        Further sites that are reached through this peer.
    """
    return PeerConfig(
        site=site,
        public_key=public_key,
        endpoint=endpoint if is_initiator else None,
        allowed=tuple(network_of(prefix, number) for number in (site, *sorted(behind))),
        keepalive_seconds=KEEPALIVE_SECONDS if is_initiator and endpoint is not None else None,
    )


def peers_of(
    prefix: IPv6Network, members: Collection[Member], site: int, *, broken: Collection[frozenset[int]] = ()
) -> tuple[PeerConfig, ...]:
    """List the peers of a site's gateway; every site computes the same network. Peers without a key wait.

    Raises
    ------
    UnreachablePairError
        Two sites of the cluster cannot be joined.
    """
    links = plan_links(members, broken=broken)
    relays = relayed(members, broken=broken)
    peers = []
    for member in sorted(members, key=lambda member: member.site):
        link = links.get(frozenset((site, member.site)))
        if link is None or member.public_key is None:
            continue
        behind = [next(iter(pair - {site})) for pair, relay in relays.items() if site in pair and relay == member.site]
        peers.append(
            peer_of(
                prefix,
                site=member.site,
                public_key=member.public_key,
                endpoint=member.endpoint,
                is_initiator=link.initiator == site,
                behind=behind,
            )
        )
    return tuple(peers)
