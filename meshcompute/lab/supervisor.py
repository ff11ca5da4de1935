"""The process that is the lab: it starts the hosts, moves their packets and answers on a control socket.

Covers the life of a lab from its first process to its last. Does not cover who starts it (``starting``): it expects
namespaces of its own, in which it is a child of process 1, and an open socket that listens.

Protocol: one JSON object per connection and direction, ended by a line end. ``status`` is answered with process file
descriptors besides, so that the caller knows the hosts by the numbers of its own pid namespace.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from meshcompute.lab.errors import LabError, LabStartError
from meshcompute.lab.hosts import RunningHost, make_keys, set_addresses, start_host, wait_until_ready
from meshcompute.lab.nat import Nat
from meshcompute.lab.shaping import Shape
from meshcompute.lab.topology import CONTROL_NETWORK, Host, Lab
from meshcompute.lab.wan import Wan, open_tun

__all__ = ["Supervisor", "main"]

BASE = Path("/mnt")  # an empty folder of every system (FHS); only this mount namespace sees what we put there
REQUEST_NBYTES = 65536
REQUEST_TIMEOUT_SECONDS = 5.0


class Supervisor:
    """The life of a lab.

    Parameters
    ----------
    lab
        What to start.
    listener
        Socket for requests.
    say
        Called with each line of progress.
    """

    def __init__(self, lab: Lab, listener: socket.socket, say: Callable[[str], None]) -> None:
        self.lab = lab
        self.listener = listener
        self.say = say
        self.hosts: dict[str, RunningHost] = {}
        devices = {host.name: open_tun(f"wan{number}") for number, host in enumerate(lab.hosts)}
        self._device_names = {host.name: f"wan{number}" for number, host in enumerate(lab.hosts)}
        shape = Shape(rate_bits_per_second=lab.rate_bits_per_second, delay_seconds=lab.delay_seconds, loss=lab.loss)
        addresses = {host.name: host.address.packed for host in lab.hosts}
        self.wan = Wan(devices, addresses, shape, CONTROL_NETWORK[1].packed)
        for host in lab.hosts:
            if host.has_nat:
                self._add_nat(host)

    def run(self) -> None:
        """Start everything, and serve until somebody ends it."""
        self.wan.watch(self.listener.fileno(), self._accept)
        failures: list[BaseException] = []
        starter = threading.Thread(target=self._start_all, args=(failures,), name="starter")
        starter.start()
        self.wan.run()
        starter.join()
        if failures:
            raise failures[0]

    def _start_all(self, failures: list[BaseException]) -> None:
        try:
            keys = BASE / "keys"
            keys.mkdir(mode=0o700)
            user_keys = make_keys(keys, tuple(account.name for account in self.lab.accounts))
            host_keys = make_keys(keys, tuple(host.name for host in self.lab.hosts))
            with ThreadPoolExecutor(len(self.lab.hosts)) as pool:
                list(pool.map(lambda host: self._start(host, host_keys, user_keys), self.lab.hosts))
            self.say("ready")
        except BaseException as exc:
            failures.append(exc)
            self.wan.stop()

    def _start(self, host: Host, host_keys: dict[str, tuple[str, str]], user_keys: dict[str, tuple[str, str]]) -> None:
        folder = BASE / "hosts" / host.name
        device = self._device_names[host.name]
        running = start_host(self.lab, host, folder=folder, host_keys=host_keys, user_keys=user_keys, device=device)
        wait_until_ready(self.lab, running, folder)
        self.hosts[host.name] = running
        self.say(f"{host.name} is up at {host.address}")

    # Requests

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(REQUEST_TIMEOUT_SECONDS)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            _, uid, _ = struct.unpack("3i", credentials)
            try:
                if uid != 0:
                    raise LabError(f"Only root may speak to the lab, not uid {uid}.")
                request = json.loads(connection.makefile().readline(REQUEST_NBYTES))
                answer, fds = self._answer(request)
            except (LabError, ValueError, KeyError, TypeError, OSError) as exc:
                answer, fds = {"error": str(exc)}, ()
            try:
                data = json.dumps(answer).encode() + b"\n"
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = connection.sendmsg([data], ancillary)
                connection.sendall(data[sent:])
            except OSError:  # whoever asked has gone
                pass
            for fd in fds:
                os.close(fd)

    def _answer(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[int]]:
        match request["do"]:
            case "status":
                hosts = dict(self.hosts)
                fds = [os.pidfd_open(1), os.pidfd_open(os.getpid()), *(os.pidfd_open(h.pid) for h in hosts.values())]
                return {
                    "lab": self.lab.to_json(),
                    "hosts": list(hosts),
                    "links": self._links(),
                    "nats": sorted(self.wan.nats),
                }, fds
            case "links":
                return {"links": self._links()}, ()
            case "shape":
                self._reshape(request["pairs"], request["changes"])
                return {"links": self._links()}, ()
            case "nat":
                self._set_nat(request["host"], request["has_nat"])
                return {}, ()
            case "capture":
                if request["path"] is None:
                    self.wan.stop_capture()
                else:
                    self.wan.start_capture(request["path"])
                return {}, ()
            case "down":
                self.wan.stop()
                return {}, ()
            case unknown:
                raise LabError(f"The lab does not know the request {unknown!r}.")

    def _reshape(self, pairs: Sequence[Sequence[str]], changes: Mapping[str, Any]) -> None:
        shapes = {}
        for source, target in pairs:
            if (source, target) not in self.wan.directions:
                raise LabError(f"The lab has no link from {source!r} to {target!r}. Hosts: {', '.join(self.hosts)}.")
            shapes[source, target] = replace(self.wan.directions[source, target].shape, **changes)
        for (source, target), shape in shapes.items():  # all or none
            self.wan.reshape(source, target, shape)

    def _set_nat(self, name: str, has_nat: bool) -> None:
        if name not in self.hosts:
            raise LabError(f"The lab has no host {name!r}. Hosts: {', '.join(self.hosts)}.")
        running = self.hosts[name]
        set_addresses(running, has_nat=has_nat)
        if has_nat:
            self._add_nat(running.host)
        else:
            self.wan.nats.pop(name, None)

    def _add_nat(self, host: Host) -> None:
        self.wan.nats[host.name] = Nat(host.address.packed, host.inner_address.packed, random.randint)

    def _links(self) -> list[dict[str, Any]]:
        return [
            {"from": source, "to": target, "shape": asdict(direction.shape), "counters": asdict(direction.counters)}
            for (source, target), direction in self.wan.directions.items()
        ]


def main() -> None:
    """Run a lab; the command line is for :mod:`meshcompute.lab.starting` only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--progress-fd", type=int, required=True)
    parser.add_argument("--lab", required=True)
    arguments = parser.parse_args()
    progress = os.fdopen(arguments.progress_fd, "w", buffering=1)

    def say(line: str) -> None:
        if progress.closed:
            return
        try:
            progress.write(line + "\n")
            if line == "ready":
                progress.close()
        except BrokenPipeError:
            pass

    try:
        lab = Lab.from_json(json.loads(arguments.lab))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "meshcompute-lab", str(BASE)], check=True)
        listener = socket.socket(fileno=arguments.listen_fd)
        supervisor = Supervisor(lab, listener, say)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.wan.stop())
        supervisor.run()
    except LabStartError as exc:
        say("error " + json.dumps([exc.part, exc.reason, exc.log]))
        sys.exit(1)
    except Exception:
        say("error " + json.dumps(["the supervisor", "failed", traceback.format_exc()]))
        sys.exit(1)
    # Hosts and their threads of ours end with process 1, which ends with us.
    os._exit(0)


if __name__ == "__main__":
    main()
