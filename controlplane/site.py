"""What a client can ask of a site, and what the loop must know: the one place where records change.

Covers PUT, GET, renewal, DELETE and logs of clusters, and the end of leases. Does not cover HTTP
(:mod:`controlplane.api`) nor doing anything on the machine (:mod:`controlplane.loop`). Every change is on disk before
anything is done for it, and nothing here waits between reading and writing a record, so no lock is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from controlplane.admission import check_caller, check_spec, choose_port, find_record, visible_records
from controlplane.clock import Clock
from controlplane.config import SiteConfig
from controlplane.desired import DesiredCluster, desired_cluster
from controlplane.errors import ConflictError, NotFoundError, StoreError
from controlplane.identity import Caller
from controlplane.leases import Tombstone, check_epoch, grant, outdated_tombstones
from controlplane.loop import Loop
from controlplane.state import ClusterRecord, Owner, Store
from controlplane.status import gone_status, status_of
from controlplane.workers.base import WorkerRuntime
from meshcompute.protocol import ClusterSpec, ClusterStatus

__all__ = ["Site"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0  # how long an answer may wait for the machine, so that it can already hold the public key
MAX_LOG_LINES = 10_000


class Site:
    """The clusters of a site.

    Parameters
    ----------
    config
        What the operator decided.
    store
        Where records are kept.
    clock
        The time.
    runtime
        What runs the workers; here only their logs are read.
    account
        The account that all workers run as, if the operator named one.
    is_port_taken
        Whether another program of this host has a UDP port.
    """

    def __init__(
        self,
        *,
        config: SiteConfig,
        store: Store,
        clock: Clock,
        runtime: WorkerRuntime,
        account: Owner | None = None,
        is_port_taken: Callable[[int], bool] = lambda _port: False,
    ) -> None:
        self.config = config
        self._store = store
        self._clock = clock
        self._runtime = runtime
        self._account = account
        self._is_port_taken = is_port_taken
        self._records: dict[str, ClusterRecord] = {}
        self._tombstones: dict[str, Tombstone] = {}
        self._loop: Loop | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What was wrong with the state folder."""
        return self._store.problems

    def open(self) -> None:
        """Read what there was before; leases of another boot are over."""
        self._store.open()
        self._records, self._tombstones = self._store.load()
        self._clear_tombstones()
        for record in list(self._records.values()):
            if record.boot_id != self._clock.boot_id and not record.is_ended:
                self._end(record, "the machine was started anew")
        if self._records:
            logger.info("adopt clusters n=%d", len(self._records))

    def use(self, loop: Loop) -> None:
        """Give it the loop that does the work."""
        self._loop = loop

    def end_all(self, reason: str) -> None:
        """End every cluster, because the operator wants it."""
        for record in list(self._records.values()):
            if not record.is_ended:
                self._end(record, reason)

    # ------------------------------------------------------------------------------------------ what clients ask for

    async def put(self, cluster_id: str, spec: ClusterSpec, caller: Caller) -> ClusterStatus:
        """Set what a cluster should be, and renew its lease.

        Parameters
        ----------
        cluster_id
            The cluster, new or known.
        spec
            What it should be.
        caller
            Who asks.

        Returns
        -------
        ClusterStatus
            What is true soon afterwards; the rest follows by itself.
        """
        check_spec(
            cluster_id,
            spec,
            caller,
            config=self.config,
            records=self._records.values(),
            tombstone=self._tombstones.get(cluster_id),
        )
        now = self._clock.monotonic()
        before = self._records.get(cluster_id)
        record = ClusterRecord(
            cluster_id=cluster_id,
            owner=before.owner if before else _account_of(caller),
            run_as=before.run_as if before else (self._account or _account_of(caller)),
            spec=spec,
            lease=grant(spec.lease_seconds, now),
            boot_id=self._clock.boot_id,
            listen_port=before.listen_port if before else self._choose_port(),
            fingerprint_by_unit=before.fingerprint_by_unit if before else {},
        )
        self._save(record, is_renewal=before is not None and not before.is_ended and before.spec == spec)
        if before is None:
            logger.info("new cluster id=%s name=%s user=%s", cluster_id, spec.name, caller.user)
        await self._wait_settled(cluster_id)
        return self._status(cluster_id, record)

    async def renew(self, cluster_id: str, epoch: int, caller: Caller) -> ClusterStatus:
        """Renew a cluster's lease."""
        self._refuse_ended(cluster_id, caller)
        record = self._find(cluster_id, caller)
        check_epoch(epoch, current=record.spec.epoch, tombstone=None)
        if epoch > record.spec.epoch:
            raise ConflictError(
                f"Epoch {epoch} is newer than epoch {record.spec.epoch}, the last one that this site has. "
                "PUT the desired state again."
            )
        record = replace(record, lease=record.lease.renewed(self._clock.monotonic()))
        self._save(record, is_renewal=True)
        return self._status(cluster_id, record)

    async def delete(self, cluster_id: str, epoch: int, caller: Caller) -> ClusterStatus:
        """End a cluster: everything of it is removed, and a late PUT does not bring it back.

        Parameters
        ----------
        cluster_id
            The cluster. One that was never here is gone as well: its PUT may still be on its way, and comes too late.
        epoch
            Wishes that are not newer than this are refused from now on.
        caller
            Who asks.

        Returns
        -------
        ClusterStatus
            Removing, or gone.
        """
        check_caller(caller, self.config.pool)
        stone = self._tombstone(cluster_id, caller)
        if cluster_id not in self._records and (stone is not None or cluster_id not in self._tombstones):
            if stone is None or epoch > stone.epoch:
                reason = stone.reason if stone else f"user {caller.user} ended it before it began"
                stone = self._bury(cluster_id, epoch, _account_of(caller), stone.name if stone else "unknown", reason)
            return gone_status(stone)
        record = self._find(cluster_id, caller)
        if not record.is_ended:
            check_epoch(epoch, current=record.spec.epoch, tombstone=None)
            self._end(record, f"user {caller.user} ended it", epoch=epoch)
        elif epoch > self._tombstones[cluster_id].epoch:
            self._bury(cluster_id, epoch, record.owner, record.spec.name, record.end_reason)
        await self._wait_settled(cluster_id)
        return self._status(cluster_id, record)

    async def get(self, cluster_id: str, caller: Caller) -> ClusterStatus:
        """Look at one cluster, now; one that has ended is still known as gone, with the reason."""
        check_caller(caller, self.config.pool)
        stone = self._tombstone(cluster_id, caller)
        if cluster_id not in self._records and stone is not None:
            return gone_status(stone)
        record = self._find(cluster_id, caller)
        if self._loop is not None:
            await self._loop.refresh([cluster_id])
        return self._status(cluster_id, record)

    async def list_clusters(self, caller: Caller) -> list[ClusterStatus]:
        """Look at all clusters of a caller, now."""
        check_caller(caller, self.config.pool)
        if self._loop is not None:
            await self._loop.refresh([record.cluster_id for record in visible_records(caller, self._records.values())])
        return [self._status(record.cluster_id, record) for record in visible_records(caller, self._records.values())]

    def all_statuses(self) -> list[ClusterStatus]:
        """Everybody's clusters as they were seen last, for monitoring."""
        return [self._status(record.cluster_id, record) for record in self._records.values()]

    async def logs(self, cluster_id: str, worker: str | None, lines: int, caller: Caller) -> str:
        """Read the logs of a cluster's units, or of one unit or process."""
        record = self._find(cluster_id, caller)
        desired = desired_cluster(record, self.config, self._clock.monotonic())
        wanted: list[tuple[str, str | None]] = []
        for unit in desired.units:
            if worker in {None, unit.name}:
                wanted.append((unit.name, None))
            elif worker in unit.process_names:
                wanted.append((unit.name, worker))
        if worker is not None and not wanted:
            names = [name for unit in desired.units for name in unit.process_names]
            raise NotFoundError(
                f"Cluster {cluster_id} has no worker {worker!r} here. It has {', '.join(names) or 'none'}."
            )
        written = []
        for name, process in wanted:
            try:
                written.append(await self._runtime.logs(name, min(lines, MAX_LOG_LINES), process))
            except NotFoundError:
                if worker is not None:
                    raise
                # Of all workers, those that have not started yet have written nothing.
        return "".join(written)

    # ------------------------------------------------------------------------------------------ what the loop asks for

    def cluster_ids(self) -> Collection[str]:
        """All clusters with a record."""
        return list(self._records)

    def desired(self, cluster_id: str, now: float) -> DesiredCluster | None:
        """What a cluster should be; None if it should be gone."""
        record = self._records.get(cluster_id)
        if record is None or record.is_ended or record.lease.is_expired(now):
            return None
        return desired_cluster(record, self.config, now)

    def fingerprints(self, cluster_id: str) -> Mapping[str, str]:
        """From which wish each unit was started."""
        record = self._records.get(cluster_id)
        return record.fingerprint_by_unit if record else {}

    def note_start(self, cluster_id: str, fingerprint_by_unit: Mapping[str, str]) -> None:
        """Remember what units are about to be started from."""
        record = self._records[cluster_id]
        known = {**record.fingerprint_by_unit, **fingerprint_by_unit}
        if known != record.fingerprint_by_unit:
            self._records[cluster_id] = replace(record, fingerprint_by_unit=known)
            self._store.save(self._records[cluster_id])

    def note_gone(self, cluster_id: str) -> None:
        """Forget a cluster of which nothing is left; its tombstone stays."""
        record = self._records.get(cluster_id)
        if record is not None and record.is_ended:
            self._store.forget(cluster_id)
            del self._records[cluster_id]
            logger.info("cluster is gone id=%s", cluster_id)

    def end_expired(self, now: float) -> Collection[str]:
        """End the clusters whose lease is over."""
        expired = [record for record in self._records.values() if not record.is_ended and record.lease.is_expired(now)]
        for record in expired:
            self._end(record, "its lease ended, because nobody renewed it")
        return [record.cluster_id for record in expired]

    def next_deadline(self) -> float | None:
        """When the next lease ends."""
        return min((record.lease.deadline for record in self._records.values() if not record.is_ended), default=None)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _choose_port(self) -> int | None:
        if self.config.network == "loopback":
            return None
        ours = {record.listen_port for record in self._records.values()}
        return choose_port(
            self.config.network_options.udp_ports,
            lambda port: port in ours or self._is_port_taken(port),
            self.config.pool,
        )

    def _find(self, cluster_id: str, caller: Caller) -> ClusterRecord:
        check_caller(caller, self.config.pool)
        return find_record(caller, self._records.get(cluster_id), cluster_id, self.config.pool)

    def _tombstone(self, cluster_id: str, caller: Caller) -> Tombstone | None:
        """A tombstone that exists for this caller."""
        stone = self._tombstones.get(cluster_id)
        return stone if stone is not None and (caller.is_operator or stone.owner_uid == caller.uid) else None

    def _refuse_ended(self, cluster_id: str, caller: Caller) -> None:
        check_caller(caller, self.config.pool)
        record = self._records.get(cluster_id)
        stone = self._tombstone(cluster_id, caller)
        if stone is not None and (record is None or record.is_ended):
            raise ConflictError(f"Cluster {cluster_id} has ended here: {stone.reason}. Boot a new one.")

    def _save(self, record: ClusterRecord, *, is_renewal: bool = False) -> None:
        self._store.save(record)
        self._records[record.cluster_id] = record
        if self._loop is not None:
            self._loop.poke(record.cluster_id, is_changed=not is_renewal)

    def _bury(self, cluster_id: str, epoch: int, owner: Owner, name: str, reason: str) -> Tombstone:
        tombstone = Tombstone(
            cluster_id=cluster_id,
            epoch=epoch,
            buried_at=self._clock.wall(),
            owner_uid=owner.uid,
            user=owner.user,
            name=name,
            reason=reason,
        )
        self._tombstones.pop(cluster_id, None)
        self._tombstones[cluster_id] = tombstone
        self._store.bury(tombstone)
        self._clear_tombstones()
        return tombstone

    def _clear_tombstones(self) -> None:
        for stone in outdated_tombstones(self._tombstones.values(), self._clock.wall()):
            self._store.unearth(stone.cluster_id)
            del self._tombstones[stone.cluster_id]

    def _end(self, record: ClusterRecord, reason: str, epoch: int = 0) -> None:
        """End a cluster, also if the disk is full: what is removed must not depend on what can be written."""
        ended = replace(record, is_ended=True, end_reason=reason)
        self._records[record.cluster_id] = ended
        logger.info("end cluster id=%s reason=%s", record.cluster_id, reason)
        try:
            self._bury(record.cluster_id, max(epoch, record.spec.epoch), record.owner, record.spec.name, reason)
            self._store.save(ended)
        except StoreError as exc:
            logger.error("the end of a cluster cannot be written down reason=%s", exc)  # noqa: TRY400 - no traceback
        if self._loop is not None:
            self._loop.poke(record.cluster_id, is_changed=True)

    async def _wait_settled(self, cluster_id: str) -> None:
        if self._loop is not None:
            await self._loop.wait_settled(cluster_id, ANSWER_SECONDS)

    def _status(self, cluster_id: str, record: ClusterRecord) -> ClusterStatus:
        current = self._records.get(cluster_id)
        report = self._loop.report(cluster_id) if self._loop is not None else None
        return status_of(
            current or record,
            self.config,
            report,
            is_gone=current is None,
            now=self._clock.monotonic(),
        )


def _account_of(caller: Caller) -> Owner:
    return Owner(uid=caller.uid, gid=caller.gid, user=caller.user, groups=caller.groups)
