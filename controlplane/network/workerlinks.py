"""Join a worker's namespace to its gateway: by a veth, or by a WireGuard interface of its own.

Covers both links, as DESIGN's section 7 has them. Does not cover when workers come and go.

::

    veth        gateway  w11 fe80::1 ───────────────────────────── mesh0 P:s::11, P::/48 via fe80::1  worker
    wireguard   gateway  mc-xxxxxxxx ── UDP 127.0.0.1 (host's) ─── mesh0 P:s::11, P::/48              worker

A veth is twice as fast, as nothing is encrypted between a worker and the gateway beside it. The other link encrypts
all the way to the worker, and is what a worker on another host of the site needs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network

from controlplane.errors import ApplyError
from controlplane.network.base import WorkerLink
from controlplane.network.interfaces import InterfaceMaker, Place, namespace_of
from controlplane.network.keepers import KeeperClient
from controlplane.network.links import LinkError, Links, open_links
from controlplane.network.peers import AddPeer, RemovePeer, plan_peers
from controlplane.network.topology import (
    KEEPALIVE_SECONDS,
    GatewayConfig,
    PeerConfig,
    interface_of,
    network_of,
    site_of,
)
from controlplane.network.wgformat import PrivateKey, configured_peers, worker_keys
from controlplane.network.wireguard import generate_key

__all__ = ["LOOPBACK", "Attachment", "WorkerLinks"]

LOOPBACK = "lo"
ROUTER = IPv6Address("fe80::1")  # what every worker sends to, on a link that has nobody else
ROUTER_LENGTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A worker's place: its namespace, and what the interface is called there."""

    address: IPv6Address
    namespace: str
    interface: str
    link: WorkerLink


