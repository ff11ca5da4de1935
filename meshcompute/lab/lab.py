"""Starting a lab, ending it, and running commands on its hosts, from the machine.

Covers what the command line calls. Does not cover what runs inside (``supervisor``, ``hosts``, ``wan``).

The lab is found by an abstract unix socket, which is no file and vanishes with its last process. Its descriptor is
made here and handed down, because such sockets belong to a network namespace.
"""

from __future__ import annotations

import array
import errno
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshcompute.lab.errors import LabError, LabMissingError, LabStartError, LabStateError
from meshcompute.lab.topology import Account, Lab

__all__ = ["LabStatus", "ask", "find_account", "lab_status", "render_exec", "start_lab", "stop_lab", "sweep_cgroups"]

PACKAGE_OF = {  # in Debian
    "debootstrap": "debootstrap",
    "dockerd": "docker.io",
    "ip": "iproute2",
    "mount": "mount",
    "nsenter": "util-linux",
    "pivot_root": "util-linux",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "tini": "tini",
    "unshare": "util-linux",
}
NEEDED = ("ip", "mount", "nsenter", "pivot_root", "setpriv", "ssh", "ssh-keygen", "sshd", "tini", "unshare")
FIRST_UID = 2000  # of accounts: above those that people and packages get first, below those of containers
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 20.0
REPLY_NBYTES = 1 << 20
MOST_FDS = 64
CGROUPS = Path("/sys/fs/cgroup")
# What a user's session on the machine says about the machine is wrong on a host of the lab.
FOREIGN_VARIABLES = frozenset(
    {"SSH_AUTH_SOCK", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "XDG_RUNTIME_DIR", "DOCKER_HOST", "MAIL", "OLDPWD"}
)
_GUARDIAN = """\
setpriv --pdeathsig KILL unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private -- "$@" &
trap '' TERM INT HUP
wait $!
find {cgroups} -depth -type d -path '*{label}/*' -exec rmdir {{}} + 2>/dev/null
find {cgroups} -depth -type d -path '*{label}' -exec rmdir {{}} + 2>/dev/null
find {cgroups} -depth -type d -name meshcompute-lab -exec rmdir {{}} + 2>/dev/null
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabStatus:
    """A lab that is up, with process numbers as this process sees them."""

    lab: Lab
    supervisor_pid: int
    pids: Mapping[str, int]
    links: Sequence[Mapping[str, Any]]


def address_of(name: str) -> str:
    """Tell the address of a lab's socket in the abstract namespace."""
    return f"\0meshcompute-lab/{name}"


def find_account() -> Account:
    """Choose a uid and gid that the machine does not use, for the account of the hosts."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.pw_gid for entry in pwd.getpwall()}
    number = next(uid for uid in range(FIRST_UID, FIRST_UID + len(taken) + 1) if uid not in taken)
    return Account(uid=number, gid=number)


def check_machine(lab: Lab) -> None:
    """Find out whether this machine can have a lab.

    Raises
    ------
    LabMissingError
        Root, a program or a part of the kernel is missing; the message says how to get it.
    """
    if os.geteuid() != 0:
        raise LabMissingError("A lab needs root: it makes namespaces and mounts. Run it with sudo.")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    needed = (*NEEDED, "dockerd") if lab.engine else NEEDED
    missing = [program for program in needed if shutil.which(program, path=path) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGE_OF[program] for program in missing))
        raise LabMissingError(
            f"A lab needs {', '.join(missing)}, not found on this machine. Install it: apt-get install {packages}"
        )
    for part, file in (("TUN devices", "/dev/net/tun"), ("namespaces of processes", "/proc/self/ns/pid")):
        if not Path(file).exists():
            raise LabMissingError(f"A lab needs {part} ({file}), which this machine's kernel does not offer.")


def start_lab(
    lab: Lab, *, say: Callable[[str], None] = lambda _line: None, dies_with_us: bool = False
) -> subprocess.Popen[bytes]:
    """Start a lab and wait until its hosts answer.

    Parameters
    ----------
    lab
        What to start.
    say
        Called with each line of progress.
    dies_with_us
        Whether the lab ends when this thread does; otherwise it stays.

    Returns
    -------
    subprocess.Popen
        The guardian.

    Raises
    ------
    LabMissingError
        The machine cannot have a lab.
    LabStateError
        A lab of this name is up already.
    LabStartError
        A part did not start; everything is gone again.
    """
    check_machine(lab)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address_of(lab.name))
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        cure = f"meshcompute lab down --name {lab.name}"
        raise LabStateError(f"The lab {lab.name!r} is up already. End it ({cure}) or choose another --name.") from exc
    listener.listen(16)
    sweep_cgroups(lab)
    reader, writer = os.pipe()
    guardian = _GUARDIAN.format(cgroups=CGROUPS, label=lab.cgroup)
    command = [
        "sh",
        "-c",
        guardian,
        "meshcompute-lab",
        "tini",
        "--",
        sys.executable,
        "-m",
        "meshcompute.lab.supervisor",
    ]
    command += ["--listen-fd", str(listener.fileno()), "--progress-fd", str(writer)]
    command += ["--lab", json.dumps(lab.to_json())]
    if dies_with_us:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    environment = {**os.environ, "PATH": lab.path}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(listener.fileno(), writer),
        start_new_session=True,  # a Ctrl-C in the terminal is for us; we end the lab in order
        cwd="/",
        env=environment,
    )
    os.close(writer)
    listener.close()
    try:
        with os.fdopen(reader) as progress:
            _follow(progress.fileno(), say)
    except BaseException:
        with suppress(LabError, OSError):  # it may have ended itself
            stop_lab(lab.name)
        process.wait(STOP_TIMEOUT_SECONDS)
        raise
    return process


def _follow(fd: int, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    pending = b""
    while True:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise LabStartError("the lab", f"was not ready after {START_TIMEOUT_SECONDS:g} s")
        data = os.read(fd, 4096)
        if not data:
            raise LabStartError("the supervisor", "ended before the lab was ready")
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            text = line.decode()
            if text == "ready":
                return
            if text.startswith("error "):
                raise LabError(json.loads(text.removeprefix("error ")))
            say(text)


def ask(name: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Ask a lab for something.

    Parameters
    ----------
    name
        Name of the lab.
    request
        What to do, with its parameters.

    Returns
    -------
    answer
        The answer.
    fds
        File descriptors that came with it; the caller closes them.

    Raises
    ------
    LabStateError
        No such lab is up.
    LabError
        The lab refused.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(STOP_TIMEOUT_SECONDS)
        try:
            connection.connect(address_of(name))
        except ConnectionRefusedError as exc:
            cure = "meshcompute lab up" + ("" if name == "lab" else f" --name {name}")
            raise LabStateError(f"No lab {name!r} is up on this machine. Start it: {cure}") from exc
        connection.sendall(json.dumps(request).encode() + b"\n")
        room = socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = connection.recvmsg(REPLY_NBYTES, room)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        while not data.endswith(b"\n"):
            more = connection.recv(REPLY_NBYTES)
            if not more:
                raise LabError(f"The lab {name!r} ended while it was asked for {request['do']}.")
            data += more
    answer = json.loads(data)
    if "error" in answer:
        raise LabError(answer["error"])
    return answer, list(fds)


def lab_status(name: str) -> LabStatus:
    """Look at a lab.

    Raises
    ------
    LabStateError
        No such lab is up.
    """
    answer, fds = ask(name, {"do": "status"})
    try:
        pids = [_pid_of(fd) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)
    return LabStatus(
        lab=Lab.from_json(answer["lab"]),
        supervisor_pid=pids[1],
        pids=dict(zip(answer["hosts"], pids[2:], strict=True)),
        links=answer["links"],
    )


def _pid_of(pidfd: int) -> int:
    """Read the number that this process's own pid namespace has for a process."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise LabError(f"This kernel does not tell the process of descriptor {pidfd}.")


