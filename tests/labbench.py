"""A lab with engines, daemons and the image of workers, and clusters that are started in it as a person would.

Covers starting such a lab, ``dask-boot.sh`` on its client's host, scripts that use a cluster, and what a host's kernel
and engine show, to compare with before. The fixture that gives it is in ``tests/lab/conftest.py``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from waiting import Lines, wait_until

from meshcompute.lab.errors import LabStateError
from meshcompute.lab.images import IMAGE, open_image_store
from meshcompute.lab.running import RunningLab
from meshcompute.lab.starting import find_accounts, find_readable, start_lab
from meshcompute.lab.topology import Lab

TOP = Path(__file__).resolve().parents[1]
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTS = ("client", "ecmwf", "eumetsat")
SITES = ("mesh@10.8.0.4", "mesh@10.8.0.2")
READY_SECONDS = 90.0
GONE_SECONDS = 30.0
# A folder is there as soon as somebody has written below it. The engine is asked itself; systemd has files for each run
# of a service; the daemon makes its folders when it needs them first, and remembers for a time which clusters have
# ended, so that a late request does not bring them back.
EXPECTED_FILES = re.compile(
    "/tmp$|/run/(docker|containerd|systemd)|/var/lib/meshcompute/([a-z]+$|tombstones/)|/var/log/lab/"
    "|(/var)?/tmp/systemd-private-"
)


class Boot:
    """``dask-boot.sh`` that runs on the client's host.

    Parameters
    ----------
    process
        It; its standard error is a pipe.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process = process
        self._written = Lines(process.stderr)
        self.lines = self._written.lines

    @property
    def said(self) -> str:
        """All that it wrote so far."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, timeout: float = READY_SECONDS) -> str:
        """Wait until it writes a line with this text, and give the line; its end without is a failure."""
        line: str = self._written.wait_until(
            lambda: next((line for line in self._written if text in line), None), f"{text!r}", timeout
        )
        return line

    @property
    def address(self) -> str:
        """Where the scheduler is, as seen from the client's host."""
        return self.wait_for("scheduler at ").rpartition("scheduler at ")[2].split()[0]

    @property
    def pid(self) -> int:
        """The process on the host, by its number on this machine: what enters the host for it passes no signal on."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Ask it to take everything down; gives its exit code."""
        os.kill(self.pid, signum)
        return self.wait()

    def wait(self, timeout: float = READY_SECONDS) -> int:
        """Wait for its end; gives its exit code."""
        code = self.process.wait(timeout)
        self._written.close(timeout)
        return code