@dataclass(slots=True)
class WorkerLinks:
    """The links of one gateway's workers, and the keys that those made of WireGuard have."""

    maker: InterfaceMaker
    attached: dict[IPv6Address, Attachment] = field(default_factory=dict)
    _keys: dict[IPv6Address, PrivateKey] = field(default_factory=dict, repr=False)

    async def attach(self, config: GatewayConfig, keeper: KeeperClient, wanted: Attachment) -> None:
        """Give a worker its address and the way to the whole cluster; nothing changes if it has them.

        Raises
        ------
        ApplyError
            The address is not one of this site's workers, or the kernel refused.
        """
        address = wanted.address
        if site_of(config.prefix, address) != config.site or address == config.address:
            raise ApplyError(
                f"{address} cannot be a worker's address here: choose one of {network_of(config.prefix, config.site)} "
                f"that is not the gateway's own, {config.address}."
            )
        before = self.attached.get(address)
        if before is not None and before.link != wanted.link:
            await self.detach(config.cluster_id, keeper, address)
        if wanted.link == "veth":
            await self._join_by_veth(config, keeper, wanted)
        else:
            await self._join_by_wireguard(config, keeper, wanted)
        self.attached[address] = wanted

    async def attach_again(self, config: GatewayConfig, keeper: KeeperClient) -> list[str]:
        """Attach all workers that were; forget those that have gone, and say why."""
        gone = []
        for address, wanted in list(self.attached.items()):
            try:
                await self.attach(config, keeper, wanted)
            except LinkError as exc:
                gone.append(f"{address}: {exc}")
                del self.attached[address]
        return gone

    async def detach(self, cluster_id: str, keeper: KeeperClient, address: IPv6Address) -> None:
        """Take a worker's link away, whichever it is, also one that an earlier daemon made."""
        known = self.attached.pop(address, None)
        self._keys.pop(address, None)
        if known is not None and known.link == "wireguard":
            with contextlib.suppress(LinkError):
                async with open_links(known.namespace) as worker:
                    await worker.delete(known.interface)
        await keeper.kill(_wireguard_name(cluster_id, address))
        inside_place = Place(namespace=namespace_of(keeper.pid), name=interface_of(cluster_id))
        async with open_links(inside_place.namespace) as inside:
            await inside.delete(_veth_name(address))
            await inside.unroute(IPv6Network(address))
            has_gateway = await inside.find(inside_place.name) is not None
        if has_gateway:
            gateway = await self.maker.door(inside_place.name, inside_place, keeper)
            keys = worker_keys(await gateway.show(), address)
            await gateway.apply([RemovePeer(peer=_worker_peer(key, address)) for key in keys])

    async def _join_by_veth(self, config: GatewayConfig, keeper: KeeperClient, wanted: Attachment) -> None:
        name = _veth_name(wanted.address)
        async with open_links(namespace_of(keeper.pid)) as inside, open_links(wanted.namespace) as worker:
            ours, theirs = await inside.find(name), await worker.find(wanted.interface)
            if ours is None or theirs is None or (ours.peer_index, theirs.peer_index) != (theirs.index, ours.index):
                await inside.delete(name)
                await worker.delete(wanted.interface)
                await inside.add_veth(name, peer=wanted.interface, peer_namespace=wanted.namespace, mtu=config.mtu)
            await inside.set_up(name, mtu=config.mtu)
            await inside.add_address(name, ROUTER, ROUTER_LENGTH)
            await inside.route(IPv6Network(wanted.address), name)
            await _prepare_worker(worker, config, wanted, via=ROUTER)

    async def _join_by_wireguard(self, config: GatewayConfig, keeper: KeeperClient, wanted: Attachment) -> None:
        name, address = _wireguard_name(config.cluster_id, wanted.address), wanted.address
        place = Place(namespace=wanted.namespace, name=wanted.interface)
        if not await self.maker.is_there(name, place, keeper):
            await self.maker.make(name, place, keeper, mtu=config.mtu)
        worker_door = await self.maker.door(name, place, keeper)
        dump = await worker_door.show()
        if dump.private_key is None:
            self._keys.setdefault(address, await generate_key())
            await worker_door.set_key(self._keys[address])
            dump = await worker_door.show()
        elif address not in self._keys:
            self._keys[address] = dump.private_key
        assert dump.public_key is not None
        outside_name = interface_of(config.cluster_id)
        gateway_place = Place(namespace=namespace_of(keeper.pid), name=outside_name)
        gateway = await self.maker.door(outside_name, gateway_place, keeper)
        gateway_dump = await gateway.show()
        # Who is called must know the caller first: a worker whose gateway does not know it loses 5 s.
        keys = worker_keys(gateway_dump, address)
        is_new = dump.public_key not in keys
        if is_new:
            others = [RemovePeer(peer=_worker_peer(key, address)) for key in keys]
            await gateway.apply([AddPeer(peer=_worker_peer(dump.public_key, address)), *others])
        async with open_links(gateway_place.namespace) as inside:
            await inside.delete(_veth_name(address))
            await inside.route(IPv6Network(address), outside_name)
        async with open_links(wanted.namespace) as worker:
            await _prepare_worker(worker, config, wanted, via=None)
        assert gateway_dump.public_key is not None
        peer = PeerConfig(
            site=config.site,
            public_key=gateway_dump.public_key,
            endpoint=f"127.0.0.1:{gateway_dump.listen_port}",
            allowed=(config.prefix,),
            keepalive_seconds=KEEPALIVE_SECONDS,
        )
        current = configured_peers(await worker_door.show(), config.prefix, {})
        if is_new and current:
            # The gateway was made again and has no session with this worker, which would notice only after 15 s.
            await worker_door.apply([*(RemovePeer(peer=old) for old in current), AddPeer(peer=peer)])
        else:
            await worker_door.apply(plan_peers(current, [peer]))


async def _prepare_worker(worker: Links, config: GatewayConfig, wanted: Attachment, *, via: IPv6Address | None) -> None:
    await worker.set_up(LOOPBACK)
    await worker.set_up(wanted.interface, mtu=config.mtu)
    await worker.add_address(wanted.interface, wanted.address)
    await worker.route(config.prefix, wanted.interface, via=via)


def _worker_peer(public_key: str, address: IPv6Address) -> PeerConfig:
    return PeerConfig(site=-1, public_key=public_key, endpoint=None, allowed=(IPv6Network(address),))


def _node_of(address: IPv6Address) -> str:
    """The end of an address, as it is written."""
    return f"{int(address) & 0xFFFF:x}"


def _veth_name(address: IPv6Address) -> str:
    """Name the gateway's end of a worker's veth: ``w11``."""
    return f"w{_node_of(address)}"


def _wireguard_name(cluster_id: str, address: IPv6Address) -> str:
    """Name a worker's WireGuard interface while it is made, in the host's namespace: at most 15 characters."""
    return f"mw{_node_of(address)}-{cluster_id[:8]}"
