"""What wg reads and writes: golden texts of a real wg (1.0.20210914), and secrets that do not show."""

import asyncio
import pickle
from ipaddress import IPv6Address, IPv6Network

import pytest

from controlplane.errors import ApplyError
from controlplane.network.peers import AddPeer, RemovePeer, SetAllowed, SetEndpoint, SetKeepalive
from controlplane.network.topology import PeerConfig, network_of
from controlplane.network.wgformat import (
    PrivateKey,
    configured_peers,
    parse_dump,
    peer_states,
    render_steps,
    worker_keys,
)
from controlplane.network.wireguard import resolve

PREFIX = IPv6Network("fda5:c0ff:eeee::/48")
PRIVATE, OWN, CALLED, CALLER, WORKER = (letter * 43 + "=" for letter in "PABCD")
DUMP = "\n".join(
    [
        f"{PRIVATE}\t{OWN}\t51820\toff",
        f"{CALLED}\t(none)\t192.0.2.2:51820\tfda5:c0ff:eeee:2::/64,fda5:c0ff:eeee:3::/64\t1700000000\t1480\t1520\t25",
        f"{CALLER}\t(none)\t(none)\tfda5:c0ff:eeee::/64\t0\t0\t148\toff",
        f"{WORKER}\t(none)\t127.0.0.1:40000\tfda5:c0ff:eeee:1::11/128\t1700000000\t10\t20\toff",
        "",
    ]
)


def peer(endpoint=None, keepalive=None, sites=(2,)):
    networks = tuple(network_of(PREFIX, site) for site in sites)
    return PeerConfig(site=2, public_key=CALLED, endpoint=endpoint, allowed=networks, keepalive_seconds=keepalive)


def test_the_dump_of_an_interface_is_read():
    dump = parse_dump(DUMP)
    assert (dump.public_key, dump.listen_port, len(dump.peers)) == (OWN, 51820, 3)
    assert dump.private_key.reveal() == PRIVATE
    called, caller, worker = dump.peers
    assert called.allowed == (network_of(PREFIX, 2), network_of(PREFIX, 3))
    assert (called.endpoint, called.keepalive_seconds) == ("192.0.2.2:51820", 25)
    assert (caller.endpoint, caller.keepalive_seconds, caller.handshake_unix_seconds) == (None, None, 0)
    assert worker.allowed == (IPv6Network("fda5:c0ff:eeee:1::11/128"),)


def test_an_interface_without_key_and_peers_is_read():
    dump = parse_dump("(none)\t(none)\t0\toff\n")
    assert (dump.private_key, dump.public_key, dump.peers) == (None, None, ())


def test_a_private_key_shows_itself_to_nobody():
    dump = parse_dump(DUMP)
    for shown in (repr(dump), str(dump), repr(dump.private_key), str(dump.private_key), f"{dump.private_key}"):
        assert PRIVATE not in shown
    with pytest.raises(TypeError, match="stays in the process"):
        pickle.dumps(PrivateKey(PRIVATE))


def test_workers_are_no_peers_of_a_site():
    dump = parse_dump(DUMP)
    assert [found.public_key for found in configured_peers(dump, PREFIX, {})] == [CALLED, CALLER]
    assert [found.public_key for found in peer_states(dump, {}, 1700000010.0)] == [CALLER, CALLED]
    assert worker_keys(dump, IPv6Address("fda5:c0ff:eeee:1::11")) == [WORKER]
    assert worker_keys(dump, IPv6Address("fda5:c0ff:eeee:1::12")) == []


def test_what_is_known_of_a_peer_comes_with_its_site():
    states = peer_states(parse_dump(DUMP), {CALLED: 2}, 1700000010.5)
    assert [state.site for state in states] == [0, 2], "the site of one network is known without being told"
    assert [state.latest_handshake_age_seconds for state in states] == [None, 10.5]
    assert (states[1].received_nbytes, states[1].sent_nbytes) == (1480, 1520)
    assert [state.site for state in peer_states(parse_dump(DUMP), {}, 0.0)] == [0, None], "two networks could be either"


def test_where_a_peer_roamed_to_counts_as_where_it_was_put():
    found = configured_peers(parse_dump(DUMP), PREFIX, {CALLED: "198.51.100.1:9"})
    assert [one.endpoint for one in found] == ["198.51.100.1:9", None]
    assert [one.site for one in found] == [2, 0]


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        (
            AddPeer(peer=peer("192.0.2.2:51820", 25, (2, 3))),
            "endpoint 192.0.2.2:51820 allowed-ips fda5:c0ff:eeee:2::/64,fda5:c0ff:eeee:3::/64 persistent-keepalive 25",
        ),
        (AddPeer(peer=peer()), "allowed-ips fda5:c0ff:eeee:2::/64 persistent-keepalive 0"),
        (RemovePeer(peer=peer()), "remove"),
        (SetEndpoint(peer=peer("[2001:db8::2]:1", 25)), "endpoint [2001:db8::2]:1"),
        (SetAllowed(peer=peer("192.0.2.2:1", 25)), "allowed-ips fda5:c0ff:eeee:2::/64"),
        (SetKeepalive(peer=peer("192.0.2.2:1", 25)), "persistent-keepalive 25"),
        (SetKeepalive(peer=peer()), "persistent-keepalive 0"),
    ],
)
def test_a_step_is_written_as_arguments_of_wg_set(step, arguments):
    assert " ".join(render_steps([step])) == f"peer {CALLED} {arguments}"


def test_steps_are_written_in_their_order():
    assert render_steps([AddPeer(peer=peer()), RemovePeer(peer=peer())])[-3:] == ["peer", CALLED, "remove"]
    assert render_steps([]) == []


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("192.0.2.1:51820", "192.0.2.1:51820"),
        ("[2001:db8::1]:51820", "[2001:db8::1]:51820"),
        ("localhost:1", "127.0.0.1:1"),
    ],
)
def test_an_endpoint_becomes_a_number(written, number):
    assert asyncio.run(resolve(written)) == number


def test_an_endpoint_that_is_not_known_is_named():
    with pytest.raises(ApplyError, match=r"The host of 'a\.\.b:1' is not known here"):
        asyncio.run(resolve("a..b:1"))
