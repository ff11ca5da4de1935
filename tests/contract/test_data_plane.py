"""One suite for every data plane: WireGuard of the kernel, wireguard-go, and this machine's loopback.

Covers what a data plane does while all is well, and what it refuses. What happens when something is killed is in
test_data_plane_deaths.py.
"""

import contextlib
import dataclasses
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from planebench import (
    LEASE_SECONDS,
    Cluster,
    Host,
    LocalHost,
    Namespace,
    PlaneError,
    connects,
    conversation,
    join,
    listener,
    ping,
    wait_for,
)

from controlplane.network.topology import (
    GatewayConfig,
    Member,
    address_of,
    peers_of,
    random_prefix,
)


@pytest.fixture(scope="module", params=["loopback", "userspace", "kernel"])
def plane(request, need_backend, tmp_path_factory):
    """A host of its own, with any data plane."""
    kind, folder = request.param, tmp_path_factory.mktemp("plane")
    if kind != "loopback":
        need_backend(kind)
    host = LocalHost(3, kind, folder) if kind == "loopback" else Host(3, kind, folder)
    yield host
    host.close()


@pytest.fixture
def config(plane):
    """A gateway that nobody else uses, removed in the end."""
    made = GatewayConfig(
        cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, listen_port=51877, deadline_seconds=LEASE_SECONDS
    )
    yield made
    plane.call("remove", cluster_id=made.cluster_id)


def test_a_gateway_that_is_ensured_twice_is_the_same(plane, config):
    first = plane.ensure(config)
    processes = plane.keepers(), plane.wireguard_pids()
    assert first["cluster_id"] == config.cluster_id
    assert re.fullmatch("[A-Za-z0-9+/]{43}=", first["public_key"])
    assert first["listen_port"] == 51877
    assert plane.ensure(config) == first
    assert (plane.keepers(), plane.wireguard_pids()) == processes
    assert plane.call("observe")[config.cluster_id] == first


def test_peers_are_what_was_asked_for_last(plane, config):
    keys = ["A" * 42 + "A=", "B" * 42 + "A="]
    members = [Member(site=site, name="x", public_key=key, endpoint=None) for site, key in enumerate(keys, start=2)]
    us = Member(site=1, name="us", endpoint="192.0.2.1:1")
    for others in (members, members[:1], members[1:], []):
        peers = peers_of(config.prefix, [us, *others], 1)
        state = plane.ensure(dataclasses.replace(config, peers=peers))
        assert [(peer["site"], peer["public_key"]) for peer in state["peers"]] == [
            (member.site, member.public_key) for member in others
        ]
        assert plane.call("observe")[config.cluster_id]["peers"] == state["peers"]


def test_a_gateway_that_was_removed_is_not_there_and_can_be_removed_again(plane, config):
    plane.ensure(config)
    plane.call("remove", cluster_id=config.cluster_id)
    assert config.cluster_id not in plane.call("observe")
    plane.call("remove", cluster_id=config.cluster_id)
    plane.call("detach", cluster_id=config.cluster_id, address=address_of(config.prefix, 1, 11))


def test_sweeping_removes_what_is_not_kept(plane, config):
    others = set(plane.call("observe"))
    plane.ensure(config)
    plane.call("sweep", keep=[*others, config.cluster_id])
    assert set(plane.call("observe")) == {*others, config.cluster_id}
    plane.call("sweep", keep=list(others))
    assert set(plane.call("observe")) == others


def test_what_needs_a_gateway_says_so_where_there_is_none(plane, config):
    address = address_of(config.prefix, 1, 11)
    with pytest.raises(PlaneError, match=config.cluster_id):
        plane.call("attach", cluster_id=config.cluster_id, netns="/proc/self/ns/net", address=address)
    with pytest.raises(PlaneError, match=config.cluster_id):
        plane.call("renew", cluster_id=config.cluster_id, deadline_seconds=5)


