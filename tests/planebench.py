"""Hosts, workers and clusters for tests of data planes, and how to talk from one to the other.

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
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from waiting import wait_until

from controlplane.network.topology import GatewayConfig, Member, address_of, peers_of, random_prefix

DRIVER = Path(__file__).parent / "contract" / "plane_driver.py"
PATIENCE_SECONDS = 20
LEASE_SECONDS = 60
INSTANCE = f"test-{os.getpid()}"  # what is left after a failure is found by this name


class PlaneError(Exception):
    """An error of a data plane, in another process."""


def wait_for(what, condition, seconds=PATIENCE_SECONDS):
    """Wait for a state, and return it."""
    return wait_until(condition, what, seconds)


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

    def __init__(self, number, kind, folder, wrapper=()):
        super().__init__()
        self.run("mount", "-t", "tmpfs", "run", "/run")  # nobody else's files come and go there
        self.number, self.kind, self.instance, self.wrapper = number, kind, f"{INSTANCE}-{number}", wrapper
        self.folder, self.begun = folder, int(time.time())
        self.log = folder / f"host{number}.log"
        self.start_daemon()

    def start_daemon(self):
        with self.log.open("a") as log:
            self.daemon = subprocess.Popen(
                self.command(*self.wrapper, sys.executable, str(DRIVER), self.kind, self.instance),
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
    return source.succeeds("ping", "-6", "-n", "-c", "1", "-W", "2", target)


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


class LocalHost(Host):
    """A daemon without namespaces: the loopback needs no root."""

    def __init__(self, number, kind, folder):
        self.number, self.kind, self.instance, self.pid = number, kind, f"{INSTANCE}-{number}", os.getpid()
        self.path, self.wrapper = "/proc/self/ns/net", ()
        self.folder, self.log = folder, folder / "host.log"
        self.start_daemon()

    def command(self, *command):
        return list(command)

    def close(self):
        self.kill_daemon()


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
