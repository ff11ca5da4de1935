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
import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, IPv6Network
from typing import Literal

from controlplane.clock import Clock, SystemClock
from controlplane.errors import ApplyError
from controlplane.network.base import WorkerLink
from controlplane.network.keepers import KeeperClient, KeeperGoneError, KeeperStatus, find_keepers, start_keeper
from controlplane.network.links import LinkError, Links, open_links
from controlplane.network.peers import plan_peers
from controlplane.network.topology import (
    KEEPALIVE_SECONDS,
    GatewayConfig,
    GatewayState,
    PeerConfig,
    PeerState,
    interface_of,
    network_of,
    site_of,
)
from controlplane.network.wireguard import (
    InterfaceDump,
    PrivateKey,
    WireGuard,
    generate_key,
    peer_config_of,
    public_key_of,
    resolve,
)

__all__ = ["Backend", "NamespacePlane", "PortTakenError"]

logger = logging.getLogger(__name__)

Backend = Literal["kernel", "userspace", "auto"]
ROUTER = IPv6Address("fe80::1")  # what every worker sends to, on a link that has nobody else
LOOPBACK = "lo"
MEND_SECONDS = (0.0, 0.2, 1.0, 2.0, 5.0)  # between tries; the last one is repeated until the deadline


class PortTakenError(ApplyError):
    """A UDP port that the gateway was told to listen at belongs to somebody else.

    Parameters
    ----------
    port
        The port.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.port = port

    def __str__(self) -> str:
        return (
            f"UDP port {self.port} is taken on this host. Choose another one (network_options.udp_ports in site.toml)."
        )


@dataclass(slots=True)
class _Gateway:
    """What this process remembers of a gateway; all of it can be had again, but the key of a dead interface."""

    cluster_id: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    config: GatewayConfig | None = None
    key: PrivateKey | None = field(default=None, repr=False)
    public_key: str | None = None
    listen_port: int | None = None
    ends_at: float = 0.0
    asked_endpoint_by_key: dict[str, tuple[str, str]] = field(default_factory=dict)  # as written, as a number
    seen_endpoint_by_key: dict[str, str] = field(default_factory=dict)
    attached: dict[IPv6Address, tuple[str, str]] = field(default_factory=dict)  # namespace and interface of the worker
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
        self.backend = backend
        self._instance = instance
        self._clock = clock or SystemClock()
        self._gateways: dict[str, _Gateway] = {}

    # ------------------------------------------------------------------------------------------------- the protocol

    async def observe(self) -> dict[str, GatewayState]:
        """Find all gateways of this instance, also those that an earlier daemon made, and read what is true of them."""
        states = {}
        for cluster_id in sorted(find_keepers(self._instance)):
            gateway = self._remember(cluster_id)
            async with gateway.lock:
                with contextlib.suppress(KeeperGoneError):
                    async with KeeperClient(self._instance, cluster_id) as keeper:
                        states[cluster_id] = await self._observe(gateway, await keeper.status())
                    self._watch(gateway)
        return states

    async def ensure(self, config: GatewayConfig) -> GatewayState:
        """Make a gateway what it should be, changing nothing that is right, and move its deadline.

        Raises
        ------
        PortTakenError
            Its UDP port belongs to somebody else.
        ApplyError
            Something else failed; what was done stays, and the next call goes on from there.
        """
        gateway = self._remember(config.cluster_id)
        async with gateway.lock:
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
        gateway = self._remember(cluster_id)
        async with gateway.lock, KeeperClient(self._instance, cluster_id) as keeper:
            if gateway.config is None:
                raise ApplyError(f"Cluster {cluster_id} has a gateway of an earlier daemon here: ensure it first.")
            await self._attach(gateway.config, keeper, netns=netns, address=address, interface=interface)
            gateway.attached[address] = (netns, interface)

    async def detach(self, cluster_id: str, address: IPv6Address) -> None:
        """Take a worker's link away, if it is there."""
        gateway = self._remember(cluster_id)
        async with gateway.lock:
            gateway.attached.pop(address, None)
            with contextlib.suppress(KeeperGoneError):
                async with KeeperClient(self._instance, cluster_id) as keeper, open_links(_path(keeper.pid)) as inside:
                    await inside.delete(_veth_of(address))

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
                        async with open_links(_path(keeper.pid)) as inside:
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
        return self._gateways.setdefault(cluster_id, _Gateway(cluster_id))

    async def _ensure(self, gateway: _Gateway, config: GatewayConfig) -> GatewayState:
        name = interface_of(config.cluster_id)
        is_new = await self._ensure_keeper(config)
        async with KeeperClient(self._instance, config.cluster_id) as keeper:
            status = await keeper.renew(config.deadline_seconds)
            gateway.ends_at = self._clock.monotonic() + config.deadline_seconds
            gateway.config = config
            async with open_links(_path(keeper.pid)) as inside:
                await self._ensure_addresses(inside, config)
                wireguard, dump = await self._ensure_interface(gateway, config, keeper, status, inside)
                await inside.set_up(name, mtu=config.mtu)
                await inside.route(config.prefix, name)
            await self._ensure_peers(gateway, config, wireguard, dump)
            if is_new:
                for address, (netns, interface) in list(gateway.attached.items()):
                    try:
                        await self._attach(config, keeper, netns=netns, address=address, interface=interface)
                    except LinkError as exc:  # the worker has gone, too
                        logger.info("cannot join a worker again address=%s reason=%s", address, exc)
                        del gateway.attached[address]
            return await self._observe(gateway, await keeper.status())

    async def _ensure_keeper(self, config: GatewayConfig) -> bool:
        """Start a keeper unless there is one; True if it was started."""
        try:
            async with KeeperClient(self._instance, config.cluster_id):
                return False
        except KeeperGoneError:
            await start_keeper(
                self._instance, config.cluster_id, prefix=config.prefix, deadline_seconds=config.deadline_seconds
            )
            return True

    @staticmethod
    async def _ensure_addresses(inside: Links, config: GatewayConfig) -> None:
        """Give the gateway its address, on lo, where it stays when WireGuard is made again."""
        await inside.set_up(LOOPBACK)
        await inside.add_address(LOOPBACK, config.address)
        await inside.refuse(network_of(config.prefix, config.site))

    async def _ensure_interface(
        self, gateway: _Gateway, config: GatewayConfig, keeper: KeeperClient, status: KeeperStatus, inside: Links
    ) -> tuple[WireGuard, InterfaceDump]:
        """Have a WireGuard interface inside, with a key and a port."""
        name = interface_of(config.cluster_id)
        is_there = await inside.find(name) is not None
        if not is_there:
            if config.listen_port is not None:
                _check_port(config.listen_port)
            status = await self._make_interface(name, config, keeper)
        wireguard = WireGuard(name, _wrapper(keeper.pid, is_userspace=name in status.processes))
        if not is_there:
            await inside.set_up(name, mtu=config.mtu)
        dump = await wireguard.show()
        if dump.private_key is None:
            gateway.key = gateway.key or await generate_key()
            gateway.public_key = None
            await wireguard.set_key(gateway.key)
        elif gateway.key is None:
            gateway.key = dump.private_key
        port = config.listen_port or (None if is_there else gateway.listen_port)
        if port is not None and port != dump.listen_port:
            try:
                await wireguard.set_port(port)
            except ApplyError as exc:
                raise PortTakenError(port) from exc
        if not is_there:
            logger.info("made a gateway cluster=%s site=%s backend=%s", config.cluster_id, config.site, self.backend)
            dump = await wireguard.show()
        return wireguard, dump

    async def _make_interface(self, name: str, config: GatewayConfig, keeper: KeeperClient) -> KeeperStatus:
        """Make the interface in the host's namespace, where its encrypted socket stays, and move it inside."""
        status = await keeper.status()
        async with open_links() as outside:
            if self.backend != "userspace" and name not in status.processes:
                try:
                    if await outside.find(name) is None:
                        await outside.add_wireguard(name)
                    self.backend = "kernel"
                except LinkError as exc:
                    if self.backend == "kernel" or exc.code != errno.EOPNOTSUPP:
                        raise
                    self.backend = "userspace"
            if self.backend == "userspace":
                if name in status.processes and await outside.find(name) is None:
                    await keeper.kill(name)  # its interface has gone, and it did not notice
                status = await keeper.spawn(name)
            # wireguard-go hears of this here, and not of what happens in another namespace.
            await outside.set_up(name, mtu=config.mtu)
            await outside.move(name, _path(keeper.pid))
        return status

    async def _ensure_peers(
        self, gateway: _Gateway, config: GatewayConfig, wireguard: WireGuard, dump: InterfaceDump
    ) -> None:
        """Give the interface its peers."""
        current = []
        for found in dump.peers:
            sites = [site_of(config.prefix, network) for network in found.allowed if isinstance(network, IPv6Network)]
            known = peer_config_of(next((site for site in sites if site is not None), -1), found)
            asked = gateway.asked_endpoint_by_key.get(found.public_key)
            # Where a peer roamed to is not for us to undo.
            current.append(replace(known, endpoint=asked[1]) if asked and known.endpoint else known)
        known_keys = {peer.public_key for peer in current}
        desired = []
        for peer in config.peers:
            if peer.endpoint is not None:
                asked = gateway.asked_endpoint_by_key.get(peer.public_key)
                number = asked[1] if asked and asked[0] == peer.endpoint else await resolve(peer.endpoint)
                gateway.asked_endpoint_by_key[peer.public_key] = (peer.endpoint, number)
                desired.append(replace(peer, endpoint=number))
            elif peer.public_key not in known_keys and peer.public_key in gateway.seen_endpoint_by_key:
                # The interface was made again and has no session, which the other side would notice only after 15 s:
                # call it this once, although it is the one that calls. The next pass switches the keepalive off.
                seen = gateway.seen_endpoint_by_key[peer.public_key]
                desired.append(replace(peer, endpoint=seen, keepalive_seconds=KEEPALIVE_SECONDS))
            else:
                desired.append(peer)
        steps = plan_peers(current, desired)
        await wireguard.apply(steps)
        for step in steps:
            logger.info("%s cluster=%s", step, config.cluster_id)

    async def _attach(
        self, config: GatewayConfig, keeper: KeeperClient, *, netns: str, address: IPv6Address, interface: str
    ) -> None:
        if site_of(config.prefix, address) != config.site or address == config.address:
            raise ApplyError(
                f"{address} cannot be a worker's address here: choose one of {network_of(config.prefix, config.site)} "
                f"that is not the gateway's own, {config.address}."
            )
        name = _veth_of(address)
        async with open_links(_path(keeper.pid)) as inside, open_links(netns) as worker:
            ours, theirs = await inside.find(name), await worker.find(interface)
            is_pair = ours is not None and theirs is not None and ours.peer_index == theirs.index
            if not is_pair or (theirs is not None and theirs.peer_index != (ours.index if ours else None)):
                await inside.delete(name)
                await worker.delete(interface)
                await inside.add_veth(name, peer=interface, peer_namespace=netns, mtu=config.mtu)
            await inside.set_up(name, mtu=config.mtu)
            await inside.add_address(name, ROUTER, 64)
            await inside.route(IPv6Network(address), name)
            await worker.set_up(LOOPBACK)
            await worker.set_up(interface, mtu=config.mtu)
            await worker.add_address(interface, address)
            await worker.route(config.prefix, interface, via=ROUTER)

    async def _observe(self, gateway: _Gateway, status: KeeperStatus) -> GatewayState:
        """Read an interface; a gateway whose interface is missing has no key and no peers."""
        namespace = _path(status.pid)
        name = interface_of(gateway.cluster_id)
        async with open_links(namespace) as inside:
            is_there = await inside.find(name) is not None
        if not is_there:
            return GatewayState(cluster_id=gateway.cluster_id, namespace=namespace, public_key=None, listen_port=None)
        dump = await WireGuard(name, _wrapper(status.pid, is_userspace=name in status.processes)).show()
        if gateway.key is None:
            gateway.key = dump.private_key
        public_key = dump.public_key
        if public_key is None and dump.private_key is not None:
            public_key = await public_key_of(dump.private_key)
        gateway.public_key, gateway.listen_port = public_key, dump.listen_port
        now = self._clock.wall()
        config_by_key = {peer.public_key: peer for peer in gateway.config.peers} if gateway.config else {}
        peers = []
        for peer in dump.peers:
            if peer.endpoint is not None:
                gateway.seen_endpoint_by_key[peer.public_key] = peer.endpoint
            peers.append(
                PeerState(
                    site=_site_of_peer(config_by_key.get(peer.public_key), peer.allowed),
                    public_key=peer.public_key,
                    endpoint=peer.endpoint,
                    latest_handshake_age_seconds=(
                        max(0.0, now - peer.handshake_unix_seconds) if peer.handshake_unix_seconds else None
                    ),
                    received_nbytes=peer.received_nbytes,
                    sent_nbytes=peer.sent_nbytes,
                )
            )
        return GatewayState(
            cluster_id=gateway.cluster_id,
            namespace=namespace,
            public_key=public_key,
            listen_port=dump.listen_port,
            peers=tuple(sorted(peers, key=lambda peer: (peer.site is None, peer.site or 0))),
        )

    # -------------------------------------------------------------------------------------------------------- watching

    def _watch(self, gateway: _Gateway) -> None:
        if gateway.watcher is None or gateway.watcher.done():
            gateway.watcher = asyncio.create_task(self._mend(gateway), name=f"gateway {gateway.cluster_id}")

    async def _mend(self, gateway: _Gateway) -> None:
        """Make again what dies before its deadline: wireguard-go, or the keeper with everything."""
        while True:
            with contextlib.suppress(ApplyError):
                async with KeeperClient(self._instance, gateway.cluster_id) as keeper:
                    async for name in keeper.watch():
                        logger.warning("wireguard-go was killed interface=%s", name)
                        await self._mend_once(gateway)
            if gateway.config is None or self._clock.monotonic() >= gateway.ends_at:
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
                except ApplyError as exc:
                    logger.warning("cannot mend a gateway yet cluster=%s reason=%s", gateway.cluster_id, exc)
                    continue
            logger.info("mended a gateway cluster=%s", gateway.cluster_id)
            return


def _path(pid: int) -> str:
    return f"/proc/{pid}/ns/net"


def _wrapper(pid: int, *, is_userspace: bool) -> Sequence[str]:
    """Enter where wg finds the interface: by a control socket in the keeper's mounts, or in the kernel's namespace."""
    return ("nsenter", f"--mount=/proc/{pid}/ns/mnt" if is_userspace else f"--net={_path(pid)}")


def _veth_of(address: IPv6Address) -> str:
    """Name the gateway's end of a worker's link: ``w11``, as the address ends."""
    return f"w{int(address) & 0xFFFFFFFFFFFF:x}"


def _site_of_peer(config: PeerConfig | None, allowed: Sequence[object]) -> int | None:
    """Find the site of a peer; without its configuration, from its only network."""
    if config is not None:
        return config.site
    networks = [network for network in allowed if isinstance(network, IPv6Network)]
    return int(networks[0].network_address) >> 64 & 0xFFFF if len(networks) == 1 else None


def _check_port(port: int) -> None:
    """See that nobody has a UDP port, on IPv4 or IPv6: wireguard-go would go on without one."""
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - as WireGuard does
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((any_address, port))
            except OSError as exc:
                if exc.errno == errno.EADDRINUSE:
                    raise PortTakenError(port) from exc