def test_a_gateway_ends_at_its_deadline_unless_somebody_renews(plane, config):
    plane.ensure(config)
    plane.call("renew", cluster_id=config.cluster_id, deadline_seconds=1)
    plane.call("renew", cluster_id=config.cluster_id, deadline_seconds=LEASE_SECONDS)
    begun = time.monotonic()
    wait_for("more than the first deadline", lambda: time.monotonic() - begun > 1.2)
    assert config.cluster_id in plane.call("observe")
    plane.call("renew", cluster_id=config.cluster_id, deadline_seconds=0.2)
    wait_for("the end of the gateway", lambda: config.cluster_id not in plane.call("observe"), seconds=15)


# -------------------------------------------------------------------------------------------------- real WireGuard


def test_workers_of_two_sites_exchange_packets_and_streams(cluster):
    assert cluster.pings(1, 2)
    assert cluster.pings(2, 1)
    with listener(cluster.workers[2]) as port, conversation(cluster.workers[1], cluster.addresses[2], port) as exchange:
        assert exchange() == "True\n"


def test_one_side_of_a_pair_calls_and_the_other_learns_where_it_is(cluster):
    peers = {site: cluster.state(site)["peers"][0] for site in (1, 2)}
    assert (peers[1]["site"], peers[2]["site"]) == (2, 1)
    assert cluster.configs[1].peers[0].endpoint is None
    assert peers[1]["endpoint"] == "10.99.0.2:51820", "learnt"
    assert peers[2]["endpoint"] == "10.99.0.1:51820", "configured"
    assert peers[1]["received_nbytes"] > 0
    assert peers[1]["sent_nbytes"] > 0


def test_a_second_ensure_of_everything_changes_nothing(cluster):
    before = {site: (host.wireguard_pids(), cluster.state(site)["public_key"]) for site, host in cluster.hosts.items()}
    for site, host in cluster.hosts.items():
        lines = len(host.log.read_text().splitlines())
        host.ensure(cluster.configs[site])
        host.attach(cluster.configs[site], cluster.workers[site], 11)
        said = "\n".join(host.log.read_text().splitlines()[lines:])
        assert "wg set" not in said
        assert "INFO:controlplane" not in said, "a pass that changes nothing is silent"
    after = {site: (host.wireguard_pids(), cluster.state(site)["public_key"]) for site, host in cluster.hosts.items()}
    assert after == before


def test_a_worker_that_was_detached_is_cut_off_and_can_come_back(cluster):
    host = cluster.hosts[1]
    host.call("detach", cluster_id=cluster.cluster_id, address=cluster.addresses[1])
    assert not cluster.pings(1, 2)
    assert "mesh0" not in cluster.workers[1].run("ip", "link")
    host.attach(cluster.configs[1], cluster.workers[1], 11)
    assert cluster.pings(1, 2)


def test_another_worker_can_take_an_address_over(cluster):
    worker = Namespace()
    try:
        cluster.hosts[1].attach(cluster.configs[1], worker, 11)
        assert ping(worker, cluster.addresses[2])
        assert not cluster.pings(1, 2), "the first one has lost it"
    finally:
        worker.close()
    cluster.hosts[1].attach(cluster.configs[1], cluster.workers[1], 11)
    assert cluster.pings(1, 2)


def test_a_site_that_comes_back_with_a_new_key_replaces_the_old_one(cluster):
    host = cluster.hosts[2]
    old = cluster.state(2)["public_key"]
    host.call("remove", cluster_id=cluster.cluster_id)
    cluster.configs[2] = dataclasses.replace(cluster.configs[2], peers=())
    host.ensure(cluster.configs[2])
    host.attach(cluster.configs[2], cluster.workers[2], 11)
    assert cluster.state(2)["public_key"] != old
    cluster.exchange_keys()
    assert [peer["public_key"] for peer in cluster.state(1)["peers"]] == [cluster.state(2)["public_key"]]
    cluster.wait_for_handshakes()
    wait_for("a packet between the sites", cluster.pings)


