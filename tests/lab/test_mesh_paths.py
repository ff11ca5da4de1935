"""Ways through the network other than the plain one, and clusters that grow and shrink.

Covers the workers' own WireGuard links, NAT, sites that do not hear each other, and containers that come and go under a
computation; in the lab, with real packets. Does not cover partitions of a cluster that runs, nor deaths.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from labbench import SITES, LabBench, open_lab_bench

from meshcompute.lab.topology import default_hosts

pytestmark = pytest.mark.timeout(400)
ECMWF, EUMETSAT = SITES
FEW = ("--processes", "2", "--lease", "30")
SITE_FILE = "/etc/meshcompute/site.toml"
PEER_FIELDS = 9  # of `wg show all dump`; an interface has five
# One value of each site crosses to the other; the sum is made at the client's wish.
CROSS = """
import sys
from distributed import Client
import dask.array as da
from meshcompute import pool, propagate_pools
with Client(sys.argv[1], timeout="60s") as client:
    client.wait_for_workers(int(sys.argv[2]), timeout=60)
    with pool("ecmwf"):
        left = da.ones((1000, 1000), chunks=500)
    with pool("eumetsat"):
        right = da.ones((1000, 1000), chunks=500)
    with propagate_pools():
        print(float((left + right).sum().compute()))
        print(float((right @ left).sum().compute()))
"""


def compute_across(bench: LabBench, address: str, n_workers: int = 4) -> None:
    """Compute with both sites' workers, so that blocks have to cross."""
    assert bench.python(CROSS, address, str(n_workers)).split()[-2:] == ["2000000.0", "1000000000.0"]


def delivered(bench: LabBench, one: str, other: str) -> int:
    """Bytes that went from one host to another so far, and back."""
    links = bench.lab.links()
    return sum(links[pair].counters.delivered_nbytes for pair in ((one, other), (other, one)))


@contextmanager
def without_endpoint(bench: LabBench, host: str) -> Iterator[None]:
    """Put a host behind NAT, and let its operator say that nobody can call it."""
    text = bench.lab.run(host, "cat", SITE_FILE).stdout
    changed = re.sub(r"(?m)^endpoints = .*", "endpoints = []", text)
    _configure(bench, host, changed)
    bench.lab.set_nat(host, True)
    try:
        yield
    finally:
        bench.lab.set_nat(host, False)
        _configure(bench, host, text)


def _configure(bench: LabBench, host: str, text: str) -> None:
    bench.lab.run(host, "sh", "-c", 'cat >"$1"', "sh", SITE_FILE, input=text)
    bench.kill(host, *bench.pids(host, "meshcompute-site"), signum=15)
    bench.wait_until(lambda: not bench.pids(host, "meshcompute-site"), f"{host}'s daemon has ended")
    bench.restart_daemon(host)


def test_workers_with_wireguard_of_their_own_compute_and_leave_nothing(bench: LabBench) -> None:
    before = bench.observe()
    with bench.booted("--link", "wireguard", *FEW) as boot:
        assert "ready: 4 workers" in boot.said
        for host in ("ecmwf", "eumetsat"):
            assert bench.pids(host, "mw11-"), f"{host} has made no interface for its worker"
            [container] = bench.containers(host)
            pid = bench.lab.run(host, "docker", "inspect", "--format", "{{.State.Pid}}", container).stdout.strip()
            links = bench.lab.run(host, "nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-o", "-details", "link").stdout
            assert "mesh0" in links
            assert "veth" not in links
        compute_across(bench, boot.address)
        assert boot.stop() == 0
    bench.wait_as(before)


