"""A data plane without a network: everything is on 127.0.0.1 of this machine, and nothing needs root.

Covers the same protocol as real gateways, so that the daemon and its clients go the same way with and without root.
Does not cover separation: whoever has an account here reaches everything. There is nothing to find again after a
restart, and nothing that could be left behind.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from ipaddress import IPv6Address

from controlplane.clock import Clock, SystemClock
from controlplane.errors import ApplyError
from controlplane.network.base import WorkerLink
from controlplane.network.topology import GatewayConfig, GatewayState, PeerState

__all__ = ["LoopbackPlane"]


@dataclass(slots=True)
class _Gateway:
    """A gateway on paper."""

    config: GatewayConfig
    ends_at: float
    attached: dict[IPv6Address, str] = field(default_factory=dict)


class LoopbackPlane:
    """A data plane whose gateways exist on paper only.

    Parameters
    ----------
    clock
        Time.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._gateways: dict[str, _Gateway] = {}

    async def observe(self) -> dict[str, GatewayState]:
        """Read all gateways whose deadline is not over."""
        now = self._clock.monotonic()
        self._gateways = {key: gateway for key, gateway in self._gateways.items() if gateway.ends_at > now}
        return {cluster_id: _state_of(gateway.config) for cluster_id, gateway in self._gateways.items()}

    async def ensure(self, config: GatewayConfig) -> GatewayState:
        """Write a gateway down, and move its deadline."""
        ends_at = self._clock.monotonic() + config.deadline_seconds
        gateway = self._gateways.setdefault(config.cluster_id, _Gateway(config, ends_at))
        gateway.config, gateway.ends_at = config, ends_at
        return _state_of(config)

    async def renew(self, cluster_id: str, deadline_seconds: float) -> None:
        """Move a gateway's deadline to so long from now."""
        (await self._find(cluster_id)).ends_at = self._clock.monotonic() + deadline_seconds

    async def attach(
        self,
        cluster_id: str,
        *,
        netns: str,
        address: IPv6Address,
        interface: str = "mesh0",
        link: WorkerLink = "veth",
    ) -> None:
        """Write a worker down; it is reached at 127.0.0.1 anyway."""
        (await self._find(cluster_id)).attached[address] = netns

    async def detach(self, cluster_id: str, address: IPv6Address) -> None:
        """Strike a worker out."""
        if cluster_id in await self.observe():
            self._gateways[cluster_id].attached.pop(address, None)

    async def remove(self, cluster_id: str) -> None:
        """Strike a gateway out."""
        self._gateways.pop(cluster_id, None)

    async def sweep(self, keep: set[str]) -> None:
        """Strike all gateways out but these."""
        for cluster_id in set(self._gateways) - keep:
            await self.remove(cluster_id)

    async def close(self) -> None:
        """Let go of nothing."""

    async def _find(self, cluster_id: str) -> _Gateway:
        if cluster_id not in await self.observe():
            raise ApplyError(f"Cluster {cluster_id} has no gateway here: ensure it first.")
        return self._gateways[cluster_id]


def _state_of(config: GatewayConfig) -> GatewayState:
    """Say what a real gateway would: a key, and a handshake with every peer."""
    # Looks like a key, is none, and opens nothing: clients hand it round as they do with real ones.
    digest = hashlib.sha256(f"loopback {config.cluster_id} {config.site}".encode()).digest()
    return GatewayState(
        cluster_id=config.cluster_id,
        namespace=None,
        public_key=base64.b64encode(digest).decode(),
        listen_port=config.listen_port,
        peers=tuple(
            PeerState(
                site=peer.site,
                public_key=peer.public_key,
                endpoint=peer.endpoint,
                latest_handshake_age_seconds=0.0,
                received_nbytes=0,
                sent_nbytes=0,
            )
            for peer in sorted(config.peers, key=lambda peer: peer.site)
        ),
    )
