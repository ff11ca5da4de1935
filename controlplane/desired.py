"""What a site should run for a cluster: its gateway and its units, from the client's wish and the operator's file.

Covers names, addresses, shares and defaults; pure. Does not cover whether the wish is allowed
(:mod:`controlplane.admission`) nor how to get there (:mod:`controlplane.reconcile`).

Names of one site with two containers of two processes each, pool ecmwf, site 1::

    unit  mc-<8 digits of the id>-ecmwf-1-u0    P:1::11    ecmwf-1-0, ecmwf-1-1
    unit  mc-<8 digits of the id>-ecmwf-1-u1    P:1::12    ecmwf-1-2, ecmwf-1-3
    unit  mc-<8 digits of the id>-scheduler     P:0::1     (the gateway steps aside, to P:0::2)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from ipaddress import IPv6Network

from controlplane.config import SiteConfig
from controlplane.network.base import WorkerLink
from controlplane.network.topology import (
    FIRST_WORKER_NODE,
    GATEWAY_NODE,
    ROUTER_NODE,
    GatewayConfig,
    PeerConfig,
    address_of,
    peer_of,
    service_address_of,
)
from controlplane.state import ClusterRecord
from controlplane.workers.base import WorkerSpec
from meshcompute.protocol import ClusterSpec, SchedulerRequest, WorkerRequest

__all__ = ["DesiredCluster", "desired_cluster", "fingerprint_of", "scheduler_addresses"]

DASK_PORT = 8786  # where a scheduler listens on the data plane, whatever its port at the client's host is
SCHEDULER_THREADS = 1
SCHEDULER_NAME = "scheduler"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredCluster:
    """A gateway and the units behind it, until a time of the monotonic clock."""

    cluster_id: str
    gateway: GatewayConfig
    units: tuple[WorkerSpec, ...]
    deadline: float
    link: WorkerLink = "veth"


def desired_cluster(record: ClusterRecord, config: SiteConfig, now: float) -> DesiredCluster:
    """Say what the machine should have of a cluster.

    Parameters
    ----------
    record
        What was asked for, by whom, and until when.
    config
        What the operator decided.
    now
        Seconds of the monotonic clock.

    Returns
    -------
    DesiredCluster
        The gateway and all units.
    """
    spec = record.spec
    remaining = record.lease.remaining_seconds(now)
    units = []
    if spec.scheduler is not None:
        units.append(_scheduler(record, spec.scheduler, config, remaining))
    if spec.workers is not None:
        units += _workers(record, spec.workers, config, remaining)
    gateway = GatewayConfig(
        cluster_id=record.cluster_id,
        prefix=IPv6Network(spec.prefix),
        site=spec.site,
        mtu=spec.mtu,
        listen_port=record.listen_port,
        peers=_peers(spec),
        deadline_seconds=remaining,
        node=ROUTER_NODE if spec.role == "scheduler" else GATEWAY_NODE,
        services=config.network_options.services,
    )
    return DesiredCluster(
        cluster_id=record.cluster_id,
        gateway=gateway,
        units=tuple(units),
        deadline=record.lease.deadline,
        link=spec.workers.link if spec.workers is not None else "veth",
    )


def _peers(spec: ClusterSpec) -> tuple[PeerConfig, ...]:
    prefix = IPv6Network(spec.prefix)
    return tuple(
        peer_of(
            prefix,
            site=peer.site,
            public_key=peer.public_key,
            endpoint=peer.endpoint,
            is_initiator=peer.initiates,
            behind=[other.site for other in spec.peers if other.via == peer.site],
        )
        for peer in spec.peers
        if peer.public_key is not None and peer.via is None
    )


def _unit_name(record: ClusterRecord, *rest: object) -> str:
    return "-".join(("mc", record.cluster_id[:8], *map(str, rest)))


def _workers(
    record: ClusterRecord, request: WorkerRequest, config: SiteConfig, remaining_seconds: float
) -> list[WorkerSpec]:
    spec, defaults = record.spec, config.workers
    processes = request.processes_per_container or defaults.processes_per_container
    is_on_mesh = config.network == "wireguard"
    return [
        WorkerSpec(
            cluster_id=record.cluster_id,
            name=_unit_name(record, config.pool, spec.site, f"u{unit}"),
            pool=config.pool,
            site=spec.site,
            process_names=tuple(
                f"{config.pool}-{spec.site}-{number}" for number in range(unit * processes, (unit + 1) * processes)
            ),
            threads_per_process=request.threads_per_process or defaults.threads_per_process,
            memory_bytes_per_process=request.memory_bytes_per_process or defaults.memory_bytes_per_process,
            scheduler_address=request.scheduler_address or _default_scheduler(spec, config),
            address=address_of(IPv6Network(spec.prefix), spec.site, FIRST_WORKER_NODE + unit) if is_on_mesh else None,
            image=request.image or defaults.image,
            uid=record.run_as.uid,
            gid=record.run_as.gid,
            groups=record.run_as.groups,
            data_folders=defaults.data_folders,
            deadline_seconds=remaining_seconds,
            owner=record.owner.user,
            hosts=tuple(
                (service.name, service_address_of(IPv6Network(spec.prefix), spec.site, service.name))
                for service in config.network_options.services
            ),
        )
        for unit in range(request.containers)
    ]


def _scheduler(
    record: ClusterRecord, request: SchedulerRequest, config: SiteConfig, remaining_seconds: float
) -> WorkerSpec:
    is_on_mesh = config.network == "wireguard"
    return WorkerSpec(
        cluster_id=record.cluster_id,
        name=_unit_name(record, SCHEDULER_NAME),
        pool=config.pool,
        site=record.spec.site,
        process_names=(SCHEDULER_NAME,),
        threads_per_process=SCHEDULER_THREADS,
        memory_bytes_per_process=config.limits.memory_bytes_per_worker,
        scheduler_address=None,
        address=address_of(IPv6Network(record.spec.prefix), record.spec.site, GATEWAY_NODE) if is_on_mesh else None,
        image=request.image or config.workers.image,
        uid=record.run_as.uid,
        gid=record.run_as.gid,
        groups=record.run_as.groups,
        data_folders=(),  # a scheduler reads no data
        deadline_seconds=remaining_seconds,
        role="scheduler",
        client_port=request.client_port,
        dashboard_port=request.dashboard_port,
        owner=record.owner.user,
    )


def _default_scheduler(spec: ClusterSpec, config: SiteConfig) -> str:
    if config.network == "loopback":
        return f"tcp://127.0.0.1:{DASK_PORT}"
    return f"tcp://[{address_of(IPv6Network(spec.prefix), 0, GATEWAY_NODE)}]:{DASK_PORT}"


def scheduler_addresses(record: ClusterRecord, config: SiteConfig) -> tuple[str, str, str | None]:
    """Say where a cluster's scheduler is.

    Parameters
    ----------
    record
        The cluster, which has a scheduler.
    config
        The site.

    Returns
    -------
    tuple
        Its address on the data plane, for clients of this host, and of the dashboard for browsers of this host.
    """
    request = record.spec.scheduler
    assert request is not None
    client = f"tcp://127.0.0.1:{request.client_port}"
    dashboard = None if request.dashboard_port is None else f"http://127.0.0.1:{request.dashboard_port}/status"
    if config.network == "loopback":
        return client, client, dashboard
    address = address_of(IPv6Network(record.spec.prefix), record.spec.site, GATEWAY_NODE)
    return f"tcp://[{address}]:{DASK_PORT}", client, dashboard


def fingerprint_of(unit: WorkerSpec) -> str:
    """A short name of all that a unit is started with; its deadline changes while it runs and does not count."""
    return hashlib.sha256(repr(replace(unit, deadline_seconds=0.0)).encode()).hexdigest()[:16]
