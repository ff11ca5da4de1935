"""What a client is told of a cluster, from its record and the loop's last look; pure.

Covers phases, conditions and the states of workers. Does not cover how they come about.
"""

from __future__ import annotations

from ipaddress import IPv6Network
from typing import Literal

from controlplane.config import SiteConfig
from controlplane.desired import DesiredCluster, desired_cluster, scheduler_addresses
from controlplane.leases import Tombstone
from controlplane.network.topology import GATEWAY_NODE, GatewayState, address_of
from controlplane.reconcile import Problem, Report, is_over
from controlplane.state import ClusterRecord
from controlplane.workers.base import WorkerSpec, WorkerState
from meshcompute.protocol import ClusterStatus, Condition, PeerStatus, SchedulerStatus, WorkerStatus

__all__ = ["gone_status", "status_of"]

FRESH_HANDSHAKE_SECONDS = 180.0  # WireGuard makes a new key every 120 s where there is traffic, rejects after 180 s
# Problems that no retry cures: somebody must change something first.
_LASTING = frozenset({"Image", "Folder", "PortTaken", "InvalidSpec", "SchedulerEnded"})


def status_of(
    record: ClusterRecord, config: SiteConfig, report: Report | None, *, is_gone: bool, now: float
) -> ClusterStatus:
    """Tell what is true of a cluster.

    Parameters
    ----------
    record
        What was asked for.
    config
        The site.
    report
        What the loop has seen last; None if it has not looked yet.
    is_gone
        Whether nothing of the cluster is left.
    now
        Seconds of the monotonic clock.

    Returns
    -------
    ClusterStatus
        The answer to the client.
    """
    spec = record.spec
    is_ending = record.is_ended or is_gone
    desired = desired_cluster(record, config, now)
    gateway = report.observed.gateway if report else None
    conditions = (
        (
            _ended(record.end_reason),
            *(_condition(problem.kind, problem) for problem in (report.problems if report else ())),
        )
        if is_ending
        else (
            _gateway(report, gateway),
            _links(record, gateway, config),
            _units("workers", [unit for unit in desired.units if unit.role == "worker"], report),
            _units("scheduler", [unit for unit in desired.units if unit.role == "scheduler"], report),
            _engine(report),
        )
    )
    return ClusterStatus(
        cluster_id=record.cluster_id,
        name=spec.name,
        owner=record.owner.user,
        epoch=spec.epoch,
        phase="gone" if is_gone else "removing" if record.is_ended else _phase(report, conditions),
        lease_remaining_seconds=0.0 if is_ending else record.lease.remaining_seconds(now),
        public_key=gateway.public_key if gateway and not is_gone else None,
        endpoint_port=(gateway.listen_port or record.listen_port) if gateway and not is_gone else None,
        address=(
            str(address_of(IPv6Network(spec.prefix), spec.site, GATEWAY_NODE))
            if config.network == "wireguard"
            else None
        ),
        peers=() if is_gone else _peers(record, gateway),
        workers=() if is_gone else _workers(desired, report),
        scheduler=None if is_gone else _scheduler(record, config),
        conditions=conditions,
    )


def gone_status(tombstone: Tombstone) -> ClusterStatus:
    """Tell what is remembered of a cluster of which nothing is left."""
    return ClusterStatus(
        cluster_id=tombstone.cluster_id,
        name=tombstone.name,
        owner=tombstone.user,
        epoch=tombstone.epoch,
        phase="gone",
        lease_remaining_seconds=0.0,
        public_key=None,
        endpoint_port=None,
        address=None,
        peers=(),
        workers=(),
        scheduler=None,
        conditions=(_ended(tombstone.reason),),
    )


def _ended(reason: str) -> Condition:
    return Condition(kind="ended", is_true=True, reason="Ended", message=f"The cluster has ended: {reason}.")


def _phase(report: Report | None, conditions: tuple[Condition, ...]) -> Literal["failed", "ready", "pending"]:
    reasons = {problem.reason for problem in (report.problems if report else ())} | {each.reason for each in conditions}
    if reasons & _LASTING:
        return "failed"
    needed = [condition for condition in conditions if condition.kind != "links"]
    is_ready = report is not None and report.is_settled and all(condition.is_true for condition in needed)
    return "ready" if is_ready else "pending"


def _problem_of(kind: str, report: Report | None) -> Problem | None:
    return next((problem for problem in (report.problems if report else ()) if problem.kind == kind), None)


