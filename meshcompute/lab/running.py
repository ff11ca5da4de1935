"""A lab that runs, as the machine and tests use it.

Covers looking at it, running commands on its hosts, changing its WAN, and ending it. Does not cover starting it
(``starting``), nor what runs inside (``supervisor``, ``hosts``, ``wan``).

The lab is found by an abstract unix socket, which is no file and vanishes with its last process.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshcompute.lab.errors import LabError, LabStateError
from meshcompute.lab.shaping import Counters, Shape
from meshcompute.lab.topology import Lab

__all__ = ["CGROUPS", "LabStatus", "Link", "RunningLab", "address_of", "sweep_cgroups"]

ANSWER_TIMEOUT_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = 20.0
REPLY_NBYTES = 1 << 20
MOST_FDS = 64
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
CGROUPS = Path("/sys/fs/cgroup")
# What a user's session on the machine says about the machine is wrong on a host of the lab.
FOREIGN_VARIABLES = frozenset(
    {"SSH_AUTH_SOCK", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "XDG_RUNTIME_DIR", "DOCKER_HOST", "MAIL", "OLDPWD"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two hosts: how it behaves, and what it has seen."""

    source: str
    target: str
    shape: Shape
    counters: Counters


@dataclass(frozen=True, slots=True, kw_only=True)
class LabStatus:
    """A lab that is up, with process numbers as this process sees them."""

    lab: Lab
    supervisor_pid: int
    pids: Mapping[str, int]
    links: Mapping[tuple[str, str], Link]
    hosts_with_nat: Sequence[str]


