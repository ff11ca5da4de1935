"""The WAN of a lab, as hosts meet it: rate, delay, loss, partition, NAT, counters, capture.

Does not cover the decisions in detail (``test_decisions``). Bounds in time are wide above, because other people's
load must not fail a test, and exact below: nothing is ever faster than the WAN allows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshcompute.lab.errors import LabError
from meshcompute.lab.running import RunningLab

UDP_HEADERS_NBYTES = 28  # IPv4 20 + UDP 8

ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 7007)); print("ready", flush=True)
while True:
    data, peer = s.recvfrom(65536); s.sendto(repr(peer).encode() if data == b"who" else data, peer)
"""
# ADDRESS PORT COUNT NBYTES TIMEOUT: sends so many datagrams one after the other; prints answers and the fastest time.
CALL = """
import socket, sys, time
address, port, count, nbytes, timeout = sys.argv[1], *map(float, sys.argv[2:])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(timeout); answers, fastest = 0, float("inf")
for i in range(int(count)):
    started = time.monotonic(); s.sendto(bytes(int(nbytes)), (address, int(port)))
    try:
        s.recv(65536); answers += 1; fastest = min(fastest, time.monotonic() - started)
    except TimeoutError: pass
print(answers, fastest)
"""
# Sends datagrams without waiting.
SHOUT = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 5005))
for i in range(int(sys.argv[3])): s.sendto(bytes(int(sys.argv[4])), (sys.argv[1], int(sys.argv[2])))
"""
SINK = """
import socket
s = socket.create_server(("0.0.0.0", 7008)); print("ready", flush=True)
while True:
    c, _ = s.accept(); n = 0
    while data := c.recv(1 << 16): n += len(data)
    c.sendall(str(n).encode()); c.close()
