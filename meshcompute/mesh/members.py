"""All sites of one cluster, acted on together.

Covers reaching them, driving a boot through the stages of :mod:`meshcompute.mesh.plan`, renewing a lease, changing the
number of workers, and taking everything down. Does not cover when to renew (:mod:`meshcompute.mesh.renewals`), nor
Dask: whether workers are registered, only the scheduler knows (:mod:`meshcompute.mesh.cluster`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import replace

from meshcompute.mesh.control import SiteClient, SiteControl
from meshcompute.mesh.linking import bypass, new_relays, silent_pairs, to_blame, what_is_true, why_not_over
from meshcompute.mesh.plan import (
    SCHEDULER_SITE,
    STAGES,
    Member,
    MeshPlan,
    Stage,
    check_members,
    is_stage_over,
    learn,
    spec_of,
    why_failed,
)
from meshcompute.mesh.sites import SiteError, SiteRefusedError, SiteStartError, SiteUnreachableError
from meshcompute.protocol import MAX_EPOCH, ClusterStatus, SiteInfo, WorkerRequest

__all__ = ["MeshSites"]

logger = logging.getLogger("meshcompute.cluster")

RENEW_TIMEOUT_SECONDS = 10.0
REMOVE_TIMEOUT_SECONDS = 20.0
FIRST_LOOK_SECONDS = 0.02
LAST_LOOK_SECONDS = 0.25
# WireGuard tries again every 5 s; what two tries did not bring is not slow but blocked.
BYPASS_SECONDS = 12.0
HANDSHAKE_SECONDS = 30.0
MEND_SECONDS = 20.0  # for the rest of the sites, when others were left out at the last moment


class MeshSites:
    """The sites of one cluster.

    Parameters
    ----------
    controls
        How to reach each site, by its number; 0 is the client's own host.
    plan
        The cluster, without members: they become known as the sites are reached.
    workers
        What to ask of a site that does not have a request of its own.
    allow_partial
        Whether to go on without sites that cannot be had.
    say
        Called with one line whenever something became true that a waiting person wants to know.

    Notes
    -----
    The constructor stores. :meth:`reach`, :meth:`start` and :meth:`remove` act, in this order; :meth:`remove` may come
    at any time and undoes whatever there is.
    """

    def __init__(
        self,
        controls: Mapping[int, SiteControl],
        plan: MeshPlan,
        *,
        workers: WorkerRequest,
        allow_partial: bool = False,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.controls = dict(controls)
        self.plan = plan
        self.infos: dict[int, SiteInfo] = {}
        self.statuses: dict[int, ClusterStatus] = {}
        self.left_out: dict[int, SiteError] = {}
        self._default_workers = workers
        self._allow_partial = allow_partial
        self._say = say
        self._epoch = 0
        self._epochs: dict[int, int] = {}  # the last one that each site has accepted
        self._stage: Stage = "keys"
        self._told: set[int] = set()  # sites that may have something of ours
        self._lost: dict[int, SiteControl] = {}  # those of them that should have nothing any more
        self._is_booting = True
        self._changing = asyncio.Lock()

    def name_of(self, site: int) -> str:
        """How people know a site: as they wrote it, and its pool."""
        written = str(self._control(site).address)
        return f"{written} ({self.infos[site].pool})" if site in self.infos else written

    @property
    def scheduler_status(self) -> ClusterStatus | None:
        """What the client's own host said last."""
        return self.statuses.get(SCHEDULER_SITE)

    @property
    def worker_names(self) -> set[str]:
        """Names of all workers that the sites should have."""
        return {worker.name for status in self.statuses.values() for worker in status.workers}

    # Booting

    async def reach(self) -> None:
        """Reach all sites at once, and check that they can make one cluster.

        Raises
        ------
        SiteError
            One of them cannot be had; the first in the order of the arguments.
        MeshPlanError
            They do not fit together.
        """

        async def reach_one(site: int) -> None:
            begin = time.monotonic()
            control = self.controls[site]
            info = await control.open()
            wanted = "scheduler" if site == SCHEDULER_SITE else "site"
            if info.role not in (wanted, "both"):
                message = (
                    f"its daemon has the role {info.role!r} and {wanted!r} is needed; its operator sets "
                    f'role = "{wanted}" or "both" in site.toml'
                )
                raise SiteStartError(str(control.address), message)
            self.infos[site] = info
            way = {"local": "", "forwarding": "", "connect": ", without socket forwarding"}[control.transport]
            self._say(f"{self.name_of(site)}: reached in {time.monotonic() - begin:.1f} s{way}")

        await self._everywhere(reach_one)
        self.infos = dict(sorted(self.infos.items()))  # they came in any order
        members = [
            Member(
                site=site,
                address=str(control.address),
                pool=self.infos[site].pool,
                network=self.infos[site].network,
                hosts=self.infos[site].endpoints,
            )
            for site, control in self.controls.items()
            if site in self.infos
        ]
        workers = {site: self._default_workers for site in self.infos if site != SCHEDULER_SITE}
        self.plan = replace(self.plan, members=tuple(members), workers={**workers, **self.plan.workers})
        check_members(self.plan)

    async def start(self, *, deadline: float) -> None:
        """Bring up gateways, the scheduler and the workers.

        Parameters
        ----------
        deadline
            Until when, in seconds of the monotonic clock.

        Raises
        ------
        SiteError
            A site did not do its part.
        """
        for stage in STAGES:
            if stage == "listen" and all(member.network == "loopback" for member in self.plan.members):
                continue
            self._stage = stage
            asked = None
            while asked != self._shape():  # sites were left out meanwhile, or are relayed: the others must know
                if asked is not None:
                    check_members(self.plan)
                    deadline = max(deadline, time.monotonic() + MEND_SECONDS)
                asked = self._shape()
                await self._tell(stage, deadline)
            self._say(what_is_true(self.plan, stage, self.statuses))
        self._is_booting = False

    def _shape(self) -> tuple[object, ...]:
        return tuple(member.site for member in self.plan.members), self.plan.broken

    async def _tell(self, stage: Stage, deadline: float, sites: Collection[int] | None = None) -> None:
        """Tell sites their part, and wait until it is true."""
        async with self._changing:
            self._epoch += 1
            epoch, plan = self._epoch, self.plan
            scheduler = self.scheduler_status
            address = scheduler.scheduler.address if scheduler is not None and scheduler.scheduler is not None else None

            async def tell_one(site: int) -> None:
                spec = spec_of(plan, site, stage, epoch=epoch, scheduler_address=address)
                self._told.add(site)
                self.statuses[site] = await self._call(site, lambda client: client.put(plan.cluster_id, spec))
                self._epochs[site] = epoch
                await self._wait(site, stage, epoch, deadline)

            await self._everywhere(tell_one, sites, is_patient=not self._is_booting)
            self.plan = learn(self.plan, self.statuses)

    async def _wait(self, site: int, stage: Stage, epoch: int, deadline: float) -> None:
        pause = FIRST_LOOK_SECONDS
        begin = time.monotonic()
        while not is_stage_over(self.plan, site, stage, self.statuses[site], epoch=epoch):
            status = self.statuses[site]
            if status.phase == "failed":
                raise SiteStartError(self.name_of(site), why_failed(status))
            if status.phase in ("removing", "gone"):
                raise SiteStartError(self.name_of(site), "the cluster was ended there while it booted")
            now = time.monotonic()
            silent = self._silent(now - begin) if stage == "run" and self._is_booting else set()
            is_to_blame = bool(silent) and site == to_blame(silent)
            why = why_not_over(self.plan, site, stage, status)
            if now > deadline + (0 if is_to_blame or not silent else LAST_LOOK_SECONDS):
                raise SiteStartError(self.name_of(site), f"it was not ready in time. {why}")
            if is_to_blame and now > begin + HANDSHAKE_SECONDS:
                raise SiteStartError(self.name_of(site), why)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK_SECONDS)
            self.statuses[site] = await self._call(site, lambda client: client.status(self.plan.cluster_id))

    def _silent(self, waited_seconds: float) -> set[frozenset[int]]:
        """Find the links that nothing passes, after relaying those that can be relayed."""
        silent = silent_pairs(self.plan, self.statuses)
        if silent and waited_seconds > BYPASS_SECONDS:
            better = bypass(self.plan, silent)
            for line in new_relays(self.plan, better):
                self._say(line)
            self.plan = better
            silent -= better.broken
        return silent

    async def _everywhere(
        self,
        act: Callable[[int], Coroutine[None, None, None]],
        sites: Collection[int] | None = None,
        *,
        is_patient: bool = True,
    ) -> None:
        """Act at all sites at once; leave out those that fail, if that is allowed, or raise the first failure.

        Without patience the first failure ends it: the others may wait for what cannot come any more.
        """
        failures: dict[int, SiteError] = {}

        async def try_one(site: int) -> None:
            try:
                await act(site)
            except SiteError as exc:
                if self._is_booting and self._can_leave_out(site):
                    await self._leave_out(site, exc)
                    return
                failures[site] = exc
                if not is_patient:
                    raise

        tasks = [asyncio.create_task(try_one(site)) for site in self.controls if sites is None or site in sites]
        try:
            _done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if others:
                await asyncio.wait(others, timeout=LAST_LOOK_SECONDS)  # who is refused for the same reason says so, too
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if len(failures) > 1:
            for failure in failures.values():
                self._say(str(failure))
        for problem in (*(failures[site] for site in sorted(failures)), *results):
            if isinstance(problem, Exception):
                raise problem

    def _can_leave_out(self, site: int) -> bool:
        rest = set(self.controls) - {SCHEDULER_SITE, site}
        return self._allow_partial and site != SCHEDULER_SITE and bool(rest)

    async def _leave_out(self, site: int, error: SiteError) -> None:
        self._say(f"{error}\ngoing on without {self.name_of(site)}")
        self.lose(site, error)  # at once: the others wait for it no longer, and nobody renews its lease
        if site in self._told:
            await self._remove_one(site)
            self._told.discard(site)
        await self._lost.pop(site).close()

    async def do_without(self, site: int, error: SiteError) -> None:
        """Go on without a site whose workers do not come, if that is allowed, and tell the others.

        Parameters
        ----------
        site
            Its number.
        error
            Why it cannot be had; raised where sites must not be left out, or it is the last one.
        """
        if not self._can_leave_out(site):
            raise error
        await self._leave_out(site, error)
        await self._tell("run", time.monotonic() + MEND_SECONDS)

    async def _call(
        self, site: int, request: Callable[[SiteClient], Awaitable[ClusterStatus]], *, attempts: int = 3
    ) -> ClusterStatus:
        return await self._control(site).call(request, attempts=attempts)

    def _control(self, site: int) -> SiteControl:
        control = self.controls.get(site) or self._lost.get(site)
        if control is None:
            raise SiteStartError(f"number {site}", "it was left out")
        return control

    # While it runs

    async def refresh(self) -> None:
        """Ask every site for its status. Those that do not answer keep their last one."""

        async def refresh_one(site: int) -> None:
            with contextlib.suppress(SiteUnreachableError):
                self._note(site, await self._call(site, lambda client: client.status(self.plan.cluster_id)))

        await asyncio.gather(*(refresh_one(site) for site in self.controls))

    def has_part(self, site: int) -> bool:
        """Tell whether a site has accepted its part of the cluster.

        Parameters
        ----------
        site
            Its number.

        Returns
        -------
        bool
            Whether there is anything to renew.
        """
        return site in self._epochs

    async def renew(self, site: int) -> ClusterStatus:
        """Renew a site's lease.

        Parameters
        ----------
        site
            Its number.

        Returns
        -------
        ClusterStatus
            What is true there; it may have ended its part.

        Raises
        ------
        SiteError
            It cannot be reached, or does not want to.
        """

        async def renewal(client: SiteClient) -> ClusterStatus:
            async with asyncio.timeout(RENEW_TIMEOUT_SECONDS):
                return await client.renew(self.plan.cluster_id, self._epochs[site])

        try:
            status = await self._call(site, renewal, attempts=2)
        except SiteRefusedError as exc:
            if exc.kind != "conflict":
                raise
            # A change of ours may have overtaken the renewal, and counts as one; or the cluster has ended there.
            status = await self._call(site, lambda client: client.status(self.plan.cluster_id))
        self._note(site, status)
        return status

    def _note(self, site: int, status: ClusterStatus) -> None:
        if site in self.controls:  # or it was left out meanwhile
            self.statuses[site] = status

    async def hand_round_new_keys(self) -> None:
        """Tell all sites the new key of a gateway that had to make one."""
        learnt = learn(self.plan, self.statuses)
        if learnt == self.plan or self._changing.locked():
            return
        self.plan = learnt
        self._say("a gateway was made anew: handing its public key round")
        try:
            await self._tell("run", time.monotonic() + self.plan.lease_seconds)
        except SiteError as exc:
            logger.warning("key not handed round: %s", exc)

    def lose(self, site: int, error: SiteError) -> None:
        """Go on without a site that has ended its part.

        Parameters
        ----------
        site
            Its number.
        error
            Why it has.
        """
        self.left_out[site] = error
        self._lost[site] = self.controls.pop(site)
        self.infos.pop(site, None)
        self.statuses.pop(site, None)
        self.plan = self.plan.without({site})

    async def set_containers(self, site: int, containers: int, *, deadline: float) -> None:
        """Ask a site for another number of worker containers, and wait until it is true.

        Parameters
        ----------
        site
            Number of the site.
        containers
            How many; at least one.
        deadline
            Until when, in seconds of the monotonic clock.

        Raises
        ------
        SiteError
            The site does not want to, or could not in time.
        """
        before = self.plan.workers
        request = before[site].model_copy(update={"containers": containers})
        self.plan = replace(self.plan, workers={**before, site: request})
        try:
            await self._tell("run", deadline, {site})
        except SiteRefusedError:
            self.plan = replace(self.plan, workers={**self.plan.workers, site: before[site]})
            raise

    async def logs(self, site: int, worker: str, lines: int) -> str:
        """Read the end of a log at a site.

        Parameters
        ----------
        site
            Number of the site.
        worker
            Name of a worker, or ``scheduler``.
        lines
            How many lines at most.

        Returns
        -------
        str
            What it wrote.
        """
        return await self.controls[site].call(lambda client: client.logs(self.plan.cluster_id, worker, lines))

    # Ending

    async def remove(self, *, is_everywhere: bool = False) -> bool:
        """Take everything down that may be there, and let go of the sites.

        Parameters
        ----------
        is_everywhere
            Whether also sites may have a part of it that were told nothing from here.

        Returns
        -------
        bool
            Whether every site said that nothing is left; else the rest goes when its lease ends.
        """
        self.controls |= self._lost  # asked once more: what they say is better than what we think
        told = sorted(self.controls if is_everywhere else self._told & set(self.controls))
        results = await asyncio.gather(*(self._remove_one(site) for site in told))
        self._told.clear()
        await self.disconnect()
        return all(results)

    async def disconnect(self) -> None:
        """Let go of the sites; the cluster lives on until its leases end."""
        await asyncio.gather(*(control.close() for control in self.controls.values()))

    async def _remove_one(self, site: int) -> bool:
        begin = time.monotonic()
        pause = FIRST_LOOK_SECONDS
        error: str
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_SECONDS):
                # The largest epoch: no request of ours that is still on its way can bring anything back.
                status = await self._call(site, lambda client: client.delete(self.plan.cluster_id, MAX_EPOCH))
                while status.phase != "gone":
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_LOOK_SECONDS)
                    status = await self._call(site, lambda client: client.status(self.plan.cluster_id))
        except SiteRefusedError as exc:
            if exc.kind == "not_found":
                self._say(f"{self.name_of(site)}: removed in {time.monotonic() - begin:.1f} s")
                return True
            error = str(exc)
        except SiteUnreachableError as exc:
            error = str(exc)
        except TimeoutError:
            error = f"{self.name_of(site)} was not done within {REMOVE_TIMEOUT_SECONDS:g} s"
        else:
            self._say(f"{self.name_of(site)}: removed in {time.monotonic() - begin:.1f} s")
            return True
        self._say(f"{error}; it ends its part by itself within {self.plan.lease_seconds:g} s, with its lease")
        return False
