"""What each site of a cluster is told, and when: the plan that a boot follows.

Covers who calls whom, relays, the desired state of every site at every stage, and when a stage is over; pure. Does not
cover talking to sites (:mod:`meshcompute.mesh.control`) nor what a site makes of it.

The stages, each told to all sites at once; the next begins when the last is true everywhere::

    keys     gateways without peers      every site answers with its public key and UDP port; the scheduler starts
    listen   peers that do not call      every responder knows its initiators before the first of them calls
    run      one side of each pair calls, workers start

Calling before the other side listens costs 5 to 12 seconds a link; a stage of its own costs one round trip, however
many sites there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Network
from typing import Literal

from pydantic import ValidationError

from meshcompute.errors import MeshError
from meshcompute.protocol import ClusterSpec, ClusterStatus, Peer, SchedulerRequest, WorkerRequest

__all__ = [
    "STAGES",
    "Member",
    "MeshPlan",
    "MeshPlanError",
    "Stage",
    "check_members",
    "check_wishes",
    "endpoint_of",
    "is_stage_over",
    "learn",
    "links_up",
    "parse_prefix",
    "prefix_of",
    "relay_of",
    "spec_of",
    "told_plainly",
    "why_failed",
]

Stage = Literal["keys", "listen", "run"]
STAGES: Sequence[Stage] = ("keys", "listen", "run")
SCHEDULER_SITE = 0
_UNIQUE_LOCAL = 0xFD  # first octet of a prefix of RFC 4193 that nobody hands out
PREFIX_BITS = 40  # the random part of such a prefix
_NOT_YET = frozenset({"Incomplete", "Missing", "NoHandshake", "Unknown"})  # reasons that time alone may cure


class MeshPlanError(MeshError, ValueError):
    """Sites that cannot make one cluster, or a wish that none can have; the message says why and what to do."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what pydantic finds wrong with a wish in this block into one sentence."""
    try:
        yield
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        what = ".".join(str(part) for part in first["loc"]) or exc.title
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
        raise MeshPlanError(f"{what} cannot be {first['input']!r}: it {reason}; ask for something else.") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A site of a cluster: the client's own host (0), or one with workers (1, 2 ... in argument order).

    ``hosts`` are where its gateway can be reached, best first; ``public_key`` and ``port`` are known once it exists.
    """

    site: int
    address: str
    pool: str
    network: Literal["wireguard", "loopback"]
    hosts: tuple[str, ...] = ()
    public_key: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return f"{self.address} ({self.pool})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """One cluster, as it should be.

    ``workers`` are by number of the site; ``broken`` are pairs of sites between which no packet passes, whatever their
    endpoints say.
    """

    cluster_id: str
    name: str
    prefix: str
    members: tuple[Member, ...]
    scheduler: SchedulerRequest
    workers: Mapping[int, WorkerRequest] = field(default_factory=dict)
    broken: frozenset[frozenset[int]] = frozenset()
    lease_seconds: float = 120.0
    mtu: int = 1280

    def member(self, site: int) -> Member:
        """Find a member by its number."""
        return next(member for member in self.members if member.site == site)

    def without(self, sites: Collection[int]) -> MeshPlan:
        """Leave sites out; the others keep their numbers."""
        return replace(self, members=tuple(member for member in self.members if member.site not in sites))


def parse_prefix(text: str) -> str:
    """Read a prefix as a person writes it.

    Parameters
    ----------
    text
        ``fda5:c0ff:eeee``, ``fda5:c0ff:eeee::`` or ``fda5:c0ff:eeee::/48``.

    Returns
    -------
    str
        The last of these forms.

    Raises
    ------
    MeshPlanError
        It is no /48 of fd00::/8.
    """
    address, _slash, length = text.strip().partition("/")
    try:
        network = IPv6Network(f"{address if '::' in address else address + '::'}/{length or 48}")
    except ValueError as exc:
        raise MeshPlanError(f"{text!r} is no IPv6 prefix ({exc}); write it like fda5:c0ff:eeee") from exc
    if network.prefixlen != 48 or network.network_address.packed[0] != _UNIQUE_LOCAL:
        raise MeshPlanError(f"{text!r} is no /48 of fd00::/8 (RFC 4193); write it like fda5:c0ff:eeee")
    return str(network)


def prefix_of(random_bits: int) -> str:
    """Make a prefix of 40 random bits.

    Parameters
    ----------
    random_bits
        From 0 to 2**40 - 1.

    Returns
    -------
    str
        ``fdxx:xxxx:xxxx::/48``.

    References
    ----------
    RFC 4193, section 3.2.2.
    """
    return str(IPv6Network(((_UNIQUE_LOCAL << PREFIX_BITS | random_bits) << 80, 48)))


def endpoint_of(member: Member) -> str | None:
    """Write where a member's gateway can be called; None if nowhere, or not known yet."""
    if not member.hosts or member.port is None:
        return None
    host = member.hosts[0]
    return f"[{host}]:{member.port}" if ":" in host else f"{host}:{member.port}"