def test_sites_that_do_not_hear_each_other_are_relayed_through_the_client(bench: LabBench) -> None:
    bench.lab.cut("ecmwf", "eumetsat")
    before = delivered(bench, "ecmwf", "eumetsat")
    with bench.booted(*FEW) as boot:
        [line] = [line for line in boot.lines if "do not hear each other" in line]
        assert f"{ECMWF} (ecmwf) and {EUMETSAT} (eumetsat)" in line
        assert "relayed through local (client)" in line
        assert "2 links have shaken hands" in boot.said
        compute_across(bench, boot.address)
    assert delivered(bench, "ecmwf", "eumetsat") == before


def test_a_site_whose_udp_ports_are_closed_is_named_and_with_allow_partial_left_out(bench: LabBench) -> None:
    chain = "add chain inet closed in { type filter hook input priority 0; }"
    bench.lab.run("eumetsat", "nft", f"add table inet closed; {chain}")
    bench.lab.run("eumetsat", "nft", "add rule inet closed in meta l4proto udp drop")
    try:
        boot = bench.start_boot(*SITES, *FEW, "--allow-partial", "--", "true")
        assert boot.wait() == 0, boot.said
        sentence = (
            rf"Site {EUMETSAT} \(eumetsat\): There was no handshake with .*; check that the UDP ports .* are open"
        )
        assert re.search(sentence, boot.said), boot.said
        assert f"going on without {EUMETSAT} (eumetsat)" in boot.said
        assert "ready: 2 workers" in boot.said
    finally:
        bench.lab.run("eumetsat", "nft", "delete table inet closed")


def test_a_site_behind_nat_calls_the_others_and_is_found_again_when_its_router_changes(can_have_mesh: None) -> None:
    client, ecmwf, eumetsat = default_hosts()
    with open_lab_bench(hosts=(client, replace(ecmwf, has_nat=True), eumetsat)) as bench:
        with bench.booted(*FEW) as boot:
            assert "3 links have shaken hands" in boot.said
            compute_across(bench, boot.address)
            seen = peers_of(bench, "eumetsat")["10.8.0.4"]
            assert seen.port not in ("51820", ""), "the router's own port, which only packets can tell"
            assert seen.keepalive == "off"
            assert {peer.keepalive for peer in peers_of(bench, "ecmwf").values()} == {"25"}
            # The router is taken away and put back: the site's address changes under the connections.
            for has_nat in (False, True):
                bench.lab.set_nat("ecmwf", has_nat)
                compute_across(bench, boot.address)
        # sshd keeps sessions whose address has gone until it notices: with its own settings, that is hours.
        assert bench.containers("ecmwf") == bench.containers("client") == []
        assert not bench.pids("ecmwf", "wireguard-go")


def test_two_sites_behind_nat_are_relayed_through_the_client_and_three_hosts_cannot_be_joined(bench: LabBench) -> None:
    with without_endpoint(bench, "ecmwf"), without_endpoint(bench, "eumetsat"):
        direct = delivered(bench, "ecmwf", "eumetsat")
        with bench.booted(*FEW) as boot:
            assert "2 links have shaken hands" in boot.said
            compute_across(bench, boot.address)
        assert delivered(bench, "ecmwf", "eumetsat") == direct
        with without_endpoint(bench, "client"):
            boot = bench.start_boot(*SITES, *FEW)
            assert boot.wait() == 1
            assert "cannot be joined: neither has an address at which the other could reach it" in boot.lines[-1]


def test_a_client_behind_nat_calls_the_sites(bench: LabBench) -> None:
    with without_endpoint(bench, "client"), bench.booted(*FEW, sites=(EUMETSAT,)) as boot:
        assert "1 link has shaken hands" in boot.said


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPeer:
    """What an interface knows of a peer."""

    port: str
    keepalive: str


def peers_of(bench: LabBench, host: str) -> dict[str, SeenPeer]:
    """Ask a host's gateways for their peers, by the address from which each was heard last."""
    [pid] = bench.pids(host, "wireguard-go")
    dump = bench.lab.run(host, "nsenter", f"--target={pid}", "--mount", "wg", "show", "all", "dump").stdout
    found = {}
    for fields in (line.split("\t") for line in dump.splitlines()):
        if len(fields) == PEER_FIELDS:
            address, _, port = fields[3].rpartition(":")
            found[address] = SeenPeer(port=port, keepalive=fields[8])
    return found


