"""A cluster that another process keeps: look at it, read its logs, end it.

Covers what the commands ``status``, ``logs`` and ``down`` do. Does not cover changing a cluster: whoever keeps it does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

from meshcompute.errors import MeshError
from meshcompute.mesh.clusterrecord import ClusterRecord, forget, record_folder
from meshcompute.mesh.plan import SCHEDULER_SITE
from meshcompute.mesh.records import attached_sites
from meshcompute.mesh.sites import SiteError, SiteRefusedError
from meshcompute.protocol import ClusterStatus

__all__ = ["describe", "end", "read_logs"]

KEEPER_TIMEOUT_SECONDS = 60.0
LOOK_SECONDS = 0.1


def describe(record: ClusterRecord) -> str:
    """Ask every site of a cluster, and write what they say.

    Parameters
    ----------
    record
        The cluster.

    Returns
    -------
    str
        Lines of text. A cluster that nobody keeps and no site has is forgotten.
    """
    return asyncio.run(_describe(record))


async def _describe(record: ClusterRecord) -> str:
    sites = attached_sites(record, say=lambda _line: None)

    async def ask(site: int) -> ClusterStatus | SiteError:
        try:
            return await sites.controls[site].call(lambda client: client.status(record.cluster_id), attempts=1)
        except SiteError as exc:
            return exc

    try:
        answers = await asyncio.gather(*(ask(site) for site in sites.controls))
    finally:
        await sites.disconnect()
    said = dict(zip(sites.controls, answers, strict=True))
    kept = f"kept by process {record.pid}" if record.is_kept() else "kept by nobody: it ends with its leases"
    lines = [f"{record.name}  {record.prefix}  {record.client_address}  {kept}"]
    for site, answer in said.items():
        name = "scheduler" if site == SCHEDULER_SITE else record.pools.get(site, "?")
        where = str(sites.controls[site].address)
        lines.append(f"  {site}  {name:<12}  {where:<24}  {_line(answer)}")
    if all(_is_gone(answer) for answer in said.values()) and not record.is_kept():
        forget(record.name)
    return "\n".join(lines)


def _is_gone(answer: ClusterStatus | SiteError) -> bool:
    if isinstance(answer, ClusterStatus):
        return answer.phase == "gone"
    return isinstance(answer, SiteRefusedError) and answer.kind == "not_found"


def _line(answer: ClusterStatus | SiteError) -> str:
    if _is_gone(answer):
        return "has nothing of it"
    if isinstance(answer, SiteError):
        return f"does not answer ({answer.message})"
    parts = [answer.phase, f"lease {answer.lease_remaining_seconds:.0f} s"]
    if answer.workers:
        running = sum(worker.state == "running" for worker in answer.workers)
        parts.append(f"{running} of {len(answer.workers)} workers run")
    for peer in answer.peers:
        age = peer.latest_handshake_age_seconds
        parts.append(f"link {peer.site}: " + ("never" if age is None else f"{age:.0f} s ago"))
    return ", ".join(parts)


def read_logs(record: ClusterRecord, place: str, worker: str | None, lines: int) -> dict[str, str]:
    """Read the end of logs at a site.

    Parameters
    ----------
    record
        The cluster.
    place
        A pool, a site as it was written, its number, or ``scheduler``.
    worker
        Name of a worker; all of the site by default.
    lines
        How many lines of each at most.

    Returns
    -------
    dict
        Text by the name of the worker.

    Raises
    ------
    MeshError
        There is no such site, or it cannot be had.
    """
    names: dict[int, tuple[str, ...]] = {SCHEDULER_SITE: ("scheduler", "0")}
    names |= {site: (record.pools.get(site, ""), written, str(site)) for site, written in record.sites.items()}
    sites = [site for site, known in names.items() if place in known]
    if not sites:
        known = ", ".join(known[0] for known in names.values())
        raise MeshError(f"Cluster {record.name} has no site {place!r}; it has {known}.")
    return asyncio.run(_read_logs(record, sites, worker, lines))


async def _read_logs(record: ClusterRecord, sites: list[int], worker: str | None, lines: int) -> dict[str, str]:
    mesh = attached_sites(record, say=lambda _line: None)
    try:
        texts: dict[str, str] = {}
        for site in sites:
            control = mesh.controls[site]
            if worker is not None:
                names = [worker]
            elif site == SCHEDULER_SITE:
                names = ["scheduler"]
            else:
                status = await control.call(lambda client: client.status(record.cluster_id))
                names = [one.name for one in status.workers]
            for name in names:
                texts[name] = await mesh.logs(site, name, lines)
        return texts
    finally:
        await mesh.disconnect()


def end(record: ClusterRecord, say: Callable[[str], None]) -> bool:
    """End a cluster: ask the process that keeps it, or the sites themselves where there is none.

    Parameters
    ----------
    record
        The cluster.
    say
        Called with lines for people.

    Returns
    -------
    bool
        Whether nothing is left of it.
    """
    if record.is_kept():
        os.kill(record.pid, signal.SIGTERM)
        begin = time.monotonic()
        while record.is_kept():
            if time.monotonic() - begin > KEEPER_TIMEOUT_SECONDS:
                say(f"process {record.pid}, which keeps {record.name}, does not end; ending its part at the sites")
                break
            time.sleep(LOOK_SECONDS)
    # Also what that process may have left: the sites know.
    is_gone = asyncio.run(_end(record, say))
    (record_folder() / f"{record.name}.log").unlink(missing_ok=True)
    forget(record.name)
    return is_gone


async def _end(record: ClusterRecord, say: Callable[[str], None]) -> bool:
    return await attached_sites(record, say=say).remove(is_everywhere=True)