def _initiator(plan: MeshPlan, first: Member, second: Member) -> int | None:
    """Number of the side that calls: the larger one, unless only the other cannot be called; None if neither can."""
    if frozenset((first.site, second.site)) in plan.broken:
        return None
    lower, upper = sorted((first, second), key=lambda member: member.site)
    if lower.hosts:
        return upper.site
    return lower.site if upper.hosts else None


def relay_of(plan: MeshPlan, first: Member, second: Member) -> int | None:
    """Choose the site that relays between two: one that both have a link with.

    Parameters
    ----------
    plan
        The cluster.
    first, second
        The two.

    Returns
    -------
    int or None
        Its number; the client's own host only if there is no other, because it has the thinnest line.
    """
    others = [member for member in plan.members if member.site not in {first.site, second.site}]
    both = [m.site for m in others if None not in (_initiator(plan, m, first), _initiator(plan, m, second))]
    return min(both, key=lambda site: (site == SCHEDULER_SITE, site), default=None)


def _peers(plan: MeshPlan, member: Member, stage: Stage) -> tuple[Peer, ...]:
    if stage == "keys" or member.network == "loopback":
        return ()
    peers = []
    for other in plan.members:
        if other.site == member.site:
            continue
        initiator = _initiator(plan, member, other)
        calls = stage == "run" and initiator == member.site
        peers.append(
            Peer(
                site=other.site,
                name=other.pool,
                public_key=other.public_key,
                endpoint=endpoint_of(other),
                initiates=calls,
                via=relay_of(plan, member, other) if initiator is None else None,
            )
        )
    return tuple(peers)


def check_wishes(plan: MeshPlan) -> None:
    """Refuse what no site could do, whoever it is.

    Parameters
    ----------
    plan
        The cluster; its members need not be known.

    Raises
    ------
    MeshPlanError
        A name, a lease or another wish is none.
    """
    with told_plainly():
        ClusterSpec(
            name=plan.name,
            epoch=1,
            role="scheduler",
            prefix=plan.prefix,
            site=SCHEDULER_SITE,
            lease_seconds=plan.lease_seconds,
            mtu=plan.mtu,
            scheduler=plan.scheduler,
        )


def check_members(plan: MeshPlan) -> None:
    """Refuse sites that cannot make one cluster.

    Parameters
    ----------
    plan
        The plan, with what the sites say of themselves.

    Raises
    ------
    MeshPlanError
        Two sites cannot reach each other and none relays, the same site is named twice, however it is written, or
        networks differ.
    """
    networks = {member.network for member in plan.members}
    if len(networks) > 1:
        told = ", ".join(f"{member}: {member.network}" for member in plan.members)
        raise MeshPlanError(f"The sites' networks differ ({told}); set the same `network` in every site.toml.")
    seen: dict[str, Member] = {}
    for member in plan.members:
        if member.address in seen:
            raise MeshPlanError(f"The site {member.address} is named twice; name each site once.")
        seen[member.address] = member
    for first, second in itertools.combinations(plan.members, 2):
        # The client's own host may be called like a site; as long as it is another host, nobody minds.
        is_own = SCHEDULER_SITE in (first.site, second.site)
        if first.pool == second.pool and not (is_own and first.hosts != second.hosts):
            raise MeshPlanError(
                f"The sites {first.address} and {second.address} have the same pool {first.pool!r}; name each site "
                "once, or ask the operator of one of them for another pool in its site.toml."
            )
    if networks == {"loopback"}:
        return
    for first, second in itertools.combinations(plan.members, 2):
        if _initiator(plan, first, second) is None and relay_of(plan, first, second) is None:
            why = "neither has an address at which the other could reach it"
            if frozenset((first.site, second.site)) in plan.broken:
                why = "no packet passes between them"
            raise MeshPlanError(
                f"The sites {first} and {second} cannot be joined: {why}, and no third site is reached by both; open a "
                "UDP port at one of them and name its host under network_options.endpoints in its site.toml, or add a "
                "site that both can reach."
            )


