"""Hosts of the lab: namespaces, files and processes of each.

Covers making a host from its description and waiting until it answers. Does not cover the WAN, nor which hosts there
are. Runs inside the lab's own namespaces, as the supervisor's part; nothing here has to be undone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshcompute.lab.errors import LabError, LabStartError
from meshcompute.lab.files import (
    READY_FILE,
    UPLINK,
    PlacedFile,
    desired_files,
    desired_services,
    render_addresses,
    render_init,
)
from meshcompute.lab.systemd import NEEDED_UNITS, UNIT_FOLDER
from meshcompute.lab.topology import Host, Lab

__all__ = ["RunningHost", "make_keys", "place", "set_addresses", "start_host", "wait_until_ready"]

READY_TIMEOUT_SECONDS = 90.0  # of a machine with much else to do
POLL_SECONDS = 0.01
ANSWER_TIMEOUT_SECONDS = 2.0
LOG_CHARACTERS = 2000
NOT_A_FILE_SYSTEM = frozenset(
    {"autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs"}
    | {"fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "squashfs"}
    | {"sysfs", "tmpfs", "tracefs"}
)
HIDDEN = ("/proc", "/sys", "/dev", "/run", "/data", "/mnt", "/var/lib/docker")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningHost:
    """A host that runs: its process 1, as seen from the supervisor."""

    host: Host
    pid: int
    unshare: subprocess.Popen[str]

    @property
    def root(self) -> Path:
        """The host's root folder, as the supervisor reaches it."""
        return Path(f"/proc/{self.pid}/root")


