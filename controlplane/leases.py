"""Leases and epochs: until when a site keeps its part of a cluster, and which wish is the latest.

Covers the arithmetic, with the time as an argument. Does not cover storing them (:mod:`controlplane.state`) nor what
happens when one ends (:mod:`controlplane.reconcile`). Times are seconds of the machine's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from controlplane.errors import ConflictError

__all__ = ["Lease", "Tombstone", "check_epoch", "grant", "outdated_tombstones"]

TOMBSTONE_SECONDS = 7 * 86400  # far longer than any request can be under way
MAX_TOMBSTONES = 10_000  # nobody can fill the disk with requests to end what never was


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A promise to keep something until a time, unless it is renewed before."""

    seconds: float
    deadline: float

    def remaining_seconds(self, now: float) -> float:
        """How long the promise still holds; never negative."""
        return max(0.0, self.deadline - now)

    def is_expired(self, now: float) -> bool:
        """Whether the time is over: at the deadline it is."""
        return now >= self.deadline

    def renewed(self, now: float) -> Lease:
        """Begin anew, now.

        Parameters
        ----------
        now
            Seconds of the monotonic clock.

        Returns
        -------
        Lease
            The same promise with a later deadline, never an earlier one.

        Raises
        ------
        ConflictError
            If the lease has expired: its cluster is being removed, and a renewal must not pretend otherwise.
        """
        if self.is_expired(now):
            raise ConflictError(
                f"The lease of {self.seconds:g} s ended {now - self.deadline:.0f} s ago, and the cluster is being "
                "removed here. Boot it again; if that happens often, ask for a longer lease_seconds."
            )
        return replace(self, deadline=max(self.deadline, now + self.seconds))


def grant(seconds: float, now: float) -> Lease:
    """Give a new lease.

    Parameters
    ----------
    seconds
        Its length.
    now
        Seconds of the monotonic clock.

    Returns
    -------
    Lease
        A lease that begins now.
    """
    return Lease(seconds=seconds, deadline=now + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What is remembered of a cluster that was deleted or whose lease ended."""

    cluster_id: str
    epoch: int
    buried_at: float  # wall clock: a tombstone must survive a boot
    owner_uid: int
    user: str
    name: str
    reason: str


def outdated_tombstones(tombstones: Iterable[Tombstone], wall_now: float) -> list[Tombstone]:
    """Find the tombstones that may go.

    Parameters
    ----------
    tombstones
        All that there are, the oldest first.
    wall_now
        Seconds since 1970.

    Returns
    -------
    list of Tombstone
        Those that are older than any late request can be, and the oldest of too many.
    """
    stones = list(tombstones)
    surplus = max(0, len(stones) - MAX_TOMBSTONES)
    return [
        stone
        for number, stone in enumerate(stones)
        if number < surplus or wall_now - stone.buried_at > TOMBSTONE_SECONDS
    ]


def check_epoch(epoch: int, *, current: int | None, tombstone: int | None) -> None:
    """Refuse what is older than what was wished last.

    Parameters
    ----------
    epoch
        The epoch of the new wish.
    current
        The epoch of the wish that holds now, if there is one.
    tombstone
        The epoch at which the cluster was ended, if it was.

    Raises
    ------
    ConflictError
        If the new wish is older than the one that holds, or not newer than the end.
    """
    if tombstone is not None and epoch <= tombstone:
        raise ConflictError(
            f"Epoch {epoch} is not newer than epoch {tombstone}, at which this cluster was deleted or its lease ended. "
            "A late request does not bring it back: boot a new cluster."
        )
    if current is not None and epoch < current:
        raise ConflictError(
            f"Epoch {epoch} is older than epoch {current}, which this site has already. "
            "Somebody else changes this cluster: read its state first, and go on from its epoch."
        )
