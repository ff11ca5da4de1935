"""From a cluster's sites to its record on disk, and back.

Covers what another process of the same person needs to find the sites again. Does not cover the files
(:mod:`meshcompute.mesh.clusterrecord`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import getpid

from meshcompute.mesh.clusterrecord import ClusterRecord, process_started
from meshcompute.mesh.control import SiteControl
from meshcompute.mesh.members import MeshSites
from meshcompute.mesh.plan import SCHEDULER_SITE, MeshPlan
from meshcompute.mesh.sites import parse_site
from meshcompute.protocol import SchedulerRequest, WorkerRequest

__all__ = ["attached_sites", "record_of"]


def record_of(mesh: MeshSites, *, ssh: Sequence[str], site_command: str, socket: str) -> ClusterRecord:
    """Write down a cluster that this process keeps.

    Parameters
    ----------
    mesh
        Its sites, all started.
    ssh, site_command, socket
        How the sites are reached.

    Returns
    -------
    ClusterRecord
        The cluster.
    """
    status = mesh.scheduler_status
    assert status is not None
    assert status.scheduler is not None
    sites = {site: str(control.address) for site, control in mesh.controls.items()}
    return ClusterRecord(
        name=mesh.plan.name,
        cluster_id=mesh.plan.cluster_id,
        prefix=mesh.plan.prefix,
        scheduler=sites.pop(SCHEDULER_SITE),
        sites=sites,
        pools={site: info.pool for site, info in mesh.infos.items()},
        socket=socket,
        ssh=tuple(ssh),
        site_command=site_command,
        client_address=status.scheduler.client_address or "",
        dashboard_address=status.scheduler.dashboard_address,
        lease_seconds=mesh.plan.lease_seconds,
        pid=getpid(),
        pid_started=process_started(getpid()),
    )


def attached_sites(record: ClusterRecord, *, say: Callable[[str], None]) -> MeshSites:
    """Find the sites of a cluster that another process keeps.

    Parameters
    ----------
    record
        The cluster.
    say
        Called with lines for people.

    Returns
    -------
    MeshSites
        With nothing reached yet.
    """
    addresses = {SCHEDULER_SITE: record.scheduler, **record.sites}
    controls = {
        number: SiteControl(parse_site(address, socket=record.socket), ssh=record.ssh, site_command=record.site_command)
        for number, address in addresses.items()
    }
    plan = MeshPlan(
        cluster_id=record.cluster_id,
        name=record.name,
        prefix=record.prefix,
        members=(),
        scheduler=SchedulerRequest(),
        lease_seconds=record.lease_seconds,
    )
    return MeshSites(controls, plan, workers=WorkerRequest(), say=say)