"""
POUR = """
import socket, sys, time
c = socket.create_connection((sys.argv[1], 7008)); started = time.monotonic()
c.sendall(bytes(int(sys.argv[2]))); c.shutdown(socket.SHUT_WR); c.recv(100); print(time.monotonic() - started)
"""


@contextmanager
def serving(lab: RunningLab, host: str, script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server on a host."""
    server = lab.popen(host, sys.executable, "-c", script, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield server
    finally:
        server.kill()
        server.communicate()


def call(
    lab: RunningLab, host: str, address: str, count: int, nbytes: int = 10, timeout: float = 10
) -> tuple[int, float]:
    """Send datagrams and wait for the answer of each."""
    done = lab.run(host, sys.executable, "-c", CALL, address, "7007", str(count), str(nbytes), str(timeout))
    answers, fastest = done.stdout.split()
    return int(answers), float(fastest)


def test_packets_and_bytes_are_counted_exactly_per_ordered_pair(lab: RunningLab) -> None:
    with serving(lab, "ecmwf", ECHO):
        before = lab.links()
        assert call(lab, "client", "10.8.0.4", 50, nbytes=972)[0] == 50
        after = lab.links()
    for pair in after:
        packets = after[pair].counters.sent_packets - before[pair].counters.sent_packets
        nbytes = after[pair].counters.sent_nbytes - before[pair].counters.sent_nbytes
        delivered = after[pair].counters.delivered_nbytes - before[pair].counters.delivered_nbytes
        is_used = set(pair) == {"client", "ecmwf"}
        assert (packets, nbytes) == ((50, 50 * (972 + UDP_HEADERS_NBYTES)) if is_used else (0, 0)), pair
        assert delivered == nbytes
        udp_nbytes = after[pair].counters.sent_udp_nbytes - before[pair].counters.sent_udp_nbytes
        assert udp_nbytes == nbytes


def test_what_is_no_datagram_is_counted_apart(lab: RunningLab) -> None:
    before = lab.links()["client", "ecmwf"].counters
    lab.run("client", "ssh", "ecmwf", "true")
    after = lab.links()["client", "ecmwf"].counters
    assert after.sent_nbytes > before.sent_nbytes + 1000
    assert (after.sent_udp_packets, after.sent_udp_nbytes) == (before.sent_udp_packets, before.sent_udp_nbytes)


def test_counters_equal_those_of_the_hosts_kernels(lab: RunningLab) -> None:
    lab.run("client", "ssh", "ecmwf", "head -c 3000000 /dev/zero | sha256sum")
    lab.run("client", "ssh", "ecmwf", "cat /proc/cpuinfo")
    lab.run("ecmwf", "sh", "-c", "until ! grep -q ' 01 ' /proc/net/tcp; do :; done", check=False, timeout=5)
    links = lab.links()
    for host in ("client", "ecmwf", "eumetsat"):
        counted = {
            "tx_bytes": sum(link.counters.sent_nbytes for pair, link in links.items() if pair[0] == host),
            "rx_bytes": sum(link.counters.delivered_nbytes for pair, link in links.items() if pair[1] == host),
            "tx_packets": sum(link.counters.sent_packets for pair, link in links.items() if pair[0] == host),
            "tx_dropped": 0,
        }
        for name, value in counted.items():
            assert int(lab.run(host, "cat", f"/sys/class/net/uplink/statistics/{name}").stdout) == value, (host, name)


def test_a_delay_is_added_in_each_direction_and_can_be_changed_while_it_runs(lab: RunningLab) -> None:
    with serving(lab, "ecmwf", ECHO):
        assert call(lab, "client", "10.8.0.4", 5)[1] < 0.02
        lab.shape(delay_seconds=0.02)
        assert 0.04 <= call(lab, "client", "10.8.0.4", 5)[1] < 0.08
        lab.shape([("client", "ecmwf")], delay_seconds=0.1)
        assert 0.12 <= call(lab, "client", "10.8.0.4", 3)[1] < 0.2


def test_a_rate_is_reached_and_never_exceeded(lab: RunningLab) -> None:
    nbytes = 2_000_000
    lab.shape(rate_bits_per_second=16e6, delay_seconds=0.005)  # 2 MB in 1 s
    with serving(lab, "ecmwf", SINK):
        before = lab.links()["client", "ecmwf"].counters.delivered_nbytes
        seconds = float(lab.run("client", sys.executable, "-c", POUR, "10.8.0.4", str(nbytes)).stdout)
        on_the_wire = lab.links()["client", "ecmwf"].counters.delivered_nbytes - before
    assert nbytes < on_the_wire < 1.1 * nbytes
    assert nbytes * 8 / 16e6 <= seconds < 2.5


def test_the_share_of_packets_that_was_asked_for_is_lost(lab: RunningLab) -> None:
    lab.shape([("client", "ecmwf")], loss=0.25)
    before = lab.links()["client", "ecmwf"].counters
    lab.run("client", sys.executable, "-c", SHOUT, "10.8.0.4", "9999", "2000", "10")
    after = lab.links()["client", "ecmwf"].counters
    sent = after.sent_packets - before.sent_packets
    assert 500 < sent <= 2000  # a burst may overflow the host's own queue, before it comes to the WAN
    dropped = after.dropped_packets - before.dropped_packets
    assert abs(dropped - 0.25 * sent) < 6 * (sent * 0.25 * 0.75) ** 0.5  # 6 standard deviations


def test_a_partition_cuts_one_pair_only_until_it_is_joined(lab: RunningLab) -> None:
    with serving(lab, "ecmwf", ECHO), serving(lab, "eumetsat", ECHO):
        lab.cut("client", "ecmwf")
        assert call(lab, "client", "10.8.0.4", 1, timeout=0.3)[0] == 0
        assert call(lab, "client", "10.8.0.2", 1)[0] == 1
        assert call(lab, "eumetsat", "10.8.0.4", 1)[0] == 1
        lab.cut("ecmwf")
        assert call(lab, "eumetsat", "10.8.0.4", 1, timeout=0.3)[0] == 0
        lab.join()
        assert call(lab, "client", "10.8.0.4", 1)[0] == call(lab, "eumetsat", "10.8.0.4", 1)[0] == 1


def test_a_connection_survives_a_short_partition(lab: RunningLab) -> None:
    session = lab.popen("client", "ssh", "ecmwf", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert session.stdin is not None
    assert session.stdout is not None
    session.stdin.write("before\n")
    session.stdin.flush()
    assert session.stdout.readline() == "before\n"
    lab.cut("ecmwf")
    dropped = lab.links()["client", "ecmwf"].counters.dropped_packets
    session.stdin.write("during\n")
    session.stdin.flush()
    while lab.links()["client", "ecmwf"].counters.dropped_packets < dropped + 2:  # sent, and sent again
        time.sleep(0.02)
    lab.join()
    assert session.communicate(timeout=30)[0] == "during\n"
    assert session.returncode == 0


def test_a_site_behind_nat_has_a_private_address_and_lets_only_answers_in(lab: RunningLab) -> None:
    lab.set_nat("eumetsat", True)
    assert lab.status().hosts_with_nat == ["eumetsat"]
    assert "192.168.2.2" in lab.run("eumetsat", "ip", "-4", "address", "show", "uplink").stdout
    ask = (
        "import socket; s=socket.socket(2,2); s.bind(('',5005)); s.sendto(b'who',('10.8.0.4',7007)); print(s.recv(99))"
    )
    with serving(lab, "ecmwf", ECHO), serving(lab, "eumetsat", ECHO):
        seen = lab.run("eumetsat", sys.executable, "-c", ask).stdout
        assert "10.8.0.2" in seen
        assert "5005" not in seen
        assert call(lab, "ecmwf", "10.8.0.2", 1, timeout=0.3)[0] == 0
        assert lab.links()["ecmwf", "eumetsat"].counters.dropped_packets >= 1
        # The control plane comes in through the port that the router forwards.
        assert lab.run("client", "ssh", "10.8.0.2", "hostname").stdout == "eumetsat\n"
        lab.set_nat("eumetsat", False)
        assert call(lab, "ecmwf", "10.8.0.2", 1)[0] == 1


def test_an_address_that_nobody_has_is_refused_at_once(lab: RunningLab) -> None:
    done = lab.run("client", "ssh", "-oBatchMode=yes", "-oConnectTimeout=20", "10.8.0.77", check=False, timeout=10)
    assert "No route to host" in done.stderr


def test_a_capture_holds_what_crossed_the_wan(lab: RunningLab, tmp_path: Path) -> None:
    file = tmp_path / "wan.pcap"
    lab.start_capture(file)
    with serving(lab, "ecmwf", ECHO):
        say = "import socket; s=socket.socket(2,2); s.sendto(b'in clear', ('10.8.0.4', 7007)); s.recv(99)"
        lab.run("client", sys.executable, "-c", say)
        lab.run("client", "ssh", "ecmwf", "echo a secret; echo done")
    lab.stop_capture()
    captured = file.read_bytes()
    assert captured[:4] == bytes.fromhex("d4c3b2a1")
    assert captured.count(b"in clear") == 2
    assert b"SSH-2.0-OpenSSH" in captured
    assert b"a secret" not in captured
    lab.run("client", "ssh", "ecmwf", "true")
    assert file.read_bytes() == captured


def test_a_wrong_wish_is_refused_and_changes_nothing(lab: RunningLab) -> None:
    before = {pair: link.shape for pair, link in lab.links().items()}
    with pytest.raises(LabError, match="a share from 0 to 1, not 2"):
        lab.shape(loss=2)
    with pytest.raises(LabError, match="no link from 'client' to 'mars'"):
        lab.shape([("client", "ecmwf"), ("client", "mars")], delay_seconds=1)
    with pytest.raises(LabError, match="no host 'mars'"):
        lab.cut("mars")
    assert {pair: link.shape for pair, link in lab.links().items()} == before


def test_the_command_line_changes_the_wan_and_shows_it(
    lab: RunningLab, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert command("wan", "--name", lab.name, "--rate", "30", "--delay", "10", "client", "ecmwf").returncode == 0
    shown = command("status", "--name", lab.name).stdout
    assert "client → ecmwf      30 Mbit/s, 10 ms, loss 0" in shown
    assert "ecmwf → client     30 Mbit/s, 10 ms, loss 0" in shown
    assert "ecmwf → eumetsat   no limit, 0 ms, loss 0" in shown
    assert command("wan", "--name", lab.name, "--cut", "eumetsat").returncode == 0
    assert command("status", "--name", lab.name).stdout.count("cut") == 4
