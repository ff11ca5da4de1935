"""The process that holds a cluster's gateway, and ends it at its deadline whatever became of the daemon.

Covers one network namespace, its forwarding rules, the processes that serve it (wireguard-go, and the relay of what
the operator lets workers reach), and the deadline. Does not cover what is configured in the namespace: the daemon does
that, from outside. Run as a script, by path, with the standard library alone, so that it starts in some hundredths of a
second and shares nothing with the daemon's upgrade.

::

    host's namespace                                gateway's namespace (forwarding, nftables, nothing else)
      encrypted UDP socket ── wireguard-go ──────── mc-xxxxxxxx  P::/48     w11, w12 ... veth to the workers
      abstract socket @meshcompute-gateway/... ──── this process
      connections to services ── servicerelay ───── listeners, for this site's workers only

The namespace has no name and no mount: it lives as long as this process. WireGuard's control sockets lie in a tmpfs
that only this process and its children see. So whatever kills this process, the kernel takes everything away with it:
wireguard-go (its death signal), the interfaces, routes and rules (the namespace), the sockets (the mount). A daemon
finds its keepers again by the names of their sockets, which are no files either.

Requests are JSON, one packet each: ``status``, ``renew`` (seconds), ``spawn`` (name), ``relay`` (network, services),
``kill`` (name), ``watch`` and ``end``. Only the user that runs the keeper, and root, are heard.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWNET = 0x40000000
MS_SLAVE_RECURSIVE = 1 << 19 | 1 << 14  # linux/mount.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_NAME = 15
SOCKET_DEADLINE_SECONDS = 5.0
TERM_SECONDS = 1.0
LOG_LINES = 20
PACKET_NBYTES = 65536
CONTROL_FOLDER = Path("/run/wireguard")

# A gateway forwards, answers no router, and knows its addresses at once (nobody else can have them). A service may have
# a low port, such as 443, for which this process would need one right more.
SYSCTLS = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/addr_gen_mode": "1",  # no link-local addresses but the one that is given
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/accept_redirects": "0",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/ip_unprivileged_port_start": "0",  # for IPv6, too
}
# Forwarded is what goes from this cluster to this cluster, and comes from where its sender is. The gateway itself
# answers pings and says when a packet is too big; it listens to nothing but what the operator lets workers reach.
RULES = """
table ip6 meshcompute {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        fib saddr . iif oif missing drop
        ip6 saddr {prefix} ip6 daddr {prefix} accept
        reject with icmpv6 admin-prohibited
    }}
    chain services {{
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        icmpv6 type {{ echo-request, echo-reply, destination-unreachable, packet-too-big, time-exceeded,
                       parameter-problem, nd-neighbor-solicit, nd-neighbor-advert }} accept
        jump services
        reject with icmpv6 admin-prohibited
    }}
}}
table ip meshcompute {{
    chain forward {{ type filter hook forward priority filter; policy drop; }}
    chain input {{ type filter hook input priority filter; policy drop; iifname "lo" accept; }}
}}
"""
# For workers of the site that are where their address leads: nobody else, whatever other sites send here.
SERVICE_RULE = (
    "add rule ip6 meshcompute services ip6 saddr {network} fib saddr . iif oif exists "
    "ip6 daddr {address} tcp dport {port} accept\n"
)
RELAY = "services"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """Call the C library, and raise what it says."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=True, timeout=10)


