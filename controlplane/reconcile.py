"""From what should be and what is to the next steps; pure.

Covers the decision for one cluster, and for what belongs to no cluster. Does not cover doing the steps
(:mod:`controlplane.loop`). The decision is level-triggered: it looks at states, never at what happened, so that it
does not matter who crashed where. A second look after the steps were done finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from itertools import groupby

from controlplane.desired import DesiredCluster, fingerprint_of
from controlplane.network.base import WorkerLink
from controlplane.network.topology import GatewayConfig, GatewayState
from controlplane.workers.base import WorkerSpec, WorkerState

__all__ = [
    "AttachUnit",
    "DetachUnit",
    "EnsureGateway",
    "Forget",
    "Memory",
    "Observed",
    "Problem",
    "RemoveGateway",
    "RenewGateway",
    "RenewUnit",
    "Report",
    "StartUnit",
    "Step",
    "StopUnit",
    "is_over",
    "plan_cluster",
    "plan_sweep",
    "retry_seconds",
    "stages",
]

RENEW_SLACK_SECONDS = 0.5  # deadlines that differ by less are the same
RETRY_FIRST_SECONDS = 0.5
RETRY_MAX_SECONDS = 30.0
STOP_GRACE_SECONDS = 3.0  # of a unit whose cluster goes on; Dask's own handlers take less than one
END_GRACE_SECONDS = 0.5  # of one whose cluster ends: a worker says goodbye to a scheduler that has gone for minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureGateway:
    """Make the gateway what it should be; that also moves its deadline."""

    config: GatewayConfig

    def __str__(self) -> str:
        return f"ensure gateway of {self.config.cluster_id[:8]} with {len(self.config.peers)} peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewGateway:
    """Move the gateway's own deadline."""

    cluster_id: str
    deadline: float

    def __str__(self) -> str:
        return f"renew gateway of {self.cluster_id[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUnit:
    """Start a unit that is not there, or has exited."""

    spec: WorkerSpec

    def __str__(self) -> str:
        return f"start {self.spec.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachUnit:
    """Give a unit its link to the gateway."""

    cluster_id: str
    name: str
    netns: str
    address: IPv6Address
    link: WorkerLink = "veth"

    def __str__(self) -> str:
        return f"attach {self.name} as {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewUnit:
    """Move a unit's own deadline."""

    name: str
    deadline: float

    def __str__(self) -> str:
        return f"renew {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopUnit:
    """End a unit, and remove all of it; its processes get so long to end by themselves."""

    name: str
    grace_seconds: float = STOP_GRACE_SECONDS

    def __str__(self) -> str:
        return f"stop {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachUnit:
    """Take a unit's link away."""

    cluster_id: str
    name: str
    address: IPv6Address

    def __str__(self) -> str:
        return f"detach {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveGateway:
    """Remove the gateway, with its namespace, interface, routes and key."""

    cluster_id: str

    def __str__(self) -> str:
        return f"remove gateway of {self.cluster_id[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Forget a cluster of which nothing is left."""

    cluster_id: str

    def __str__(self) -> str:
        return f"forget {self.cluster_id[:8]}"


