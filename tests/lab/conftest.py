"""Labs for tests: one that the whole run shares, without engines, and starting one of one's own.

Covers fixtures, and what the kernel knows about a lab, to compare with before. Tests that end a lab start their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from labbench import HOSTS, LabBench, open_lab_bench

from meshcompute.lab.errors import LabStateError
from meshcompute.lab.running import RunningLab
from meshcompute.lab.starting import NEEDED, PACKAGE_OF, find_accounts, find_readable, has_engine, start_lab
from meshcompute.lab.starting import find_program as find
from meshcompute.lab.topology import Lab

PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COMMAND = (sys.executable, "-c", "from meshcompute.lab.cli import lab; lab(prog_name='meshcompute lab')")
GONE_WITHIN_SECONDS = 15.0


@pytest.fixture(scope="session")
def can_have_lab(need: Callable[..., None]) -> None:
    """What every lab needs; the lab itself would say so, too."""
    need("root", os.geteuid() == 0)
    for program in NEEDED:
        need(program, find(program), f"apt-get install {PACKAGE_OF[program]}")
    need("TUN devices", Path("/dev/net/tun").exists())


@pytest.fixture(scope="session")
def can_have_engine(need: Callable[..., None]) -> None:
    """A Docker engine that hosts can start."""
    need("dockerd", has_engine(), "apt-get install docker.io")


@pytest.fixture(scope="module")
def start(can_have_lab: None) -> Iterator[Callable[..., RunningLab]]:
    """Start a lab of one's own; arguments as of Lab. It ends with the test file."""
    with ExitStack() as stack:

        def start(**options: Any) -> RunningLab:
            name = f"test-{os.getpid()}-{time.monotonic_ns()}"
            usual = {"path": PATH, "accounts": find_accounts(), "readable": find_readable()}
            guardian = start_lab(Lab(**{**usual, "name": name, **options}))
            running = RunningLab(options.get("name", name))

            def stop() -> None:
                with suppress(LabStateError):  # the test may have ended it
                    running.stop()
                guardian.wait(GONE_WITHIN_SECONDS)

            stack.callback(stop)
            return running

        yield start


@pytest.fixture(scope="module")
def shared_lab(start: Callable[..., RunningLab]) -> RunningLab:
    """A lab that the tests of a file share."""
    return start()


@pytest.fixture(scope="session")
def can_have_mesh(can_have_lab: None, can_have_engine: None, need: Callable[..., None]) -> None:
    """What a lab needs in which clusters run: engines, WireGuard, the image of workers."""
    for program, package in (("wg", "wireguard-tools"), ("wireguard-go", "wireguard-go"), ("ss", "iproute2")):
        need(program, find(program), f"apt-get install {package}")
    archive = os.environ.get("MESHCOMPUTE_WORKER_IMAGE", "")
    cure = "scripts/build-image.sh --own-engine --base debootstrap --save FILE; MESHCOMPUTE_WORKER_IMAGE=FILE"
    need("the image of workers", archive and Path(archive).exists(), cure)


