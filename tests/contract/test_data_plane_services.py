"""What the operator lets workers reach beside their cluster: exactly that, from exactly there. Real WireGuard."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from planebench import Cluster, Host, Namespace, connects, conversation, listener, ping, wait_for

from controlplane.config import Service
from controlplane.network.topology import GatewayConfig, address_of, random_prefix, service_address_of

NAME = "objects.example"


@pytest.fixture
def port(cluster):
    """Have something that listens at every address of host 1."""
    with listener(cluster.hosts[1]) as number:
        yield number


@pytest.fixture
def serve(cluster):
    """Give site 1's gateway services, until the test ends; gives the address of the one with our name."""

    def serve(*services):
        cluster.hosts[1].ensure(dataclasses.replace(cluster.configs[1], services=services))
        return str(service_address_of(cluster.prefix, 1, NAME))

    yield serve
    serve()


def relays(host):
    """Process ids of the relays of a host."""
    found = []
    for keeper in host.keepers():
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
            found += [int(pid) for pid in children if b"servicerelay" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@pytest.mark.parametrize("host", ["10.99.0.1", "127.0.0.1", "fd99:0::1", "localhost"])
def test_workers_of_the_site_reach_a_service_by_its_address(cluster, serve, port, host):
    address = serve(Service(name=NAME, host=host, port=port))
    with conversation(cluster.workers[1], address, port) as exchange:
        assert exchange() == "True\n"


def test_a_worker_with_a_wireguard_of_its_own_reaches_it_too(cluster, serve, port):
    address, worker = serve(Service(name=NAME, host="10.99.0.1", port=port)), Namespace()
    try:
        own = cluster.hosts[1].attach(cluster.configs[1], worker, 13, link="wireguard")
        wait_for("a packet from site to site", lambda: ping(worker, cluster.addresses[2]), seconds=10)
        assert connects(worker, address, port)
        cluster.hosts[1].call("detach", cluster_id=cluster.cluster_id, address=own)
    finally:
        worker.close()


def test_nobody_else_reaches_it(cluster, serve, port):
    address = serve(Service(name=NAME, host="10.99.0.1", port=port))
    assert connects(cluster.workers[1], address, port), "there is something to reach"
    assert not connects(cluster.workers[2], address, port), "a worker of another site"
    gateway = cluster.state(2)["namespace"]
    code = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
    asked = ["nsenter", f"--net={gateway}", sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(asked, capture_output=True, check=False).returncode, "another site's gateway"
    assert not connects(cluster.hosts[1], address, port), "the host, which has no way in"
    other = Cluster(cluster.hosts.values(), ports=(51821, 51821))
    try:
        other.boot().wait_for_handshakes()
        stranger = other.workers[1]
        stranger.run("ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "mesh0")
        assert not connects(stranger, address, port), "a worker of another cluster, of the same site"
        assert not connects(stranger, str(service_address_of(other.prefix, 1, NAME)), port), "which has no service"
    finally:
        other.close()


def test_nothing_else_is_reached(cluster, serve, port):
    with listener(cluster.hosts[1]) as secret:
        address = serve(Service(name=NAME, host="10.99.0.1", port=port))
        worker = cluster.workers[1]
        worker.run("ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "mesh0")
        try:
            assert connects(worker, address, port)
            assert not connects(worker, address, secret), "another port of the host"
            for target in (str(address_of(cluster.prefix, 1, 1)), "fd99:0::1", "10.99.0.1"):
                assert not connects(worker, target, port), target
        finally:
            worker.run("ip", "-6", "route", "del", "default")


def test_a_service_that_the_operator_takes_away_is_gone(cluster, serve, port):
    address = serve(Service(name=NAME, host="10.99.0.1", port=port))
    assert connects(cluster.workers[1], address, port)
    serve()
    assert not connects(cluster.workers[1], address, port)
    assert relays(cluster.hosts[1]) == []


def test_a_second_ensure_leaves_its_connections_and_a_name_that_nobody_knows_harms_no_other(cluster, serve, port):
    services = (Service(name=NAME, host="10.99.0.1", port=port), Service(name="b", host="no..such", port=9000))
    address = serve(*services)
    with conversation(cluster.workers[1], address, port) as exchange:
        assert exchange() == "True\n"
        pids = relays(cluster.hosts[1])
        serve(*services)
        assert relays(cluster.hosts[1]) == pids
        assert exchange() == "True\n"


def test_a_relay_has_no_rights_is_mended_when_killed_and_goes_with_the_gateway(cluster, serve, port):
    address = serve(Service(name=NAME, host="10.99.0.1", port=port))
    with conversation(
        cluster.workers[1], address, port
    ) as exchange:  # the kernel takes connections before a relay runs
        assert exchange() == "True\n"
    (pid,) = relays(cluster.hosts[1])
    said = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert said["Uid"].split() == ["65534"] * 4
    assert said["Groups"].split() == []
    assert int(said["CapEff"], 16) == int(said["CapPrm"], 16) == 0
    assert said["NoNewPrivs"] == "1"
    os.kill(pid, signal.SIGKILL)
    wait_for("another relay", lambda: set(relays(cluster.hosts[1])) - {pid}, seconds=15)
    wait_for("a connection through it", lambda: connects(cluster.workers[1], address, port))
    (pid,) = relays(cluster.hosts[1])
    (keeper,) = [
        pid for pid, words in cluster.hosts[1].keepers().items() if any(cluster.cluster_id in w for w in words)
    ]
    os.kill(keeper, signal.SIGKILL)
    wait_for("the end of the relay", lambda: not Path(f"/proc/{pid}").exists())
    wait_for("a connection through the next one", lambda: connects(cluster.workers[1], address, port), seconds=15)


def test_the_rights_of_the_unit_are_enough_for_a_service_at_a_low_port(wireguard, tmp_path):
    rights = "-all,+net_admin,+sys_admin,+sys_chroot,+sys_ptrace,+setuid,+setgid,+kill"
    host = Host(8, wireguard, tmp_path, wrapper=("setpriv", "--bounding-set", rights, "--no-new-privs"))
    config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=20)
    worker = Namespace()
    try:
        host.ensure(dataclasses.replace(config, services=(Service(name=NAME, host="127.0.0.1", port=443),)))
        host.attach(config, worker, 11)
        with listener(host, 443):
            assert connects(worker, str(service_address_of(config.prefix, 1, NAME)), 443)
        host.ensure(config)
        assert relays(host) == []
        host.call("remove", cluster_id=config.cluster_id)
    finally:
        worker.close()
        host.close()


def test_where_the_service_does_not_answer_its_user_is_told_at_once(cluster, serve):
    with listener(cluster.hosts[1]) as port:
        address = serve(Service(name=NAME, host="10.99.0.1", port=port))
        assert connects(cluster.workers[1], address, port)
    code = (
        "import socket\n"
        f"connection = socket.create_connection(({address!r}, {port}), 1)\n"
        "connection.settimeout(10)\n"
        "try:\n"
        "    print(repr(connection.recv(1)))\n"
        "except ConnectionResetError:\n"
        "    print('reset')\n"
    )
    assert cluster.workers[1].run(sys.executable, "-I", "-S", "-c", code) == "reset\n"
