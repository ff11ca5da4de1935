"""The shape of a cluster's network: golden texts, and properties over random clusters."""

from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.errors import InvalidSpecError
from controlplane.network.peers import AddPeer, RemovePeer, SetEndpoint, applied, plan_peers
from controlplane.network.topology import (
    GatewayConfig,
    Link,
    Member,
    PeerConfig,
    UnreachablePairError,
    address_of,
    initiator_of,
    interface_of,
    network_of,
    parse_prefix,
    peers_of,
    plan_links,
    random_prefix,
    relayed,
    site_of,
)

PREFIX = IPv6Network("fda5:c0ff:eeee::/48")
KEYS = [letter * 43 + "=" for letter in "ABCDEFGH"]


def member(site, endpoint="192.0.2.{}:51820"):
    return Member(
        site=site,
        name=f"site{site}",
        public_key=KEYS[site],
        endpoint=endpoint.format(site) if endpoint is not None else None,
    )


def text(steps):
    return "\n".join(str(step) for step in steps)


def peer(site, key=None, endpoint=None, allowed=None, keepalive=None):
    return PeerConfig(
        site=site,
        public_key=KEYS[site] if key is None else key,
        endpoint=endpoint,
        allowed=tuple(network_of(PREFIX, number) for number in ([site] if allowed is None else allowed)),
        keepalive_seconds=keepalive,
    )


# ---------------------------------------------------------------------------------------------------------- addresses


def test_a_cluster_with_the_prefix_of_the_reference_has_its_addresses():
    assert address_of(PREFIX, 0, 1) == IPv6Address("fda5:c0ff:eeee:0::1")
    assert address_of(PREFIX, 1, 11) == IPv6Address("fda5:c0ff:eeee:1::11")
    assert address_of(PREFIX, 2, 11) == IPv6Address("fda5:c0ff:eeee:2::11")
    assert network_of(PREFIX, 2) == IPv6Network("fda5:c0ff:eeee:2::/64")


def test_the_number_of_a_node_is_read_as_it_is_written():
    assert str(address_of(PREFIX, 1, 20)) == "fda5:c0ff:eeee:1::20"
    assert len({address_of(PREFIX, 1, node) for node in range(1, 10_000)}) == 9999


def test_random_prefixes_are_unique_local_and_their_low_bits_are_random():
    prefixes = [random_prefix() for _ in range(200)]
    assert len(set(prefixes)) == 200
    assert all(prefix.prefixlen == 48 and prefix.subnet_of(IPv6Network("fd00::/8")) for prefix in prefixes)
    for bit in range(40):
        assert {int(prefix.network_address) >> 80 + bit & 1 for prefix in prefixes} == {0, 1}, bit


@pytest.mark.parametrize("written", ["fda5:c0ff:eeee", "fda5:c0ff:eeee::", "fda5:c0ff:eeee::/48", "FDA5:C0FF:EEEE"])
def test_a_prefix_can_be_written_short_or_whole(written):
    assert parse_prefix(written) == PREFIX


@pytest.mark.parametrize(
    "written", ["", "eeee", "2001:db8:1::/48", "fda5:c0ff:eeee::1", "fda5::/16", "fda5:c0ff:eeee:1", "fc00:1:2", "x::"]
)
def test_a_prefix_that_is_no_48_of_fd00_is_refused_with_an_example(written):
    with pytest.raises(InvalidSpecError, match=r"write it like 'fda5:c0ff:eeee'"):
        parse_prefix(written)


@pytest.mark.parametrize(("site", "node"), [(-1, 1), (65536, 1), (1, 0), (1, 10_000)])
def test_a_number_that_does_not_fit_into_an_address_is_refused(site, node):
    with pytest.raises(InvalidSpecError, match="does not fit into an address"):
        address_of(PREFIX, site, node)


@given(st.integers(0, 65535), st.integers(1, 9999))
def test_the_site_of_every_address_is_found(site, node):
    assert site_of(PREFIX, address_of(PREFIX, site, node)) == site
    assert site_of(PREFIX, network_of(PREFIX, site)) == site
    assert site_of(IPv6Network("fda5:c0ff:eeef::/48"), address_of(PREFIX, site, node)) is None


def test_the_whole_prefix_belongs_to_no_site():
    assert site_of(PREFIX, PREFIX) is None


def test_the_name_of_an_interface_fits_into_fifteen_characters():
    assert interface_of("0a1b2c3d4e5f60718293a4b5c6d7e8f9") == "mc-0a1b2c3d"


def test_a_gateway_that_serves_a_scheduler_can_have_another_address_than_the_scheduler():
    config = GatewayConfig(cluster_id="c", prefix=PREFIX, site=0, node=2)
    assert config.address == IPv6Address("fda5:c0ff:eeee::2")


