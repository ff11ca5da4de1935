"""Gateways as network namespaces: one for each cluster, joined to the others by WireGuard and to its workers by veth.

Covers the order in which a gateway is made, compared with what should be, mended and removed. Does not cover who may
have one, nor for how long.

::

    host's namespace                    gateway's namespace                    a worker's namespace
      UDP socket ─ wireguard-go ─────── mc-xxxxxxxx  ◄── P::/48
                                        lo           P:s::1
                                        w11 fe80::1  ◄── P:s::11/128 ──veth── mesh0 P:s::11, P::/48 via fe80::1

Namespace and wireguard-go belong to a keeper (:mod:`controlplane.network.keeper`), which outlives this daemon and ends
at the gateway's deadline. The private key is made here, is in this process and in the interface, and nowhere else: a
daemon that starts again reads it back from the interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address

from controlplane.clock import Clock, SystemClock
from controlplane.errors import ApplyError, InvalidSpecError
from controlplane.network.base import WorkerLink
from controlplane.network.interfaces import Backend, InterfaceMaker, Place, PortTakenError, check_port, namespace_of
from controlplane.network.keeper import RELAY
from controlplane.network.keepers import ImpostorError, KeeperClient, KeeperGoneError, find_keepers, start_keeper
from controlplane.network.links import LinkError, open_links
from controlplane.network.peers import plan_peers
from controlplane.network.topology import (
    KEEPALIVE_SECONDS,
    GatewayConfig,
    GatewayState,
    PeerConfig,
    interface_of,
    network_of,
    service_address_of,
)
from controlplane.network.wgformat import InterfaceDump, PrivateKey, configured_peers, peer_states
from controlplane.network.wireguard import WireGuard, generate_key, resolve
from controlplane.network.workerlinks import LOOPBACK, Attachment, WorkerLinks

__all__ = ["NamespacePlane"]

logger = logging.getLogger(__name__)

MEND_SECONDS = (0.0, 0.2, 1.0, 2.0, 5.0)  # between tries; the last one is repeated until the deadline


@dataclass(slots=True)
class _Gateway:
    """What this process remembers of a gateway; all of it can be had again, but the key of a dead interface."""

    cluster_id: str
    workers: WorkerLinks
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    config: GatewayConfig | None = None
    key: PrivateKey | None = field(default=None, repr=False)
    listen_port: int | None = None
    ends_at: float = 0.0
    asked_endpoint_by_key: dict[str, tuple[str, str]] = field(default_factory=dict)  # as written, as a number
    seen_endpoint_by_key: dict[str, str] = field(default_factory=dict)
    watcher: asyncio.Task[None] | None = None


class NamespacePlane:
    """A data plane of real WireGuard; needs root.

    Parameters
    ----------
    backend
        WireGuard of the kernel, wireguard-go, or the first of them that works.
    instance
        Whose gateways these are: two daemons of one host do not see each other's.
    clock
        Time.
    """

    def __init__(self, backend: Backend = "auto", *, instance: str = "site", clock: Clock | None = None) -> None:
        self._maker = InterfaceMaker(backend)
        self._instance = instance
        self._clock = clock or SystemClock()
        self._gateways: dict[str, _Gateway] = {}

    @property
    def backend(self) -> Backend:
        """WireGuard of the kernel or wireguard-go; "auto" until the first gateway was made."""
        return self._maker.backend

    # ------------------------------------------------------------------------------------------------- the protocol

    async def observe(self) -> dict[str, GatewayState]:
        """Find all gateways of this instance, also those that an earlier daemon made, and read what is true of them."""
        states = {}
        for cluster_id in sorted(find_keepers(self._instance)):
            gateway = self._remember(cluster_id)
            async with gateway.lock:
                try:
                    async with KeeperClient(self._instance, cluster_id) as keeper:
                        states[cluster_id] = await self._observe(gateway, keeper)
                    self._watch(gateway)
                except KeeperGoneError:
                    continue
                except ApplyError as exc:
                    if cluster_id in find_keepers(self._instance):  # or it has ended meanwhile
                        logger.warning("a gateway cannot be read now cluster=%s reason=%s", cluster_id, exc)
                        states[cluster_id] = GatewayState(
                            cluster_id=cluster_id, namespace=None, public_key=None, listen_port=None
                        )
        return states

    async def ensure(self, config: GatewayConfig) -> GatewayState:
        """Make a gateway what it should be, changing nothing that is right, and move its deadline.

        Raises
        ------
        PortTakenError
            Its UDP port belongs to somebody else.
        InvalidSpecError
            The cluster has a gateway here, with another prefix or number of the site.
        ApplyError
            Something else failed; what was done stays, and the next call goes on from there.
        """
        gateway = self._remember(config.cluster_id)
        async with gateway.lock:
            old = gateway.config
            if old is not None and (old.prefix, old.site, old.node) != (config.prefix, config.site, config.node):
                raise InvalidSpecError(
                    f"Cluster {config.cluster_id} has {old.address} here and cannot become {config.address}: "
                    "delete it first, or give the new one an id of its own."
                )
            state = await self._ensure(gateway, config)
            self._watch(gateway)
            return state

    async def renew(self, cluster_id: str, deadline_seconds: float) -> None:
        """Move a gateway's deadline to so long from now, and change nothing else."""
        gateway = self._remember(cluster_id)
        async with KeeperClient(self._instance, cluster_id) as keeper:
            await keeper.renew(deadline_seconds)
        gateway.ends_at = self._clock.monotonic() + deadline_seconds

    async def attach(
        self,
        cluster_id: str,
        *,
        netns: str,
        address: IPv6Address,
        interface: str = "mesh0",
        link: WorkerLink = "veth",
    ) -> None:
        """Give a worker's namespace its address and the way to the whole cluster; nothing changes if it has them.

        Parameters
        ----------
        cluster_id
            Whose gateway.
        netns
            Path of the worker's namespace.
        address
            Of the worker, out of the site's network.
        interface
            Its name at the worker.
        link
            How it is joined to the gateway.
        """
        wanted = Attachment(address=address, namespace=netns, interface=interface, link=link)
        gateway = self._remember(cluster_id)
        async with gateway.lock, KeeperClient(self._instance, cluster_id) as keeper:
            if gateway.config is None:
                raise ApplyError(f"Cluster {cluster_id} has a gateway of an earlier daemon here: ensure it first.")
            await gateway.workers.attach(gateway.config, keeper, wanted)

    async def detach(self, cluster_id: str, address: IPv6Address) -> None:
        """Take a worker's link away, if it is there."""
        gateway = self._remember(cluster_id)
        async with gateway.lock:
            with contextlib.suppress(KeeperGoneError):
                async with KeeperClient(self._instance, cluster_id) as keeper:
                    await gateway.workers.detach(cluster_id, keeper, address)

    async def remove(self, cluster_id: str) -> None:
        """Remove a gateway with all that belongs to it; when this returns, it is gone."""
        gateway = self._remember(cluster_id)
        async with gateway.lock:
            gateway.config = None
            if gateway.watcher is not None:
                gateway.watcher.cancel()
                await asyncio.gather(gateway.watcher, return_exceptions=True)
            with contextlib.suppress(KeeperGoneError):
                async with KeeperClient(self._instance, cluster_id) as keeper:
                    # The kernel would remove these with the namespace, but some time later.
                    with contextlib.suppress(LinkError):
                        async with open_links(namespace_of(keeper.pid)) as inside:
                            for link in await inside.all():
                                if link != LOOPBACK and link != interface_of(cluster_id):
                                    await inside.delete(link)
                            await inside.delete(interface_of(cluster_id))
                    await keeper.end()
                    logger.info("removed a gateway cluster=%s", cluster_id)
            self._gateways.pop(cluster_id, None)

    async def sweep(self, keep: set[str]) -> None:
        """Remove all gateways of this instance but these."""
        for cluster_id in find_keepers(self._instance) - keep:
            logger.info("sweeping a gateway that nobody wants cluster=%s", cluster_id)
            await self.remove(cluster_id)

    async def close(self) -> None:
        """Stop watching; the gateways stay until their deadlines, or until another daemon finds them."""
        watchers = [gateway.watcher for gateway in self._gateways.values() if gateway.watcher is not None]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        self._gateways.clear()

    # ----------------------------------------------------------------------------------------------- making and mending

    def _remember(self, cluster_id: str) -> _Gateway:
        if cluster_id not in self._gateways:
            self._gateways[cluster_id] = _Gateway(cluster_id, WorkerLinks(self._maker))
        return self._gateways[cluster_id]

    async def _ensure(self, gateway: _Gateway, config: GatewayConfig) -> GatewayState:
        if await self._ensure_keeper(config):
            logger.info("made a gateway cluster=%s site=%s", config.cluster_id, config.site)
        async with KeeperClient(self._instance, config.cluster_id) as keeper:
            held = await keeper.renew(config.deadline_seconds)
            gateway.ends_at = self._clock.monotonic() + config.deadline_seconds
            gateway.config = config
            async with open_links(namespace_of(keeper.pid)) as inside:
                # On lo an address stays when WireGuard is made again.
                await inside.set_up(LOOPBACK)
                await inside.add_address(LOOPBACK, config.address)
                await inside.refuse(network_of(config.prefix, config.site))
                for service in config.services:
                    await inside.add_address(LOOPBACK, service_address_of(config.prefix, config.site, service.name))
            if config.services or RELAY in held.processes:
                await self._ensure_services(config, keeper)
            wireguard = await self._ensure_interface(gateway, config, keeper)
            dump = await wireguard.show()
            await self._ensure_peers(gateway, config, wireguard, dump)
            return await self._observe(gateway, keeper)

    async def _ensure_keeper(self, config: GatewayConfig) -> bool:
        """Start a keeper unless there is one; True if it was started."""
        try:
            async with KeeperClient(self._instance, config.cluster_id):
                return False
        except ImpostorError:
            raise
        except KeeperGoneError:
            await start_keeper(
                self._instance, config.cluster_id, prefix=config.prefix, deadline_seconds=config.deadline_seconds
            )
            return True

    @staticmethod
    async def _ensure_services(config: GatewayConfig, keeper: KeeperClient) -> None:
        """Let workers reach what they may; a host that has no address now must not keep a cluster from starting."""
        services = []
        for service in config.services:
            try:
                host, _colon, port = (await resolve(f"{service.host}:{service.port}")).rpartition(":")
            except ApplyError as exc:
                logger.warning(
                    "a service is left out name=%s cluster=%s reason=%s", service.name, config.cluster_id, exc
                )
                continue
            address = service_address_of(config.prefix, config.site, service.name)
            services.append((str(address), service.port, host.strip("[]"), int(port)))
        await keeper.relay(network_of(config.prefix, config.site), services)

    async def _ensure_interface(self, gateway: _Gateway, config: GatewayConfig, keeper: KeeperClient) -> WireGuard:
        """Have a WireGuard interface inside, with a key, a port and the route to the whole cluster."""
        name = interface_of(config.cluster_id)
        place = Place(namespace=namespace_of(keeper.pid), name=name)
        is_new = not await self._maker.is_there(name, place, keeper)
        if is_new:
            if config.listen_port is not None:
                check_port(config.listen_port)
            await self._maker.make(name, place, keeper, mtu=config.mtu)
        wireguard = await self._maker.door(name, place, keeper)
        dump = await wireguard.show()
        if dump.private_key is None:
            gateway.key = gateway.key or await generate_key()
            await wireguard.set_key(gateway.key)
        else:
            gateway.key = gateway.key or dump.private_key
        # One that nobody chose is kept when the interface is made again: the others know it.
        port = config.listen_port or (gateway.listen_port if is_new else None)
        if port is not None and port != dump.listen_port:
            try:
                await wireguard.set_port(port)
            except ApplyError as exc:
                raise PortTakenError(port) from exc
        async with open_links(place.namespace) as inside:
            await inside.set_up(name, mtu=config.mtu)
            await inside.route(config.prefix, name)
        return wireguard

    @staticmethod
    async def _ensure_peers(
        gateway: _Gateway, config: GatewayConfig, wireguard: WireGuard, dump: InterfaceDump
    ) -> None:
        """Give the interface its peers."""
        asked = gateway.asked_endpoint_by_key
        current = configured_peers(dump, config.prefix, {key: number for key, (_text, number) in asked.items()})
        have = {peer.public_key for peer in current}
        desired: list[PeerConfig] = []
        for peer in config.peers:
            key = peer.public_key
            if peer.endpoint is not None:
                number = asked[key][1] if asked.get(key, ("", ""))[0] == peer.endpoint else await resolve(peer.endpoint)
                asked[key] = (peer.endpoint, number)
                desired.append(replace(peer, endpoint=number))
            elif key not in have and key in gateway.seen_endpoint_by_key:
                # The interface was made again and has no session, which the other side would notice only after 15 s:
                # call it this once, although it is the one that calls. The next pass switches the keepalive off.
                seen = gateway.seen_endpoint_by_key[key]
                desired.append(replace(peer, endpoint=seen, keepalive_seconds=KEEPALIVE_SECONDS))
            else:
                desired.append(peer)
        steps = plan_peers(current, desired)
        await wireguard.apply(steps)
        for step in steps:
            logger.info("%s cluster=%s", step, config.cluster_id)

    async def _observe(self, gateway: _Gateway, keeper: KeeperClient) -> GatewayState:
        """Read an interface; a gateway whose interface is missing has no key and no peers."""
        namespace, name = namespace_of(keeper.pid), interface_of(gateway.cluster_id)
        place = Place(namespace=namespace, name=name)
        if not await self._maker.is_there(name, place, keeper):
            return GatewayState(cluster_id=gateway.cluster_id, namespace=namespace, public_key=None, listen_port=None)
        dump = await (await self._maker.door(name, place, keeper)).show()
        gateway.key = gateway.key or dump.private_key
        gateway.listen_port = dump.listen_port
        for peer in dump.peers:
            if peer.endpoint is not None:
                gateway.seen_endpoint_by_key[peer.public_key] = peer.endpoint
        configured = gateway.config.peers if gateway.config is not None else ()
        return GatewayState(
            cluster_id=gateway.cluster_id,
            namespace=namespace,
            public_key=dump.public_key,
            listen_port=dump.listen_port,
            peers=peer_states(dump, {peer.public_key: peer.site for peer in configured}, self._clock.wall()),
        )

    # -------------------------------------------------------------------------------------------------------- watching

    def _watch(self, gateway: _Gateway) -> None:
        if gateway.watcher is None or gateway.watcher.done():
            gateway.watcher = asyncio.create_task(self._mend(gateway), name=f"gateway {gateway.cluster_id}")

    async def _mend(self, gateway: _Gateway) -> None:
        """Make again what dies before its deadline: wireguard-go, the relay, or the keeper with everything."""
        while True:
            with contextlib.suppress(ApplyError):
                async with KeeperClient(self._instance, gateway.cluster_id) as keeper:
                    async for name in keeper.watch():
                        logger.warning("a process of the gateway was killed name=%s", name)
                        await self._mend_once(gateway)
            if gateway.config is None or self._clock.monotonic() >= gateway.ends_at:
                if self._gateways.get(gateway.cluster_id) is gateway and not gateway.lock.locked():
                    del self._gateways[gateway.cluster_id]  # with the key
                return
            logger.warning("the gateway's process was killed cluster=%s", gateway.cluster_id)
            await self._mend_once(gateway)

    async def _mend_once(self, gateway: _Gateway) -> None:
        for attempt in range(10_000):
            await asyncio.sleep(MEND_SECONDS[min(attempt, len(MEND_SECONDS) - 1)])
            async with gateway.lock:
                remaining = gateway.ends_at - self._clock.monotonic()
                if gateway.config is None or remaining <= 0:
                    return
                try:
                    await self._ensure(gateway, replace(gateway.config, deadline_seconds=remaining))
                    async with KeeperClient(self._instance, gateway.cluster_id) as keeper:
                        for gone in await gateway.workers.attach_again(gateway.config, keeper):
                            logger.info("a worker has gone meanwhile worker=%s", gone)
                except ApplyError as exc:
                    logger.warning("cannot mend a gateway yet cluster=%s reason=%s", gateway.cluster_id, exc)
                    continue
            logger.info("mended a gateway cluster=%s", gateway.cluster_id)
            return
