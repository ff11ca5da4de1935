"""Starting a lab.

Covers whether the machine can have one, and the processes from the machine to the supervisor. Does not cover what the
supervisor does.

The lab's socket is made here and handed down, because abstract sockets belong to a network namespace.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from meshcompute.lab.errors import LabError, LabMissingError, LabStartError, LabStateError
from meshcompute.lab.running import CGROUPS, RunningLab, address_of, sweep_cgroups
from meshcompute.lab.systemd import PROGRAM
from meshcompute.lab.topology import ACCOUNTS, Account, Lab

__all__ = [
    "NEEDED",
    "PACKAGE_OF",
    "check_machine",
    "find_accounts",
    "find_program",
    "find_readable",
    "has_engine",
    "start_lab",
]

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
POLL_SECONDS = 0.05
# A death signal that is asked for after the parent's death never comes: hence the looks at PPID.
_GUARDIAN = """\
[ {parent} -eq 0 ] || [ $PPID -eq {parent} ] || exit 1
setpriv --pdeathsig KILL sh -c '[ $PPID -eq '$$' ] || exit 1
    exec unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private -- "$@"' sh "$@" &
trap '' TERM INT HUP
wait $!
find {cgroups} -depth -type d -path '*{label}/*' -exec rmdir {{}} + 2>/dev/null
find {cgroups} -depth -type d -path '*{label}' -exec rmdir {{}} + 2>/dev/null
find {cgroups} -depth -type d -name meshcompute-lab -exec rmdir {{}} + 2>/dev/null
"""


def find_accounts() -> tuple[Account, ...]:
    """Choose uids and gids that the machine does not use, for the accounts of the hosts."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    free = (number for number in count(FIRST_UID) if number not in taken)
    return tuple(Account(name=name, uid=number, gid=number) for name, number in zip(ACCOUNTS, free, strict=False))


def find_readable(*more: str | None) -> tuple[str, ...]:
    """List what the accounts of hosts must be able to reach to run this Python and meshcompute; and more."""
    paths = [sys.executable, os.path.realpath(sys.executable), sys.base_prefix + "/lib", __file__, *more]
    return tuple(dict.fromkeys(path for path in paths if path))


def has_engine() -> bool:
    """Tell whether this machine has a Docker engine that hosts could start for themselves."""
    return find_program("dockerd") is not None


def find_program(program: str) -> str | None:
    """Find a program, also where only root looks for it."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def check_machine(lab: Lab) -> None:
    """Find out whether this machine can have a lab.

    Raises
    ------
    LabMissingError
        Root, a program or a part of the kernel is missing; the message says how to get it.
    """
    if os.geteuid() != 0:
        raise LabMissingError("A lab needs root: it makes namespaces and mounts. Run it with sudo.")
    needed = (*NEEDED, "dockerd") if lab.engine else NEEDED
    missing = [program for program in needed if find_program(program) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGE_OF[program] for program in missing))
        raise LabMissingError(
            f"A lab needs {', '.join(missing)}, not found on this machine. Install it: apt-get install {packages}"
        )
    if any(host.has_systemd for host in lab.hosts) and not Path(PROGRAM).exists():
        raise LabMissingError(f"A host with systemd needs {PROGRAM} of this machine: apt-get install systemd")
    for part, file in (("TUN devices", "/dev/net/tun"), ("namespaces of processes", "/proc/self/ns/pid")):
        if not Path(file).exists():
            raise LabMissingError(f"A lab needs {part} ({file}), which this machine's kernel does not offer.")


def start_lab(
    lab: Lab, *, say: Callable[[str], None] = lambda _line: None, dies_with_us: bool = False, locks: Sequence[int] = ()
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
    locks
        File descriptors that the lab keeps open as long as it is up.

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
    listener = _bind(lab.name)
    listener.listen(16)
    sweep_cgroups(lab)
    reader, writer = os.pipe()
    guardian = _GUARDIAN.format(cgroups=CGROUPS, label=lab.cgroup, parent=os.getpid() if dies_with_us else 0)
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
        # A pipe that ends with the caller must not stay open as long as a detached lab does.
        stderr=None if dies_with_us else subprocess.DEVNULL,
        pass_fds=(listener.fileno(), writer, *locks),
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
            RunningLab(lab.name).stop()
        process.wait(STOP_TIMEOUT_SECONDS)
        raise
    return process


def _bind(name: str) -> socket.socket:
    """Take the lab's address; a lab that is just ending still has it for a moment."""
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while True:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address_of(name))
            return listener
        except OSError as exc:
            listener.close()
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        try:
            RunningLab(name).status()
        except LabStateError:
            time.sleep(POLL_SECONDS)
        else:
            cure = f"meshcompute lab down --name {name}"
            raise LabStateError(f"The lab {name!r} is up already. End it ({cure}) or choose another --name.")


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
                raise LabStartError(*json.loads(text.removeprefix("error ")))
            say(text)