# ------------------------------------------------------------------------------------------------------ who calls whom


def test_the_larger_number_calls_where_both_can_be_called():
    assert initiator_of(member(1), member(2)) == 2
    assert initiator_of(member(2), member(1)) == 2


def test_who_cannot_be_called_calls():
    assert initiator_of(member(1, None), member(2)) == 1
    assert initiator_of(member(1), member(2, None)) == 2


def test_two_that_cannot_be_called_have_no_link():
    assert initiator_of(member(1, None), member(2, None)) is None
    assert plan_links([member(1, None), member(2, None)]) == {}


def test_the_peers_of_three_sites_that_reach_each_other():
    members = [member(2), member(0, None), member(1)]
    assert text(plan_peers([], peers_of(PREFIX, members, 0))) == (
        "add peer 1 (BBBBBBBB...), at 192.0.2.1:51820, for fda5:c0ff:eeee:1::/64, keepalive 25 s\n"
        "add peer 2 (CCCCCCCC...), at 192.0.2.2:51820, for fda5:c0ff:eeee:2::/64, keepalive 25 s"
    )
    assert text(plan_peers([], peers_of(PREFIX, members, 1))) == (
        "add peer 0 (AAAAAAAA...), which calls us, for fda5:c0ff:eeee::/64\n"
        "add peer 2 (CCCCCCCC...), which calls us, for fda5:c0ff:eeee:2::/64"
    )
    assert text(plan_peers([], peers_of(PREFIX, members, 2))) == (
        "add peer 0 (AAAAAAAA...), which calls us, for fda5:c0ff:eeee::/64\n"
        "add peer 1 (BBBBBBBB...), at 192.0.2.1:51820, for fda5:c0ff:eeee:1::/64, keepalive 25 s"
    )


def test_two_sites_behind_nat_are_relayed_through_one_that_both_reach():
    members = [member(0), member(1, None), member(2, None), member(3)]
    assert relayed(members) == {frozenset((1, 2)): 3}, "a site rather than the client's own host"
    assert text(plan_peers([], peers_of(PREFIX, members, 1))) == (
        "add peer 0 (AAAAAAAA...), at 192.0.2.0:51820, for fda5:c0ff:eeee::/64, keepalive 25 s\n"
        "add peer 3 (DDDDDDDD...), at 192.0.2.3:51820, for fda5:c0ff:eeee:3::/64, fda5:c0ff:eeee:2::/64, "
        "keepalive 25 s"
    )


def test_the_clients_host_relays_where_nobody_else_can():
    assert relayed([member(0), member(1, None), member(2, None)]) == {frozenset((1, 2)): 0}


def test_a_path_that_is_known_to_be_broken_is_relayed():
    broken = [frozenset((1, 2))]
    members = [member(1), member(2), member(3)]
    assert plan_links(members, broken=broken) == {
        frozenset((1, 3)): Link(initiator=3, responder=1),
        frozenset((2, 3)): Link(initiator=3, responder=2),
    }
    assert relayed(members, broken=broken) == {frozenset((1, 2)): 3}


def test_two_sites_that_nobody_can_join_are_named_with_what_to_do():
    with pytest.raises(UnreachablePairError) as caught:
        peers_of(PREFIX, [member(1, None), member(2, None)], 1)
    assert (caught.value.first, caught.value.second) == ("site1", "site2")
    assert str(caught.value) == (
        "Sites 'site1' and 'site2' cannot be joined: neither can be reached by the other, and no third site is reached "
        "by both. Open a UDP port at one of them and name it under network_options.endpoints in its site.toml, or add "
        "a site that both can reach."
    )


def test_a_peer_whose_key_is_not_known_yet_is_left_out():
    members = [member(1), Member(site=2, name="late", endpoint="192.0.2.2:1")]
    assert peers_of(PREFIX, members, 1) == ()


@given(st.lists(st.booleans(), min_size=2, max_size=8).filter(any))
def test_every_address_of_the_cluster_belongs_to_exactly_one_peer_of_every_site(reachable):
    members = [member(site, "192.0.2.{}:1" if is_reachable else None) for site, is_reachable in enumerate(reachable)]
    calls = set()
    for site in range(len(members)):
        peers = peers_of(PREFIX, members, site)
        allowed = [network for other in peers for network in other.allowed]
        assert sorted(allowed) == [network_of(PREFIX, other) for other in range(len(members)) if other != site]
        calls |= {(site, other.site) for other in peers if other.endpoint is not None}
    assert not {(called, caller) for caller, called in calls} & calls, "both sides of a pair call"
    assert {frozenset(call) for call in calls} == set(plan_links(members))


