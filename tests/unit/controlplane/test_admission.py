"""Who may have what."""

from dataclasses import replace

import pytest
from controlbench import ID, KEYS, OTHER_ID, caller, config, mesh_config, record, scheduler_spec, spec

from controlplane.admission import check_spec, choose_port, find_record, visible_records
from controlplane.errors import ConflictError, ForbiddenError, InvalidSpecError, NotFoundError, QuotaError
from controlplane.leases import Tombstone
from meshcompute.protocol import Peer, SchedulerRequest, WorkerRequest

STONE = Tombstone(cluster_id=ID, epoch=3, buried_at=0.0, owner_uid=1000, user="u", name="n", reason="r")


def check(wanted, who=None, *, site=None, records=(), tombstone=None, cluster_id=ID):
    check_spec(cluster_id, wanted, who or caller(), config=site or mesh_config(), records=records, tombstone=tombstone)


def test_what_is_within_the_limits_may_be():
    check(spec())
    check(scheduler_spec())
    check(spec(epoch=2), records=[record()])
    check(spec(epoch=1), records=[record()])  # the same again
    check(spec(epoch=4), tombstone=STONE)


def test_whom_the_operator_does_not_name_may_nothing():
    with pytest.raises(ForbiddenError, match=r"user1000 may not use site ecmwf.*access\.users"):
        check(spec(), caller(is_allowed=False))


@pytest.mark.parametrize(
    ("wanted", "limits", "message"),
    [
        (spec(), {"workers": 3}, "4 worker processes are more than the 3"),
        (spec(workers=WorkerRequest(threads_per_process=9)), {}, r"9 threads.*limits\.threads_per_worker"),
        (spec(workers=WorkerRequest(memory_bytes_per_process=2**40)), {}, r"limits\.memory_per_worker"),
        (spec(lease_seconds=700.0), {"lease_seconds": 600}, "A lease of 700 s is longer than 600 s"),
        (spec(), {"clusters": 0}, r"has 0 of the 0 clusters.*limits\.clusters"),
        (spec(), {"clusters_total": 0}, r"limits\.clusters_total"),
    ],
)
def test_more_than_the_operator_allows_is_refused_with_the_key_that_says_so(wanted, limits, message):
    with pytest.raises(QuotaError, match=message):
        check(wanted, site=mesh_config(limits=limits))


def test_the_sites_own_default_counts_where_nothing_is_asked_for():
    site = mesh_config(limits={"workers": 7}, workers={"processes_per_container": 4})
    check(spec(workers=WorkerRequest(containers=1)), site=site)
    with pytest.raises(QuotaError, match="8 worker processes"):
        check(spec(workers=WorkerRequest(containers=2)), site=site)


def test_clusters_are_counted_per_user_without_this_one_and_those_that_end():
    site = mesh_config(limits={"clusters": 1})
    other = record(OTHER_ID, wanted=spec(prefix="fd00:1::/48"))
    with pytest.raises(QuotaError, match="has 1 of the 1 clusters"):
        check(spec(), site=site, records=[other])
    check(spec(), caller(1001), site=site, records=[other])
    check(spec(), site=site, records=[replace(other, is_ended=True)])
    check(spec(epoch=2), site=site, records=[record()])


def test_a_late_wish_does_not_bring_a_cluster_back():
    with pytest.raises(ConflictError, match="not newer than epoch 3"):
        check(spec(epoch=3), tombstone=STONE)


def test_the_same_epoch_cannot_say_two_things():
    with pytest.raises(ConflictError, match="with epoch 2"):
        check(spec(peers=(Peer(site=0, name="client", public_key=KEYS[1]),)), records=[record()])


def test_what_makes_a_cluster_what_it_is_cannot_change():
    for change in ({"prefix": "fd00:1::/48"}, {"site": 2}, {"role": "scheduler", "workers": None}):
        with pytest.raises(InvalidSpecError, match="cannot change"):
            check(spec(epoch=2, **change), records=[record()])


def test_clusters_do_not_touch_each_other():
    with pytest.raises(ConflictError, match="prefix fda5:c0ff:eeee::/48 is in use"):
        check(spec(), records=[record(OTHER_ID)])
    with pytest.raises(ConflictError, match="begins like"):
        check(spec(prefix="fd00:1::/48"), records=[record(ID[:8] + "f" * 24)])
    with pytest.raises(ConflictError, match=r"The id .* is taken"):
        check(spec(epoch=2), caller(1001), records=[record(uid=1000)])
    with pytest.raises(ConflictError, match="Port 8786 of this host"):
        check(scheduler_spec(prefix="fd00:1::/48"), records=[record(OTHER_ID, wanted=scheduler_spec())])


def test_a_site_is_asked_only_for_what_it_is():
    with pytest.raises(InvalidSpecError, match=r"role 'site' and cannot be asked for 'scheduler'"):
        check(scheduler_spec(), site=mesh_config(role="site"))
    with pytest.raises(InvalidSpecError, match=r"does not run the image 'evil:1'; it has meshcompute-worker:latest"):
        check(spec(workers=WorkerRequest(image="evil:1")))
    with pytest.raises(InvalidSpecError, match="has no WireGuard"):
        check(spec(workers=WorkerRequest(link="wireguard")), site=config())
    with pytest.raises(InvalidSpecError, match="cannot be both"):
        check(scheduler_spec(scheduler=SchedulerRequest(client_port=8787)))


def test_a_caller_sees_its_own_clusters_and_an_operator_all():
    mine, theirs = record(uid=1000), record(OTHER_ID, uid=1001)
    assert visible_records(caller(1000), [mine, theirs]) == [mine]
    assert visible_records(caller(5, is_operator=True), [theirs, mine]) == [mine, theirs]
    with pytest.raises(NotFoundError, match=f"no cluster {OTHER_ID} of user user1000"):
        find_record(caller(1000), theirs, OTHER_ID, "ecmwf")


def test_the_lowest_free_port_is_taken_until_there_is_none():
    assert choose_port((5000, 5003), {5000, 5001}.__contains__, "ecmwf") == 5002
    with pytest.raises(QuotaError, match=r"All UDP ports from 5000 to 5001.*udp_ports"):
        choose_port((5000, 5001), {5000, 5001}.__contains__, "ecmwf")
