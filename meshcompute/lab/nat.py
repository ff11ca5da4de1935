"""A router with NAT in front of a site (pure).

Covers what such a router does to TCP, UDP and pings over IPv4. Does not cover fragments (they do not pass), helpers
for protocols that carry addresses, or clocks: times are given.

As RFC 4787 calls it: one mapping per inner port, whoever is spoken to ("endpoint-independent mapping"); packets come
in only from an address and port that the site has sent to ("address and port-dependent filtering"), and only packets
from inside keep a mapping alive. Outer ports are drawn at random, so that nobody can guess them. Ports that the
router's owner has forwarded (TCP 22: the way in for the control plane) are open to everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from meshcompute.lab.packets import ICMP, TCP, UDP, addresses_of, ports_of, rewrite_source, rewrite_target

__all__ = ["Nat"]

# UDP: what common routers do, and what a keepalive of 25 s is made for; RFC 4787 asks for more. TCP: RFC 5382.
IDLE_SECONDS = {ICMP: 30.0, TCP: 7440.0, UDP: 30.0}
FIRST_PORT, LAST_PORT = 20000, 60000
FORWARDED = frozenset({(TCP, 22)})


@dataclass(slots=True, kw_only=True)
class _Mapping:
    inner_port: int
    outer_port: int
    last_sent_by_peer: dict[tuple[bytes, int], float] = field(default_factory=dict)


class Nat:
    """A router with NAT.

    Parameters
    ----------
    outer
        Its address on the WAN.
    inner
        Address of the one host behind it.
    draw
        Called with the first and last possible number; returns one between them, at random.
    forwarded
        Protocols and ports that are open to everybody.
    """

    def __init__(
        self,
        outer: bytes,
        inner: bytes,
        draw: Callable[[int, int], int],
        forwarded: Collection[tuple[int, int]] = FORWARDED,
    ) -> None:
        self.outer = outer
        self.inner = inner
        self.forwarded = frozenset(forwarded)
        self._draw = draw
        self._by_inner: dict[tuple[int, int], _Mapping] = {}
        self._by_outer: dict[tuple[int, int], _Mapping] = {}

    def send(self, packet: bytes, now: float) -> bytes | None:
        """Let a packet of the site out.

        Parameters
        ----------
        packet
            An IPv4 packet.
        now
            Time, in seconds.

        Returns
        -------
        bytes or None
            The packet as the WAN sees it; ``None``: it cannot pass.
        """
        addresses, ports = addresses_of(packet), ports_of(packet)
        if addresses is None or ports is None or addresses[0] != self.inner:
            return None
        protocol, port, peer_port = ports
        if (protocol, port) in self.forwarded:
            return rewrite_source(packet, self.outer, port)
        mapping = self._by_inner.get((protocol, port))
        if mapping is None or self._is_over(protocol, mapping, now):
            mapping = self._new_mapping(protocol, port)
        mapping.last_sent_by_peer[addresses[1], 0 if protocol == ICMP else peer_port] = now
        return rewrite_source(packet, self.outer, mapping.outer_port)

    def receive(self, packet: bytes, now: float) -> bytes | None:
        """Let a packet of the WAN in.

        Parameters
        ----------
        packet
            An IPv4 packet.
        now
            Time, in seconds.

        Returns
        -------
        bytes or None
            The packet as the site sees it; ``None``: it cannot pass.
        """
        addresses, ports = addresses_of(packet), ports_of(packet)
        if addresses is None or ports is None or addresses[1] != self.outer:
            return None
        protocol, peer_port, port = ports
        if (protocol, port) in self.forwarded:
            return rewrite_target(packet, self.inner, port)
        mapping = self._by_outer.get((protocol, port))
        if mapping is None or self._is_over(protocol, mapping, now):
            return None
        sent_at = mapping.last_sent_by_peer.get((addresses[0], 0 if protocol == ICMP else peer_port))
        if sent_at is None or now - sent_at > IDLE_SECONDS[protocol]:
            return None
        return rewrite_target(packet, self.inner, mapping.inner_port)

    def _is_over(self, protocol: int, mapping: _Mapping, now: float) -> bool:
        return now - max(mapping.last_sent_by_peer.values()) > IDLE_SECONDS[protocol]

    def _new_mapping(self, protocol: int, port: int) -> _Mapping:
        old = self._by_inner.pop((protocol, port), None)
        if old is not None:
            del self._by_outer[protocol, old.outer_port]
        while True:
            outer = self._draw(FIRST_PORT, LAST_PORT)
            if (protocol, outer) not in self._by_outer and outer != port and (protocol, outer) not in self.forwarded:
                break
        mapping = _Mapping(inner_port=port, outer_port=outer)
        self._by_inner[protocol, port] = self._by_outer[protocol, outer] = mapping
        return mapping
