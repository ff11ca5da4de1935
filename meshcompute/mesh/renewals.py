"""Keep the leases of a cluster's sites alive, and notice which sites have ended their part.

Covers when to renew, what a failed renewal means, and who is told. Does not cover how a site is asked
(:mod:`meshcompute.mesh.members`) nor what becomes of a cluster that has lost one (:mod:`meshcompute.mesh.cluster`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from meshcompute.mesh.members import MeshSites
from meshcompute.mesh.plan import SCHEDULER_SITE, why_failed
from meshcompute.mesh.sites import SiteError, SiteRefusedError, SiteStartError, SiteUnreachableError
from meshcompute.protocol import ClusterStatus

__all__ = ["Renewals"]

logger = logging.getLogger("meshcompute.cluster")

RENEWALS_PER_LEASE = 6  # of 120 s: every 20 s
SILENT_RENEWALS_PER_LEASE = 24  # once a site does not answer
HURRY_SECONDS = 10.0  # how long a suspicion lasts: twice what a daemon needs to see by itself what has changed
HURRY_PAUSE_SECONDS = 0.5


class Renewals:
    """Renews the lease of every site of a cluster.

    Parameters
    ----------
    mesh
        The sites.
    say
        Called with one line whenever a waiting person wants to know.
    on_lost
        Called with a site that has ended its part, and why; that site is not asked again.
    on_renewed
        Called after each renewal.
    """

    def __init__(
        self,
        mesh: MeshSites,
        *,
        say: Callable[[str], None],
        on_lost: Callable[[int, SiteError], None],
        on_renewed: Callable[[], None],
    ) -> None:
        self._mesh = mesh
        self._say = say
        self._on_lost = on_lost
        self._on_renewed = on_renewed
        self._suspicions: dict[int, asyncio.Event] = {}
        self._hurry_until: dict[int, float] = {}

    async def run(self) -> None:
        """Renew until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for site in list(self._mesh.controls):
                self._suspicions[site] = asyncio.Event()
                tasks.create_task(self._keep(site), name=f"renew {site}")

    def hurry(self, site: int) -> None:
        """Ask a site soon, because something there seems to have ended.

        Parameters
        ----------
        site
            Its number.
        """
        self._hurry_until[site] = time.monotonic() + HURRY_SECONDS
        if site in self._suspicions:
            self._suspicions[site].set()

    async def _keep(self, site: int) -> None:
        mesh, lease = self._mesh, self._mesh.plan.lease_seconds
        heard = time.monotonic()
        is_silent = False
        while True:
            await self._pause(site, lease / (SILENT_RENEWALS_PER_LEASE if is_silent else RENEWALS_PER_LEASE))
            if site not in mesh.controls:
                return
            if not mesh.has_part(site):
                heard = time.monotonic()
                continue  # it has nothing of ours yet
            problem: SiteError | None = None
            try:
                status = await self._renew(site, until=heard + lease)
            except SiteError as exc:
                problem = exc
            if site not in mesh.controls:
                return  # it was left out meanwhile
            if isinstance(problem, SiteRefusedError):
                if problem.kind in ("not_found", "conflict"):
                    self._on_lost(site, problem)
                    return
                logger.warning("lease not renewed site=%s error=%s", mesh.name_of(site), problem)
            elif problem is not None:
                if not is_silent:
                    is_silent = True
                    remaining = max(0.0, heard + lease - time.monotonic())
                    self._say(f"{problem}; trying on, its lease ends in {remaining:.0f} s")
            else:
                if is_silent:
                    self._say(f"{mesh.name_of(site)}: back after {time.monotonic() - heard:.0f} s")
                heard, is_silent = time.monotonic(), False
                reason = _why_lost(site, status)
                if reason is not None:
                    self._on_lost(site, SiteStartError(mesh.name_of(site), reason))
                    return
                self._on_renewed()
                await mesh.hand_round_new_keys()
            if time.monotonic() > heard + lease:
                # By its own clock, which began no later than ours, it has ended its part, whatever became of it.
                message = f"it could not be reached for {lease:g} s, and so its lease has ended"
                self._on_lost(site, SiteUnreachableError(mesh.name_of(site), "no_answer", message))
                return

    async def _pause(self, site: int, seconds: float) -> None:
        if time.monotonic() < self._hurry_until.get(site, 0.0):
            await asyncio.sleep(HURRY_PAUSE_SECONDS)
            return
        suspicion = self._suspicions[site]
        try:
            async with asyncio.timeout(seconds):
                await suspicion.wait()
        except TimeoutError:
            pass
        suspicion.clear()

    async def _renew(self, site: int, *, until: float) -> ClusterStatus:
        """Renew once, and wait for the answer no longer than the lease lasts."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, until - time.monotonic())):
                return await self._mesh.renew(site)
        except SiteUnreachableError:  # is an OSError, and so is a TimeoutError
            raise
        except TimeoutError as exc:
            name = self._mesh.name_of(site)
            raise SiteUnreachableError(name, "no_answer", "it did not answer before its lease ended") from exc


def _why_lost(site: int, status: ClusterStatus) -> str | None:
    """Why a site that answers has nothing for us any more; None if it has."""
    if status.phase in ("removing", "gone"):
        told = " ".join(condition.message for condition in status.conditions if condition.kind == "ended")
        return told or "The cluster was ended there."
    if site == SCHEDULER_SITE and status.phase == "failed":
        return why_failed(status)
    return None
