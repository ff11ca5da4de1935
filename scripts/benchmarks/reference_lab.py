"""What ``reference.py`` does in the lab: mounts, programs on the client's host, and counting what crosses.

Covers acting and looking; decisions and figures are elsewhere.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlab import HOSTS, SITES, say, wait_until
from reference_calculations import STORE_PORT, store_name

from meshcompute.lab.running import Link, RunningLab

HERE = Path(__file__).resolve().parent
SITE_FILE = "/etc/meshcompute/site.toml"
PROGRAMS_SOCKET = "/tmp/reference.socket"  # noqa: S108 - the lab's own
PROGRAM_SECONDS = 7200.0
PROGRAM_END_SECONDS = 10.0
TICK_SECONDS = 2.0
QUIET_TRIES = 10
TELLING_SHARE = 0.02  # of the bytes: before so much has crossed, nobody can say how long the rest takes
# Read-only, for all users, pages kept as long as the kernel wants: the files do not change.
SSHFS_OPTIONS = "ro,allow_other,kernel_cache,attr_timeout=3600,entry_timeout=3600,reconnect,Compression=no"
Pair = tuple[str, str]
# On the LAN of each site, of which the WAN knows nothing.
STORES = {"ecmwf": "10.1.0.5", "eumetsat": "10.2.0.5"}
# Where another host finds a site's store while SSH forwards it there.
FORWARDED = {"ecmwf": "127.0.1.1", "eumetsat": "127.0.1.2"}
_FORWARD = "ssh -N -o Compression=no -L {here}:{port}:{store}:{port} {site} & read end; kill $!; wait $!"

# On a host, for every line: what each WireGuard interface has sent to each peer. wireguard-go's are found by control
# sockets, which the keepers' mount namespaces have; the kernel's show themselves in their network namespaces only.
_WIREGUARD = """
import glob, json, os, subprocess, sys

def inode(path):
    try:
        return os.readlink(path)
    except OSError:
        return None

def comm(folder):
    try:
        with open(folder + "/comm") as file:
            return file.read().strip()
    except OSError:
        return None

