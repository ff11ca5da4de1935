"""One suite for every data plane: WireGuard of the kernel, wireguard-go, and this machine's loopback.

::

    host 1 (namespace)  10.99.0.1 ══════veth══════ 10.99.0.2  host 2 (namespace)
      daemon, UDP socket                             daemon, UDP socket
      gateway's namespace  P:1::1                    gateway's namespace  P:2::1
      worker's namespace   P:1::11                   worker's namespace   P:2::11

No packet meets the machine's own network. A host is what its processes hold: it vanishes with them.
"""

import contextlib
import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from controlplane.network.topology import (
    GatewayConfig,
    Member,
    address_of,
    interface_of,
    peers_of,
    random_prefix,
)

DRIVER = Path(__file__).with_name("plane_driver.py")
PATIENCE_SECONDS = 20
LEASE_SECONDS = 60
INSTANCE = f"test-{os.getpid()}"  # what is left after a failure is found by this name


class PlaneError(Exception):
    """An error of a data plane, in another process."""


def wait_for(what, condition, seconds=PATIENCE_SECONDS):
    """Wait for a state, and return it."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


class Namespace:
    """A network namespace (and mounts) that lives as long as a process that sleeps in it, or as this process."""

    def __init__(self):
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "sh", "-c", "echo; exec sleep 600"],
            stdout=subprocess.PIPE,
        )
        self.process.stdout.readline()
        self.pid = self.process.pid
        self.path = f"/proc/{self.pid}/ns/net"
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *command):
        return ["nsenter", f"--net={self.path}", f"--mount=/proc/{self.pid}/ns/mnt", *command]

    def run(self, *command, check=True):
        return subprocess.run(self.command(*command), check=check, capture_output=True, text=True, timeout=30).stdout

    def succeeds(self, *command):
        return subprocess.run(self.command(*command), capture_output=True, timeout=30, check=False).returncode == 0

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Host(Namespace):
    """A host with a daemon."""

    def __init__(self, number, kind, folder, instance=INSTANCE):
        super().__init__()
        self.run("mount", "-t", "tmpfs", "run", "/run")  # nobody else's files come and go there
        self.number, self.kind, self.instance = number, kind, f"{instance}-{number}"
        self.folder, self.begun = folder, int(time.time())
        self.log = folder / f"host{number}.log"
        self.start_daemon()

    def start_daemon(self):
        with self.log.open("a") as log:
            self.daemon = subprocess.Popen(
                self.command(sys.executable, str(DRIVER), self.kind, self.instance),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TMPDIR": str(self.folder)},
            )

    def kill_daemon(self):
        self.daemon.kill()
        self.daemon.wait()
        self.daemon.stdin.close()
        self.daemon.stdout.close()

    def call(self, name, **arguments):
        self.daemon.stdin.write(json.dumps({"call": name, "arguments": arguments}, default=str) + "\n")
        self.daemon.stdin.flush()
        is_there, _, _ = select.select([self.daemon.stdout], [], [], PATIENCE_SECONDS)
        line = self.daemon.stdout.readline() if is_there else ""
        assert line, f"the daemon of host {self.number} does not answer:\n{self.log.read_text()[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise PlaneError(f"{answer['error']}: {answer['message']}")
        return answer["answer"]

    def ensure(self, config):
        return self.call("ensure", config=dataclasses.asdict(config))

    def attach(self, config, worker, node, link="veth"):
        address = address_of(config.prefix, config.site, node)
        self.call("attach", cluster_id=config.cluster_id, netns=worker.path, address=address, link=link)
        return str(address)

    def keepers(self):
        """Process ids of what holds gateways, and of wireguard-go, by name of the program."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode().split("\0")
                if any(f"meshcompute-gateway/{self.instance}/" in word for word in words):
                    found[int(process.name)] = words
        return found

    def wireguard_pids(self):
        """Process ids of wireguard-go, by interface."""
        found = {}
        for keeper in self.keepers():
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
                    words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
                    if words[0] == "wireguard-go":
                        found[words[2]] = int(child)
        return found

    def close(self):
        self.kill_daemon()
        for pid in [*self.wireguard_pids().values(), *self.keepers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().close()


def join(first, second, number=0):
    """Lay a cable between two hosts."""
    name = f"wan{number}"
    subprocess.run(
        f"ip link add {name} netns {first.pid} type veth peer name {name} netns {second.pid}".split(),
        check=True,
        timeout=10,
    )
    for host in (first, second):
        host.run("ip", "address", "add", f"10.99.{number}.{host.number}/24", "dev", name)
        host.run("ip", "-6", "address", "add", f"fd99:{number}::{host.number}/64", "dev", name, "nodad")
        host.run("ip", "link", "set", name, "up")


class Cluster:
    """A cluster at two hosts, with a worker at each."""

    def __init__(self, hosts, ports=(51820, 51820)):
        self.hosts = dict(enumerate(hosts, start=1))
        self.cluster_id = uuid.uuid4().hex
        self.prefix = random_prefix()
        self.ports = dict(enumerate(ports, start=1))
        self.workers = {site: Namespace() for site in self.hosts}
        self.addresses = {}
        self.configs = {}

    def boot(self):
        for site, host in self.hosts.items():
            self.configs[site] = GatewayConfig(
                cluster_id=self.cluster_id,
                prefix=self.prefix,
                site=site,
                listen_port=self.ports[site],
                deadline_seconds=LEASE_SECONDS,
            )
            state = host.ensure(self.configs[site])
            assert state["listen_port"] == self.ports[site]
            self.addresses[site] = host.attach(self.configs[site], self.workers[site], 11)
        self.exchange_keys()
        return self

    def exchange_keys(self):
        """Tell every gateway of the others; who is called goes first."""
        members = [
            Member(
                site=site,
                name=f"site{site}",
                public_key=host.ensure(self.configs[site])["public_key"],
                endpoint=f"10.99.0.{host.number}:{self.ports[site]}",
            )
            for site, host in self.hosts.items()
        ]
        for site, host in self.hosts.items():
            peers = peers_of(self.prefix, members, site)
            self.configs[site] = dataclasses.replace(self.configs[site], peers=peers)
            host.ensure(self.configs[site])

    def state(self, site):
        return self.hosts[site].call("observe")[self.cluster_id]

    def wait_for_handshakes(self):
        for site in self.hosts:
            wait_for(
                f"a handshake at site {site}",
                lambda site=site: [
                    peer for peer in self.state(site)["peers"] if peer["latest_handshake_age_seconds"] is not None
                ],
            )
        return self

    def pings(self, source=1, target=2):
        return ping(self.workers[source], self.addresses[target])

    def close(self):
        for host in self.hosts.values():
            if host.daemon.poll() is None:
                host.call("remove", cluster_id=self.cluster_id)
        for worker in self.workers.values():
            worker.close()


def ping(source, target):
    return source.succeeds("ping", "-6", "-n", "-c", "1", "-W", "1", target)


def connects(source, target, port):
    """Whether a TCP connection can be made."""
    code = f"import socket; socket.create_connection(({target!r}, {port}), 1)"
    return source.succeeds(sys.executable, "-I", "-S", "-c", code)


@contextlib.contextmanager
def listener(namespace, port=0):
    """A TCP server on all addresses, of IPv4 and IPv6, that writes back what it reads; yields its port."""
    code = (
        "import socket, threading\n"
        f"server = socket.create_server(('::', {port}), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "print(server.getsockname()[1], flush=True)\n"
        "def echo(connection):\n"
        "    while data := connection.recv(65536):\n"
        "        connection.sendall(data)\n"
        "while True:\n"
        "    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()\n"
    )
    command = namespace.command("setpriv", "--pdeathsig", "KILL", sys.executable, "-I", "-S", "-c", code)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def conversation(source, target, port):
    """A TCP connection that stays; yields a function that sends 64 KiB and waits until they are back."""
    code = (
        "import socket, sys\n"
        f"connection = socket.create_connection(({target!r}, {port}), 5)\n"
        "connection.settimeout(30)\n"
        "for line in sys.stdin:\n"
        "    data = line.encode() * 8192\n"
        "    connection.sendall(data)\n"
        "    back = b''\n"
        "    while len(back) < len(data):\n"
        "        back += connection.recv(65536)\n"
        "    print(back == data, flush=True)\n"
    )
    command = source.command("setpriv", "--pdeathsig", "KILL", sys.executable, "-I", "-S", "-c", code)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def exchange():
            process.stdin.write("1234567\n")
            process.stdin.flush()
            return process.stdout.readline()

        try:
            yield exchange
        finally:
            process.kill()


def has_kernel_wireguard():
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "wireguard"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def need_backend(backend, need):
    """Skip where a kind of WireGuard is missing; in CI only the kernel's may be."""
    need("root, for network namespaces", os.geteuid() == 0)
    if backend == "kernel" and not has_kernel_wireguard():
        pytest.skip("this kernel has no WireGuard module (modprobe wireguard): its backend is not tested here")
    programs = ["wg", "nft", "ping", "setpriv", "unshare", "nsenter", "ip", "ss"]
    for program in [*programs, "wireguard-go"] if backend == "userspace" else programs:
        need(program, shutil.which(program))


@pytest.fixture(scope="module", params=["userspace", "kernel"])
def wireguard(request, need):
    """Name of a backend that this machine has."""
    need_backend(request.param, need)
    return request.param


@pytest.fixture(scope="module")
def hosts(wireguard, tmp_path_factory):
    """Two hosts that reach each other."""
    folder = tmp_path_factory.mktemp("hosts")
    with contextlib.ExitStack() as stack:
        made = []
        for number in (1, 2):
            made.append(Host(number, wireguard, folder))
            stack.callback(made[-1].close)
        join(*made)
        yield made


@pytest.fixture(scope="module")
def cluster(hosts):
    """A cluster that is up; tests leave it up."""
    made = Cluster(hosts)
    try:
        yield made.boot().wait_for_handshakes()
    finally:
        made.close()


# ------------------------------------------------------------------------------------------------- every data plane


@pytest.fixture(scope="module", params=["loopback", "userspace", "kernel"])
def plane(request, need, tmp_path_factory):
    """A host of its own, with any data plane."""
    kind, folder = request.param, tmp_path_factory.mktemp("plane")
    if kind != "loopback":
        need_backend(kind, need)
    host = LocalHost(3, kind, folder) if kind == "loopback" else Host(3, kind, folder)
    yield host
    host.close()


class LocalHost(Host):
    """A daemon without namespaces: the loopback needs no root."""

    def __init__(self, number, kind, folder):
        self.number, self.kind, self.instance, self.pid = number, kind, f"{INSTANCE}-{number}", os.getpid()
        self.path = "/proc/self/ns/net"
        self.folder, self.log = folder, folder / "host.log"
        self.start_daemon()

    def command(self, *command):
        return list(command)

    def close(self):
        self.kill_daemon()


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
    wait_for("the end of the gateway", lambda: config.cluster_id not in plane.call("observe"), seconds=5)


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
        wait_for("another wireguard-go", lambda: host.wireguard_pids().get(name, pid) != pid, seconds=5)
        wait_for("a packet between the sites", cluster.pings, seconds=5)
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
        wait_for("another keeper", lambda: set(host.keepers()) - {keeper}, seconds=5)
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
        wait_for("another wireguard-go", lambda: host.wireguard_pids().get(name, pids[name]) != pids[name], seconds=5)
        wait_for("a packet between the sites", cluster.pings, seconds=5)
        assert cluster.state(1)["public_key"] == before["public_key"], "read back from the interface"


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


def test_a_worker_can_be_joined_by_wireguard_of_its_own_and_is_mended_likewise(cluster, wireguard):
    host, worker = cluster.hosts[1], Namespace()
    try:
        address = host.attach(cluster.configs[1], worker, 12, link="wireguard")
        wait_for("a packet from site to site", lambda: ping(worker, cluster.addresses[2]), seconds=5)
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
                    wait_for("a packet after that", lambda: ping(worker, cluster.addresses[2]), seconds=8)
        host.call("detach", cluster_id=cluster.cluster_id, address=address)
        assert "mesh0" not in worker.run("ip", "link")
        assert not any(name.startswith("mw") for name in host.wireguard_pids())
        assert not ping(cluster.workers[2], address)
    finally:
        worker.close()


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


def everything_of(host):
    """What the kernel has of a host: links, routes, files, mounts, rules, sockets and processes."""
    # The kernel takes its time with link-local addresses of cables.
    routes = "ip -6 route | grep -v fe80"
    inside = host.run("sh", "-c", f"ip -o link | cut -d: -f2; {routes}; ls -R /run; cat /proc/mounts; nft list ruleset")
    unix_sockets = host.run("cat", "/proc/self/net/unix").split()
    sockets = {word for word in unix_sockets if f"meshcompute-gateway/{host.instance}/" in word}
    return inside, sockets, host.run("ss", "-Hlun"), host.keepers(), host.wireguard_pids()


def is_used(namespace):
    """Whether any process is in a network namespace, given by what its path leads to."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/net").readlink() == namespace:
                return True
    return False


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
        wait_for("the end of everything", lambda: everything_of(host) == before, seconds=5)
        wait_for("the end of the worker's link", lambda: "mesh0" not in worker.run("ip", "link"), seconds=2)
        assert not is_used(namespace)
    finally:
        worker.close()
        host.close()
