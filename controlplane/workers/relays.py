"""Start, find and end the processes that make a scheduler's ports reachable at this host's 127.0.0.1.

Covers the other side of :mod:`.relay`: one for each scheduler, whose record lies in the folder of its unit. Does not
cover when there should be one (:mod:`.docker`).
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from controlplane.workers import relay
from controlplane.workers.base import WorkerSpec
from controlplane.workers.commands import SCHEDULER_DASHBOARD_PORT, SCHEDULER_PORT
from controlplane.workers.processes import ProcessRecord, disown, is_alive, read_record, record_of, write_record
from controlplane.workers.runfolder import RunFolder

__all__ = ["Relays"]

END_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 0.02


class Relays:
    """The relays of a runtime's schedulers.

    Parameters
    ----------
    folder
        Where the units have their folders.
    monotonic
        Reads CLOCK_MONOTONIC, in seconds.
    """

    def __init__(self, folder: RunFolder, monotonic: Callable[[], float]) -> None:
        self._folder = folder
        self._monotonic = monotonic
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, spec: WorkerSpec, listeners: Sequence[socket.socket], proc: str) -> None:
        """Start the relay of a scheduler.

        Parameters
        ----------
        spec
            The scheduler's unit.
        listeners
            Sockets that listen, for clients and for browsers.
        proc
            Folder in /proc of the process in whose network the scheduler is.
        """
        targets = (SCHEDULER_PORT, SCHEDULER_DASHBOARD_PORT)
        pairs = [f"{listener.fileno()}:{port}" for listener, port in zip(listeners, targets, strict=False)]
        command = [sys.executable, "-I", relay.__file__, str(self._folder.given(spec.name)), proc]
        child = subprocess.Popen(
            [*command, str(spec.uid), str(spec.gid), str(_owner_uid(spec)), *pairs],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=[listener.fileno() for listener in listeners],
            start_new_session=True,  # clients stay connected while the daemon restarts
        )
        self._children[spec.name] = child
        write_record(self._folder.folder(spec.name) / "relay.json", record_of(child.pid))

    def record(self, name: str) -> ProcessRecord | None:
        """Read which process is, or was, the relay of a scheduler; None if there never was one."""
        return read_record(self._folder.folder(name) / "relay.json")

    def is_there(self, name: str) -> bool:
        """Tell whether the relay of a scheduler runs."""
        if name in self._children:
            self._children[name].poll()  # takes note of its end, without which it stays as a zombie
        record = self.record(name)
        return record is not None and is_alive(record)

    def end(self, name: str) -> None:
        """Wait until nothing holds the network of a container any more: the relay sees that its lease has ended."""
        record = self.record(name)
        until = self._monotonic() + END_TIMEOUT_SECONDS
        while record is not None and self.is_there(name):
            if self._monotonic() > until:
                os.kill(record.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        self._children.pop(name, None)

    def disown(self) -> None:
        """Let go of all relays, which live on."""
        for child in self._children.values():
            disown(child)


def _owner_uid(spec: WorkerSpec) -> int:
    """Find the account that asked for a unit: the operator may let it run as another one."""
    try:
        return pwd.getpwnam(spec.owner).pw_uid
    except KeyError:  # nameless, or no account of this host
        return spec.uid