def spec_of(
    plan: MeshPlan, site: int, stage: Stage, *, epoch: int, scheduler_address: str | None = None
) -> ClusterSpec:
    """Write what a site is told at a stage.

    Parameters
    ----------
    plan
        The cluster.
    site
        Number of the site.
    stage
        How far the boot is.
    epoch
        Larger with every change.
    scheduler_address
        Where workers find the scheduler; needed at the stage ``run``.

    Returns
    -------
    ClusterSpec
        The desired state, whole.
    """
    is_scheduler = site == SCHEDULER_SITE
    workers = plan.workers.get(site) if stage == "run" else None
    if workers is not None:
        workers = workers.model_copy(update={"scheduler_address": scheduler_address})
    return ClusterSpec(
        name=plan.name,
        epoch=epoch,
        role="scheduler" if is_scheduler else "site",
        prefix=plan.prefix,
        site=site,
        lease_seconds=plan.lease_seconds,
        mtu=plan.mtu,
        peers=_peers(plan, plan.member(site), stage),
        workers=workers,
        scheduler=plan.scheduler if is_scheduler else None,
    )


def learn(plan: MeshPlan, statuses: Mapping[int, ClusterStatus]) -> MeshPlan:
    """Put the keys and ports that the sites answered with into the plan.

    Parameters
    ----------
    plan
        The plan so far.
    statuses
        The last answer of each site, by its number; sites may be missing.

    Returns
    -------
    MeshPlan
        The same one if nothing is new.
    """
    members = []
    for member in plan.members:
        status = statuses.get(member.site)
        if status is not None and status.public_key is not None:
            member = replace(member, public_key=status.public_key, port=status.endpoint_port)  # noqa: PLW2901
        members.append(member)
    return plan if tuple(members) == plan.members else replace(plan, members=tuple(members))


def links_up(plan: MeshPlan, site: int, status: ClusterStatus) -> tuple[list[int], list[int]]:
    """Tell which links of a site have shaken hands, and which have not.

    Parameters
    ----------
    plan
        The cluster.
    site
        Number of the site.
    status
        Its last answer.

    Returns
    -------
    tuple of list of int
        Numbers of the sites at the other ends: of links that are up, and of those that are not.
    """
    member = plan.member(site)
    if member.network == "loopback":
        return [], []
    ages = {peer.site: peer.latest_handshake_age_seconds for peer in status.peers}
    direct = [o.site for o in plan.members if o.site != site and _initiator(plan, member, o) is not None]
    return [o for o in direct if ages.get(o) is not None], [o for o in direct if ages.get(o) is None]


def is_stage_over(plan: MeshPlan, site: int, stage: Stage, status: ClusterStatus, *, epoch: int) -> bool:
    """Tell whether a site has done what it was told at a stage, so that the others may go on.

    Parameters
    ----------
    plan
        The cluster.
    site
        Number of the site.
    stage
        What it was told.
    status
        Its last answer.
    epoch
        The epoch with which it was told.

    Returns
    -------
    bool
        At ``run``: everything is up but the workers' registration, which only the scheduler knows.
    """
    if status.epoch < epoch:
        return False
    is_mesh = plan.member(site).network == "wireguard"
    if stage == "keys":
        has_address = site != SCHEDULER_SITE or (status.scheduler is not None and status.scheduler.address is not None)
        return has_address and (not is_mesh or (status.public_key is not None and status.endpoint_port is not None))
    up, down = links_up(plan, site, status)
    if stage == "listen":
        return {*up, *down} <= {peer.site for peer in status.peers}
    return status.phase == "ready" and not down


def why_failed(status: ClusterStatus) -> str:
    """Say in a site's own words what is not as it should be.

    Parameters
    ----------
    status
        Its last answer.

    Returns
    -------
    str
        The messages of the conditions that are not true; never empty.
    """
    wrong = [condition for condition in status.conditions if not condition.is_true]
    # What is only not there yet matters little where something else is broken.
    broken = [condition for condition in wrong if condition.reason not in _NOT_YET] or wrong
    told = " ".join(dict.fromkeys(condition.message.strip() for condition in broken))
    return told or f"the cluster is {status.phase} there and the site gives no reason; its log says more"