class RunningLab:
    """A lab that runs.

    Parameters
    ----------
    name
        Its name.
    """

    def __init__(self, name: str = "lab") -> None:
        self.name = name

    # Looking

    def status(self) -> LabStatus:
        """Look at everything.

        Raises
        ------
        LabStateError
            No such lab is up.
        """
        answer, fds = self._ask({"do": "status"})
        try:
            pids = [_pid_of(fd) for fd in fds]
        finally:
            _close(fds)
        return LabStatus(
            lab=Lab.from_json(answer["lab"]),
            supervisor_pid=pids[1],
            pids=dict(zip(answer["hosts"], pids[2:], strict=True)),
            links=_links_of(answer),
            hosts_with_nat=answer["nats"],
        )

    def links(self) -> dict[tuple[str, str], Link]:
        """Look at every direction between two hosts, by source and target."""
        return _links_of(self._ask({"do": "links"})[0])

    # Changing the WAN

    def pairs(self, *hosts: str) -> list[tuple[str, str]]:
        """Name directions: all; between one host and all others; or, with two hosts, between the two.

        Raises
        ------
        LabError
            There is no such host.
        """
        pairs = list(self.links())
        for host in hosts:
            if not any(host in pair for pair in pairs):
                raise LabError(f"The lab has no host {host!r}.")
        if len(hosts) == 2:
            return [pair for pair in pairs if set(pair) == set(hosts)]
        return [pair for pair in pairs if not hosts or len(set(pair) & set(hosts)) == 1]

    def shape(self, pairs: Iterable[tuple[str, str]] | None = None, **changes: Any) -> None:
        """Let directions behave differently from now on.

        Parameters
        ----------
        pairs
            Source and target of each; ``None``: all.
        **changes
            Fields of :class:`meshcompute.lab.shaping.Shape` with their new values.
        """
        chosen = list(self.links()) if pairs is None else list(pairs)
        self._ask({"do": "shape", "pairs": chosen, "changes": changes})

    def cut(self, *hosts: str) -> None:
        """Let nothing pass between these hosts and all others; with two hosts, between the two only."""
        self.shape(self.pairs(*hosts), is_cut=True)

    def join(self, *hosts: str) -> None:
        """Undo :meth:`cut`; without hosts, everywhere."""
        self.shape(self.pairs(*hosts), is_cut=False)

    def set_nat(self, host: str, has_nat: bool) -> None:
        """Put a host behind a router with NAT, or take it out; its connections break."""
        self._ask({"do": "nat", "host": host, "has_nat": has_nat})

    def start_capture(self, path: str | os.PathLike[str]) -> None:
        """Write every packet that enters the WAN to a file that tcpdump reads."""
        self._ask({"do": "capture", "path": str(Path(path).absolute())})

    def stop_capture(self) -> None:
        """Write no more."""
        self._ask({"do": "capture", "path": None})

    # Running commands

    def command(
        self,
        host: str,
        command: Sequence[str],
        *,
        user: str = "root",
        environment: Mapping[str, str] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> tuple[list[str], dict[str, str]]:
        """Tell what to execute, and with which variables, to run a command on a host.

        Parameters
        ----------
        host
            Name of the host.
        command
            Program and arguments.
        user
            ``root`` or an account of the host.
        environment
            Variables of the caller; ``None``: this process's.
        folder
            Current folder, kept if the host has it; ``None``: this process's.

        Returns
        -------
        arguments
            What to execute. The command ends when the process made of this does.
        environment
            Variables for it.

        Raises
        ------
        LabError
            There is no such host.
        """
        status = self.status()
        if host not in status.pids:
            raise LabError(f"The lab has no host {host!r}. Its hosts: {', '.join(status.pids)}.")
        path = next(status.lab.path_of(each) for each in status.lab.hosts if each.name == host)
        home = "/root" if user == "root" else f"/home/{user}"
        given = os.environ if environment is None else environment
        variables = {name: value for name, value in given.items() if name not in FOREIGN_VARIABLES}
        variables |= {"HOME": home, "USER": user, "LOGNAME": user, "PATH": path}
        become = [] if user == "root" else [f"--reuid={user}", f"--regid={user}", "--init-groups"]
        enter = ["nsenter", f"--target={status.pids[host]}", "--mount", "--net", "--pid", "--uts", "--ipc"]
        start = ["sh", "-c", 'cd "$1" 2>/dev/null || cd; shift; exec "$@"', "sh", str(folder or Path.cwd()), *command]
        return [*enter, "--root", "--wd", "--", *DIES_WITH_PARENT, *become, "--", *start], variables

    def run(
        self, host: str, *command: str, user: str = "root", timeout: float = 60.0, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and wait for it.

        Parameters
        ----------
        host
            Name of the host.
        *command
            Program and arguments.
        user
            ``root`` or an account of the host.
        timeout
            Seconds that it may take.
        check
            Whether an exit code other than 0 is an error.
        **options
            Further arguments of :func:`subprocess.run`.

        Returns
        -------
        subprocess.CompletedProcess
            With its output as text.

        Raises
        ------
        LabError
            There is no such host, or the exit code is not 0; the message has what the command wrote.
        """
        arguments, variables = self.command(host, command, user=user)
        options = {"capture_output": True, "text": True, "env": variables, **options}
        done: subprocess.CompletedProcess[str]
        done = subprocess.run([*DIES_WITH_PARENT, *arguments], timeout=timeout, check=False, **options)
        if check and done.returncode != 0:
            wrote = f"{done.stdout or ''}{done.stderr or ''}".strip()
            raise LabError(f"On host {host}, {' '.join(command)} ended with exit code {done.returncode}: {wrote}")
        return done

    def popen(self, host: str, *command: str, user: str = "root", **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host, which ends when this thread does; options as of :class:`subprocess.Popen`."""
        arguments, variables = self.command(host, command, user=user)
        return subprocess.Popen([*DIES_WITH_PARENT, *arguments], **{"env": variables, **options})

    # Ending

    def stop(self) -> None:
        """End the lab and wait until its last process is gone.

        Raises
        ------
        LabStateError
            No such lab is up.
        """
        answer, fds = self._ask({"do": "status"})
        try:
            with suppress(LabError, OSError):  # it may end between the two
                self._ask({"do": "down"})
            first = fds[0]  # process 1 of the lab: the kernel ends all others before this one is gone
            if not select.select([first], [], [], STOP_TIMEOUT_SECONDS)[0]:
                signal.pidfd_send_signal(first, signal.SIGKILL)
                select.select([first], [], [], STOP_TIMEOUT_SECONDS)
        finally:
            _close(fds)
        sweep_cgroups(Lab.from_json(answer["lab"]))

    # How

    def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Send a request; returns the answer, and file descriptors that the caller closes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT_SECONDS)
            try:
                connection.connect(address_of(self.name))
                connection.sendall(json.dumps(request).encode() + b"\n")
                data, fds = _receive(connection)
            except (ConnectionError, EOFError) as exc:  # there is none, or it has ended while it was asked
                cure = "meshcompute lab up" + ("" if self.name == "lab" else f" --name {self.name}")
                raise LabStateError(f"No lab {self.name!r} is up on this machine. Start it: {cure}") from exc
            except TimeoutError as exc:
                message = f"The lab {self.name!r} did not answer within {ANSWER_TIMEOUT_SECONDS:g} s. End it"
                raise LabError(f"{message} by kill -9 of its processes; nothing of it stays.") from exc
        answer = json.loads(data)
        if "error" in answer:
            raise LabError(answer["error"])
        return answer, fds


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(REPLY_NBYTES, room)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    while not data.endswith(b"\n"):
        more = connection.recv(REPLY_NBYTES)
        if not more:
            _close(fds)
            raise EOFError
        data += more
    return data, list(fds)


def address_of(name: str) -> str:
    """Tell the address of a lab's socket in the abstract namespace."""
    return f"\0meshcompute-lab/{name}"


def _links_of(answer: Mapping[str, Any]) -> dict[tuple[str, str], Link]:
    return {
        (link["from"], link["to"]): Link(
            source=link["from"], target=link["to"], shape=Shape(**link["shape"]), counters=Counters(**link["counters"])
        )
        for link in answer["links"]
    }


def _pid_of(pidfd: int) -> int:
    """Read the number that this process's own pid namespace has for a process."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise LabError(f"This kernel does not tell the process of descriptor {pidfd}.")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def sweep_cgroups(lab: Lab) -> None:
    """Remove the cgroups that engines of this lab left when they were killed; others are not touched."""
    for parent in [*CGROUPS.glob("*/meshcompute-lab"), CGROUPS / "meshcompute-lab"]:
        top = parent / lab.name
        inner: list[str | Path] = [
            folder for folder, _, _ in os.walk(top, topdown=False)
        ]  # does not mind what goes while it looks
        for folder in [*inner, parent]:
            with suppress(OSError):  # gone already, or another lab's is in it
                os.rmdir(folder)  # noqa: PTH106 - os.walk gives names
