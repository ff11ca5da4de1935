"""Whether a caller may have what it asks for: rights, limits, and clashes with other clusters.

Covers the decisions, on plain data. Does not cover what the machine can do: an image that is missing, for example, is
found when it is used, and told in the cluster's conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from controlplane.config import MIB, SiteConfig
from controlplane.errors import ConflictError, ForbiddenError, InvalidSpecError, NotFoundError, QuotaError
from controlplane.identity import Caller
from controlplane.leases import Tombstone, check_epoch
from controlplane.state import ClusterRecord
from meshcompute.protocol import ClusterSpec, SchedulerRequest, WorkerRequest

__all__ = ["check_caller", "check_spec", "choose_port", "find_record", "visible_records"]

ID_DIGITS_IN_NAMES = 8  # names of namespaces and units carry so many digits of a cluster's id


def check_caller(caller: Caller, pool: str) -> None:
    """Refuse whom ``site.toml`` does not name."""
    if not caller.is_allowed:
        raise ForbiddenError(
            f"User {caller.user} may not use site {pool}. Ask its operator to add the account to access.users, or one "
            "of its groups to access.groups, in site.toml."
        )


def visible_records(caller: Caller, records: Iterable[ClusterRecord]) -> list[ClusterRecord]:
    """A caller's own clusters, oldest name first; all of them for an operator."""
    mine = (record for record in records if caller.is_operator or record.owner.uid == caller.uid)
    return sorted(mine, key=lambda record: (record.spec.name, record.cluster_id))


def find_record(caller: Caller, record: ClusterRecord | None, cluster_id: str, pool: str) -> ClusterRecord:
    """A record that exists for this caller: what belongs to others is not even there."""
    if record is None or not visible_records(caller, [record]):
        raise NotFoundError(
            f"Site {pool} has no cluster {cluster_id} of user {caller.user}. It may have ended: its lease is over when "
            "nobody renews it. GET /v1/clusters lists those that there are."
        )
    return record


def check_spec(
    cluster_id: str,
    spec: ClusterSpec,
    caller: Caller,
    *,
    config: SiteConfig,
    records: Collection[ClusterRecord],
    tombstone: Tombstone | None,
) -> None:
    """Refuse a desired state that this caller cannot have here.

    Parameters
    ----------
    cluster_id
        The cluster.
    spec
        What it should be.
    caller
        Who asks.
    config
        What the operator allows.
    records
        All clusters of this site, those that are being removed among them.
    tombstone
        Where this cluster's id has ended before, if it has.

    Raises
    ------
    ForbiddenError, ConflictError, InvalidSpecError, QuotaError
        With what is wrong and what to do about it.
    """
    check_caller(caller, config.pool)
    current = next((record for record in records if record.cluster_id == cluster_id), None)
    others = [record for record in records if record.cluster_id != cluster_id]
    if current is not None and current.owner.uid != caller.uid:
        raise ConflictError(f"The id {cluster_id} is taken. Boot a cluster with a new, random id.")
    _check_epoch(spec, current, tombstone)
    if current is not None:
        _check_unchanged(spec, current.spec)
    _check_clashes(cluster_id, spec, others)
    _check_role(spec, config)
    _check_clusters(caller, others, config)
    _check_lease(spec.lease_seconds, config)
    if spec.workers is not None:
        _check_workers(spec.workers, config)
    if spec.scheduler is not None:
        _check_scheduler(spec.scheduler, others, config)


def _check_epoch(spec: ClusterSpec, current: ClusterRecord | None, tombstone: Tombstone | None) -> None:
    is_live = current is not None and not current.is_ended
    check_epoch(
        spec.epoch,
        current=current.spec.epoch if current is not None and is_live else None,
        tombstone=tombstone.epoch if tombstone is not None else None,
    )
    if current is not None and is_live and spec.epoch == current.spec.epoch and spec != current.spec:
        raise ConflictError(
            f"Epoch {spec.epoch} of this cluster says something else already. Send the change with epoch "
            f"{spec.epoch + 1}."
        )


def _check_unchanged(spec: ClusterSpec, before: ClusterSpec) -> None:
    for key in ("prefix", "site", "role"):
        if getattr(spec, key) != getattr(before, key):
            raise InvalidSpecError(
                f"{key} cannot change from {getattr(before, key)!r} to {getattr(spec, key)!r} while the cluster lives. "
                "Boot a new cluster."
            )


