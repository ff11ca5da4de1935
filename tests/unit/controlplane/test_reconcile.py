"""From what should be and what is to the next steps."""

from dataclasses import replace

import pytest
from controlbench import ID, KEYS, mesh_config, record, scheduler_spec, spec

from controlplane.desired import desired_cluster, fingerprint_of
from controlplane.network.topology import GatewayState, PeerState
from controlplane.reconcile import Memory, Observed, is_over, plan_cluster, plan_sweep, stages
from controlplane.workers.base import WorkerState
from meshcompute.protocol import WorkerRequest

NOW = 1000.0
U0, U1 = "mc-01234567-ecmwf-1-u0", "mc-01234567-ecmwf-1-u1"


def desired(**fields):
    return desired_cluster(record(wanted=spec(**fields)), mesh_config(), NOW)


def gateway(key=KEYS[5], peers=(KEYS[0],)):
    found = tuple(
        PeerState(
            site=0,
            public_key=peer,
            endpoint=None,
            latest_handshake_age_seconds=None,
            received_nbytes=0,
            sent_nbytes=0,
        )
        for peer in peers
    )
    return GatewayState(cluster_id=ID, namespace="/proc/1/ns/net", public_key=key, listen_port=51820, peers=found)


def unit(name, state="running", cluster_id=ID, has_run=False):
    return WorkerState(
        cluster_id=cluster_id, name=name, state=state, pid=7, netns=f"/proc/{name}/ns/net", has_run=has_run
    )


def settled(wanted):
    """What there is, and what is remembered, when all is as it should be."""
    units = {each.name: unit(each.name) for each in wanted.units}
    memory = Memory(
        gateway=wanted.gateway,
        gateway_deadline=wanted.deadline,
        public_key=KEYS[5],
        link_by_unit={each.name: (units[each.name].netns, each.address) for each in wanted.units},
        deadline_by_unit={each.name: wanted.deadline for each in wanted.units},
        fingerprint_by_unit={each.name: fingerprint_of(each) for each in wanted.units},
    )
    return Observed(gateway=gateway(), units=units), memory


def plan(wanted, observed, memory=None, now=NOW):
    return [str(step) for step in plan_cluster(ID, wanted, observed, memory or Memory(), now)]


def test_from_nothing_the_gateway_comes_first_and_then_the_units():
    assert plan(desired(), Observed(gateway=None, units={})) == [
        "ensure gateway of 01234567 with 1 peers",
        f"start {U0}",
        f"start {U1}",
    ]


def test_when_all_is_as_it_should_be_there_is_nothing_to_do():
    wanted = desired()
    assert plan(wanted, *settled(wanted)) == []


def test_units_that_wait_for_their_address_get_it():
    wanted = desired()
    observed, memory = settled(wanted)
    memory = replace(memory, link_by_unit={})
    assert plan(wanted, observed, memory) == [
        f"attach {U0} as fda5:c0ff:eeee:1::11",
        f"attach {U1} as fda5:c0ff:eeee:1::12",
    ]


def test_after_a_restart_of_the_daemon_nothing_that_runs_is_stopped_or_started():
    wanted = desired()
    observed, memory = settled(wanted)
    steps = plan(wanted, observed, Memory(fingerprint_by_unit=memory.fingerprint_by_unit))
    assert not [step for step in steps if step.startswith(("start", "stop", "remove"))]
    assert plan(wanted, observed, Memory()) == steps  # also when the store was lost


def test_a_unit_that_has_exited_is_started_again_and_attached_in_its_new_namespace():
    wanted = desired()
    observed, memory = settled(wanted)
    gone = replace(observed, units={**observed.units, U0: unit(U0, "exited")})
    assert plan(wanted, gone, memory) == [f"start {U0}"]
    back = replace(observed, units={**observed.units, U0: replace(unit(U0), netns="/proc/new/ns/net")})
    assert plan(wanted, back, memory) == [f"attach {U0} as fda5:c0ff:eeee:1::11"]


def test_a_unit_that_exits_again_and_again_is_started_less_and_less_often():
    wanted = desired()
    observed, memory = settled(wanted)
    gone = replace(observed, units={**observed.units, U0: unit(U0, "exited")})
    memory = replace(memory, starts_by_unit={U0: (3, NOW)})  # the third start was now: 2 s
    assert plan(wanted, gone, memory, NOW + 1.9) == []
    assert plan(wanted, gone, memory, NOW + 2.0) == [f"start {U0}"]