def stop_lab(name: str) -> None:
    """End a lab and wait until its last process is gone.

    Raises
    ------
    LabStateError
        No such lab is up.
    """
    answer, fds = ask(name, {"do": "status"})
    try:
        with suppress(LabError):  # it may end between the two
            ask(name, {"do": "down"})
        first = fds[0]  # process 1 of the lab: the kernel ends all others before this one is gone
        readable, _, _ = select.select([first], [], [], STOP_TIMEOUT_SECONDS)
        if not readable:
            signal.pidfd_send_signal(first, signal.SIGKILL)
            select.select([first], [], [], STOP_TIMEOUT_SECONDS)
    finally:
        for fd in fds:
            os.close(fd)
    sweep_cgroups(Lab.from_json(answer["lab"]))


def sweep_cgroups(lab: Lab) -> None:
    """Remove the cgroups that engines of this lab left when they were killed; others are not touched."""
    for parent in [*CGROUPS.glob("*/meshcompute-lab"), CGROUPS / "meshcompute-lab"]:
        top = parent / lab.name
        folders = sorted((folder for folder in top.rglob("*") if folder.is_dir()), reverse=True)
        for folder in (*folders, top, parent):
            with suppress(OSError):  # gone already, or another lab's is in it
                folder.rmdir()


def render_exec(
    status: LabStatus, host: str, command: Sequence[str], *, user: str, environment: Mapping[str, str], folder: str
) -> tuple[list[str], dict[str, str]]:
    """Render the command that runs a command on a host.

    Parameters
    ----------
    status
        The lab.
    host
        Name of the host.
    command
        Program and arguments.
    user
        ``root`` or an account of the host.
    environment
        Variables of the caller.
    folder
        Current folder of the caller, kept if the host has it.

    Returns
    -------
    arguments
        What to execute; it ends when the caller's process does.
    environment
        Variables for it.

    Raises
    ------
    LabError
        There is no such host.
    """
    if host not in status.pids:
        raise LabError(f"The lab has no host {host!r}. Its hosts: {', '.join(status.pids)}.")
    home = "/root" if user == "root" else f"/home/{user}"
    variables = {name: value for name, value in environment.items() if name not in FOREIGN_VARIABLES}
    variables |= {"HOME": home, "USER": user, "LOGNAME": user, "PATH": status.lab.path}
    become = [] if user == "root" else [f"--reuid={user}", f"--regid={user}", "--init-groups"]
    enter = [
        "nsenter",
        f"--target={status.pids[host]}",
        "--mount",
        "--net",
        "--pid",
        "--uts",
        "--ipc",
        "--root",
        "--wd",
    ]
    start = ["sh", "-c", 'cd "$1" 2>/dev/null || cd; shift; exec "$@"', "sh", folder, *command]
    return [*enter, "--", "setpriv", *become, "--pdeathsig", "KILL", "--", *start], variables