def _check_clashes(cluster_id: str, spec: ClusterSpec, others: Iterable[ClusterRecord]) -> None:
    for other in others:
        if other.spec.prefix == spec.prefix:
            raise ConflictError(
                f"The prefix {spec.prefix} is in use by another cluster at this site. Leave --prefix away for a random "
                "one, or end the other cluster first."
            )
        if other.cluster_id[:ID_DIGITS_IN_NAMES] == cluster_id[:ID_DIGITS_IN_NAMES]:
            raise ConflictError(
                f"The id {cluster_id} begins like that of another cluster here. Boot a cluster with a new, random id."
            )


def _check_role(spec: ClusterSpec, config: SiteConfig) -> None:
    if config.role not in {"both", spec.role}:
        raise InvalidSpecError(
            f"Site {config.pool} has the role {config.role!r} and cannot be asked for {spec.role!r}. "
            'Name another host, or ask its operator to set role = "both" in site.toml.'
        )


def _check_clusters(caller: Caller, others: Iterable[ClusterRecord], config: SiteConfig) -> None:
    live = [other for other in others if not other.is_ended]
    mine = sum(other.owner.uid == caller.uid for other in live)
    if mine >= config.limits.clusters:
        raise QuotaError(
            f"User {caller.user} has {mine} of the {config.limits.clusters} clusters that site {config.pool} allows a "
            "user at once. End one of them (meshcompute down), or ask the operator for a higher limits.clusters."
        )
    if len(live) >= config.limits.clusters_total:
        raise QuotaError(
            f"Site {config.pool} has {len(live)} clusters, which is all that limits.clusters_total allows. "
            "Try again when one has ended."
        )


def _check_lease(lease_seconds: float, config: SiteConfig) -> None:
    if lease_seconds > config.limits.lease_seconds:
        raise QuotaError(
            f"A lease of {lease_seconds:g} s is longer than {config.limits.lease_seconds:g} s, the longest at site "
            f"{config.pool}. Ask for a shorter one, and renew it."
        )


def _check_image(image: str | None, config: SiteConfig) -> None:
    allowed = config.workers.allowed_images
    if image is not None and image not in allowed:
        raise InvalidSpecError(
            f"Site {config.pool} does not run the image {image!r}; it has {', '.join(allowed)}. Choose one of these, "
            "or ask the operator to add it to workers.images."
        )


def _check_workers(workers: WorkerRequest, config: SiteConfig) -> None:
    limits, defaults = config.limits, config.workers
    processes = workers.processes_per_container or defaults.processes_per_container
    wishes = (
        ("worker processes", workers.containers * processes, limits.workers, "workers"),
        ("threads per worker", workers.threads_per_process or 0, limits.threads_per_worker, "threads_per_worker"),
        (
            "MiB of memory per worker",
            (workers.memory_bytes_per_process or 0) / MIB,
            limits.memory_bytes_per_worker / MIB,
            "memory_per_worker",
        ),
    )
    for what, wanted, allowed, key in wishes:
        if wanted > allowed:
            raise QuotaError(
                f"{wanted:.10g} {what} are more than the {allowed:.10g} that site {config.pool} allows a cluster. "
                f"Ask for less, or ask the operator for a higher limits.{key}."
            )
    if workers.link == "wireguard" and config.network == "loopback":
        raise InvalidSpecError(f"Site {config.pool} has no WireGuard (network = \"loopback\"): ask for link 'veth'.")
    _check_image(workers.image, config)


def _check_scheduler(scheduler: SchedulerRequest, others: Iterable[ClusterRecord], config: SiteConfig) -> None:
    if scheduler.client_port == scheduler.dashboard_port:
        raise InvalidSpecError(f"Port {scheduler.client_port} cannot be both the scheduler's and the dashboard's.")
    wanted = {scheduler.client_port, scheduler.dashboard_port} - {None}
    for other in others:
        theirs = other.spec.scheduler
        taken = wanted & {theirs.client_port, theirs.dashboard_port} if theirs is not None else set()
        if taken:
            raise ConflictError(
                f"Port {min(port for port in taken if port)} of this host belongs to the scheduler of another cluster. "
                "Choose another one (--port, --dashboard-port)."
            )
    _check_image(scheduler.image, config)


def choose_port(ports: tuple[int, int], is_taken: Callable[[int], bool], pool: str) -> int:
    """Choose a UDP port for a new cluster's gateway.

    Parameters
    ----------
    ports
        First and last of the site's range.
    is_taken
        Whether another cluster, or another program of this host, has a port.
    pool
        The site's name, for the message.

    Returns
    -------
    int
        The lowest one that is free.

    Raises
    ------
    QuotaError
        If there is none.
    """
    for port in range(ports[0], ports[1] + 1):
        if not is_taken(port):
            return port
    raise QuotaError(
        f"All UDP ports from {ports[0]} to {ports[1]} of site {pool} are taken, one for each cluster. Try again when a "
        "cluster has ended, or ask the operator for a wider network_options.udp_ports."
    )