GROW_AND_SHRINK = """
import json, random, sys, time
from distributed import Client, get_worker, wait
from meshcompute import pool
from meshcompute.mesh.cluster import MeshCluster
from meshcompute.protocol import WorkerRequest

def found(client):
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {info["name"]: address.rpartition("]")[0].rpartition("[")[2] for address, info in workers.items()}

def until(is_true, what, seconds=60):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, what
        time.sleep(0.1)

def draw(number):
    return get_worker().name, number, random.random()

def busy(number):
    time.sleep(0.2)
    return number

def mtu():
    with open("/sys/class/net/mesh0/mtu") as file:
        return int(file.read())

request = WorkerRequest(containers=2, processes_per_container=2)
options = {"workers": request, "lease_seconds": 60, "mtu": 1380, "quiet": True}
with MeshCluster(sys.argv[1:], **options) as cluster, Client(cluster) as client:
    said = {"at first": found(client), "mtu": sorted(set(client.run(mtu).values()))}
    cluster.scale(6, site="ecmwf")
    client.wait_for_workers(10, timeout=60)
    said["grown"] = found(client)
    with pool("ecmwf"):
        running = client.map(busy, range(100), pure=False)
        held = client.map(draw, range(60), pure=False)
    wait(held)
    values = client.gather(held)
    said["who held"] = sorted({name for name, _number, _value in values})
    cluster.scale(2, site="ecmwf")
    until(lambda: len(found(client)) == 6, found(client))
    said["shrunk"] = found(client)
    said["lost"] = client.gather(held) != values
    said["went on"] = sorted(client.gather(running)) == list(range(100))
    cluster.adapt(minimum=1, maximum=2, site="ecmwf", interval_seconds=0.5)
    with pool("ecmwf"):
        more = client.map(busy, range(1000), pure=False)
    until(lambda: len([name for name in found(client) if name.startswith("ecmwf")]) == 4, "grown by itself")
    said["adapted"] = found(client)
    client.cancel(more)
    del more
    until(lambda: len([name for name in found(client) if name.startswith("ecmwf")]) == 2, "shrunk by itself")
    said["kept"] = client.gather(held) == values
print(json.dumps(said))
"""


def test_sites_grow_and_shrink_under_a_computation_and_lose_nothing(bench: LabBench) -> None:
    process = bench.start_python(GROW_AND_SHRINK, *SITES)
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    said = json.loads(output.splitlines()[-1])
    ecmwf = {f"ecmwf-1-{number}": 0x11 + number // 2 for number in range(6)}
    eumetsat = {f"eumetsat-2-{number}": 0x11 + number // 2 for number in range(4)}

    def nodes(addresses: dict[str, str]) -> dict[str, int]:
        sites = {name: int(address.split(":")[3], 16) for name, address in addresses.items()}
        assert all(site == (1 if name.startswith("ecmwf") else 2) for name, site in sites.items()), sites
        return {name: int(address.rpartition("::")[2], 16) for name, address in addresses.items()}

    some = {name: node for name, node in ecmwf.items() if node < 0x13}
    few = {name: node for name, node in ecmwf.items() if node < 0x12}
    assert nodes(said["at first"]) == {**some, **eumetsat}
    assert nodes(said["grown"]) == {**ecmwf, **eumetsat}
    assert nodes(said["shrunk"]) == {**few, **eumetsat}
    assert nodes(said["adapted"]) == {**some, **eumetsat}
    assert set(said["who held"]) - set(few), "nothing was held by those who left: this proves nothing"
    assert not said["lost"]
    assert said["went on"]
    assert said["kept"]
    assert said["mtu"] == [1380]