def make_keys(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Make a key pair for each name.

    Parameters
    ----------
    folder
        Folder in memory that nobody else sees.
    names
        What the keys are for.

    Returns
    -------
    dict
        Private and public key by name.
    """
    running = [
        subprocess.Popen(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"meshcompute lab {name}", "-f", str(folder / name)],
            stdin=subprocess.DEVNULL,
        )
        for name in names
    ]
    for process in running:
        process.wait()
    return {name: ((folder / name).read_text(), (folder / f"{name}.pub").read_text()) for name in names}


def place(upper: Path, file: PlacedFile) -> None:
    """Write a file into the upper layer of a host's root.

    Folders above it look as the machine's do; where the machine has none, or ``is_ours`` says so for the last one,
    the folder is the file's owner's, and hides the machine's.
    """
    made = upper
    parents = Path(file.path).parts[1:-1]
    for i, part in enumerate(parents):
        made /= part
        if made.exists():
            continue
        made.mkdir()
        original = Path("/", *parents[: i + 1])
        if original.is_dir() and not (file.is_ours and i == len(parents) - 1):
            status = original.stat()
            made.chmod(status.st_mode & 0o7777)
            os.chown(made, status.st_uid, status.st_gid)
        else:
            made.chmod(0o755)
            os.chown(made, file.uid, file.gid)
            os.setxattr(made, "trusted.overlay.opaque", b"y")
    target = upper / file.path.lstrip("/")
    target.touch(mode=0o600)
    target.write_text(file.text)
    target.chmod(file.mode)
    os.chown(target, file.uid, file.gid)


def _open_way(upper: Path, path: Path) -> None:
    """Let every account of a host pass through the folders above a path."""
    for folder in reversed(path.parents[:-1]):
        if not folder.is_dir() or folder.is_symlink() or folder.stat().st_mode & 0o001:
            continue
        # A folder of the upper layer has the say about permissions; what is in it comes from both.
        place(upper, PlacedFile(path=str(folder / ".lab"), text=""))
        inside = upper / str(folder).lstrip("/")
        (inside / ".lab").unlink()
        inside.chmod(inside.stat().st_mode | 0o111)


def start_host(
    lab: Lab,
    host: Host,
    *,
    folder: Path,
    host_keys: dict[str, tuple[str, str]],
    user_keys: dict[str, tuple[str, str]],
    device: str,
) -> RunningHost:
    """Start a host, and give it its uplink.

    Parameters
    ----------
    lab
        The lab.
    host
        Which of its hosts.
    folder
        An empty folder on the lab's tmpfs.
    host_keys, user_keys
        Private and public keys of hosts and of accounts, by name.
    device
        TUN device of this network namespace that becomes the host's uplink.

    Returns
    -------
    RunningHost
        The host, whose services may not be there yet.

    Raises
    ------
    LabStartError
        A command failed.
    """
    machine = {name: Path("/etc", name).read_text() for name in ("passwd", "shadow", "group")}
    upper = folder / "upper"
    upper.mkdir(parents=True, mode=0o755)
    files = desired_files(lab, host, machine=machine, host_keys=host_keys, user_keys=user_keys)
    units = {name: Path(UNIT_FOLDER, name).read_text() for name in NEEDED_UNITS} if host.has_systemd else {}
    for file in (*files, *desired_services(lab, host, units)):
        place(upper, file)
    for path in lab.readable:
        _open_way(upper, Path(path))
    script = folder / "init"
    script.write_text(render_init(lab, host, folder=str(folder), mounts=_other_mounts()))
    unshare = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--propagation", "private", "--fork"]
    environment = {"PATH": lab.path, "LANG": "C.UTF-8", "HOME": "/root"}
    with (folder / "init.log").open("w") as log:
        process = subprocess.Popen(
            [*unshare, "--kill-child", "--", "sh", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline() != "created\n":
        raise LabStartError(f"host {host.name}", "could not make its namespaces", _text(folder / "init.log"))
    # unshare itself is in the host's network namespace, too.
    moved = subprocess.run(
        ["ip", "link", "set", device, "netns", str(process.pid), "name", UPLINK],
        capture_output=True,
        text=True,
        check=False,
    )
    if moved.returncode != 0:
        raise LabStartError(f"host {host.name}", "did not get its uplink", moved.stderr.strip())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.stdin.write("go\n")
    process.stdin.close()
    return RunningHost(host=host, pid=int(children[0]), unshare=process)


def wait_until_ready(lab: Lab, running: RunningHost, folder: Path) -> None:
    """Wait until a host's sshd listens, and its engine and its daemon answer.

    Raises
    ------
    LabStartError
        The host ended, or the time was up.
    """
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    part = f"host {running.host.name}"
    waiting_for = {"sshd": (running.root / READY_FILE.lstrip("/")).exists}
    if lab.engine:
        waiting_for["engine"] = lambda: _answers(running.root / "run/docker.sock", "/_ping")
    if lab.daemon and not running.host.has_systemd:
        waiting_for["site"] = lambda: _answers(running.root / "run/meshcompute/site.sock", "/v1/health")
    while waiting_for:
        waiting_for = {name: is_ready for name, is_ready in waiting_for.items() if not _is_true(is_ready)}
        ended = [name for name in waiting_for if _is_true((running.root / f"run/lab.{name}.ended").exists)]
        if ended:
            log = _text(running.root / f"var/log/lab/{ended[0]}.log")[-LOG_CHARACTERS:]
            raise LabStartError(part, f"lost its {ended[0]}, which ended", log)
        code = running.unshare.poll()
        if code is not None:
            raise LabStartError(part, f"ended with exit code {code}", _text(folder / "init.log"))
        if time.monotonic() > deadline:
            logs = [_text(running.root / f"var/log/lab/{name}.log")[-LOG_CHARACTERS:] for name in waiting_for]
            missing = " and ".join(waiting_for)
            reason = f"was not ready after {READY_TIMEOUT_SECONDS:g} s: no {missing}"
            raise LabStartError(part, reason, _text(folder / "init.log") + "\n".join(logs))
        time.sleep(POLL_SECONDS)


def _is_true(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # nobody listens yet; or the host has just ended
        return False


def _answers(path: Path, resource: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_TIMEOUT_SECONDS)
        connection.connect(str(path))
        connection.sendall(f"GET {resource} HTTP/1.0\r\nHost: lab\r\n\r\n".encode())
        return connection.recv(16).startswith(b"HTTP/")


def set_addresses(running: RunningHost, *, has_nat: bool) -> None:
    """Give a running host the address that it has behind NAT, or on the WAN itself."""
    script = "\n".join(("set -e", *render_addresses(running.host, has_nat=has_nat)))
    enter = ["nsenter", f"--target={running.pid}", "--net", "--", "sh", "-c", script]
    done = subprocess.run(enter, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"Host {running.host.name} did not get its other address: {done.stderr.strip()}")


def _other_mounts() -> tuple[str, ...]:
    """List the machine's file systems besides its root, which an overlay of the root does not show."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        mount, kind = before.split()[4], after.split()[0]
        is_hidden = any(mount == hidden or mount.startswith(hidden + "/") for hidden in HIDDEN)
        if (
            mount != "/"
            and not is_hidden
            and kind not in NOT_A_FILE_SYSTEM
            and Path(mount).is_dir()
            and "\\" not in mount
        ):
            found.append(mount)
    return tuple(dict.fromkeys(found))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
