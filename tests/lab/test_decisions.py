"""What the WAN decides, without a lab: rate, queue, NAT, checksums. No root is needed."""

from __future__ import annotations

import socket
import struct
import tomllib
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.config import parse_config
from meshcompute.lab.files import render_site
from meshcompute.lab.nat import Nat
from meshcompute.lab.packets import ICMP, TCP, UDP, addresses_of, ports_of, rewrite_source, rewrite_target, unreachable
from meshcompute.lab.shaping import Direction, Shape
from meshcompute.lab.topology import Account, Lab

SITE, ROUTER, PEER, OTHER = (socket.inet_aton(a) for a in ("192.168.2.2", "10.8.0.2", "10.8.0.4", "10.8.0.3"))


def checksum(data: bytes) -> int:
    """The Internet checksum as RFC 1071 describes it."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(protocol: int, source: bytes, target: bytes, ports: tuple[int, int], payload: bytes = b"hello") -> bytes:
    """An IPv4 packet with right checksums; a ping has its number in place of ports."""
    pseudo = source + target + struct.pack("!BBH", 0, protocol, 0)
    if protocol == UDP:
        body, at = struct.pack("!4H", *ports, 8 + len(payload), 0) + payload, 6
    elif protocol == TCP:
        body, at = (struct.pack("!2H2I4H", *ports, 1, 2, 0x5010, 1000, 0, 0) + payload, 16)
    else:
        body, at, pseudo = struct.pack("!BBHHH", 8, 0, 0, ports[0], 1) + payload, 2, b""
    if pseudo:
        pseudo = pseudo[:-2] + len(body).to_bytes(2)
    body = body[:at] + checksum(pseudo + body).to_bytes(2) + body[at + 2 :]
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 7, 0, 64, protocol, 0, source, target)
    return header[:10] + checksum(header).to_bytes(2) + header[12:] + body


def is_right(data: bytes) -> bool:
    """Whether the checksums of a packet fit; RFC 1624 allows both zeros."""
    header, body = data[:20], data[20:]
    pseudo = b"" if data[9] == ICMP else data[12:20] + struct.pack("!BBH", 0, data[9], len(body))
    return checksum(header) == 0 and checksum(pseudo + body) == 0


ports = st.tuples(st.integers(1, 65535), st.integers(1, 65535))
addresses = st.binary(min_size=4, max_size=4)


@given(st.sampled_from([TCP, UDP, ICMP]), addresses, addresses, ports, st.binary(max_size=9), addresses, ports)
def test_checksums_fit_after_any_rewriting(
    protocol: int, source: bytes, target: bytes, old: tuple[int, int], payload: bytes, new: bytes, to: tuple[int, int]
) -> None:
    original = packet(protocol, source, target, old, payload)
    assert is_right(original)
    for changed, seen in (
        (rewrite_source(original, new, to[0]), (new, target)),
        (rewrite_target(original, new, to[0]), (source, new)),
    ):
        assert is_right(changed)
        assert addresses_of(changed) == seen
        assert len(changed) == len(original)


def test_a_udp_packet_without_a_checksum_stays_without() -> None:
    without = bytearray(packet(UDP, SITE, PEER, (5000, 6000)))
    without[26:28] = b"\0\0"
    assert rewrite_source(bytes(without), ROUTER, 30000)[26:28] == b"\0\0"


def nat() -> Nat:
    numbers = count(30000)
    return Nat(ROUTER, SITE, lambda _first, _last: next(numbers))


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_an_answer_comes_in_through_nat_and_a_stranger_does_not(protocol: int) -> None:
    router = nat()
    sent = router.send(packet(protocol, SITE, PEER, (5000, 6000)), now=0.0)
    assert sent is not None
    assert (addresses_of(sent), ports_of(sent)) == ((ROUTER, PEER), (protocol, 30000, 6000))
    answer = router.receive(packet(protocol, PEER, ROUTER, (6000, 30000)), now=1.0)
    assert answer is not None
    assert (addresses_of(answer), ports_of(answer)) == ((PEER, SITE), (protocol, 6000, 5000))
    assert router.receive(packet(protocol, OTHER, ROUTER, (6000, 30000)), now=1.0) is None  # another host
    assert router.receive(packet(protocol, PEER, ROUTER, (6001, 30000)), now=1.0) is None  # another port of it
    assert router.receive(packet(protocol, PEER, ROUTER, (6000, 5000)), now=1.0) is None  # the inner port


def test_a_port_keeps_its_outer_port_whoever_it_speaks_to() -> None:
    router = nat()
    sent = [router.send(packet(UDP, SITE, peer, (5000, 6000)), now=0.0) for peer in (PEER, OTHER)]
    assert [ports_of(one or b"") for one in sent] == [(UDP, 30000, 6000)] * 2


def test_a_mapping_ends_when_the_site_is_silent_and_only_its_own_packets_keep_it() -> None:
    router = nat()
    router.send(packet(UDP, SITE, PEER, (5000, 6000)), now=0.0)
    router.send(packet(UDP, SITE, PEER, (5000, 6000)), now=25.0)  # WireGuard's usual keepalive
    knock = packet(UDP, PEER, ROUTER, (6000, 30000))
    assert router.receive(knock, now=54.0) is not None
    assert router.receive(knock, now=56.0) is None
    again = router.send(packet(UDP, SITE, PEER, (5000, 6000)), now=60.0)
    assert again is not None
    assert ports_of(again) == (UDP, 30001, 6000)  # and now with another outer port
    assert router.receive(knock, now=60.0) is None


def test_the_forwarded_port_is_open_to_everybody_and_answers_from_itself() -> None:
    router = nat()
    knock = router.receive(packet(TCP, OTHER, ROUTER, (40000, 22)), now=0.0)
    assert knock is not None
    assert (addresses_of(knock), ports_of(knock)) == ((OTHER, SITE), (TCP, 40000, 22))
    answer = router.send(packet(TCP, SITE, OTHER, (22, 40000)), now=0.0)
    assert answer is not None
    assert (addresses_of(answer), ports_of(answer)) == ((ROUTER, OTHER), (TCP, 22, 40000))


def test_fragments_and_foreign_sources_do_not_pass_nat() -> None:
    fragment = bytearray(packet(UDP, SITE, PEER, (5000, 6000)))
    fragment[6] |= 0x20  # more fragments follow
    assert nat().send(bytes(fragment), now=0.0) is None
    assert nat().send(packet(UDP, OTHER, PEER, (5000, 6000)), now=0.0) is None


def test_a_line_is_busy_for_as_long_as_its_rate_says() -> None:
    line = Direction(shape=Shape(rate_bits_per_second=8e6, delay_seconds=0.02))  # 1 byte per microsecond
    arrivals = [line.admit(1000, now=5.0, draw=1.0) for _ in range(3)]
    assert arrivals == pytest.approx([5.021, 5.022, 5.023])
    assert line.admit(1000, now=6.0, draw=1.0) == pytest.approx(6.021)


@given(st.lists(st.tuples(st.integers(1, 1500), st.floats(0, 1), st.floats(0, 0.01)), max_size=300), st.floats(0, 1))
def test_every_packet_is_counted_once_as_delivered_or_dropped_or_on_its_way(
    packets: list[tuple[int, float, float]], loss: float
) -> None:
    line = Direction(shape=Shape(rate_bits_per_second=1e6, delay_seconds=0.01, loss=loss))
    now, on_their_way = 0.0, []
    for nbytes, draw, pause in packets:
        now += pause
        arrives_at = line.admit(nbytes, now, draw)
        if arrives_at is not None:
            assert arrives_at >= now + 0.01
            on_their_way.append(nbytes)
    for nbytes in on_their_way[::2]:
        line.deliver(nbytes)
    counted, left = line.counters, on_their_way[1::2]
    assert counted.sent_packets == len(packets) == counted.delivered_packets + counted.dropped_packets + len(left)
    assert counted.sent_nbytes == sum(p[0] for p in packets)
    assert counted.sent_nbytes == counted.delivered_nbytes + counted.dropped_nbytes + sum(left)


def test_the_queue_of_a_slow_line_is_bounded() -> None:
    line = Direction(shape=Shape(rate_bits_per_second=1e6))
    admitted = [line.admit(1500, now=0.0, draw=1.0) for _ in range(1000)]
    waiting = [arrival for arrival in admitted if arrival is not None]
    assert len(waiting) == int(line.shape.queue_nbytes // 1500)
    assert line.counters.dropped_packets == 1000 - len(waiting)


def test_what_is_on_its_way_when_a_link_is_cut_is_lost() -> None:
    line = Direction(shape=Shape(delay_seconds=1.0))
    assert line.admit(100, now=0.0, draw=1.0) == 1.0
    line.reshape(Shape(delay_seconds=1.0, is_cut=True), now=0.5)
    assert not line.deliver(100)
    assert (line.counters.dropped_packets, line.counters.delivered_packets) == (1, 0)


@pytest.mark.parametrize("wrong", [{"rate_bits_per_second": 0}, {"delay_seconds": -1}, {"loss": 1.5}])
def test_a_shape_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|is a share"):
        Shape(**wrong)


def test_the_router_s_answer_for_an_unknown_target_quotes_the_packet() -> None:
    original = packet(TCP, PEER, socket.inet_aton("10.8.0.77"), (5000, 80))
    answer = unreachable(original, socket.inet_aton("10.8.0.1"))
    assert answer is not None
    assert checksum(answer[:20]) == checksum(answer[20:]) == 0
    assert (answer[20], answer[21], answer[28:]) == (3, 1, original[:28])
    assert unreachable(answer, PEER) is None  # never an error about an error


def test_a_lab_survives_its_way_to_another_process() -> None:
    lab = Lab(name="x", accounts=(Account(name="mesh", uid=2000, gid=2000),), delay_seconds=0.01, shared="/a b")
    assert Lab.from_json(lab.to_json()) == lab


@pytest.mark.parametrize("engine", [True, False])
def test_every_host_s_site_file_is_one_that_a_daemon_accepts(engine: bool) -> None:
    lab = Lab(name="any", accounts=(Account(name="mesh", uid=2000, gid=2000),), engine=engine)
    for host in lab.hosts:
        config = parse_config(tomllib.loads(render_site(lab, host)))
        assert (config.pool, config.runtime) == (host.name, "docker" if engine else "process")
