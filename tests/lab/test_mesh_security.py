"""Who can reach what, while two people's clusters run at the same sites.

Covers what crosses the WAN, what workers, strangers and other clusters reach, what a worker's container may do, and
where private keys are not. The clusters are started once, with everything at its most talkative.
"""

from __future__ import annotations

import json
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from labbench import HOSTS, SITES, Boot, LabBench
from labprobes import (
    ICMP,
    REACH,
    SSH_PORT,
    TCP,
    ask_site,
    find_in_lab,
    forms_of,
    private_keys,
    reachable,
    read_capture,
)

MESH, GUEST = "fda5:c0ff:eeee", "fdbb:bbbb:bbbb"  # prefixes of the two people's clusters
LISTENING = 7007  # a port at which every host listens, at all of its addresses
ADDRESSES = {"client": "10.8.0.3", "ecmwf": "10.8.0.4", "eumetsat": "10.8.0.2"}
MARKER_SEED, MARKER_NBYTES = 1, 300_000

# The command line of meshcompute up, with a log of all that it does.
UP_AND_TELL = """
import logging, sys
logging.basicConfig(level="DEBUG", stream=sys.stderr)
from meshcompute.cli import main
main()
"""
LISTEN = f"""
import os, socket, threading, time
def serve(kind):
    with socket.socket(socket.AF_INET6, kind) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", {LISTENING}))
        if kind == socket.SOCK_STREAM:
            server.listen()
        while True:
            if kind == socket.SOCK_STREAM:
                server.accept()[0].close()
            else:
                server.sendto(b"here", server.recvfrom(100)[1])
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    threading.Thread(target=serve, args=(kind,), daemon=True).start()
print("listening", flush=True)
time.sleep(1000)
"""
ON_CLUSTER = f"""
{REACH}
import json, os, pathlib, random, subprocess, sys
from distributed import Client
argument = json.loads(sys.argv[2])
def names(client):
    return {{worker["name"]: address for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()}}
with Client(sys.argv[1]) as client:
"""
FROM_EVERYWHERE = f"""{ON_CLUSTER}
    found = client.run(reach, argument, workers=[names(client)[name] for name in ("ecmwf-1-0", "eumetsat-2-0")
                                                 if name in names(client)])
    print(json.dumps([*found.values(), client.run_on_scheduler(reach, argument)]))
"""
WORKERS = f"""{ON_CLUSTER}
    print(json.dumps(names(client)))
"""
MOVE_MARKER = f"""{ON_CLUSTER}
    def make():
        return random.Random({MARKER_SEED}).randbytes({MARKER_NBYTES})
    places = names(client)
    made = client.submit(make, workers=[places["ecmwf-1-0"]])
    print(client.submit(len, made, workers=[places["eumetsat-2-0"]]).result())
    print(len(made.result()))
"""
INSIDE = f"""{ON_CLUSTER}
    def look():
        def fails(act):
            try:
                act()
            except OSError as exc:
                return exc.strerror
        status = dict(line.split(":\\t", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
        mounts = [line.split() for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
        return {{
            "status": status,
            "interfaces": sorted(os.listdir("/sys/class/net")),
            "addresses": [line.split()[0] for line in pathlib.Path("/proc/net/if_inet6").read_text().splitlines()
                          if not line.startswith("fe80") and line.split()[-1] != "lo"],
            "routes4": pathlib.Path("/proc/net/route").read_text().splitlines()[1:],
            "mounts": {{mount[4]: mount[5].split(",") for mount in mounts}},
            "data": sorted(os.listdir("/data")),
            "in /data/ecmwf": sorted(os.listdir("/data/ecmwf")),
            "mine": pathlib.Path("/data/ecmwf/mine").read_text(),
            "team": pathlib.Path("/data/ecmwf/team").read_text(),
            "other": fails(lambda: pathlib.Path("/data/ecmwf/other").read_text()),
            "write root": fails(lambda: pathlib.Path("/new").write_text("")),
            "write data": fails(lambda: pathlib.Path("/data/ecmwf/new").write_text("")),
            "write unit": fails(lambda: pathlib.Path("/run/meshcompute/lease").write_text("1e9")),
            "write sysctl": fails(lambda: pathlib.Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")),
            "engine": [str(path) for path in pathlib.Path("/").glob("**/docker.sock")][:3],
            "environment": dict(os.environ),
        }}
    print(json.dumps(client.run(look, workers=[names(client)["ecmwf-1-0"]])))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Two people's clusters, and what was noted of them."""

    bench: LabBench
    mesh: Boot
    guest: Boot
    capture: Path

    def ask(self, source: str, argument: Any = None, *, user: str = "mesh") -> Any:
        """Run a program with one of the clusters; gives what it prints, as JSON."""
        boot = self.mesh if user == "mesh" else self.guest
        return json.loads(self.bench.python(source, boot.address, json.dumps(argument), user=user))

    def cluster_id(self, user: str = "mesh") -> str:
        """Ask a site for the id of a user's only cluster."""
        ((_status, clusters),) = ask_site(self.bench.lab, "ecmwf", ("GET", "/v1/clusters"), user=user)
        (cluster,) = clusters
        return str(cluster["cluster_id"])


