"""Which links are silent while a cluster boots, who is relayed, and who is to blame."""

from dataclasses import replace

import pytest
from meshplans import plan_of, shaken, status_of

from meshcompute.mesh.linking import bypass, new_relays, silent_pairs, to_blame, what_is_true, why_not_over
from meshcompute.mesh.plan import MeshPlanError, check_members, is_stage_over, spec_of


def pair(*sites):
    return frozenset(sites)


def test_a_link_is_silent_when_neither_side_has_seen_a_handshake():
    plan = plan_of(True, True, True)
    statuses = {
        0: status_of(0, peers=shaken(s1=1.0, s2=None)),
        1: status_of(1, peers=shaken(s0=None, s2=None)),
        2: status_of(2, peers=shaken(s0=None, s1=None)),
    }
    assert silent_pairs(plan, statuses) == {pair(0, 2), pair(1, 2)}
    assert silent_pairs(plan, {}) == set()


def test_two_that_do_not_hear_each_other_are_relayed_by_a_third_that_both_hear():
    plan = plan_of(True, True, True)
    relayed = bypass(plan, {pair(1, 2)})
    assert relayed.broken == {pair(1, 2)}
    said = (
        "mesh@10.8.0.1 (pool1) and mesh@10.8.0.2 (pool2) do not hear each other: relayed through mesh@10.8.0.0 (pool0)"
    )
    assert new_relays(plan, relayed) == [said]
    check_members(relayed)
    via = {peer.site: peer.via for peer in spec_of(relayed, 1, "run", epoch=4).peers}
    assert via == {0: None, 2: 0}
    heard = status_of(1, peers=shaken(s0=1.0, s2=None))
    assert not is_stage_over(plan, 1, "run", heard, epoch=1)
    assert is_stage_over(relayed, 1, "run", heard, epoch=1)


def test_a_site_that_nobody_hears_is_not_relayed_and_gets_the_blame():
    plan = plan_of(True, True, True)
    silent = {pair(0, 1), pair(1, 2)}
    assert bypass(plan, silent) is plan
    assert to_blame(silent) == 1
    assert to_blame({pair(1, 2)}) == 2
    assert to_blame({pair(0, 1)}) == 1, "without the client's own host there is no cluster"


def test_of_many_silent_links_only_those_are_relayed_that_can_be():
    plan = plan_of(True, True, True, True)
    better = bypass(plan, {pair(1, 2), pair(0, 3), pair(1, 3), pair(2, 3)})
    assert better.broken == {pair(1, 2)}


def test_a_broken_link_without_a_relay_is_a_precise_error():
    broken = replace(plan_of(True, True, True), broken=frozenset({pair(1, 2)})).without({0})
    with pytest.raises(MeshPlanError, match=r"mesh@10\.8\.0\.1 .*mesh@10\.8\.0\.2 .* no packet passes between them"):
        check_members(broken)


def test_people_are_told_how_many_links_there_are_and_which_are_missing():
    plan = plan_of(True, True, True)
    up = {site: status_of(site, peers=shaken(**{f"s{o}": 1.0 for o in range(3) if o != site})) for site in range(3)}
    assert what_is_true(plan, "run", up) == "3 links have shaken hands"
    assert what_is_true(plan.without({2}), "run", up) == "1 link has shaken hands"
    waiting = status_of(1, peers=shaken(s0=1.0, s2=None))
    assert "no handshake with mesh@10.8.0.2 (pool2); check that the UDP ports" in why_not_over(plan, 1, "run", waiting)
