"""What a client is told."""

from dataclasses import replace

from controlbench import ID, KEYS, config, mesh_config, record, scheduler_spec, spec

from controlplane.desired import desired_cluster
from controlplane.leases import Tombstone
from controlplane.network.topology import GatewayState, PeerState
from controlplane.reconcile import Observed, Problem, Report
from controlplane.status import gone_status, status_of
from controlplane.workers.base import WorkerState
from meshcompute.mesh.plan import why_failed

NOW = 1010.0


def report(wanted, *, age=5.0, state="running", **fields):
    """All is there."""
    peer = PeerState(
        site=None,
        public_key=KEYS[0],
        endpoint=None,
        latest_handshake_age_seconds=age,
        received_nbytes=10,
        sent_nbytes=20,
    )
    gateway = GatewayState(cluster_id=ID, namespace=None, public_key=KEYS[5], listen_port=51820, peers=(peer,))
    units = {
        unit.name: WorkerState(cluster_id=ID, name=unit.name, state=state)
        for unit in desired_cluster(wanted, mesh_config(), NOW).units
    }
    return Report(observed=Observed(gateway=gateway, units=units), **{"is_settled": True, **fields})


def tell(wanted=None, found=None, *, site=None, is_gone=False):
    return status_of(wanted or record(), site or mesh_config(), found, is_gone=is_gone, now=NOW)


def condition(status, kind):
    return next(condition for condition in status.conditions if condition.kind == kind)


def test_when_all_is_there_the_cluster_is_ready():
    status = tell(found=report(record()))
    assert status.phase == "ready"
    assert status.lease_remaining_seconds == 110.0
    assert (status.public_key, status.endpoint_port, status.address) == (KEYS[5], 51820, "fda5:c0ff:eeee:1::1")
    assert [worker.name for worker in status.workers] == [f"ecmwf-1-{n}" for n in range(4)]
    assert {worker.state for worker in status.workers} == {"running"}
    assert [(peer.site, peer.received_nbytes, peer.sent_nbytes) for peer in status.peers] == [(0, 10, 20)]
    assert all(found.is_true for found in status.conditions)


def test_a_cluster_that_nobody_has_looked_at_yet_is_pending():
    status = tell()
    assert status.phase == "pending"
    assert {worker.state for worker in status.workers} == {"unknown"}


def test_a_link_without_a_handshake_is_named_and_does_not_hinder_this_site():
    for age in (None, 500.0):
        status = tell(found=report(record(), age=age))
        assert status.phase == "ready"
        assert not condition(status, "links").is_true
        assert "client (0)" in condition(status, "links").message


def test_units_that_are_not_all_there_are_counted():
    found = report(record(), state="exited", is_settled=False)
    status = tell(
        found=replace(found, observed=replace(found.observed, units=dict([*found.observed.units.items()][:1])))
    )
    assert status.phase == "pending"
    assert condition(status, "workers").message == "1 of 2 units are missing, 1 are starting or have exited."
    assert [worker.state for worker in status.workers] == ["exited", "exited", "starting", "starting"]


def test_an_engine_that_does_not_answer_makes_workers_unknown_and_not_gone():
    found = report(record(), problems=(Problem(kind="engine", reason="RuntimeUnknown", message="no answer"),))
    status = tell(found=replace(found, is_settled=False, observed=replace(found.observed, units=None)))
    assert {worker.state for worker in status.workers} == {"unknown"}
    assert condition(status, "engine").message == "no answer"
    assert status.phase == "pending"


def test_what_no_retry_cures_is_a_failure_and_the_rest_is_tried_again():
    for reason, phase in (("Image", "failed"), ("PortTaken", "failed"), ("Apply", "pending")):
        problem = Problem(kind="workers", reason=reason, message="that is why")
        status = tell(found=report(record(), problems=(problem,), is_settled=False))
        assert (status.phase, condition(status, "workers").message) == (phase, "that is why")


def test_a_cluster_that_ends_says_why():
    ended = record(is_ended=True, end_reason="its lease ended")
    assert tell(ended, report(ended)).phase == "removing"
    status = tell(ended, report(ended), is_gone=True)
    assert (status.phase, status.workers, status.public_key, status.lease_remaining_seconds) == ("gone", (), None, 0.0)
    assert condition(status, "ended").message == "The cluster has ended: its lease ended."
    stone = Tombstone(cluster_id=ID, epoch=3, buried_at=0.0, owner_uid=1, user="u", name="n", reason="its lease ended")
    assert condition(gone_status(stone), "ended") == condition(status, "ended")


def test_the_schedulers_addresses_are_told():
    wanted = record(wanted=scheduler_spec())
    scheduler = tell(wanted, report(wanted)).scheduler
    assert scheduler.address == "tcp://[fda5:c0ff:eeee::1]:8786"
    assert scheduler.client_address == "tcp://127.0.0.1:8786"
    assert tell(record(wanted=spec(workers=None)), site=config()).scheduler is None


def test_a_scheduler_that_ended_fails_the_cluster_with_its_reason():
    wanted = record(wanted=scheduler_spec())
    seen = report(wanted)
    (name,) = seen.observed.units
    ended = WorkerState(cluster_id=ID, name=name, state="exited", has_run=True, message="it was killed")
    told = tell(wanted, replace(seen, observed=replace(seen.observed, units={name: ended})))
    assert told.phase == "failed"
    assert "The scheduler has ended (it was killed), and what it knew is lost." in why_failed(told)
