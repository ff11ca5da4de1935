"""The loop that makes it so: looks at a cluster, decides, acts, and looks again.

Covers doing the steps of :mod:`controlplane.reconcile` through the data plane and the worker runtime, when to look
again, and what to remember of failures. Does not cover what should be (whoever implements :class:`Wishes`). Nothing
that fails here ends the loop: it becomes a problem of its cluster, told in its status, and is tried again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from controlplane.clock import Clock
from controlplane.desired import DesiredCluster, fingerprint_of
from controlplane.errors import RuntimeUnknownError, SiteError
from controlplane.network.base import DataPlane
from controlplane.network.topology import GatewayState
from controlplane.reconcile import (
    AttachUnit,
    DetachUnit,
    EnsureGateway,
    Forget,
    Memory,
    Observed,
    Problem,
    RemoveGateway,
    RenewGateway,
    RenewUnit,
    Report,
    StartUnit,
    Step,
    StopUnit,
    is_over,
    plan_cluster,
    plan_sweep,
    stages,
)
from controlplane.workers.base import WorkerRuntime, WorkerState
from controlplane.workqueue import WorkQueue

__all__ = ["Loop", "Wishes"]

logger = logging.getLogger(__name__)

RESYNC_SECONDS = 5.0  # how long something that changed by itself may go unseen
SETTLING_SECONDS = 0.2  # ... while units are starting
SWEEP_SECONDS = 60.0
ENGINE_PATIENCE_SECONDS = 5.0  # an engine that is silent for longer is unknown: leases and answers do not wait for it
STEADY_SECONDS = 60.0  # a unit that has run so long starts without delay when it exits


class Wishes(Protocol):
    """What should be, and who wants to know what became of it."""

    def cluster_ids(self) -> Collection[str]:
        """All clusters with a record, those that are being removed among them."""
        ...

    def desired(self, cluster_id: str, now: float) -> DesiredCluster | None:
        """What a cluster should be; None if it should be gone."""
        ...

    def fingerprints(self, cluster_id: str) -> Mapping[str, str]:
        """From which wish each unit was started."""
        ...

    def note_start(self, cluster_id: str, fingerprint_by_unit: Mapping[str, str]) -> None:
        """Remember, on disk, what units are about to be started from."""
        ...

    def note_gone(self, cluster_id: str) -> None:
        """Forget a cluster of which nothing is left."""
        ...

    def end_expired(self, now: float) -> Collection[str]:
        """End the clusters whose lease is over, and name them."""
        ...

    def next_deadline(self) -> float | None:
        """When the next lease ends."""
        ...


@dataclass(slots=True)
class _Seen:
    """What the loop keeps of one cluster."""

    memory: Memory = field(default_factory=Memory)
    report: Report | None = None
    last_steps: tuple[Step, ...] = ()
    looks: int = 0
    generation: int = 0


class Loop:
    """Keeps the clusters of a site as they should be.

    Parameters
    ----------
    plane
        The data plane.
    runtime
        What runs the workers.
    wishes
        What should be.
    clock
        The time.
    """

    def __init__(self, *, plane: DataPlane, runtime: WorkerRuntime, wishes: Wishes, clock: Clock) -> None:
        self._plane = plane
        self._runtime = runtime
        self._wishes = wishes
        self._clock = clock
        self._queue = WorkQueue()
        self._wake = asyncio.Event()
        self._looked = asyncio.Condition()
        self._seen: dict[str, _Seen] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_sweep = 0.0
        self._gateways = asyncio.Lock()  # a sweep and a new gateway never meet
        self._observation: asyncio.Task[tuple[dict[str, GatewayState], dict[str, WorkerState] | None]] | None = None
        self._stuck_look: asyncio.Task[dict[str, WorkerState]] | None = None
        self.problems: tuple[Problem, ...] = ()
        self.engine_problem: Problem | None = None
        self.n_failures = 0

    def poke(self, cluster_id: str, *, is_changed: bool = False) -> None:
        """Ask for a look at a cluster, now; what was found before a change does not count as settled."""
        if is_changed:
            seen = self._seen.setdefault(cluster_id, _Seen())
            seen.generation += 1
            if seen.report is not None:
                seen.report = replace(seen.report, is_settled=False, problems=())
        self._queue.add(cluster_id, self._clock.monotonic())
        self._wake.set()

    def report(self, cluster_id: str) -> Report | None:
        """What the last look found; None if nobody has looked yet."""
        seen = self._seen.get(cluster_id)
        return seen.report if seen else None

    async def wait_settled(self, cluster_id: str, timeout_seconds: float) -> None:
        """Wait until a cluster is as it should be, has a problem, or the time is over."""
        start = self._seen.setdefault(cluster_id, _Seen()).looks

        def has_news() -> bool:
            seen = self._seen.get(cluster_id)
            if seen is None:
                return True  # it is gone
            return (
                seen.looks > start
                and seen.report is not None
                and (seen.report.is_settled or bool(seen.report.problems))
            )

        try:
            async with asyncio.timeout(timeout_seconds), self._looked:
                await self._looked.wait_for(has_news)
        except TimeoutError:
            pass

    async def refresh(self, cluster_ids: Collection[str]) -> None:
        """Look at clusters without changing anything; requests that come together share one look."""
        if self._observation is None or self._observation.done():
            self._observation = asyncio.create_task(self._observe())
        try:
            gateways, units = await asyncio.shield(self._observation)
        except Exception as exc:
            logger.debug("cannot look reason=%s", exc)
            return
        for cluster_id in cluster_ids:
            seen = self._seen.get(cluster_id)
            if seen is not None and seen.report is not None:
                seen.report = replace(seen.report, observed=_only(cluster_id, gateways, units))

    async def run(self) -> None:
        """Work until cancelled."""
        self.adopt()
        try:
            while True:
                self._wake.clear()
                self._begin()
                times = [self._next_sweep, self._queue.next_due(), self._wishes.next_deadline()]
                wake_at = min(time for time in times if time is not None)
                await self._clock.wait(self._wake, max(0.0, wake_at - self._clock.monotonic()))
        finally:
            for task in self._tasks | ({self._stuck_look} if self._stuck_look else set()):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def adopt(self) -> None:
        """Ask for a look at every cluster that there is, and for a sweep."""
        for cluster_id in self._wishes.cluster_ids():
            self.poke(cluster_id)
        self._next_sweep = self._clock.monotonic()

    async def work(self) -> None:
        """Do what is due now, and what that makes due, instead of :meth:`run`: for those who move the time by hand."""
        while self._begin():
            await asyncio.gather(*self._tasks)

    def _begin(self) -> int:
        """Begin all that is due, and say how much that is."""
        now = self._clock.monotonic()
        for cluster_id in self._wishes.end_expired(now):
            self._queue.add(cluster_id, now)
        work = [self._look(cluster_id) for cluster_id in self._queue.take_due(now)]
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            work.append(self.sweep())
        for coroutine in work:
            self._spawn(coroutine)
        return len(work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_gone(self, timeout_seconds: float) -> bool:
        """Wait until no cluster is left; False if the time is over first."""
        try:
            async with asyncio.timeout(timeout_seconds), self._looked:
                await self._looked.wait_for(lambda: not self._wishes.cluster_ids())
        except TimeoutError:
            return False
        return True

    async def sweep(self) -> None:
        """Remove what carries our mark and belongs to no cluster; nothing at all if the engine does not answer."""
        try:
            units = await self._runtime.observe()
            for step in plan_sweep(self._wishes.cluster_ids(), units):
                logger.info("sweep a unit of no cluster name=%s", step.name)
                await self._runtime.stop(step.name, step.grace_seconds)
            async with self._gateways:
                await self._plane.sweep(set(self._wishes.cluster_ids()))
        except Exception as exc:
            self._note_engine(exc)
            self.problems = (_problem("sweep", exc),)
            _log_failure("sweep", exc)
        else:
            self.problems = ()

    async def _observe(self) -> tuple[dict[str, GatewayState], dict[str, WorkerState] | None]:
        gateways = await self._plane.observe()
        try:
            units = await self._observe_units()
        except RuntimeUnknownError as exc:
            self._note_engine(exc)
            return gateways, None
        self.engine_problem = None
        return gateways, units

    async def _observe_units(self) -> dict[str, WorkerState]:
        """Ask the engine, which may be stuck: one look waits for it then, and no second one."""
        if self._stuck_look is None or await _is_over(self._stuck_look, ENGINE_PATIENCE_SECONDS):
            look = asyncio.create_task(self._runtime.observe())
            look.add_done_callback(lambda done: done.cancelled() or done.exception())
            if await _is_over(look, ENGINE_PATIENCE_SECONDS):
                self._stuck_look = None
                return look.result()
            self._stuck_look = look
        raise RuntimeUnknownError(
            f"The container engine has not answered for {ENGINE_PATIENCE_SECONDS:g} s, so nobody knows which workers "
            "run: look what it does (systemctl status docker), and restart it if need be."
        )

    def _note_engine(self, exc: Exception) -> None:
        if isinstance(exc, RuntimeUnknownError):
            if self.engine_problem is None:
                logger.warning("the engine does not answer reason=%s", exc)
            self.engine_problem = _problem("engine", exc)

    async def _look(self, cluster_id: str) -> None:
        """Observe, decide and act once, then say when to look again."""
        seen = self._seen.setdefault(cluster_id, _Seen())
        problems: list[Problem] = []
        again: float | None = None
        generation = seen.generation
        try:
            gateways, units = await self._observe()
            observed = _only(cluster_id, gateways, units)
            now = self._clock.monotonic()
            seen.memory = _updated(seen.memory, observed, self._wishes.fingerprints(cluster_id), now)
            desired = self._wishes.desired(cluster_id, now)
            steps = plan_cluster(cluster_id, desired, observed, seen.memory, now)
            problems = await self._apply(cluster_id, steps, seen, is_removal=desired is None)
            now = self._clock.monotonic()
            is_complete = _is_complete(desired, observed)
            if not steps:
                again = now + (RESYNC_SECONDS if is_complete else SETTLING_SECONDS)
            else:
                again = now if steps != seen.last_steps else now + SETTLING_SECONDS
            seen.last_steps = steps
            if observed.units is None:
                problems.append(self.engine_problem or Problem(kind="engine", reason="Unknown", message=""))
            seen.report = Report(
                observed=observed,
                problems=tuple(problems),
                is_settled=not steps and is_complete and generation == seen.generation,
            )
        except Exception as exc:
            problems = [_problem("gateway", exc)]
            _log_failure(f"look at {cluster_id[:8]}", exc)
            before = seen.report.observed if seen.report else Observed(gateway=None, units=None)
            seen.report = Report(observed=before, problems=tuple(problems))
        finally:
            seen.looks += 1
            self.n_failures += bool(problems)
            is_known = cluster_id in self._wishes.cluster_ids()
            if not is_known:
                self._seen.pop(cluster_id, None)
            self._queue.done(
                cluster_id,
                again=again if is_known else None,
                has_failed=bool(problems) and is_known,
                now=self._clock.monotonic(),
            )
            self._wake.set()
            async with self._looked:
                self._looked.notify_all()

    async def _apply(self, cluster_id: str, steps: tuple[Step, ...], seen: _Seen, *, is_removal: bool) -> list[Problem]:
        problems: list[Problem] = []
        starts = {step.spec.name: fingerprint_of(step.spec) for step in steps if isinstance(step, StartUnit)}
        if starts:
            self._wishes.note_start(cluster_id, starts)
        for stage in stages(steps):
            results = await asyncio.gather(*(self._do(step, seen) for step in stage), return_exceptions=True)
            for step, result in zip(stage, results, strict=True):
                if isinstance(result, Exception):
                    self._note_engine(result)
                    problems.append(_problem(_KIND_OF_STEP[type(step)], result))
                    _log_failure(str(step), result)
                elif isinstance(result, BaseException):
                    raise result
                elif not isinstance(step, RenewUnit | RenewGateway | EnsureGateway):
                    logger.info("done step=%s cluster=%s", step, cluster_id)
            if problems and not is_removal and not isinstance(stage[0], RenewUnit | RenewGateway):
                break  # what comes later rests on this; a removal goes as far as it can
        return problems

    async def _do(self, step: Step, seen: _Seen) -> None:
        now = self._clock.monotonic()
        memory = seen.memory
        match step:
            case EnsureGateway():
                deadline = now + step.config.deadline_seconds
                async with self._gateways:
                    state = await self._plane.ensure(step.config)
                seen.memory = replace(
                    seen.memory, gateway=step.config, gateway_deadline=deadline, public_key=state.public_key
                )
            case RenewGateway():
                await self._plane.renew(step.cluster_id, max(0.0, step.deadline - now))
                seen.memory = replace(seen.memory, gateway_deadline=step.deadline)
            case StartUnit():
                name = step.spec.name
                starts = memory.starts_by_unit.get(name, (0, 0.0))[0]
                seen.memory = replace(seen.memory, starts_by_unit={**memory.starts_by_unit, name: (starts + 1, now)})
                await self._runtime.start(step.spec)
                deadline = now + step.spec.deadline_seconds
                seen.memory = replace(seen.memory, deadline_by_unit={**seen.memory.deadline_by_unit, name: deadline})
            case AttachUnit():
                await self._plane.attach(step.cluster_id, netns=step.netns, address=step.address, link=step.link)
                link = {step.name: (step.netns, step.address)}
                seen.memory = replace(seen.memory, link_by_unit={**seen.memory.link_by_unit, **link})
            case RenewUnit():
                await self._runtime.renew(step.name, max(0.0, step.deadline - now))
                deadlines = {**seen.memory.deadline_by_unit, step.name: step.deadline}
                seen.memory = replace(seen.memory, deadline_by_unit=deadlines)
            case StopUnit():
                await self._runtime.stop(step.name, step.grace_seconds)
                # An end that was wanted is no failure: the next start of this name need not wait.
                others = {key: start for key, start in seen.memory.starts_by_unit.items() if key != step.name}
                seen.memory = replace(seen.memory, starts_by_unit=others)
            case DetachUnit():
                await self._plane.detach(step.cluster_id, step.address)
                links = {name: link for name, link in seen.memory.link_by_unit.items() if name != step.name}
                seen.memory = replace(seen.memory, link_by_unit=links)
            case RemoveGateway():
                async with self._gateways:
                    await self._plane.remove(step.cluster_id)
                seen.memory = Memory()
            case Forget():
                self._wishes.note_gone(step.cluster_id)


_KIND_OF_STEP: Mapping[type, str] = {
    EnsureGateway: "gateway",
    RenewGateway: "gateway",
    RemoveGateway: "gateway",
    Forget: "gateway",
    StartUnit: "workers",
    StopUnit: "workers",
    RenewUnit: "workers",
    AttachUnit: "workers",
    DetachUnit: "workers",
}


async def _is_over(task: asyncio.Task[Any], timeout_seconds: float) -> bool:
    done, _pending = await asyncio.wait({task}, timeout=timeout_seconds)
    return bool(done)


def _only(cluster_id: str, gateways: Mapping[str, GatewayState], units: Mapping[str, WorkerState] | None) -> Observed:
    if units is not None:
        units = {name: state for name, state in units.items() if state.cluster_id == cluster_id}
    return Observed(gateway=gateways.get(cluster_id), units=units)


def _is_complete(desired: DesiredCluster | None, observed: Observed) -> bool:
    if observed.units is None:
        return False
    if desired is None:
        return True
    units = observed.units
    return all(
        (unit.name in units and units[unit.name].state == "running") or is_over(unit, units) for unit in desired.units
    )


def _updated(memory: Memory, observed: Observed, fingerprint_by_unit: Mapping[str, str], now: float) -> Memory:
    """Forget the failures of units that have run for a while, and take over what the store knows."""
    units = observed.units or {}
    starts = {
        name: (count, last)
        for name, (count, last) in memory.starts_by_unit.items()
        if not (name in units and units[name].state == "running" and now - last > STEADY_SECONDS)
    }
    return replace(memory, starts_by_unit=starts, fingerprint_by_unit=dict(fingerprint_by_unit))


def _problem(kind: str, exc: Exception) -> Problem:
    if isinstance(exc, RuntimeUnknownError):
        kind = "engine"
    if isinstance(exc, SiteError):
        return Problem(kind=kind, reason=type(exc).__name__.removesuffix("Error"), message=str(exc))
    message = f"{type(exc).__name__}: {exc}. The log of the daemon (journalctl -u meshcompute-site) has more."
    return Problem(kind=kind, reason="Unexpected", message=message)


def _log_failure(what: str, exc: Exception) -> None:
    if isinstance(exc, SiteError):
        logger.warning("failed what=%s reason=%s", what, exc)
    else:
        logger.error("failed what=%s", what, exc_info=exc)