def test_two_clusters_at_the_same_hosts_do_not_reach_each_other(cluster):
    other = Cluster(cluster.hosts.values(), ports=(51821, 51821))
    try:
        other.boot().wait_for_handshakes()
        assert other.pings(1, 2)
        assert cluster.pings(1, 2)
        for source, target in ((cluster, other), (other, cluster)):
            worker = source.workers[1]
            worker.run("ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "mesh0")
            for site in (1, 2):
                assert not ping(worker, target.addresses[site])
                assert not ping(worker, str(address_of(target.prefix, site, 1)))
            worker.run("ip", "-6", "route", "del", "default")
    finally:
        other.close()
    assert cluster.pings(1, 2), "the one that stays does not notice that the other one ends"


def test_a_worker_reaches_no_listener_of_any_host(cluster):
    worker = cluster.workers[1]
    worker.run("ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "mesh0")
    try:
        for site, host in cluster.hosts.items():
            with listener(host) as port:
                assert connects(host, "::1", port), "the listener listens"
                gateway = str(address_of(cluster.prefix, site, 1))
                assert ping(worker, gateway)
                for target in (gateway, f"fd99:0::{host.number}", f"10.99.0.{host.number}"):
                    assert not connects(worker, target, port), target
    finally:
        worker.run("ip", "-6", "route", "del", "default")


def test_a_worker_cannot_send_in_the_name_of_another_one(cluster):
    worker = cluster.workers[1]
    forged = str(address_of(cluster.prefix, 1, 12))
    worker.run("ip", "-6", "address", "add", f"{forged}/128", "dev", "mesh0", "nodad")
    try:
        before = cluster.state(1)["peers"][0]["sent_nbytes"]
        worker.run(
            "ping",
            "-6",
            "-c",
            "3",
            "-i",
            "0.05",
            "-W",
            "1",
            "-s",
            "1000",
            "-I",
            forged,
            cluster.addresses[2],
            check=False,
        )
        assert cluster.state(1)["peers"][0]["sent_nbytes"] - before < 1000, "not even one of them left the site"
    finally:
        worker.run("ip", "-6", "address", "del", f"{forged}/128", "dev", "mesh0")


def test_a_private_key_is_nowhere_but_in_the_interface(cluster, hosts):
    for host in hosts:
        namespaces = [f"/proc/{keeper}/ns" for keeper in host.keepers()]
        shown = [
            subprocess.run(
                ["nsenter", f"--net={path}/net", f"--mount={path}/mnt", "wg", "show", "all", "private-key"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            for path in namespaces
        ]
        assert shown, "a gateway"
        for _name, key in shown:
            assert len(key) == 44
            secret = key.encode()
            for process in Path("/proc").glob("[0-9]*"):
                for place in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        assert secret not in (process / place).read_bytes(), f"{process}/{place}"
            assert "wg set" in host.log.read_text(), "the log has what was done"
            assert key not in host.log.read_text()
            folders = ["/run", "/dev/shm", "/etc", "/var/lib", str(host.folder)]
            recent = host.run("find", *folders, "-type", "f", "-newermt", f"@{host.begun}", check=False).split("\n")[
                :-1
            ]
            assert any(name.startswith(str(host.folder)) for name in recent), "what is written now is found"
            for name in recent:
                with contextlib.suppress(OSError):
                    assert secret not in Path(name).read_bytes(), name


def test_a_port_that_is_taken_is_named(hosts):
    host = hosts[0]
    config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, listen_port=51899)
    code = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 51899)); print(flush=True); input()"
    command = host.command(sys.executable, "-I", "-S", "-c", code)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            with pytest.raises(PlaneError, match="PortTakenError: UDP port 51899 is taken on this host"):
                host.ensure(config)
        finally:
            process.kill()
    assert host.ensure(config)["listen_port"] == 51899, "and works as soon as it is free"
    host.call("remove", cluster_id=config.cluster_id)


def test_two_sites_that_cannot_reach_each_other_are_relayed_through_one_that_both_reach(hosts, wireguard, tmp_path):
    first, hub = hosts
    second = Host(5, wireguard, tmp_path)
    workers = {1: Namespace(), 3: Namespace()}
    prefix, cluster_id = random_prefix(), uuid.uuid4().hex
    try:
        join(hub, second, number=1)
        assert not ping(first, "10.99.1.5")
        configs = {
            site: GatewayConfig(
                cluster_id=cluster_id, prefix=prefix, site=site, listen_port=51850, deadline_seconds=LEASE_SECONDS
            )
            for site in (1, 2, 3)
        }
        by_site = {2: hub, 1: first, 3: second}
        keys = {site: host.ensure(configs[site])["public_key"] for site, host in by_site.items()}
        for site, endpoint in ((1, "10.99.0.2:51850"), (2, None), (3, "[fd99:1::2]:51850")):
            members = [
                Member(site=1, name="a", public_key=keys[1]),
                Member(site=2, name="hub", public_key=keys[2], endpoint=endpoint or "unused"),
                Member(site=3, name="b", public_key=keys[3]),
            ]
            configs[site] = dataclasses.replace(configs[site], peers=peers_of(prefix, members, site))
        for site, host in by_site.items():
            host.ensure(configs[site])
        addresses = {site: by_site[site].attach(configs[site], worker, 11) for site, worker in workers.items()}
        wait_for("a packet through the hub", lambda: ping(workers[1], addresses[3]))
        assert ping(workers[3], addresses[1])
    finally:
        for host in (first, hub):
            host.call("remove", cluster_id=cluster_id)
        for namespace in (*workers.values(), second):
            namespace.close()


def test_an_address_that_is_not_a_workers_is_refused(cluster):
    worker = cluster.workers[1]
    for site, node in ((2, 12), (1, 1)):
        address = address_of(cluster.prefix, site, node)
        with pytest.raises(PlaneError, match=f"{address} cannot be a worker's address here: choose one of "):
            cluster.hosts[1].call("attach", cluster_id=cluster.cluster_id, netns=worker.path, address=address)


def test_a_worker_that_has_ipv6_switched_off_or_has_gone_is_named_with_what_to_do(cluster):
    worker, host = Namespace(), cluster.hosts[1]
    try:
        worker.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        with pytest.raises(PlaneError, match="IPv6 is switched off there: set the sysctl"):
            host.attach(cluster.configs[1], worker, 13)
    finally:
        worker.close()
    with pytest.raises(PlaneError, match=f"Opening the network namespace {worker.path} failed"):
        host.attach(cluster.configs[1], worker, 13)


def test_a_gateway_cannot_become_another_one(cluster):
    config = dataclasses.replace(cluster.configs[1], site=7)
    with pytest.raises(PlaneError, match="delete it first"):
        cluster.hosts[1].ensure(config)


def test_a_stranger_who_took_a_gateways_name_is_named_and_harms_nothing(hosts):
    host = hosts[0]
    config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=20)
    name = f"\\0meshcompute-gateway/{host.instance}/{config.cluster_id}"
    code = f"import socket; s = socket.socket(1, 5); s.bind('{name}'); s.listen(); print(flush=True); input()"
    command = host.command("setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-I", "-S", "-c", code)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            with pytest.raises(PlaneError, match=f"belongs to process {process.pid} of user 65534, who took its name"):
                host.ensure(config)
            assert config.cluster_id not in host.call("observe")
            host.call("remove", cluster_id=config.cluster_id)
        finally:
            process.kill()
    assert host.ensure(config)["public_key"] is not None
    host.call("remove", cluster_id=config.cluster_id)


def test_a_gateway_needs_four_capabilities_and_no_more(wireguard, tmp_path):
    # SYS_CHROOT enters the mounts in which WireGuard's control sockets lie, SYS_PTRACE a worker of another account.
    needed = "-all,+net_admin,+sys_admin,+sys_chroot,+sys_ptrace"
    host = Host(7, wireguard, tmp_path, wrapper=("setpriv", "--bounding-set", needed, "--no-new-privs"))
    config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=20)
    worker = ["unshare", "--net", "setpriv", "--reuid", "65534", "--clear-groups", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(worker, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            host.ensure(config)
            for node, link in ((11, "veth"), (12, "wireguard")):
                address = address_of(config.prefix, 1, node)
                place = {"netns": f"/proc/{process.pid}/ns/net", "address": address, "interface": f"mesh{node}"}
                host.call("attach", cluster_id=config.cluster_id, link=link, **place)
            host.call("remove", cluster_id=config.cluster_id)
            assert host.call("observe") == {}
        finally:
            process.kill()
            host.close()