class _SharedLab:
    """The lab that tests share; one that a failed test has spoilt ends, and the next test gets a new one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bench: LabBench | None = None

    def get(self) -> LabBench:
        if self._bench is None:
            self._bench = self._stack.enter_context(open_lab_bench())
        return self._bench

    def end(self) -> None:
        self._bench = None
        self._stack.close()


@pytest.fixture(scope="session")
def _shared_mesh_lab(can_have_mesh: None) -> Iterator[_SharedLab]:
    shared = _SharedLab()
    yield shared
    shared.end()


@pytest.fixture(scope="module")
def mesh_lab(_shared_mesh_lab: _SharedLab) -> Iterator[LabBench]:
    """The shared lab for a cluster that the tests of a file share; that file compares before and after by itself."""
    bench = _shared_mesh_lab.get()
    before = bench.observe()
    yield bench
    is_well = False
    with suppress(AssertionError):  # the file itself has failed then
        bench.wait_as(before)
        is_well = all(map(bench.answers, HOSTS))
    if not is_well:
        _shared_mesh_lab.end()


@pytest.fixture
def bench(_shared_mesh_lab: _SharedLab) -> Iterator[LabBench]:
    """A lab with engines, daemons and the image, shared by the run: after each test every host must look as before.

    Whoever ends a host's services puts them back, or opens a lab of its own (``open_lab_bench``).
    """
    bench = _shared_mesh_lab.get()
    before = bench.observe()
    yield bench
    is_well = False
    try:
        bench.close()
        bench.lab.join()
        bench.lab.shape(rate_bits_per_second=None, delay_seconds=0.0, loss=0.0)
        bench.wait_as(before)
        is_well = all(map(bench.answers, HOSTS))
    finally:
        if not is_well:
            _shared_mesh_lab.end()


@pytest.fixture
def lab(shared_lab: RunningLab) -> Iterator[RunningLab]:
    """The shared lab, whose WAN is as fast as it goes and lets everything pass, before and after."""
    yield shared_lab
    shared_lab.shape(rate_bits_per_second=None, delay_seconds=0.0, loss=0.0, is_cut=False)
    for host in shared_lab.status().hosts_with_nat:
        shared_lab.set_nat(host, False)


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``meshcompute lab`` with arguments, as a user would."""

    def command(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False)

    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the kernel shows of this machine, as far as a lab could change it."""

    links: frozenset[str]
    routes: frozenset[str]
    rules: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    sockets: frozenset[str]
    files: frozenset[str]
    accounts: str

    @classmethod
    def observe(cls) -> Machine:
        """Look at it now."""
        return cls(
            links=_lines("ip", "-o", "link"),
            routes=_lines("ip", "route", "show", "table", "all"),
            rules=_lines("ip", "rule"),
            # `ip netns` of others makes mounts there; a lab never does.
            mounts=frozenset(
                line.split(" ", 4)[4]
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if "/run/netns" not in line
            ),
            # os.walk, unlike glob, does not mind what is removed while it looks
            cgroups=frozenset(p for p, _, _ in os.walk("/sys/fs/cgroup") if "meshcompute-lab" in p.rpartition("/")[2]),
            sockets=frozenset(re.findall(r"@meshcompute-lab/\S+", Path("/proc/net/unix").read_text())),
            files=frozenset(
                str(file) for folder in ("/", "/mnt", "/home", "/run", "/etc/ssh", "/var/lib") for file in _in(folder)
            ),
            accounts="".join(Path("/etc", name).read_text() for name in ("passwd", "group", "shadow")),
        )

    def differences_from(self, before: Machine) -> dict[str, object]:
        """What is new, and of what describes the network and the accounts, also what is gone."""
        found: dict[str, object] = {}
        for name in ("mounts", "cgroups", "sockets", "files"):  # other programs of the machine may remove theirs
            found[name] = getattr(self, name) - getattr(before, name)
        for name in ("links", "routes", "rules"):
            found[name] = getattr(self, name) ^ getattr(before, name)
        found["accounts"] = self.accounts != before.accounts
        return {name: difference for name, difference in found.items() if difference}


def _lines(*command: str) -> frozenset[str]:
    return frozenset(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def _in(folder: str) -> list[Path]:
    return list(Path(folder).iterdir()) if Path(folder).is_dir() else []


def namespaces_of(pid: int) -> frozenset[str]:
    """Namespaces of a process that this one is not in."""

    def read(pid: int | str) -> set[str]:
        return {str(entry.readlink()) for entry in Path(f"/proc/{pid}/ns").iterdir()}

    return frozenset(read(pid) - read("self"))


def processes_in(namespaces: frozenset[str]) -> dict[int, str]:
    """Processes of this machine that are in any of these namespaces, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if entry.name.isdigit() and namespaces & {str(link.readlink()) for link in (entry / "ns").iterdir()}:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def expect_nothing_left() -> Iterator[Callable[[RunningLab], None]]:
    """Note a running lab; at the end of the test, the kernel must show nothing of it, and the machine as before."""
    before = Machine.observe()
    namespaces: set[str] = set()

    def note(running: RunningLab) -> None:
        status = running.status()
        for pid in (status.supervisor_pid, *status.pids.values()):
            namespaces.update(namespaces_of(pid))
        assert len(namespaces) >= 3 + 5 * len(status.pids)

    yield note
    assert namespaces, "the test has noted no lab"
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while True:
        processes, left = processes_in(frozenset(namespaces)), Machine.observe().differences_from(before)
        if not (processes or left) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert not processes
    assert not left
