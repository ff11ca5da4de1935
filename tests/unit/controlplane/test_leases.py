"""Leases and epochs, with the time as a number."""

import pytest

from controlplane.errors import ConflictError
from controlplane.leases import MAX_TOMBSTONES, TOMBSTONE_SECONDS, Tombstone, check_epoch, grant, outdated_tombstones


def test_a_lease_ends_at_its_deadline_and_not_before():
    lease = grant(120.0, now=1000.0)
    assert not lease.is_expired(1119.999)
    assert lease.is_expired(1120.0)
    assert lease.remaining_seconds(1100.0) == 20.0
    assert lease.remaining_seconds(5000.0) == 0.0


def test_a_renewal_counts_from_now():
    assert grant(120.0, now=1000.0).renewed(1100.0) == grant(120.0, now=1100.0)


def test_a_renewal_never_shortens_a_lease():
    lease = grant(120.0, now=1000.0)
    assert lease.renewed(990.0) == lease


def test_an_expired_lease_is_never_renewed():
    with pytest.raises(ConflictError, match=r"lease of 120 s ended 5 s ago.*Boot it again"):
        grant(120.0, now=1000.0).renewed(1125.0)


@pytest.mark.parametrize(
    ("epoch", "current", "tombstone", "is_refused"),
    [
        (1, None, None, False),
        (2, 2, None, False),  # the same request again
        (3, 2, None, False),
        (1, 2, None, True),
        (2, None, 2, True),  # the late PUT
        (1, None, 2, True),
        (3, None, 2, False),
    ],
)
def test_what_is_older_than_the_last_wish_is_refused(epoch, current, tombstone, is_refused):
    if is_refused:
        with pytest.raises(ConflictError, match=f"Epoch {epoch} is"):
            check_epoch(epoch, current=current, tombstone=tombstone)
    else:
        check_epoch(epoch, current=current, tombstone=tombstone)


def stone(number, buried_at=0.0):
    return Tombstone(
        cluster_id=f"{number:032x}", epoch=1, buried_at=buried_at, owner_uid=1, user="u", name="n", reason="r"
    )


def test_tombstones_older_than_a_week_may_go():
    stones = [stone(1), stone(2, buried_at=1.0)]
    assert outdated_tombstones(stones, TOMBSTONE_SECONDS) == []
    assert outdated_tombstones(stones, TOMBSTONE_SECONDS + 0.5) == stones[:1]


def test_of_too_many_tombstones_the_oldest_go():
    stones = [stone(number) for number in range(MAX_TOMBSTONES + 2)]
    assert outdated_tombstones(stones, 0.0) == stones[:2]
