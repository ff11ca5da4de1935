"""Wait until the scheduler answers and the workers that the sites run are registered there.

Covers what else could happen meanwhile: a site says that it cannot, or the time is over. Does not cover starting them
(:mod:`meshcompute.mesh.members`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from distributed.deploy.cluster import Cluster

from meshcompute.mesh.members import MeshSites
from meshcompute.mesh.plan import SCHEDULER_SITE, why_failed
from meshcompute.mesh.sites import SiteError, SiteStartError

__all__ = ["wait_answering", "wait_registered"]

WORKER_LOOK_SECONDS = 0.05
STATUS_LOOK_SECONDS = 1.0
LOG_LINES = 15


async def wait_answering(mesh: MeshSites, scheduler: Any, *, deadline: float) -> None:
    """Wait until the scheduler answers: on a busy host it starts more slowly than its relay has patience.

    Parameters
    ----------
    mesh
        The sites.
    scheduler
        Dask's way to call the scheduler.
    deadline
        Until when, in seconds of the monotonic clock.

    Raises
    ------
    SiteStartError
        It has ended, or did not answer in time; the message has what it wrote last.
    """
    while True:
        try:
            await scheduler.identity(n_workers=0)
            return
        except OSError as exc:
            await mesh.refresh()
            status = mesh.scheduler_status
            has_failed = status is not None and status.phase == "failed"
            if has_failed or time.monotonic() > deadline:
                why = (
                    why_failed(status)
                    if has_failed and status is not None
                    else f"The scheduler does not answer ({exc})."
                )
                message = f"{why} What it wrote last:\n{await _log_tail(mesh, SCHEDULER_SITE, 'scheduler')}"
                raise SiteStartError(mesh.name_of(SCHEDULER_SITE), message) from exc
        await asyncio.sleep(WORKER_LOOK_SECONDS)


async def wait_registered(
    mesh: MeshSites, cluster: Cluster, *, deadline: float, timeout_seconds: float, say: Callable[[str], None]
) -> None:
    """Wait until every worker that the sites run is registered at the scheduler, but for sites that can be left out.

    Parameters
    ----------
    mesh
        The sites.
    cluster
        The cluster, which hears of workers from its scheduler.
    deadline
        Until when, in seconds of the monotonic clock.
    timeout_seconds
        How long all of the boot may take, for the message.
    say
        Called with a line whenever more workers have come.

    Raises
    ------
    SiteStartError
        A site says that it cannot, or some did not come in time; the message has what they wrote last.
    """
    next_status = time.monotonic() + STATUS_LOOK_SECONDS
    told = 0
    while missing := mesh.worker_names - cluster.observed:
        n_here = len(mesh.worker_names) - len(missing)
        if n_here > told:
            told = n_here
            say(f"{told} of {len(mesh.worker_names)} workers")
        if time.monotonic() > next_status:
            await mesh.refresh()
            next_status = time.monotonic() + STATUS_LOOK_SECONDS
        for site, status in list(mesh.statuses.items()):
            theirs = sorted(missing & {worker.name for worker in status.workers})
            if theirs and status.phase == "failed":
                await mesh.do_without(site, SiteStartError(mesh.name_of(site), why_failed(status)))
            elif theirs and time.monotonic() > deadline:
                message = (
                    f"{', '.join(theirs)} did not register within {timeout_seconds:g} s; what they wrote last:\n"
                    f"{await _log_tail(mesh, site, theirs[0])}"
                )
                await mesh.do_without(site, SiteStartError(mesh.name_of(site), message))
        await asyncio.sleep(WORKER_LOOK_SECONDS)


async def _log_tail(mesh: MeshSites, site: int, worker: str) -> str:
    try:
        return await mesh.logs(site, worker, LOG_LINES)
    except SiteError as exc:
        return f"(no log: {exc})"