@contextmanager
def listeners(bench: LabBench) -> Iterator[None]:
    """Let every host listen at all of its addresses, TCP and UDP."""
    with ExitStack() as stack:
        for host in HOSTS:
            pipe = bench.lab.popen(host, sys.executable, "-c", LISTEN, stdout=-1, text=True)
            stack.callback(pipe.communicate)
            stack.callback(pipe.kill)
            assert pipe.stdout is not None
            assert pipe.stdout.readline() == "listening\n"
        yield


@contextmanager
def talkative_daemons(bench: LabBench) -> Iterator[None]:
    """Let the daemons of all hosts write down everything that they do."""

    def restart(*options: str) -> None:
        for host in HOSTS:
            bench.kill(host, *bench.pids(host, "meshcompute-site"), signum=signal.SIGTERM)
            bench.wait_until(lambda host=host: not bench.pids(host, "meshcompute-site"), f"{host}'s daemon ends")
            bench.restart_daemon(host, *options)

    restart("--log-level", "DEBUG")
    try:
        yield
    finally:
        restart()


@contextmanager
def data_of_people(bench: LabBench) -> Iterator[None]:
    """Give ecmwf files of the user, of a group that the user is in, and of somebody else."""
    script = """
        cp -p /etc/group /run/group.before
        sed -i 's/^games:.*/games:x:60:mesh/' /etc/group
        cd /data/ecmwf
        for name in mine team other; do echo $name >$name; done
        chown mesh: mine; chown root:games team; chown guest: other; chmod 600 mine other; chmod 640 team
    """
    bench.lab.run("ecmwf", "sh", "-euc", script)
    try:
        yield
    finally:
        bench.lab.run("ecmwf", "sh", "-euc", "cp -p /run/group.before /etc/group; rm /run/group.before /data/ecmwf/*")