class LabBench:
    """A running lab on which clusters can be started.

    Parameters
    ----------
    lab
        It; with engines, daemons and the image.
    """

    def __init__(self, lab: RunningLab) -> None:
        self.lab = lab
        self._boots: list[Boot] = []

    def start_boot(self, *arguments: str, user: str = "mesh") -> Boot:
        """Run ``dask-boot.sh`` with these arguments on the client's host; does not wait."""
        process = self.lab.popen(
            "client", str(TOP / "scripts/dask-boot.sh"), *arguments, user=user,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        boot = Boot(process)
        self._boots.append(boot)
        return boot

    @contextmanager
    def booted(self, *arguments: str, user: str = "mesh", sites: tuple[str, ...] = SITES) -> Iterator[Boot]:
        """Have a cluster while the block runs: two sites, four workers each unless the arguments say otherwise."""
        boot = self.start_boot(*sites, *arguments, user=user)
        try:
            boot.wait_for(" ready: ")
            yield boot
        finally:
            if boot.process.poll() is None:
                boot.stop()

    def python(self, source: str, *arguments: str, user: str = "mesh", timeout: float = 100.0, **options: Any) -> str:
        """Run a Python program on the client's host; gives what it prints. Its failure is a failure."""
        command = (sys.executable, "-c", source, *arguments)
        return self.lab.run("client", *command, user=user, timeout=timeout, **options).stdout

    def start_python(self, source: str, *arguments: str, user: str = "mesh") -> subprocess.Popen[str]:
        """Start a Python program on the client's host, with pipes for what it prints."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = self.lab.popen(
            "client", sys.executable, "-c", source, *arguments, user=user, **pipes
        )
        return process

    def observe(self) -> dict[str, dict[str, Counter[str]]]:
        """Ask every host's kernel and engine for all that a cluster could leave there, by host and kind."""
        return {host.name: self._observe(host.name) for host in self.lab.status().lab.hosts}

    def _observe(self, host: str) -> dict[str, Counter[str]]:
        seen = json.loads(
            self.lab.run(host, sys.executable, "-c", _OBSERVE, f"/meshcompute-lab/{self.lab.name}/{host}").stdout
        )
        # What the host has written anywhere on its root; below it is the machine's, where others write, too.
        upper = Path(f"/proc/{self.lab.status().supervisor_pid}/root/mnt/hosts/{host}/upper")
        written = [f"/{path.relative_to(upper)}" for path in upper.rglob("*") if "__pycache__" not in path.parts]
        assert "/etc/passwd" in written  # or this looks at the wrong place
        seen["files"] = [path for path in (*seen["files"], *written) if not EXPECTED_FILES.match(path)]
        return {kind: Counter(what) for kind, what in seen.items()}

    def wait_as(self, before: Mapping[str, Mapping[str, Counter[str]]], timeout: float = GONE_SECONDS) -> None:
        """Wait until every host looks as it did before; what is new after that time is a failure, by name."""
        deadline = time.monotonic() + timeout
        while True:
            now = self.observe()
            new = {
                host: {kind: dict(more) for kind, seen in kinds.items() if (more := seen - before[host][kind])}
                for host, kinds in now.items()
            }
            left = {host: kinds for host, kinds in new.items() if kinds}
            if not left:
                return
            assert time.monotonic() < deadline, f"left after {timeout:g} s: {json.dumps(left, indent=1)}"
            time.sleep(0.2)

    def wait_until(self, is_true: Callable[[], object], what: str, timeout: float = GONE_SECONDS) -> None:
        """Wait for a state, never for a time."""
        wait_until(is_true, what, timeout)

    def pids(self, host: str, text: str) -> list[int]:
        """Processes of a host whose command line has this text, by the numbers of its own pid namespace."""
        script = f"grep -lsF -- '{text}' /proc/[0-9]*/cmdline | cut -d/ -f3 | grep -vx -e self -e $$ || true"
        own = self.lab.run(host, "sh", "-c", script).stdout.split()
        alive = []
        for pid in map(int, own):
            line = self.lab.run(host, "cat", f"/proc/{pid}/cmdline", check=False).stdout
            if text in line and "grep -lsF" not in line:
                alive.append(pid)
        return alive

    def kill(self, host: str, *pids: int, signum: int = signal.SIGKILL) -> None:
        """Send a signal to processes of a host, by the numbers of its own pid namespace."""
        assert pids, "nobody to signal"
        self.lab.run(host, "kill", f"-{signum:d}", *map(str, pids))

    def containers(self, host: str, *, every: bool = True) -> list[str]:
        """Names of the containers of clusters that a host's engine has."""
        options = ["--filter", "label=meshcompute.cluster", *(["--all"] if every else [])]
        return sorted(self.lab.run(host, "docker", "ps", *options, "--format", "{{.Names}}").stdout.split())

    def log(self, host: str, service: str = "site") -> str:
        """What a service of a host wrote: ``site`` (the daemon), ``sshd`` or ``engine``."""
        return self.lab.run(host, "cat", f"/var/log/lab/{service}.log").stdout

    def restart_daemon(self, host: str, *options: str) -> None:
        """Start a host's daemon again, which must have ended, with these options; returns when it answers."""
        start = 'rm -f /run/lab.site.ended; setsid sh /etc/lab/site "$@" </dev/null >/dev/null 2>&1 &'
        self.lab.run(host, "sh", "-c", start, "sh", *options)
        self.wait_until(lambda: self.answers(host), f"{host}'s daemon answers", READY_SECONDS)

    def answers(self, host: str) -> bool:
        """Tell whether a host's daemon is healthy."""
        return self.lab.run(host, "meshcompute-site", "ping", check=False).returncode == 0

    def close(self) -> None:
        """End what tests have left."""
        for boot in self._boots:
            if boot.process.poll() is None:
                boot.stop()
        self._boots.clear()


@contextmanager
def open_lab_bench(**options: Any) -> Iterator[LabBench]:
    """Start a lab with engines, daemons and the image in ``MESHCOMPUTE_WORKER_IMAGE``; options as of ``Lab``."""
    archive = Path(os.environ["MESHCOMPUTE_WORKER_IMAGE"])
    with ExitStack() as stack:
        store, lock = open_image_store(archive, say=print, cache=archive.with_suffix(".store"))
        stack.callback(os.close, lock)
        usual = {
            "name": f"test-{os.getpid()}-{time.monotonic_ns()}",
            "path": PATH,
            "accounts": find_accounts(),
            "readable": find_readable(str(TOP)),
            "engine": True,
            "daemon": True,
            "image_store": str(store),
        }
        lab = Lab(**{**usual, **options})
        guardian = start_lab(lab, locks=(lock,), say=print, dies_with_us=True)  # a killed run leaves no lab
        running = RunningLab(lab.name)

        def stop() -> None:
            with suppress(LabStateError):  # the test may have ended it
                running.stop()
            guardian.wait(GONE_SECONDS)

        stack.callback(stop)
        bench = LabBench(running)
        stack.callback(bench.close)
        for host in lab.hosts:
            bench.wait_until(
                lambda host=host: (
                    running.run(host.name, "docker", "image", "inspect", IMAGE, check=False).returncode == 0
                    and (host.has_systemd or bench.answers(host.name))
                ),
                f"{host.name} has an engine with the image, and a daemon unless it is to be installed",
            )
        yield bench


# Runs on a host. Everything is named so that the same thing has the same name before and after.
_OBSERVE = r"""
import glob, json, os, re, subprocess, sys

def lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

def read(path):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""

mine, pid = set(), os.getpid()
while pid > 1:  # this program and what entered the host for it
    mine.add(pid)
    pid = int(re.search(r"PPid:\s+(\d+)", read(f"/proc/{pid}/status"))[1])
processes, namespaces = [], set()
for entry in os.listdir("/proc"):
    if entry.isdigit() and int(entry) not in mine:
        command = read(f"/proc/{entry}/cmdline").replace("\0", " ").strip()
        if command and "State:\tZ" not in read(f"/proc/{entry}/status"):
            processes.append(command)
            for kind in ("mnt", "net", "pid", "uts", "ipc", "user", "cgroup"):
                try:
                    namespaces.add(f"{kind} {os.readlink(f'/proc/{entry}/ns/{kind}')}")
                except OSError:
                    pass
files = []
for top in ("/run", "/dev/shm", "/data"):  # file systems of the host's own
    for folder, folders, names in os.walk(top):
        files += [os.path.join(folder, name) for name in (*folders, *names)]
seen = {
    "processes": processes,
    "namespaces": [name.split()[0] for name in namespaces],
    "mounts": [line.split()[4] for line in open("/proc/self/mountinfo")],
    "links": [re.sub(r"^\d+: ", "", line).split(":")[0] for line in lines("ip", "-o", "link")],
    "addresses": [" ".join(line.split()[1:4]) for line in lines("ip", "-o", "address")],
    "routes": [*lines("ip", "route", "show", "table", "all"), *lines("ip", "-6", "route", "show", "table", "all")],
    "rules": [*lines("ip", "rule"), *lines("ip", "-6", "rule")],
    "nft": lines("nft", "list", "ruleset"),
    "listeners": [" ".join(line.split()[:5]) for line in lines("ss", "-H", "-lntu")],
    # The daemon keeps connections to its engine for a while: each is a socket of the same name.
    "unix": sorted({line.split()[7] for line in open("/proc/net/unix") if len(line.split()) > 7}),
    "forwarding": [read(path).strip() + path for path in glob.glob("/proc/sys/net/ipv[46]/conf/*/forwarding")],
    "containers": lines("docker", "ps", "--all", "--format", "{{.Names}}"),
    "volumes": lines("docker", "volume", "ls", "-q"),
    "networks": lines("docker", "network", "ls", "--format", "{{.Name}}"),
    "cgroups": [path for path, _, _ in os.walk("/sys/fs/cgroup") if sys.argv[1] + "/" in path],
    "files": files,
}
print(json.dumps(seen))
"""
