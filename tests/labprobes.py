"""What tests of the lab's security look with: captures of the WAN, private keys, and every place where one could lie.

Covers looking; what is expected is said by the tests.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from meshcompute.lab.running import LabStatus, RunningLab

PCAP_HEADER_NBYTES = 24
ICMP, TCP, UDP = 1, 6, 17  # IANA's numbers of protocols
SSH_PORT = 22
GATEWAY = "mesh-gateway"  # what the process that holds a gateway calls itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """An IPv4 packet on the WAN; ports are 0 where the protocol has none."""

    protocol: int
    source: IPv4Address
    target: IPv4Address
    ports: tuple[int, int]
    payload: bytes

    @property
    def is_ssh(self) -> bool:
        """Whether it belongs to a connection with an SSH server."""
        return self.protocol == TCP and SSH_PORT in self.ports

    @property
    def is_wireguard(self) -> bool:
        """Whether it is one of WireGuard's four kinds of messages, by the first four bytes of each."""
        return self.protocol == UDP and self.payload[:4] in {bytes((kind, 0, 0, 0)) for kind in (1, 2, 3, 4)}


def read_capture(path: Path) -> Iterator[Packet]:
    """Read a file that the lab's WAN has written (pcap, raw IP)."""
    data = path.read_bytes()
    offset = PCAP_HEADER_NBYTES
    while offset + 16 <= len(data):
        (length,) = struct.unpack_from("=8xI", data, offset)
        packet = data[offset + 16 : offset + 16 + length]
        offset += 16 + length
        header = (packet[0] & 0x0F) * 4
        protocol = packet[9]
        content = packet[header:]
        ports, start = (0, 0), 0
        if protocol in {TCP, UDP}:
            ports = struct.unpack_from("!HH", content)
            start = 8 if protocol == UDP else (content[12] >> 4) * 4
        yield Packet(
            protocol=protocol,
            source=IPv4Address(packet[12:16]),
            target=IPv4Address(packet[16:20]),
            ports=ports,
            payload=content[start:],
        )


def gateway_processes(lab: RunningLab, host: str) -> list[int]:
    """Find the processes that hold a host's gateways, by the numbers of its own pid namespace."""
    command = f"grep -lx {GATEWAY} /proc/[0-9]*/comm 2>/dev/null | cut -d/ -f3"
    return [int(pid) for pid in lab.run(host, "sh", "-c", command).stdout.split()]


def private_keys(lab: RunningLab, host: str) -> dict[str, str]:
    """Read the private keys of a host's WireGuard interfaces out of the interfaces, by cluster and name."""
    keys = {}
    for pid in gateway_processes(lab, host):
        # wireguard-go is asked through a socket in the keeper's mounts, the kernel in its network namespace.
        enter = ("nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--net=/proc/{pid}/ns/net")
        shown = lab.run(host, *enter, "wg", "show", "all", "private-key").stdout
        keys.update({f"{host} {name}": key for name, key in (line.split() for line in shown.splitlines())})
    return keys


def forms_of(key: str) -> set[bytes]:
    """List how a key may be written: base64 with and without its end, hexadecimal, raw."""
    raw = base64.b64decode(key)
    return {key.rstrip("=").encode(), raw, raw.hex().encode(), raw.hex().upper().encode()}


def find_in_lab(lab: RunningLab, needles: Iterable[bytes]) -> set[str]:
    """Search all that can be read on every host of a lab.

    Every file that a host has written anywhere (its root is an overlay on the machine's), its file systems in memory,
    those of its containers and of the gateways' processes, and the command lines and environments of all processes.

    Returns
    -------
    set of str
        Names of the places.
    """
    pattern = re.compile(b"|".join(re.escape(needle) for needle in needles))
    status = lab.status()
    return {
        f"{host}: {place}"
        for host in status.pids
        for place, path in _places(status, host)
        if pattern.search(_read(path)) is not None
    }


def _places(status: LabStatus, host: str) -> Iterator[tuple[str, Path]]:
    root = Path(f"/proc/{status.pids[host]}/root")
    upper = Path(f"/proc/{status.supervisor_pid}/root/mnt/hosts/{host}/upper")
    yield from _files(upper, "")
    for folder in ("run", "data", "dev/shm", "var/lib/docker/containers", "var/lib/meshcompute"):
        yield from _files(root / folder, f"/{folder}")
    for process in (root / "proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            yield f"/proc/{process.name}/{name} of {_read(process / 'comm').decode().strip()}", process / name
    # Containers and gateways have file systems of their own, beside those of the host.
    seen = {device for _top, device in _in_memory(root / "proc/1")}
    for process in (root / "proc").glob("[0-9]*"):
        for top, device in _in_memory(process):
            if device not in seen:
                seen.add(device)
                yield from _files(top, f"/{top.relative_to(process)}")


def _in_memory(process: Path) -> Iterator[tuple[Path, int]]:
    """List the tmpfs that a process sees, with their devices."""
    for mount in re.findall(r"^(?:\S+ ){4}/(\S*) .* - tmpfs ", _read(process / "mountinfo").decode(), re.MULTILINE):
        with suppress(OSError):
            yield process / "root" / mount, (process / "root" / mount).stat().st_dev


def _files(top: Path, name: str) -> Iterator[tuple[str, Path]]:
    for folder, _folders, names in os.walk(top):
        for each in names:
            path = Path(folder, each)
            if path.is_file() and not path.is_symlink():
                yield f"{name}/{path.relative_to(top)}", path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def ask_site(lab: RunningLab, host: str, *requests: Sequence[Any], user: str = "mesh", groups: str = "") -> list[Any]:
    """Send requests (method, path, and perhaps a body) to a host's daemon as one of its users.

    Returns
    -------
    list
        Of each, the HTTP status and the body, decoded where it is JSON.
    """
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={groups}" if groups else "--init-groups")
    return list(json.loads(lab.run(host, *become, sys.executable, "-c", _ASK, json.dumps(requests)).stdout))


_ASK = """
import http.client, json, socket, sys
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/meshcompute/site.sock")
def ask(method, path, body=None):
    connection = Connection("localhost", timeout=50)
    try:
        connection.request(method, path, body and json.dumps(body))
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text
    finally:
        connection.close()
print(json.dumps([ask(*request) for request in json.loads(sys.argv[1])]))
"""


def reachable(lab: RunningLab, host: str, targets: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Find out which of these TCP ports answer to a process of a host, in its own network namespace."""
    program = f"{REACH}\nimport json, sys\nprint(json.dumps(reach(json.loads(sys.argv[1]))))"
    found = lab.run(host, sys.executable, "-c", program, json.dumps(list(targets))).stdout
    return {(address, port) for address, port in json.loads(found)}


# Runs at hosts and in workers: gives the addresses and ports that take a connection, or answer a datagram.
REACH = """
def reach(targets):
    import socket
    from concurrent.futures import ThreadPoolExecutor

    def try_tcp(target):
        try:
            with socket.create_connection(tuple(target), timeout=5):
                return True
        except OSError:
            return False

    def try_udp(target):
        try:
            kind, _, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
            with socket.socket(kind, socket.SOCK_DGRAM) as asker:
                asker.settimeout(1)
                asker.connect(address)
                asker.send(b"anybody?")
                return bool(asker.recv(100))
        except OSError:
            return False

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda target: try_tcp(target) or try_udp(target), targets))
    return [target for target, answer in zip(targets, answers) if answer]
"""