def test_a_changed_wish_replaces_only_the_units_that_it_changes():
    wanted = desired(workers=WorkerRequest(containers=2, processes_per_container=2, threads_per_process=3))
    observed, memory = settled(desired())
    assert plan(wanted, observed, memory) == [
        f"stop {U0}",
        f"stop {U1}",
        "detach fda5:c0ff:eeee:1::11",
        "detach fda5:c0ff:eeee:1::12",
        f"start {U0}",
        f"start {U1}",
    ]
    fewer = desired(workers=WorkerRequest(containers=1, processes_per_container=2))
    assert plan(fewer, observed, memory) == [f"stop {U1}", "detach fda5:c0ff:eeee:1::12"]


def test_a_renewed_lease_renews_each_deadline_before_anything_else():
    wanted = desired()
    observed, memory = settled(wanted)
    later = replace(wanted, deadline=wanted.deadline + 20.0)
    assert plan(later, observed, memory) == [f"renew {U0}", f"renew {U1}", "renew gateway of 01234567"]
    missing = replace(observed, units={U0: observed.units[U0]})
    assert plan(later, missing, memory) == [f"renew {U0}", "renew gateway of 01234567", f"start {U1}"]


@pytest.mark.parametrize(
    "state",
    [None, gateway(key=KEYS[6]), gateway(key=None, peers=()), gateway(peers=())],
    ids=["it is gone", "it has another key", "its interface died", "it has lost its peers"],
)
def test_a_gateway_that_is_not_what_it_was_is_made_so_again(state):
    wanted = desired()
    observed, memory = settled(wanted)
    assert plan(wanted, replace(observed, gateway=state), memory) == ["ensure gateway of 01234567 with 1 peers"]


def test_an_engine_that_does_not_answer_is_not_an_engine_without_units():
    wanted = desired()
    _, memory = settled(wanted)
    assert plan(wanted, Observed(gateway=gateway(), units=None), memory) == []
    assert plan(wanted, Observed(gateway=None, units=None)) == ["ensure gateway of 01234567 with 1 peers"]


def test_removal_takes_units_first_then_the_gateway_and_then_forgets():
    observed, memory = settled(desired())
    assert plan(None, observed, memory) == [
        f"stop {U0}",
        f"stop {U1}",
        "detach fda5:c0ff:eeee:1::11",
        "detach fda5:c0ff:eeee:1::12",
        "remove gateway of 01234567",
    ]
    assert plan(None, Observed(gateway=None, units={})) == ["forget 01234567"]


def test_a_cluster_is_not_forgotten_while_the_engine_does_not_answer():
    assert plan(None, Observed(gateway=gateway(), units=None)) == ["remove gateway of 01234567"]
    assert plan(None, Observed(gateway=None, units=None)) == []


def test_only_what_belongs_to_no_cluster_is_swept_and_nothing_if_nobody_knows():
    units = {"a": unit("a"), "b": unit("b", cluster_id="f" * 32)}
    assert [step.name for step in plan_sweep([ID], units)] == ["b"]
    assert plan_sweep([], None) == ()


def test_neighbours_of_one_kind_are_done_at_the_same_time():
    steps = plan_cluster(ID, desired(), Observed(gateway=None, units={}), Memory(), NOW)
    assert [len(stage) for stage in stages(steps)] == [1, 2]


def test_a_scheduler_that_has_run_is_not_started_again_because_what_it_knew_is_lost():
    wanted = desired_cluster(record(wanted=scheduler_spec()), mesh_config(), NOW)
    (scheduler,) = wanted.units
    observed, memory = settled(wanted)
    observed = replace(observed, gateway=gateway(peers=()))
    ended = replace(observed, units={scheduler.name: unit(scheduler.name, "exited", has_run=True)})
    assert is_over(scheduler, ended.units)
    assert plan(wanted, ended, memory) == []
    half_made = replace(observed, units={scheduler.name: unit(scheduler.name, "exited")})
    assert plan(wanted, half_made, memory) == [f"start {scheduler.name}"]


def test_a_worker_unit_that_has_run_is_started_again():
    wanted = desired()
    observed, memory = settled(wanted)
    ended = replace(observed, units={**observed.units, U1: unit(U1, "exited", has_run=True)})
    assert plan(wanted, ended, memory) == [f"start {U1}"]


def test_while_the_engine_is_silent_what_was_started_is_renewed_and_nothing_else_is_done():
    wanted = desired()
    observed, memory = settled(wanted)
    silent = replace(observed, units=None)
    memory = replace(memory, deadline_by_unit={}, fingerprint_by_unit={U0: "x"})
    assert plan(wanted, silent, memory) == [f"renew {U0}"]