def _condition(kind: str, problem: Problem) -> Condition:
    return Condition(kind=kind, is_true=False, reason=problem.reason, message=problem.message)


def _gateway(report: Report | None, gateway: GatewayState | None) -> Condition:
    problem = _problem_of("gateway", report)
    if problem is not None:
        return _condition("gateway", problem)
    if gateway is None:
        return Condition(kind="gateway", is_true=False, reason="Missing", message="There is no gateway yet.")
    return Condition(kind="gateway", is_true=True, reason="Configured", message="The gateway is configured.")


def _links(record: ClusterRecord, gateway: GatewayState | None, config: SiteConfig) -> Condition:
    if config.network == "loopback":
        return Condition(kind="links", is_true=True, reason="Loopback", message="This site has no WireGuard.")
    ages = {peer.site: peer.latest_handshake_age_seconds for peer in _peers(record, gateway)}
    wanted = {peer.site: peer.name for peer in record.spec.peers if peer.via is None}
    silent = [
        f"{name} ({site})"
        for site, name in sorted(wanted.items())
        if (age := ages.get(site)) is None or age > FRESH_HANDSHAKE_SECONDS
    ]
    if silent:
        message = f"No handshake with {', '.join(silent)}. Does UDP pass between the two sites' endpoints?"
        return Condition(kind="links", is_true=False, reason="NoHandshake", message=message)
    return Condition(kind="links", is_true=True, reason="Shaken", message="Every peer has shaken hands.")


def _engine(report: Report | None) -> Condition:
    problem = _problem_of("engine", report)
    if problem is not None:
        return _condition("engine", problem)
    return Condition(kind="engine", is_true=True, reason="Answers", message="The engine answers.")


def _units(kind: str, units: list[WorkerSpec], report: Report | None) -> Condition:
    if kind == "workers" and (problem := _problem_of("workers", report)) is not None:
        return _condition(kind, problem)
    states = report.observed.units if report else None
    if states is None and units:
        return Condition(kind=kind, is_true=False, reason="Unknown", message="What runs is not known yet.")
    for unit in units:
        if is_over(unit, states or {}):
            message = f"The scheduler has ended ({(states or {})[unit.name].message}), and what it knew is lost."
            return Condition(kind=kind, is_true=False, reason="SchedulerEnded", message=message)
    missing = [unit.name for unit in units if (states or {}).get(unit.name) is None]
    not_running = [unit.name for unit in units if (state := (states or {}).get(unit.name)) and state.state != "running"]
    if missing or not_running:
        message = f"{len(missing)} of {len(units)} units are missing, {len(not_running)} are starting or have exited."
        return Condition(kind=kind, is_true=False, reason="Incomplete", message=message)
    if not units:
        return Condition(kind=kind, is_true=True, reason="NoneWanted", message="None was asked for.")
    return Condition(kind=kind, is_true=True, reason="Running", message=f"{len(units)} units are running.")


def _peers(record: ClusterRecord, gateway: GatewayState | None) -> tuple[PeerStatus, ...]:
    site_by_key = {peer.public_key: peer.site for peer in record.spec.peers if peer.public_key is not None}
    found = []
    for peer in gateway.peers if gateway else ():
        site = peer.site if peer.site is not None else site_by_key.get(peer.public_key)
        if site is not None:
            found.append(
                PeerStatus(
                    site=site,
                    latest_handshake_age_seconds=peer.latest_handshake_age_seconds,
                    received_nbytes=peer.received_nbytes,
                    sent_nbytes=peer.sent_nbytes,
                )
            )
    return tuple(sorted(found, key=lambda peer: peer.site))


def _workers(desired: DesiredCluster, report: Report | None) -> tuple[WorkerStatus, ...]:
    states = report.observed.units if report else None
    workers: list[WorkerStatus] = []
    for unit in desired.units:
        if unit.role != "worker":
            continue
        state: WorkerState | None = (states or {}).get(unit.name)
        workers += [
            WorkerStatus(
                name=name,
                container=unit.name,
                state="unknown" if states is None else "starting" if state is None else state.state,
                address=str(unit.address) if unit.address is not None else None,
                message=state.message if state is not None else "",
            )
            for name in unit.process_names
        ]
    return tuple(workers)


def _scheduler(record: ClusterRecord, config: SiteConfig) -> SchedulerStatus | None:
    if record.spec.scheduler is None:
        return None
    address, client_address, dashboard_address = scheduler_addresses(record, config)
    return SchedulerStatus(address=address, client_address=client_address, dashboard_address=dashboard_address)
