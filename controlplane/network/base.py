"""What a data plane is, whatever it is made of.

Covers the protocol that the daemon uses. Does not cover its implementations: real WireGuard
(:mod:`controlplane.network.gateway`) and this machine's loopback (:mod:`controlplane.network.loopback`). Both pass
tests/contract/test_data_plane.py.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Literal, Protocol

from controlplane.network.topology import GatewayConfig, GatewayState

__all__ = ["DataPlane", "WorkerLink"]

WorkerLink = Literal["veth", "wireguard"]


class DataPlane(Protocol):
    """The gateways of a site. Everything is idempotent."""

    async def observe(self) -> dict[str, GatewayState]:
        """Read all gateways by cluster, also those that an earlier daemon made."""

    async def ensure(self, config: GatewayConfig) -> GatewayState:
        """Make a gateway what it should be, and move its deadline."""

    async def renew(self, cluster_id: str, deadline_seconds: float) -> None:
        """Move a gateway's deadline to so long from now."""

    async def attach(
        self,
        cluster_id: str,
        *,
        netns: str,
        address: IPv6Address,
        interface: str = "mesh0",
        link: WorkerLink = "veth",
    ) -> None:
        """Give a worker's namespace its address and the way to the whole cluster."""

    async def detach(self, cluster_id: str, address: IPv6Address) -> None:
        """Take a worker's link away."""

    async def remove(self, cluster_id: str) -> None:
        """Remove a gateway with all that belongs to it."""

    async def sweep(self, keep: set[str]) -> None:
        """Remove all gateways but these."""

    async def close(self) -> None:
        """Let go of the gateways, which stay."""
