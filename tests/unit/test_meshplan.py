"""What each site is told, and when: the plan of a boot, with integers and strings alone."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshplans import KEYS, SCHEDULER, plan_of, shaken, status_of

from meshcompute.mesh.plan import (
    STAGES,
    MeshPlanError,
    check_members,
    check_wishes,
    endpoint_of,
    is_stage_over,
    learn,
    links_up,
    parse_prefix,
    prefix_of,
    spec_of,
    why_failed,
)
from meshcompute.protocol import Condition, SchedulerStatus


@pytest.mark.parametrize("text", ["fda5:c0ff:eeee", "fda5:c0ff:eeee::", "fda5:c0ff:eeee::/48", " fda5:c0ff:eeee\n"])
def test_the_prefix_of_the_reference_is_read_however_it_is_written(text):
    assert parse_prefix(text) == "fda5:c0ff:eeee::/48"


@pytest.mark.parametrize("text", ["", "2001:db8:1", "fda5:c0ff:eeee::/64", "fda5:c0ff:eeee:1::/48", "10.8.0.0/24", "x"])
def test_what_is_no_prefix_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(MeshPlanError, match="write it like fda5:c0ff:eeee") as excinfo:
        parse_prefix(text)
    assert repr(text) in str(excinfo.value)


@given(st.integers(0, 2**40 - 1))
def test_every_random_prefix_is_one_of_rfc_4193(bits):
    assert parse_prefix(prefix_of(bits)) == prefix_of(bits)


@given(st.lists(st.booleans(), min_size=2, max_size=6))
def test_one_side_of_every_pair_calls_and_it_can_reach_the_other(reachable):
    plan = plan_of(*reachable)
    try:
        check_members(plan)
    except MeshPlanError:
        return
    specs = [spec_of(plan, site, "run", epoch=3, scheduler_address=SCHEDULER) for site in range(len(reachable))]
    for first, second in itertools.combinations(range(len(reachable)), 2):
        here = next(peer for peer in specs[first].peers if peer.site == second)
        there = next(peer for peer in specs[second].peers if peer.site == first)
        if here.via is not None or there.via is not None:
            assert here.via == there.via
            assert not here.initiates
            assert not there.initiates
            continue
        assert here.initiates != there.initiates
        assert (here if here.initiates else there).endpoint is not None


def test_the_larger_number_calls_unless_only_the_other_cannot_be_called():
    calls = {peer.site: peer.initiates for peer in spec_of(plan_of(True, True, True), 1, "run", epoch=3).peers}
    assert calls == {0: True, 2: False}
    calls = {peer.site: peer.initiates for peer in spec_of(plan_of(False, True, True), 1, "run", epoch=3).peers}
    assert calls == {0: False, 2: False}


def test_a_pair_without_a_link_is_relayed_by_a_site_and_by_the_client_only_if_there_is_none():
    specs = {site: spec_of(plan_of(True, False, False, True), site, "run", epoch=3) for site in range(4)}
    assert {peer.site: peer.via for peer in specs[1].peers} == {0: None, 2: 3, 3: None}
    assert {peer.site: peer.via for peer in specs[2].peers} == {0: None, 1: 3, 3: None}
    assert {peer.site: peer.via for peer in specs[3].peers} == {0: None, 1: None, 2: None}
    assert {peer.site: peer.via for peer in spec_of(plan_of(True, False, False), 1, "run", epoch=3).peers}[2] == 0


def test_two_sites_that_nothing_joins_are_named_with_what_to_do():
    check_members(plan_of(False, False, True))  # both call the third, which relays
    with pytest.raises(MeshPlanError) as excinfo:
        check_members(plan_of(False, False))
    assert "mesh@10.8.0.0 (pool0) and mesh@10.8.0.1 (pool1) cannot be joined" in str(excinfo.value)
    assert "open a UDP port" in str(excinfo.value)


def test_a_site_that_is_named_twice_and_networks_that_differ_are_refused():
    plan = plan_of(True, True, True)
    twice = replace(plan, members=(*plan.members[:2], replace(plan.members[2], address=plan.members[1].address)))
    with pytest.raises(MeshPlanError, match=r"mesh@10\.8\.0\.1 is named twice"):
        check_members(twice)
    mixed = replace(plan, members=(*plan.members[:2], replace(plan.members[2], network="loopback")))
    with pytest.raises(MeshPlanError, match=r"networks differ .*mesh@10\.8\.0\.2 \(pool2\): loopback"):
        check_members(mixed)


def test_sites_with_the_same_pool_are_refused_and_the_clients_host_may_be_called_like_one():
    plan = plan_of(True, True, True)
    same = replace(plan, members=(*plan.members[:2], replace(plan.members[2], pool="pool1")))
    with pytest.raises(MeshPlanError, match=r"mesh@10\.8\.0\.1 and mesh@10\.8\.0\.2 have the same pool 'pool1'"):
        check_members(same)
    like_the_client = replace(plan.members[1], pool="pool0")
    check_members(replace(plan, members=(plan.members[0], like_the_client, plan.members[2])))
    itself = replace(like_the_client, hosts=plan.members[0].hosts)
    with pytest.raises(MeshPlanError, match="have the same pool 'pool0'"):
        check_members(replace(plan, members=(plan.members[0], itself, plan.members[2])))


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"name": "a b"}, "name cannot be 'a b': it should match pattern .*; ask for something else"),
        ({"lease_seconds": 4000.0}, r"lease_seconds cannot be 4000\.0: it should be less than or equal to 3600"),
        ({"mtu": 576}, "mtu cannot be 576: it should be greater than or equal to 1280"),
    ],
)
def test_what_no_site_could_do_is_told_in_one_sentence_before_any_is_asked(wish, sentence):
    plan = plan_of(True)
    check_wishes(plan)
    with pytest.raises(MeshPlanError, match=f"^{sentence}.*$"):
        check_wishes(replace(plan, **wish))


def test_nobody_calls_before_everybody_listens_and_workers_come_last():
    plan = plan_of(True, True, True)
    told = {stage: spec_of(plan, 1, stage, epoch=1, scheduler_address=SCHEDULER) for stage in STAGES}
    assert told["keys"].peers == ()
    assert [(peer.site, peer.initiates) for peer in told["listen"].peers] == [(0, False), (2, False)]
    assert [(peer.site, peer.initiates) for peer in told["run"].peers] == [(0, True), (2, False)]
    assert told["keys"].workers is told["listen"].workers is None
    assert told["run"].workers.scheduler_address == SCHEDULER
    assert [peer.public_key for peer in told["run"].peers] == [KEYS[0], KEYS[2]]
    assert [peer.endpoint for peer in told["run"].peers] == ["192.0.2.0:51820", "192.0.2.2:51822"]


def test_the_scheduler_starts_with_its_gateway_and_only_at_the_clients_host():
    plan = plan_of(True, True)
    for stage in STAGES:
        assert spec_of(plan, 0, stage, epoch=1).scheduler == plan.scheduler
        assert spec_of(plan, 0, stage, epoch=1).workers is None
        assert spec_of(plan, 1, stage, epoch=1, scheduler_address=SCHEDULER).scheduler is None
    assert [spec_of(plan, site, "run", epoch=1).role for site in (0, 1)] == ["scheduler", "site"]


def test_on_the_loopback_network_there_are_no_peers():
    plan = plan_of(False, False, False, network="loopback")
    check_members(plan)
    assert spec_of(plan, 1, "run", epoch=2, scheduler_address="tcp://127.0.0.1:8786").peers == ()


def test_the_endpoint_of_an_ipv6_host_goes_in_brackets():
    member = plan_of(True).members[0]
    assert endpoint_of(replace(member, hosts=("fd00::4",))) == "[fd00::4]:51820"
    assert endpoint_of(replace(member, port=None)) is None


def test_a_new_key_is_learnt_and_an_old_one_changes_nothing():
    plan = plan_of(True, True)
    assert learn(plan, {1: status_of(1)}) is plan
    assert learn(plan, {1: status_of(1, public_key=KEYS[5])}).members[1].public_key == KEYS[5]
    assert learn(plan, {1: status_of(1, public_key=None, endpoint_port=None)}) is plan


@pytest.mark.parametrize(
    ("stage", "site", "values", "is_over"),
    [
        ("keys", 1, {}, True),
        ("keys", 1, {"public_key": None}, False),
        ("keys", 1, {"endpoint_port": None}, False),
        ("keys", 1, {"epoch": 0}, False),
        ("keys", 0, {}, False),  # its scheduler's address is not known yet
        ("listen", 1, {}, False),
        ("listen", 1, {"peers": shaken(s0=None)}, False),
        ("listen", 1, {"peers": shaken(s0=None, s2=None)}, True),
        ("run", 1, {"peers": shaken(s0=1.0, s2=None)}, False),
        ("run", 1, {"peers": shaken(s0=1.0, s2=2.0), "phase": "pending"}, False),
        ("run", 1, {"peers": shaken(s0=1.0, s2=2.0)}, True),
    ],
)
def test_a_stage_is_over_when_the_site_has_done_its_part_of_it(stage, site, values, is_over):
    assert is_stage_over(plan_of(True, True, True), site, stage, status_of(site, **values), epoch=1) is is_over


def test_the_first_stage_is_over_at_the_clients_host_when_the_scheduler_has_an_address():
    scheduler = SchedulerStatus(address=SCHEDULER, client_address="tcp://127.0.0.1:8786", dashboard_address=None)
    assert is_stage_over(plan_of(True, True), 0, "keys", status_of(0, scheduler=scheduler), epoch=1)


def test_links_that_have_shaken_hands_are_told_from_those_that_have_not():
    plan = plan_of(True, True, True)
    assert links_up(plan, 1, status_of(1, peers=shaken(s0=3.0, s2=None))) == ([0], [2])


def test_a_failure_is_told_in_the_sites_words_without_what_is_only_not_there_yet():
    conditions = (
        Condition(kind="links", is_true=False, reason="NoHandshake", message="No handshake yet."),
        Condition(kind="workers", is_true=False, reason="Image", message="There is no image x; pull it."),
        Condition(kind="gateway", is_true=True, reason="Configured", message="Fine."),
    )
    assert why_failed(status_of(1, conditions=conditions)) == "There is no image x; pull it."
    assert why_failed(status_of(1, conditions=conditions[:1])) == "No handshake yet."
    assert "gives no reason" in why_failed(status_of(1, phase="failed"))


def test_sites_that_are_left_out_leave_the_others_their_numbers():
    plan = plan_of(True, True, True).without({1})
    assert [member.site for member in plan.members] == [0, 2]
    assert [peer.site for peer in spec_of(plan, 2, "run", epoch=1, scheduler_address=SCHEDULER).peers] == [0]