for _ in sys.stdin:
    folders = glob.glob("/proc/[0-9]*")
    programs = [folder for folder in folders if comm(folder) == "wireguard-go"]
    kind, option = ("mnt", "--mount") if programs else ("net", "--net")
    namespaces = {inode(f"{folder}/ns/{kind}"): f"{option}={folder}/ns/{kind}" for folder in programs or folders}
    seen = {}
    for entered in namespaces.values():
        for what, length in (("endpoints", 2), ("transfer", 3)):
            command = ["nsenter", entered, "wg", "show", "all", what]
            for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
                key, *values = line.split()[-length:]  # an interface's name is left out where it is the last line's
                seen.setdefault(key, {})[what] = values
    print(json.dumps(seen), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What has been sent from one host to another: by the lab's counters, and by WireGuard's own."""

    nbytes: int = 0
    udp_nbytes: int = 0
    udp_packets: int = 0
    wireguard_nbytes: int = 0

    def __sub__(self, other: Sent) -> Sent:
        """What has been sent since."""
        return Sent(**{name: getattr(self, name) - getattr(other, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All counters.

    Attributes
    ----------
    sent
        By pair of hosts, at once when they were asked for.
    settled
        The same at a moment shortly after, when nothing passed while they were read.
    unsure_nbytes
        What passed all the same.
    """

    sent: Mapping[Pair, Sent]
    settled: Mapping[Pair, Sent]
    unsure_nbytes: int


class Counters:
    """All counters of a lab.

    Parameters
    ----------
    lab
        The lab.
    """

    def __init__(self, lab: RunningLab) -> None:
        self._lab = lab
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        pipes["start_new_session"] = True  # a Ctrl-C in the terminal is for the benchmark, which ends all in order
        self._asked = {host: lab.popen(host, sys.executable, "-c", _WIREGUARD, **pipes) for host in HOSTS}
        self._hosts = {str(host.address): host.name for host in lab.status().lab.hosts}

    def read(self) -> Reading:
        """Read all of them; again, as long as something passes meanwhile."""
        first = None
        for _ in range(QUIET_TRIES):
            links = self._lab.links()  # the lab's first: they are what is told
            before = self._wireguard()
            first = first or _sent(links, before)
            links = self._lab.links()
            after = self._wireguard()
            if before == after:
                break
        assert first is not None
        unsure = sum(after.values()) - sum(before.values())
        return Reading(sent=first, settled=_sent(links, before), unsure_nbytes=unsure)

    def total_nbytes(self) -> int:
        """All that has been sent between hosts."""
        return sum(link.counters.sent_nbytes for link in self._lab.links().values())

    def _wireguard(self) -> dict[Pair, int]:
        for process in self._asked.values():
            process.stdin.write("\n")
            process.stdin.flush()
        sent: dict[Pair, int] = {}
        for host, process in self._asked.items():
            for peer in json.loads(process.stdout.readline()).values():
                target = self._hosts.get(peer.get("endpoints", [""])[0].rpartition(":")[0])
                if target is not None:
                    sent[host, target] = sent.get((host, target), 0) + int(peer["transfer"][1])
        return sent

    def close(self) -> None:
        """End the programs that look."""
        for process in self._asked.values():
            _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a program on a host that ends with its input, and by force if it does not: the figures are there already."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(PROGRAM_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sent(links: Mapping[Pair, Link], wireguard: Mapping[Pair, int]) -> dict[Pair, Sent]:
    return {
        pair: Sent(
            nbytes=link.counters.sent_nbytes,
            udp_nbytes=link.counters.sent_udp_nbytes,
            udp_packets=link.counters.sent_udp_packets,
            wireguard_nbytes=wireguard.get(pair, 0),
        )
        for pair, link in links.items()
    }


class Programs:
    """The server of programs on the client's host, which has imported what users import.

    Parameters
    ----------
    lab
        The lab.
    """

    def __init__(self, lab: RunningLab) -> None:
        command = (sys.executable, str(HERE / "reference_programs.py"), PROGRAMS_SOCKET)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "start_new_session": True}
        self._server = lab.popen("client", *command, user="mesh", text=True, **pipes)
        # A socket with a name is reached by any process that sees the file, whatever its network.
        self._path = f"/proc/{lab.status().pids['client']}/root{PROGRAMS_SOCKET}"

    def wait_listening(self) -> None:
        """Wait until all is imported."""
        if self._server.stdout.readline() != "listening\n":
            raise RuntimeError(f"reference_programs.py ended with {self._server.wait()}")

    @contextmanager
    def started(self, options: Mapping[str, Any]) -> Iterator[Program]:
        """Have a program until the block ends."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            connection.sendall(json.dumps(options).encode() + b"\n")
            yield Program(connection, str(options["program"]))

    def close(self) -> None:
        """End the server; programs end when their input does, or with the lab."""
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()


class Program:
    """A program on the client's host that does something when it is told to.

    Parameters
    ----------
    connection
        Its standard input and output.
    name
        For messages.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection, self._name = connection, name
        self._received = b""

    def wait_for(self, word: str | None = None, tick: Callable[[], None] = lambda: None) -> str:
        """Wait for a word, or any line; gives the line. Calls ``tick`` from time to time."""
        deadline = time.monotonic() + PROGRAM_SECONDS
        self._connection.settimeout(TICK_SECONDS)
        while time.monotonic() < deadline:
            line, ended, rest = self._received.partition(b"\n")
            if not ended:
                try:
                    more = self._connection.recv(1 << 20)
                except TimeoutError:
                    tick()
                    continue
                if not more:
                    raise RuntimeError(f"The program {self._name} ended")
                self._received += more
                continue
            self._received = rest
            text = line.decode()
            if text.startswith('{"failed"'):
                raise RuntimeError(f"The program {self._name} failed: {json.loads(text)['failed']}")
            if word is None or text == word:
                return text
        raise RuntimeError(f"The program {self._name} did not say {word!r} within {PROGRAM_SECONDS:g} s")

    def go(self) -> None:
        """Let it go on."""
        self._connection.sendall(b"\n")

    def result(self) -> Any:
        """Let it go on, and read what it found out."""
        self.go()
        return json.loads(self.wait_for())


@contextmanager
def mounted(lab: RunningLab, mounts: Iterable[Pair]) -> Iterator[None]:
    """Have the data of sites mounted on hosts: (host, site). The kernels' caches of it are empty at first."""
    with ExitStack() as stack:
        for host, site in mounts:
            folder = f"/data/{site}"
            # Both programs stay, and must not hold our pipes.
            command = (
                f"mkdir -p {folder} && sshfs -o {SSHFS_OPTIONS} {SITES[site]}:{folder} {folder} >/run/sshfs.log 2>&1"
            )
            lab.run(host, "sh", "-c", f"({command}) || {{ cat /run/sshfs.log; exit 1; }}")
            stack.callback(_unmount, lab, host, folder)
        yield


def _unmount(lab: RunningLab, host: str, folder: str) -> None:
    wait_until(lambda: lab.run(host, "umount", folder, check=False).returncode == 0, f"{host} lets {folder} go")