Step = (
    EnsureGateway | RenewGateway | StartUnit | AttachUnit | RenewUnit | StopUnit | DetachUnit | RemoveGateway | Forget
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is true of one cluster on this machine. ``units`` None: the engine does not answer, nobody knows."""

    gateway: GatewayState | None
    units: Mapping[str, WorkerState] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What was done for a cluster by this process. Empty after a restart, which costs some repeated steps and no more.

    ``fingerprint_by_unit`` comes from the store; a unit without one was not started by us and is adopted as it is.
    """

    gateway: GatewayConfig | None = None
    gateway_deadline: float = 0.0
    public_key: str | None = None
    link_by_unit: Mapping[str, tuple[str, IPv6Address]] = field(default_factory=dict)
    deadline_by_unit: Mapping[str, float] = field(default_factory=dict)
    fingerprint_by_unit: Mapping[str, str] = field(default_factory=dict)
    starts_by_unit: Mapping[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A step that failed: ``kind`` is the condition that it belongs to."""

    kind: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the last look at a cluster has found."""

    observed: Observed
    problems: tuple[Problem, ...] = ()
    is_settled: bool = False


def retry_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row: 0.5 s, doubled each time, at most 30 s."""
    if failures <= 0:
        return 0.0
    return float(min(RETRY_MAX_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(failures - 1, 16)))


def plan_cluster(
    cluster_id: str, desired: DesiredCluster | None, observed: Observed, memory: Memory, now: float
) -> tuple[Step, ...]:
    """Find the next steps for one cluster.

    Parameters
    ----------
    cluster_id
        The cluster.
    desired
        What should be; None if the cluster should be gone.
    observed
        What is.
    memory
        What this process has done for it.
    now
        Seconds of the monotonic clock.

    Returns
    -------
    tuple
        Steps in order; empty if all is as it should be.
    """
    if desired is None:
        return _removal(cluster_id, observed, memory)
    steps: list[Step] = []
    if _needs_gateway(desired, observed.gateway, memory):
        steps.append(EnsureGateway(config=desired.gateway))
    elif _differ(desired.deadline, memory.gateway_deadline):
        steps.append(RenewGateway(cluster_id=cluster_id, deadline=desired.deadline))
    wanted = {unit.name: unit for unit in desired.units}
    if observed.units is None:
        # Nobody knows what runs, and starting or stopping anything would be a guess; but what was started must not end
        # because its engine is silent.
        started = [
            RenewUnit(name=name, deadline=desired.deadline)
            for name in sorted(wanted.keys() & memory.fingerprint_by_unit.keys())
            if _differ(desired.deadline, memory.deadline_by_unit.get(name, 0.0))
        ]
        return (*started, *steps)
    renewals = [
        RenewUnit(name=name, deadline=desired.deadline)
        for name, state in sorted(observed.units.items())
        if name in wanted
        and state.state != "exited"
        and _differ(desired.deadline, memory.deadline_by_unit.get(name, 0.0))
    ]
    outdated = [
        name
        for name, state in sorted(observed.units.items())
        if name not in wanted or (state.state != "exited" and _is_outdated(wanted[name], memory))
    ]
    stops = [StopUnit(name=name) for name in outdated]
    detached = [
        DetachUnit(cluster_id=cluster_id, name=name, address=link[1])
        for name, link in sorted(memory.link_by_unit.items())
        if name not in wanted or name in outdated
    ]
    starts = [
        StartUnit(spec=unit)
        for name, unit in wanted.items()
        if (name not in observed.units or name in outdated or observed.units[name].state == "exited")
        and not is_over(unit, observed.units)
        and now >= _next_start(memory, name)
    ]
    links = [
        AttachUnit(cluster_id=cluster_id, name=name, netns=state.netns, address=address, link=desired.link)
        for name, state in sorted(observed.units.items())
        if name in wanted and name not in outdated and state.state != "exited"
        if state.netns is not None and (address := wanted[name].address) is not None
        if memory.link_by_unit.get(name) != (state.netns, address)
    ]
    renewals = [step for step in renewals if step.name not in outdated]
    return (*renewals, *steps, *stops, *detached, *starts, *links)


def _removal(cluster_id: str, observed: Observed, memory: Memory) -> tuple[Step, ...]:
    steps: list[Step] = [StopUnit(name=name, grace_seconds=END_GRACE_SECONDS) for name in sorted(observed.units or ())]
    if observed.gateway is not None:
        steps += [
            DetachUnit(cluster_id=cluster_id, name=name, address=link[1])
            for name, link in sorted(memory.link_by_unit.items())
        ]
        steps.append(RemoveGateway(cluster_id=cluster_id))
    if not steps and observed.units is not None:
        steps.append(Forget(cluster_id=cluster_id))
    return tuple(steps)


def _differ(deadline: float, other: float) -> bool:
    """Whether one is later: also an earlier one must be handed on, when a shorter lease is asked for."""
    return abs(deadline - other) > RENEW_SLACK_SECONDS


def _without_deadline(config: GatewayConfig) -> GatewayConfig:
    return replace(config, deadline_seconds=0.0)


def _needs_gateway(desired: DesiredCluster, state: GatewayState | None, memory: Memory) -> bool:
    if state is None or memory.gateway is None:
        return True
    if _without_deadline(memory.gateway) != _without_deadline(desired.gateway):
        return True
    return memory.public_key is not None and (
        state.public_key != memory.public_key
        or {peer.public_key for peer in state.peers} != {peer.public_key for peer in desired.gateway.peers}
    )


def _is_outdated(unit: WorkerSpec, memory: Memory) -> bool:
    known = memory.fingerprint_by_unit.get(unit.name)
    return known is not None and known != fingerprint_of(unit)


def _next_start(memory: Memory, name: str) -> float:
    starts, last = memory.starts_by_unit.get(name, (0, 0.0))
    return last + retry_seconds(starts) if starts else 0.0


def is_over(unit: WorkerSpec, units: Mapping[str, WorkerState]) -> bool:
    """Whether a unit ended for good: a scheduler is not started again, because what it knew is lost.

    Parameters
    ----------
    unit
        What should be.
    units
        What is.

    Returns
    -------
    bool
        Whether nothing will become of it any more.
    """
    state = units.get(unit.name)
    return unit.role == "scheduler" and state is not None and state.state == "exited" and state.has_run


def stages(steps: Iterable[Step]) -> list[list[Step]]:
    """Group steps that may be done at the same time: neighbours of one kind do not depend on each other."""
    return [list(group) for _kind, group in groupby(steps, key=type)]


def plan_sweep(known: Collection[str], units: Mapping[str, WorkerState] | None) -> tuple[StopUnit, ...]:
    """Find units that belong to no cluster of this site.

    Parameters
    ----------
    known
        Clusters that have a record, those that are being removed among them.
    units
        All units of this site's runtime, or None if the engine does not answer: then nothing is swept.

    Returns
    -------
    tuple
        What to stop.
    """
    return tuple(
        StopUnit(name=name, grace_seconds=END_GRACE_SECONDS)
        for name, state in sorted((units or {}).items())
        if state.cluster_id not in known
    )