class Keeper:
    """One gateway's namespace and processes.

    Parameters
    ----------
    listener
        Abstract socket, made in the host's namespace.
    deadline_seconds
        When to end, from now, unless somebody renews.
    """

    def __init__(self, listener: socket.socket, deadline_seconds: float) -> None:
        self._listener = listener
        self._deadline = time.monotonic() + deadline_seconds
        self._host_namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._services: list[Any] = []
        self._watchers: set[socket.socket] = set()
        self._log: list[str] = []
        self._is_ending = False

    def enter(self, prefix: str) -> None:
        """Move into namespaces of its own and make the rules there."""
        _call("unshare", CLONE_NEWNET | CLONE_NEWNS)
        # Unmounting on the host must still work: what happens to its mounts happens here, too, but not the other way.
        _call("mount", b"none", b"/", None, MS_SLAVE_RECURSIVE, None)
        _call("mount", b"meshcompute", b"/run", b"tmpfs", 0, b"size=256k,mode=0755")
        CONTROL_FOLDER.mkdir(mode=0o700)
        try:
            self._set_sysctls()
        except OSError:  # a service manager made /proc/sys read-only: not for the whole host is it written here
            _call("mount", b"proc", b"/proc", b"proc", 0, None)
            self._set_sysctls()
        _nft(RULES.format(prefix=prefix))

    @staticmethod
    def _set_sysctls() -> None:
        for name, value in SYSCTLS.items():
            Path("/proc/sys", name).write_text(value, encoding="ascii")

    def serve(self) -> None:
        """Answer until told to end, until SIGTERM, or until the deadline."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda _file: os.read(wake_read, 4096))
        while not self._is_ending and (remaining := self._deadline - time.monotonic()) > 0:
            for key, _events in self._selector.select(remaining):
                key.data(key.fileobj)
            self._reap()
        self._end_processes()

    def _on_term(self, *_: object) -> None:
        self._is_ending = True

    def _accept(self, _listener: object) -> None:
        connection, _address = self._listener.accept()
        _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.getuid()):
            connection.close()
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, self._on_packet)

    def _on_packet(self, connection: socket.socket) -> None:
        try:
            packet = connection.recv(PACKET_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._selector.unregister(connection)
            self._watchers.discard(connection)
            connection.close()
            return
        try:
            answer = self._answer(json.loads(packet), connection)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        self._send(connection, answer)

    def _answer(self, request: Mapping[str, Any], connection: socket.socket) -> dict[str, Any]:
        match request["do"]:
            case "renew":
                self._deadline = time.monotonic() + float(request["seconds"])
            case "spawn":
                self._spawn(str(request["name"]))
            case "relay":
                self._relay(str(request["network"]), request["services"])
            case "kill":
                self._kill(str(request["name"]))
            case "watch":
                self._watchers.add(connection)
            case "end":
                self._is_ending = True
                self._end_processes()
            case "status":
                pass
            case other:
                raise ValueError(f"no such request: {other!r}")
        return {
            "pid": os.getpid(),
            "processes": {name: process.pid for name, process in self._processes.items() if process.poll() is None},
            "remaining_seconds": self._deadline - time.monotonic(),
            "log": self._log,
        }

    @staticmethod
    def _send(connection: socket.socket, answer: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # gone, or not listening: the deadline does not wait for anybody
            connection.send(json.dumps(answer).encode())

    def _spawn(self, name: str) -> None:
        """Start wireguard-go in the host's network namespace and wait until it can be configured."""
        if name in self._processes and self._processes[name].poll() is None:
            return
        control = CONTROL_FOLDER / f"{name}.sock"
        control.unlink(missing_ok=True)  # of one that was killed
        process = self._start(name, ["wireguard-go", "-f", name])
        give_up = time.monotonic() + SOCKET_DEADLINE_SECONDS
        while not control.exists():
            if process.poll() is not None or time.monotonic() > give_up:
                self._kill(name)
                raise RuntimeError(f"wireguard-go -f {name} did not come up: {' / '.join(self._log[-3:])}")
            time.sleep(0.003)

    def _relay(self, network: str, services: list[Any]) -> None:
        """Let workers of this network reach these: address and port here, host and port as this host reaches them."""
        is_there = RELAY in self._processes and self._processes[RELAY].poll() is None
        if services == self._services and is_there == bool(services):
            return
        self._kill(RELAY)
        rules = "".join(SERVICE_RULE.format(network=network, address=s[0], port=s[1]) for s in services)
        _nft(f"flush chain ip6 meshcompute services\n{rules}")
        if not services:
            self._services = services
            return
        with contextlib.ExitStack() as stack:
            words = []
            for address, port, *target in services:
                listener = stack.enter_context(socket.create_server((address, port), family=socket.AF_INET6))
                words.append(",".join(map(str, (listener.fileno(), *target))))
            script = str(Path(__file__).with_name("servicerelay.py"))
            command = [sys.executable, "-I", "-S", script, str(os.getpid()), *words]
            self._start(RELAY, command, [int(word.partition(",")[0]) for word in words])
        self._services = services

    def _start(self, name: str, command: list[str], fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start a process in the host's network namespace that dies with this one."""
        keeper_pid = os.getpid()

        def enter_host() -> None:
            _call("setns", self._host_namespace, CLONE_NEWNET)
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper_pid:
                os._exit(1)

        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            preexec_fn=enter_host,  # noqa: PLW1509 - this process has one thread
        )
        self._processes[name] = process
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        self._selector.register(process.stderr, selectors.EVENT_READ, self._on_log)
        return process

    def _on_log(self, pipe: Any) -> None:
        data = pipe.read(PACKET_NBYTES)
        if data:
            # The banner says in a box that the kernel could do this; where it could, it would.
            lines = [line for line in data.decode(errors="replace").splitlines() if line and line[0] not in "┌│└"]
            self._log[:] = [*self._log, *lines][-LOG_LINES:]
        elif data == b"":
            self._selector.unregister(pipe)
            pipe.close()

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        if process.poll() is None:
            process.terminate()  # it removes its interface
            try:
                process.wait(TERM_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        pipe = process.stderr
        if pipe is not None and not pipe.closed:
            self._on_log(pipe)
            if not pipe.closed:
                self._selector.unregister(pipe)
                pipe.close()

    def _reap(self) -> None:
        ended = [name for name, process in self._processes.items() if process.poll() is not None]
        for name in ended:
            code = self._processes[name].returncode
            self._kill(name)
            self._log.append(f"{name} ended with {code}")
            for watcher in self._watchers:
                self._send(watcher, {"ended": name, "code": code})

    def _end_processes(self) -> None:
        for name in list(self._processes):
            self._kill(name)


def main(name: str, prefix: str, deadline_seconds: str) -> None:
    """Become a keeper: the caller's process ends when the gateway's namespace is there.

    Parameters
    ----------
    name
        Of the abstract socket.
    prefix
        Of the cluster.
    deadline_seconds
        When to end.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.bind(f"\0{name}")
    read_end, write_end = os.pipe()
    if os.fork() > 0:
        os.close(write_end)
        listener.close()
        os._exit(0 if os.read(read_end, 1) else 1)  # the keeper is there, or has said on stderr why not
    os.close(read_end)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        _call("prctl", PR_SET_NAME, b"mesh-gateway", 0, 0, 0)
    try:
        keeper = Keeper(listener, float(deadline_seconds))
        keeper.enter(prefix)
    except (OSError, subprocess.SubprocessError) as exc:
        print(f"no gateway could be made: {exc}", file=sys.stderr)
        os._exit(1)
    listener.listen(16)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.write(write_end, b"1")
    os.close(write_end)
    keeper.serve()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
