"""The process that is the lab: it starts the hosts, moves their packets and answers on a control socket.

Covers the life of a lab from its first process to its last. Does not cover who starts it (``lab``): it expects
namespaces of its own, in which it is a child of process 1, and an open socket that listens.

Protocol: one JSON object per connection and direction, ended by a line end. ``status`` is answered with process file
descriptors besides, so that the caller knows the hosts by the numbers of its own pid namespace.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from meshcompute.lab.errors import LabError
from meshcompute.lab.hosts import RunningHost, make_keys, start_host, wait_until_ready
from meshcompute.lab.shaping import Shape
from meshcompute.lab.topology import Lab
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
        self.wan = Wan(devices, {host.name: host.address.packed for host in lab.hosts}, shape)

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
            made = make_keys(keys, ("user", *(host.name for host in self.lab.hosts)))
            user_key = made.pop("user")
            with ThreadPoolExecutor(len(self.lab.hosts)) as pool:
                list(pool.map(lambda host: self._start(host.name, made, user_key), self.lab.hosts))
            self.say("ready")
        except BaseException as exc:
            failures.append(exc)
            self.wan.stop()

    def _start(self, name: str, host_keys: dict[str, tuple[str, str]], user_key: tuple[str, str]) -> None:
        host = next(host for host in self.lab.hosts if host.name == name)
        folder = BASE / "hosts" / name
        device = self._device_names[name]
        running = start_host(self.lab, host, folder=folder, host_keys=host_keys, user_key=user_key, device=device)
        wait_until_ready(running, folder)
        self.hosts[name] = running
        self.say(f"{name} is up at {host.address}")

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
                return {"lab": self.lab.to_json(), "hosts": list(hosts), "links": self._links()}, fds
            case "shape":
                now = time.monotonic()
                for pair in request["pairs"]:
                    direction = self.wan.directions[pair[0], pair[1]]
                    direction.reshape(replace(direction.shape, **request["changes"]), now)
                return {"links": self._links()}, ()
            case "down":
                self.wan.stop()
                return {}, ()
            case unknown:
                raise LabError(f"The lab does not know the request {unknown!r}.")

    def _links(self) -> list[dict[str, Any]]:
        return [
            {"from": source, "to": target, **asdict(direction.shape), **asdict(direction.counters)}
            for (source, target), direction in self.wan.directions.items()
        ]


def main() -> None:
    """Run a lab; the command line is for :mod:`meshcompute.lab.lab` only."""
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
    except Exception as exc:
        text = str(exc) if isinstance(exc, LabError) else traceback.format_exc()
        say("error " + json.dumps(text))
        sys.exit(1)
    # Hosts and their threads of ours end with process 1, which ends with us.
    os._exit(0)


if __name__ == "__main__":
    main()