# ---------------------------------------------------------------------------------------------------------- peer steps


def test_a_second_plan_is_empty():
    peers = peers_of(PREFIX, [member(0), member(1), member(2)], 2)
    assert plan_peers(peers, peers) == ()


def test_a_peer_with_a_new_key_is_added_before_the_old_one_goes():
    steps = plan_peers([peer(1)], [peer(1, key=KEYS[5])])
    assert text(steps) == (
        "add peer 1 (FFFFFFFF...), which calls us, for fda5:c0ff:eeee:1::/64\nremove peer 1 (BBBBBBBB...)"
    )
    assert steps == (AddPeer(peer=peer(1, key=KEYS[5])), RemovePeer(peer=peer(1)))


def test_a_peer_that_moved_gets_its_new_endpoint_and_nothing_else():
    old, new = peer(1, endpoint="192.0.2.1:1", keepalive=25), peer(1, endpoint="192.0.2.9:1", keepalive=25)
    assert plan_peers([old], [new]) == (SetEndpoint(peer=new),)
    assert text(plan_peers([old], [new])) == "call peer 1 (BBBBBBBB...) at 192.0.2.9:1"


def test_an_endpoint_that_was_learnt_is_left_alone():
    assert plan_peers([peer(1, endpoint="198.51.100.7:40000")], [peer(1)]) == ()


def test_a_new_relay_takes_the_addresses_over_from_the_old_one():
    before = [peer(1, allowed=[1, 3]), peer(2)]
    after = [peer(1), peer(2, allowed=[2, 3])]
    assert text(plan_peers(before, after)) == (
        "let peer 2 (CCCCCCCC...) have fda5:c0ff:eeee:2::/64, fda5:c0ff:eeee:3::/64"
    )


def test_addresses_that_nobody_takes_over_are_taken_away():
    assert text(plan_peers([peer(1, allowed=[1, 3])], [peer(1)])) == (
        "let peer 1 (BBBBBBBB...) have fda5:c0ff:eeee:1::/64"
    )


def test_two_relays_that_change_places_never_leave_a_site_alone():
    before = [peer(1, allowed=[1, 3]), peer(2, allowed=[2, 4])]
    after = [peer(1, allowed=[1, 4]), peer(2, allowed=[2, 3])]
    assert text(plan_peers(before, after)) == (
        "let peer 1 (BBBBBBBB...) have fda5:c0ff:eeee:1::/64, fda5:c0ff:eeee:4::/64, fda5:c0ff:eeee:3::/64\n"
        "let peer 2 (CCCCCCCC...) have fda5:c0ff:eeee:2::/64, fda5:c0ff:eeee:3::/64"
    )


def test_a_keepalive_can_be_set_and_taken_away():
    assert text(plan_peers([peer(1)], [peer(1, keepalive=25)])) == (
        "keep the path to peer 1 (BBBBBBBB...) open every 25 s"
    )
    assert text(plan_peers([peer(1, keepalive=25)], [peer(1)])) == "let peer 1 (BBBBBBBB...) fall silent"


@st.composite
def _peer_sets(draw):
    """Peers with their own keys, and each site's addresses at one of them."""
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    owner_by_site = {site: draw(st.sampled_from(keys)) for site in range(4)} if keys else {}
    return [
        peer(
            number,
            key=key,
            endpoint=draw(st.sampled_from(["192.0.2.1:1", "192.0.2.2:2"])),
            allowed=[site for site, owner in owner_by_site.items() if owner == key],
            keepalive=draw(st.sampled_from([None, 25])),
        )
        for number, key in enumerate(keys)
    ]


@given(_peer_sets(), _peer_sets())
def test_the_steps_lead_from_any_peers_to_any_others_and_no_address_is_without_a_peer_meanwhile(before, after):
    steps = plan_peers(before, after)
    numbers = {other.public_key: other.site for other in after}

    def essence(peers):
        return {
            (key := p.public_key): (numbers.get(key), p.endpoint, set(p.allowed), p.keepalive_seconds) for p in peers
        }

    reached = applied(before, steps)
    assert {p.public_key: set(p.allowed) for p in reached} == {p.public_key: set(p.allowed) for p in after}
    assert essence(reached) == essence(after)
    assert not plan_peers(reached, after)
    owned = {net for p in before for net in p.allowed} & {net for p in after for net in p.allowed}
    for count in range(len(steps) + 1):
        assert owned <= {net for p in applied(before, steps[:count]) for net in p.allowed}, text(steps[:count])


def test_steps_say_nothing_secret_and_stay_short():
    for step in plan_peers([], peers_of(PREFIX, [member(0), member(1), member(2)], 1)):
        assert KEYS[0] not in str(step)
        assert len(str(step)) < 160
