"""Data planes when something is killed, and what is left of them: real WireGuard, in hosts of namespaces."""

import dataclasses
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from planebench import (
    LEASE_SECONDS,
    Host,
    Namespace,
    conversation,
    everything_of,
    is_used,
    listener,
    ping,
    wait_for,
)

from controlplane.network.topology import (
    GatewayConfig,
    address_of,
    interface_of,
    random_prefix,
)


@pytest.mark.parametrize("site", [1, 2], ids=["of the site that is called", "of the site that calls"])
def test_wireguard_go_killed_is_mended_with_the_same_key_and_no_connection_lost(cluster, wireguard, site):
    if wireguard == "kernel":
        pytest.skip("WireGuard of the kernel has no process that could be killed")
    host, name = cluster.hosts[site], interface_of(cluster.cluster_id)
    before = cluster.state(site)
    with listener(cluster.workers[2]) as port, conversation(cluster.workers[1], cluster.addresses[2], port) as exchange:
        assert exchange() == "True\n"
        pid = host.wireguard_pids()[name]
        os.kill(pid, signal.SIGKILL)
        wait_for("another wireguard-go", lambda: host.wireguard_pids().get(name, pid) != pid, seconds=15)
        wait_for("a packet between the sites", cluster.pings, seconds=10)
        assert exchange() == "True\n", "the connection is the same"
    after = cluster.state(site)
    assert (after["public_key"], after["listen_port"]) == (before["public_key"], before["listen_port"])
    assert after["namespace"] == before["namespace"]
    own = str(address_of(cluster.prefix, site, 1))
    assert (
        own
        in subprocess.run(
            ["nsenter", f"--net={after['namespace']}", "ip", "address"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_a_keeper_killed_is_mended_with_the_same_key_and_its_workers(cluster):
    host = cluster.hosts[1]
    before = cluster.state(1)
    (keeper,) = [pid for pid, words in host.keepers().items() if any(cluster.cluster_id in word for word in words)]
    with listener(cluster.workers[2]) as port, conversation(cluster.workers[1], cluster.addresses[2], port) as exchange:
        assert exchange() == "True\n"
        os.kill(keeper, signal.SIGKILL)
        wait_for("another keeper", lambda: set(host.keepers()) - {keeper}, seconds=15)
        wait_for("a packet between the sites", cluster.pings, seconds=10)
        assert exchange() == "True\n", "the connection is the same"
    assert cluster.state(1)["public_key"] == before["public_key"]
    assert cluster.state(1)["namespace"] != before["namespace"]


def test_a_daemon_killed_leaves_the_gateway_and_the_next_one_adopts_it(cluster, wireguard):
    host, name = cluster.hosts[1], interface_of(cluster.cluster_id)
    before, pids = cluster.state(1), host.wireguard_pids()
    with listener(cluster.workers[2]) as port, conversation(cluster.workers[1], cluster.addresses[2], port) as exchange:
        host.kill_daemon()
        assert exchange() == "True\n", "nobody misses the daemon"
        host.start_daemon()
        after = cluster.state(1)
        assert after["public_key"] == before["public_key"]
        assert [peer["site"] for peer in after["peers"]] == [2]
        host.ensure(cluster.configs[1])
        assert host.wireguard_pids() == pids
        assert exchange() == "True\n"
    if wireguard == "userspace":
        os.kill(pids[name], signal.SIGKILL)
        wait_for("another wireguard-go", lambda: host.wireguard_pids().get(name, pids[name]) != pids[name], seconds=15)
        wait_for("a packet between the sites", cluster.pings, seconds=10)
        assert cluster.state(1)["public_key"] == before["public_key"], "read back from the interface"


def test_a_worker_can_be_joined_by_wireguard_of_its_own_and_is_mended_likewise(cluster, wireguard):
    host, worker = cluster.hosts[1], Namespace()
    try:
        address = host.attach(cluster.configs[1], worker, 12, link="wireguard")
        wait_for("a packet from site to site", lambda: ping(worker, cluster.addresses[2]), seconds=10)
        assert ping(cluster.workers[1], address), "a worker of the same site, joined by a veth"
        assert ping(cluster.workers[2], address)
        assert "wireguard" in worker.run("ip", "-d", "link", "show", "mesh0") or wireguard == "userspace"
        assert "veth" not in worker.run("ip", "-d", "link", "show", "mesh0")
        assert [peer["site"] for peer in cluster.state(1)["peers"]] == [2], "a worker is no peer site"
        before = host.wireguard_pids()
        host.ensure(cluster.configs[1])
        host.attach(cluster.configs[1], worker, 12, link="wireguard")
        assert host.wireguard_pids() == before
        if wireguard == "userspace":
            for name, pid in before.items():
                if cluster.cluster_id[:8] in name:
                    os.kill(pid, signal.SIGKILL)
                    wait_for("another process", lambda name=name, pid=pid: host.wireguard_pids().get(name, pid) != pid)
                    wait_for("a packet after that", lambda: ping(worker, cluster.addresses[2]), seconds=10)
        host.call("detach", cluster_id=cluster.cluster_id, address=address)
        assert "mesh0" not in worker.run("ip", "link")
        assert not any(name.startswith("mw") for name in host.wireguard_pids())
        assert not ping(cluster.workers[2], address)
    finally:
        worker.close()


def test_a_gateway_is_made_although_the_service_manager_made_proc_sys_read_only(hosts):
    host = hosts[0]
    host.run("mount", "--bind", "/proc/sys", "/proc/sys")
    try:
        host.run("mount", "-o", "remount,bind,ro", "/proc/sys")
        assert not host.succeeds("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
        config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=20)
        namespace = host.ensure(config)["namespace"]
        inside = ["nsenter", f"--net={namespace}", "cat", "/proc/sys/net/ipv6/conf/all/forwarding"]
        assert subprocess.run(inside, capture_output=True, text=True, check=True).stdout == "1\n"
        assert host.run("cat", "/proc/sys/net/ipv6/conf/all/forwarding") == "0\n", "nothing of the host is changed"
        host.call("remove", cluster_id=config.cluster_id)
    finally:
        host.run("umount", "/proc/sys")


def test_a_daemon_killed_half_way_is_no_hindrance_to_the_next_one(hosts):
    host, before = hosts[1], everything_of(hosts[1])
    worker = Namespace()
    config = GatewayConfig(
        cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, listen_port=51860, deadline_seconds=LEASE_SECONDS
    )
    about = {"cluster_id": config.cluster_id, "netns": worker.path, "address": address_of(config.prefix, 1, 11)}
    requests = [
        {"call": "ensure", "arguments": {"config": dataclasses.asdict(config)}},
        {"call": "attach", "arguments": about},
    ]
    lines = "".join(json.dumps(request, default=str) + "\n" for request in requests)
    try:
        for milliseconds in (30, 90, 160):
            host.call("observe")  # it is up
            host.daemon.stdin.write(lines)
            host.daemon.stdin.flush()
            time.sleep(milliseconds / 1000)  # not a wait for a state: any state will do
            host.kill_daemon()
            host.start_daemon()
        assert host.ensure(config)["listen_port"] == 51860
        host.attach(config, worker, 11)
        assert ping(worker, str(config.address))
    finally:
        host.call("remove", cluster_id=config.cluster_id)
        worker.close()
    assert everything_of(host) == before


def test_nothing_is_left_of_a_gateway_that_was_removed(hosts):
    host = hosts[0]
    before, worker = everything_of(host), Namespace()
    config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=LEASE_SECONDS)
    namespace = Path(host.ensure(config)["namespace"]).readlink()
    assert is_used(namespace)
    host.attach(config, worker, 11)
    assert everything_of(host) != before
    host.call("remove", cluster_id=config.cluster_id)
    assert "mesh0" not in worker.run("ip", "link")
    worker.close()
    assert everything_of(host) == before
    assert not is_used(namespace)


@pytest.mark.parametrize("victims", [["daemon"], ["daemon", "keeper"]])
def test_nothing_is_left_after_the_deadline_whatever_was_killed(hosts, wireguard, tmp_path, victims):
    host = Host(4, wireguard, tmp_path)
    worker = Namespace()
    try:
        before = everything_of(host)
        config = GatewayConfig(cluster_id=uuid.uuid4().hex, prefix=random_prefix(), site=1, deadline_seconds=20)
        namespace = Path(host.ensure(config)["namespace"]).readlink()
        host.attach(config, worker, 11)
        pids = {
            "daemon": [host.daemon.pid],
            "keeper": list(host.keepers()),
        }
        assert everything_of(host) != before
        host.call("renew", cluster_id=config.cluster_id, deadline_seconds=1.5)
        for victim in victims:
            for pid in pids[victim]:
                os.kill(pid, signal.SIGKILL)
        wait_for("the end of everything", lambda: everything_of(host) == before, seconds=8)
        wait_for("the end of the worker's link", lambda: "mesh0" not in worker.run("ip", "link"), seconds=5)
        assert not is_used(namespace)
    finally:
        worker.close()
        host.close()