@contextmanager
def forwarded(lab: RunningLab, forwards: Iterable[Pair]) -> Iterator[None]:
    """Have the object stores of sites at hosts, through SSH: (host, site)."""
    with ExitStack() as stack:
        for host, site in forwards:
            command = _FORWARD.format(here=FORWARDED[site], port=STORE_PORT, store=STORES[site], site=SITES[site])
            process = lab.popen(host, "sh", "-c", command, stdin=subprocess.PIPE, start_new_session=True)
            stack.callback(_end, process)
            asked = ("ss", "-Hltn", f"src {FORWARDED[site]}:{STORE_PORT}")
            wait_until(lambda h=host, a=asked: lab.run(h, *a).stdout, f"{host} forwards to the store of {site}")
        yield


@contextmanager
def serving(lab: RunningLab) -> Iterator[None]:
    """Have an object store at each site, with what lies in the site's folder, which only hosts of the site reach."""
    with ExitStack() as stack:
        for site, address in STORES.items():
            lab.run(site, "ip", "address", "add", f"{address}/32", "dev", "lo")
            command = (sys.executable, str(HERE / "reference_store.py"), address, site, f"/data/{site}")
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
            process = lab.popen(site, *command, text=True, stderr=subprocess.DEVNULL, **pipes)
            stack.callback(_end, process)
            if process.stdout.readline() != "serving\n":
                raise RuntimeError(f"The object store of {site} ended with {process.wait()}")
        names = "".join(f"{FORWARDED[site]}\t{store_name(site)}\n" for site in SITES)
        lab.run("client", "sh", "-c", "cat >>/etc/hosts", input=names)
        yield


def let_sites_mount(lab: RunningLab) -> None:
    """Do what operators would: sites may log in at each other, and workers see what is at the other site.

    The folder of the other site is empty until something is mounted there, and its object store does not answer until
    it is forwarded.
    """
    copied = ("config", "id_ed25519", "known_hosts")
    files = {name: lab.run("client", "cat", f"/root/.ssh/{name}").stdout for name in copied}
    for site in SITES:
        for name, text in files.items():
            write = f"umask 077; mkdir -p /root/.ssh; cat >/root/.ssh/{name}"
            lab.run(site, "sh", "-c", write, input=text)
        folders = ", ".join(f'"/data/{name}"' for name in SITES)
        stores = {name: address if name == site else FORWARDED[name] for name, address in STORES.items()}
        services = ", ".join(f'"{store_name(name)}" = "{at}:{STORE_PORT}"' for name, at in stores.items())
        edit = f"s#^data_folders = .*#data_folders = [{folders}]#; s#^endpoints = .*#&\\nservices = {{ {services} }}#"
        lab.run(
            site, "sh", "-c", f"mkdir -p {' '.join(f'/data/{name}' for name in SITES)}; sed -i '{edit}' {SITE_FILE}"
        )
        _restart_daemon(lab, site)


def _restart_daemon(lab: RunningLab, host: str) -> None:
    found = lab.run(host, "sh", "-c", "ss -Hxlp 'src unix:/run/meshcompute/site.sock'").stdout
    pid = found.partition("pid=")[2].partition(",")[0]
    lab.run(host, "kill", pid)
    gone = f"{host}'s daemon ends"
    wait_until(lambda: lab.run(host, "test", "-e", f"/proc/{pid}", check=False).returncode != 0, gone)
    lab.run(host, "sh", "-c", "setsid sh /etc/lab/site </dev/null >/dev/null 2>&1 &")
    answers = f"{host}'s daemon answers"
    wait_until(lambda: lab.run(host, "meshcompute-site", "ping", check=False).returncode == 0, answers)


class Progress:
    """Tell a waiting person how far something is, by what has crossed.

    Parameters
    ----------
    counters
        Of the lab.
    what
        What runs.
    expected_nbytes
        What will cross, as far as one knows; 0 if little.
    """

    def __init__(self, counters: Counters, what: str, expected_nbytes: float) -> None:
        self._counters, self._what, self._expected = counters, what, expected_nbytes
        self._began, self._first = time.monotonic(), counters.total_nbytes()
        self._next = self._began + 10

    def __call__(self) -> None:
        """Say it, every now and then."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 30
        crossed = self._counters.total_nbytes() - self._first
        rest = (self._expected - crossed) / max(1.0, crossed / (now - self._began))
        is_known = rest > 0 and crossed > self._expected * TELLING_SHARE > 0
        left = f", about {rest / 60:.1f} min left" if is_known else ""
        say(f"    {self._what}: {crossed / 2**20:.1f} MiB have crossed in {now - self._began:.0f} s{left}")