@pytest.fixture(scope="module")
def clusters(mesh_lab: LabBench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    """Have the clusters of two people at once; afterwards, every host looks as before."""
    bench = mesh_lab
    before = bench.observe()
    capture = tmp_path_factory.mktemp("wan") / "wan.pcap"
    with talkative_daemons(bench), data_of_people(bench):
        bench.lab.start_capture(capture)
        try:
            mesh = Boot(bench.start_python(UP_AND_TELL, "up", *SITES, "--prefix", MESH, "--name", "of-mesh"))
            try:
                mesh.wait_for(" ready: ")
                # On both kinds of links, and without eumetsat, whose host is a stranger to it.
                small = ("--processes", "1", "--link", "wireguard", "--prefix", GUEST, "--name", "of-guest")
                with bench.booted(*small, user="guest", sites=("guest@10.8.0.4",)) as guest:
                    yield Clusters(bench=bench, mesh=mesh, guest=guest, capture=capture)
            finally:
                if mesh.process.poll() is None:
                    mesh.stop()
                assert mesh.process.stdout is not None
                mesh.process.stdout.close()
        finally:
            bench.lab.stop_capture()
    bench.wait_as(before)


def test_between_sites_there_is_wireguard_and_ssh_and_no_plain_byte_of_a_task(clusters: Clusters) -> None:
    bench = clusters.bench
    assert bench.python(MOVE_MARKER, clusters.mesh.address, "null").split() == [str(MARKER_NBYTES)] * 2
    ports = {
        cluster["endpoint_port"]
        for user in ("mesh", "guest")
        for host in HOSTS
        for cluster in ask_site(bench.lab, host, ("GET", "/v1/clusters"), user=user)[0][1]
    }
    assert len(ports) == 2
    kinds = {"wireguard": 0, "ssh": 0, "icmp": 0}
    content = []
    for packet in read_capture(clusters.capture):
        if packet.is_wireguard and set(packet.ports) <= ports:
            kinds["wireguard"] += len(packet.payload)
        elif packet.is_ssh:
            kinds["ssh"] += len(packet.payload)
        else:
            assert packet.protocol == ICMP, packet
            kinds["icmp"] += 1
        content.append(packet.payload)
    assert kinds["wireguard"] > MARKER_NBYTES
    assert kinds["ssh"] > 10_000
    assert marks_in(content) == 0


def test_the_capture_shows_what_is_sent_in_clear(clusters: Clusters, tmp_path: Path) -> None:
    """Without this, the test before could not fail."""
    lab = clusters.bench.lab
    send = f"import random, socket; socket.create_connection(('10.8.0.2', 5005)).sendall({_MARKER_SOURCE})"
    receive = "import socket; c = socket.create_server(('', 5005)).accept()[0]\nwhile c.recv(9999): pass"
    receiver = lab.popen("eumetsat", sys.executable, "-c", receive)
    listening = "until ss -Hlnt sport = 5005 | grep -q .; do :; done"
    lab.run("eumetsat", "sh", "-c", listening)
    before = len(list(read_capture(clusters.capture)))
    lab.run("ecmwf", sys.executable, "-c", send)
    assert receiver.wait(20) == 0
    seen = [packet for packet in list(read_capture(clusters.capture))[before:] if 5005 in packet.ports]
    assert all(packet.protocol == TCP and not packet.is_ssh and not packet.is_wireguard for packet in seen)
    assert marks_in([packet.payload for packet in seen]) > 50


_MARKER_SOURCE = f"random.Random({MARKER_SEED}).randbytes({MARKER_NBYTES})"


def marks_in(payloads: list[bytes]) -> int:
    """Count pieces of the marker that are in the payload of one packet: 100 of 16 bytes are looked for."""
    marker = random.Random(MARKER_SEED).randbytes(MARKER_NBYTES)
    content = b"\n".join(payloads)
    return sum(marker[place : place + 16] in content for place in range(0, MARKER_NBYTES, MARKER_NBYTES // 100))


def test_a_worker_reaches_no_listener_of_any_host_but_its_scheduler(clusters: Clusters) -> None:
    scheduler = [f"{MESH}:0::1", 8786]
    gateways = [f"{MESH}:{site}::{node}" for site in range(3) for node in (1, 2)]
    addresses = [*ADDRESSES.values(), *gateways, "fe80::1%mesh0", "172.17.0.1", "127.0.0.1", "::1"]
    ports = (LISTENING, SSH_PORT, 8786, 8787, 51820, 51821)
    targets = [[address, port] for address in addresses for port in ports]
    with listeners(clusters.bench):
        there = {(address, LISTENING) for address in ADDRESSES.values()}
        assert reachable(clusters.bench.lab, "ecmwf", there) == there  # or the rest would say nothing
        by_ecmwf, by_eumetsat, by_scheduler = clusters.ask(FROM_EVERYWHERE, targets)
    assert by_ecmwf == by_eumetsat == [scheduler]
    own = [["127.0.0.1", 8786], ["127.0.0.1", 8787]]  # in its own container
    assert sorted(by_scheduler) == sorted([scheduler, *own])


def test_a_worker_of_another_cluster_reaches_nothing(clusters: Clusters) -> None:
    places = {
        user: [address.removeprefix("tcp://").rsplit(":", 1) for address in clusters.ask(WORKERS, user=user).values()]
        for user in ("mesh", "guest")
    }
    targets = {
        user: [[host.strip("[]"), int(port)] for host, port in [*found, (f"{prefix}::1", "8786")]]
        for (user, found), prefix in zip(places.items(), (MESH, GUEST), strict=True)
    }
    assert len(targets["mesh"]) == 9
    assert len(targets["guest"]) == 2
    everything = targets["mesh"] + targets["guest"]
    for user, own in targets.items():
        for found in clusters.ask(FROM_EVERYWHERE, everything, user=user):
            assert found == own


def test_a_stranger_on_the_wan_reaches_ssh_only_and_no_gateway_answers_its_handshakes(clusters: Clusters) -> None:
    bench = clusters.bench
    ((_ok, (cluster,)),) = ask_site(bench.lab, "ecmwf", ("GET", "/v1/clusters"), user="guest")
    # What a host listens at that is not its loopback's: SSH, and WireGuard, which answers nobody that it does not know.
    listening = bench.lab.run("ecmwf", "ss", "-Hlntu").stdout.splitlines()
    places = {(line.split()[0], line.split()[4].rpartition(":")[0::2]) for line in listening}
    open_ports = {(kind, int(port)) for kind, (host, port) in places if not host.startswith(("127.", "[::1]"))}
    assert ("tcp", SSH_PORT) in open_ports
    assert {kind for kind, port in open_ports if port != SSH_PORT} == {"udp"}
    assert len(open_ports) <= 4
    targets = {(ADDRESSES["ecmwf"], port) for port in (SSH_PORT, 8786, 8787, *(port for _kind, port in open_ports))}
    targets |= {(f"{GUEST}::1", 8786), (f"{GUEST}:1::1", SSH_PORT), (f"{MESH}::1", 8786), (f"{MESH}:2::1", SSH_PORT)}
    assert reachable(bench.lab, "eumetsat", targets) == {(ADDRESSES["ecmwf"], SSH_PORT)}

    gateway = (f"{ADDRESSES['ecmwf']}:{cluster['endpoint_port']}", cluster["public_key"])
    with stranger(bench, "client") as known, stranger(bench, "eumetsat") as unknown:
        known.add_peer(unknown.public_key)
        unknown.add_peer(known.public_key, f"{ADDRESSES['client']}:{known.port}")
        unknown.ping("fdcc::1")
        bench.wait_until(lambda: unknown.received(known.public_key) > 0, "two strangers that know each other meet")
        unknown.add_peer(gateway[1], gateway[0], f"{GUEST}::/48")
        unknown.ping(f"{GUEST}:1::1")
        bench.wait_until(lambda: unknown.sent(gateway[1]) >= 2 * 148, "handshakes were tried")  # 148 bytes each
        assert unknown.received(gateway[1]) == 0


class Stranger:
    """A WireGuard interface on a host that is nobody's gateway."""

    def __init__(self, bench: LabBench, host: str) -> None:
        self.bench, self.host = bench, host
        self.port = 40000
        self.sh("until wg show stranger >/dev/null 2>&1; do sleep 0.05; done")
        self.sh("umask 077; wg genkey >/run/stranger; wg set stranger private-key /run/stranger listen-port 40000")
        self.sh("rm /run/stranger; ip link set stranger up")
        self.sh("ip -6 route add fdcc::/16 dev stranger; ip -6 route add fdbb::/16 dev stranger")
        self.public_key = self.sh("wg show stranger public-key").strip()

    def sh(self, script: str) -> str:
        """Run a line of shell on the host."""
        return self.bench.lab.run(self.host, "sh", "-euc", script).stdout

    def add_peer(self, public_key: str, endpoint: str | None = None, allowed: str = "fdcc::/16") -> None:
        """Know somebody."""
        place = f"endpoint {endpoint}" if endpoint else ""
        self.sh(f"wg set stranger peer {public_key} allowed-ips {allowed} {place}")

    def ping(self, address: str) -> None:
        """Send packets, which make WireGuard try handshakes; nobody has to answer."""
        self.sh(f"ip -6 address replace fdcc::99/128 dev stranger; ping -6 -c 1 -W 1 {address} >/dev/null || true")

    def _transfer(self, public_key: str) -> tuple[int, int]:
        for line in self.sh("wg show stranger transfer").splitlines():
            key, received, sent = line.split()
            if key == public_key:
                return int(received), int(sent)
        raise AssertionError(public_key)

    def received(self, public_key: str) -> int:
        """Bytes that came from a peer."""
        return self._transfer(public_key)[0]

    def sent(self, public_key: str) -> int:
        """Bytes that went to a peer."""
        return self._transfer(public_key)[1]


@contextmanager
def stranger(bench: LabBench, host: str) -> Iterator[Stranger]:
    """Have a WireGuard interface of nobody's on a host."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = bench.lab.popen(host, "wireguard-go", "-f", "stranger", **pipes)
    try:
        yield Stranger(bench, host)
    finally:
        bench.lab.run(host, "ip", "link", "delete", "stranger")
        process.wait(20)
        bench.lab.run(host, "rmdir", "/run/wireguard")


def test_a_worker_s_container_can_do_nothing_but_compute(clusters: Clusters) -> None:
    bench = clusters.bench
    account = next(account for account in bench.lab.status().lab.accounts if account.name == "mesh")
    name = f"mc-{clusters.cluster_id()[:8]}-ecmwf-1-u0"
    (container,) = json.loads(bench.lab.run("ecmwf", "docker", "inspect", name).stdout)
    host, config = container["HostConfig"], container["Config"]
    assert config["User"] == f"{account.uid}:{account.gid}"
    assert "60" in host["GroupAdd"]
    assert config["Labels"]["meshcompute.owner"] == "mesh"
    assert config["Labels"]["meshcompute.cluster"] == clusters.cluster_id()
    wanted = {
        "ReadonlyRootfs": True, "Privileged": False, "CapAdd": None, "CapDrop": ["ALL"], "NetworkMode": "none",
        "SecurityOpt": ["no-new-privileges"], "Binds": None, "PortBindings": None, "Init": True, "PidMode": "",
        "UTSMode": "", "IpcMode": "private", "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
    }  # fmt: skip
    assert {key: host[key] for key in wanted} == wanted
    assert not host["Devices"]
    assert 4 << 30 <= host["Memory"] == host["MemorySwap"] <= 6 << 30  # four processes of 1 GiB, and what they spill
    assert host["CpuQuota"] == 4 * host["CpuPeriod"]
    assert 0 < host["PidsLimit"] <= 2048
    mounts = {mount["Destination"]: (mount["Source"], mount["RW"]) for mount in container["Mounts"]}
    assert mounts.pop("/run/meshcompute")[1] is False
    assert mounts == {"/data/ecmwf": ("/data/ecmwf", False)}

    (inside,) = clusters.ask(INSIDE).values()
    status = inside["status"]
    assert status["Uid"].split() == [str(account.uid)] * 4
    assert status["Gid"].split() == [str(account.gid)] * 4
    assert set(status["Groups"].split()) == {str(account.gid), "60"}
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert inside["interfaces"] == ["lo", "mesh0"]
    assert inside["addresses"] == ["fda5c0ffeeee00010000000000000011"]
    assert inside["routes4"] == []
    assert "ro" in inside["mounts"]["/"]
    assert "ro" in inside["mounts"]["/data/ecmwf"]
    writable = {mount for mount, options in inside["mounts"].items() if "rw" in options}
    assert {mount for mount in writable if not mount.startswith(("/proc", "/dev", "/sys"))} == {"/tmp", "/scratch"}
    assert inside["data"] == ["ecmwf"]
    assert (inside["mine"], inside["team"], inside["other"]) == ("mine\n", "team\n", "Permission denied")
    for place in ("root", "data", "unit", "sysctl"):
        assert inside[f"write {place}"] == "Read-only file system", place
    assert inside["engine"] == []
    assert inside["environment"]["POOL_NAME"] == "ecmwf"


def test_private_keys_are_nowhere_but_in_the_interfaces(clusters: Clusters) -> None:
    lab = clusters.bench.lab
    keys = {name: key for host in HOSTS for name, key in private_keys(lab, host).items()}
    ids = {user: clusters.cluster_id(user)[:8] for user in ("mesh", "guest")}
    assert set(keys) == {
        *(f"{host} mc-{ids['mesh']}" for host in HOSTS),
        *(f"{host} mc-{ids['guest']}" for host in ("client", "ecmwf")),
        f"ecmwf mw11-{ids['guest']}",
    }
    assert len(set(keys.values())) == len(keys)
    needles = {form for key in keys.values() for form in forms_of(key)}
    assert find_in_lab(lab, needles) == set()
    told = [
        answer
        for user in ("mesh", "guest")
        for host in HOSTS
        for answer in ask_site(lab, host, *_everything(lab, host, user), user=user)
    ]
    assert {status for status, _body in told} == {200}
    said = json.dumps(told).encode() + "\n".join([*clusters.mesh.lines, *clusters.guest.lines]).encode()
    assert clusters.cluster_id().encode() in said
    assert [needle for needle in needles if needle in said] == []
    # The daemons and the client were talkative, or that would say little.
    assert "ran a program command=" in clusters.bench.log("ecmwf")
    assert "DEBUG" in clusters.mesh.said


def _everything(lab: Any, host: str, user: str) -> list[tuple[str, str]]:
    paths = ["/v1/site", "/v1/clusters", "/v1/health", "/v1/metrics", "/v1/openapi.json"]
    for cluster in ask_site(lab, host, ("GET", "/v1/clusters"), user=user)[0][1]:
        one = f"/v1/clusters/{cluster['cluster_id']}"
        paths += [one, *(f"{one}/logs?worker={worker['name']}&lines=10000" for worker in cluster["workers"])]
    return [("GET", path) for path in paths]


def test_a_secret_that_lies_about_would_be_found(clusters: Clusters) -> None:
    lab = clusters.bench.lab
    secret = secrets.token_hex(16)
    lab.run("ecmwf", "sh", "-c", f"echo x{secret} >/home/mesh/file; echo {secret} >/run/other")
    process = lab.popen("client", "env", f"SECRET={secret}", "sleep", "1000.5", stdout=subprocess.DEVNULL)
    try:
        clusters.bench.wait_until(lambda: clusters.bench.pids("client", "1000.5"), "it runs")
        found = find_in_lab(lab, [secret.encode()])
    finally:
        process.kill()
        process.wait()
        lab.run("ecmwf", "rm", "/home/mesh/file", "/run/other")
    assert {"ecmwf: /home/mesh/file", "ecmwf: /run/other"} <= found
    assert any(place.startswith("client: /proc/") and place.endswith("/environ of sleep") for place in found)
