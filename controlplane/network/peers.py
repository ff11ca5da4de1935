"""The steps from the peers that an interface has to those that it should have.

Covers the difference, as steps whose text is fit for the log, and what each step does by WireGuard's rules. Does not
cover how a step is done (:mod:`controlplane.network.wireguard`) nor when (:mod:`controlplane.network.gateway`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv6Network

from controlplane.network.topology import PeerConfig

__all__ = [
    "AddPeer",
    "RemovePeer",
    "SetAllowed",
    "SetEndpoint",
    "SetKeepalive",
    "Step",
    "applied",
    "plan_peers",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddPeer:
    """A peer that the interface does not have."""

    peer: PeerConfig

    def __str__(self) -> str:
        peer = self.peer
        place = f"at {peer.endpoint}" if peer.endpoint is not None else "which calls us"
        keepalive = f", keepalive {peer.keepalive_seconds} s" if peer.keepalive_seconds else ""
        return f"add {peer}, {place}, for {_networks(peer.allowed)}{keepalive}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovePeer:
    """A peer that the interface should not have."""

    peer: PeerConfig

    def __str__(self) -> str:
        return f"remove {self.peer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEndpoint:
    """A peer that is called at another place from now on."""

    peer: PeerConfig

    def __str__(self) -> str:
        return f"call {self.peer} at {self.peer.endpoint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAllowed:
    """A peer behind which other sites are from now on."""

    peer: PeerConfig

    def __str__(self) -> str:
        return f"let {self.peer} have {_networks(self.peer.allowed)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetKeepalive:
    """A peer whose path is kept open, or no longer."""

    peer: PeerConfig

    def __str__(self) -> str:
        seconds = self.peer.keepalive_seconds
        return f"keep the path to {self.peer} open every {seconds} s" if seconds else f"let {self.peer} fall silent"


Step = AddPeer | RemovePeer | SetEndpoint | SetAllowed | SetKeepalive


def plan_peers(current: Iterable[PeerConfig], desired: Iterable[PeerConfig]) -> tuple[Step, ...]:
    """Find the steps from the peers that are to the peers that should be.

    Parameters
    ----------
    current
        Peers of the interface. An endpoint that a peer roamed to is not a difference: give the one that was set.
    desired
        Peers that it should have.

    Notes
    -----
    Adding comes before removing: an address that moves from one peer to another is taken over at once, in WireGuard
    itself, and never belongs to nobody. For the same reason who gains addresses goes before who loses some, and keeps
    meanwhile what it has. A desired endpoint of None leaves alone what was learnt from the peer's own packets.
    """
    have = {peer.public_key: peer for peer in current}
    want = {peer.public_key: peer for peer in desired}
    kept = [key for key in want if key in have]
    steps: list[Step] = [AddPeer(peer=peer) for key, peer in want.items() if key not in have]
    for key in kept:
        if set(want[key].allowed) - set(have[key].allowed):
            held = _allowed(applied(have.values(), steps), key)
            extra = tuple(network for network in held if network not in want[key].allowed)
            steps.append(SetAllowed(peer=replace(want[key], allowed=want[key].allowed + extra)))
    reached = applied(have.values(), steps)
    for key in kept:
        old, new = have[key], want[key]
        if set(_allowed(reached, key)) != set(new.allowed):
            steps.append(SetAllowed(peer=new))
        if new.endpoint is not None and new.endpoint != old.endpoint:
            steps.append(SetEndpoint(peer=new))
        if (old.keepalive_seconds or 0) != (new.keepalive_seconds or 0):
            steps.append(SetKeepalive(peer=new))
    steps += [RemovePeer(peer=peer) for key, peer in have.items() if key not in want]
    return tuple(steps)


def applied(current: Iterable[PeerConfig], steps: Iterable[Step]) -> tuple[PeerConfig, ...]:
    """Say which peers there are after these steps, by WireGuard's rules: an address belongs to one peer only."""
    peers = {peer.public_key: peer for peer in current}
    for step in steps:
        peer = step.peer
        if isinstance(step, RemovePeer):
            peers.pop(peer.public_key, None)
            continue
        if isinstance(step, AddPeer | SetAllowed):
            peers = {
                key: replace(other, allowed=tuple(net for net in other.allowed if net not in peer.allowed))
                for key, other in peers.items()
            }
        old = peers.get(peer.public_key, peer)
        peers[peer.public_key] = replace(
            old,
            allowed=peer.allowed if isinstance(step, AddPeer | SetAllowed) else old.allowed,
            endpoint=peer.endpoint if isinstance(step, AddPeer | SetEndpoint) else old.endpoint,
            keepalive_seconds=(
                peer.keepalive_seconds if isinstance(step, AddPeer | SetKeepalive) else old.keepalive_seconds
            ),
        )
    return tuple(peers.values())


def _allowed(peers: Iterable[PeerConfig], public_key: str) -> tuple[IPv6Network, ...]:
    return next((peer.allowed for peer in peers if peer.public_key == public_key), ())


def _networks(networks: Iterable[IPv6Network]) -> str:
    return ", ".join(str(network) for network in networks) or "no address"
