"""Benches for the contract of worker runtimes: a runtime, a scheduler in a unit, and eyes on this host's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from ipaddress import IPv6Network
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from distributed import Client
from distributed.versions import VersionMismatchWarning

from controlplane.workers.base import WorkerRuntime, WorkerSpec
from controlplane.workers.docker import DockerRuntime
from controlplane.workers.process import ProcessRuntime
from docker import DockerClient
from meshcompute.lab.files import render_engine_store
from meshcompute.lab.images import open_image_store

__all__ = ["Bench", "DockerBench", "ProcessBench"]

TIMEOUT_SECONDS = 60
PREFIX = IPv6Network("fda5:c0ff:eeee:1::/64")
_T = TypeVar("_T")


class Bench:
    """What the tests do to a runtime; subclasses say which runtime, and how its units are joined.

    Parameters
    ----------
    folder
        For everything that this bench writes.
    """

    kind: str
    runtime: Any
    client: Client
    scheduler: WorkerSpec
    client_port: int
    dashboard_port: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = f"a{os.getpid()}"  # other runs on this machine have pools and workers, too
        self.data = folder / "data" / "a"
        self.hidden = folder / "data" / "b"
        for store, text in ((self.data, "data of a"), (self.hidden, "data of b")):
            store.mkdir(parents=True)
            (store / ("field.txt" if store is self.data else "secret.txt")).write_text(text)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.open(stack)
            self.client_port, self.dashboard_port = _free_ports(2)
            self.runtime = self.new_runtime()
            stack.callback(lambda: self.do(self.runtime.close()))
            stack.callback(self.stop_all)
            self.scheduler = self.scheduler_spec()
            self.do(self.runtime.start(self.scheduler))
            self.attach(self.scheduler)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VersionMismatchWarning)  # patch releases of Python
                client = Client(f"tcp://127.0.0.1:{self.client_port}", timeout=TIMEOUT_SECONDS)
            self.client = stack.enter_context(client)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    # What differs

    def open(self, stack: contextlib.ExitStack) -> None:
        """Start what the runtime needs."""

    def new_runtime(self) -> WorkerRuntime:
        """Make a runtime object over the same host."""
        raise NotImplementedError

    def attach(self, spec: WorkerSpec) -> None:
        """Join a unit to the network of the cluster."""

    def scheduler_spec(self) -> WorkerSpec:
        """Make the spec of the scheduler's unit."""
        raise NotImplementedError

    def spec(self, name: str, processes: tuple[int, ...] = (0,)) -> WorkerSpec:
        """Make the spec of a unit of workers."""
        raise NotImplementedError

    def leftovers(self, name: str) -> list[str]:
        """List what is still there of a unit."""
        raise NotImplementedError

    # What does not

    def do(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run a call of the runtime."""
        return asyncio.run(task)

    def opened(self, runtime: WorkerRuntime) -> WorkerRuntime:
        """Let a runtime object be closed with this bench."""
        self._stack.callback(lambda: self.do(runtime.close()))
        return runtime

    def wait(self, is_true: Callable[[], object], what: str, *, has_engine: bool = True) -> None:
        """Wait for a state."""
        until = time.monotonic() + TIMEOUT_SECONDS
        while not is_true():
            in_time = time.monotonic() < until
            assert in_time, f"{what}: not seen in {TIMEOUT_SECONDS} s\n{self.all_logs() if has_engine else ''}"
            time.sleep(0.05)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Workers that the scheduler knows, by name."""
        found = self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        return {worker["name"]: {**worker, "address": address} for address, worker in found.items()}

    def wait_for_workers(self, *names: str) -> dict[str, dict[str, Any]]:
        """Wait until the scheduler knows these workers."""
        self.wait(lambda: set(names) <= set(self.workers()), f"workers {names}")
        return self.workers()

    def on(self, name: str, function: Callable[[], _T]) -> _T:
        """Run a function on a worker."""
        address = self.wait_for_workers(name)[name]["address"]
        result: _T = self.client.submit(function, workers=[address], pure=False).result(timeout=TIMEOUT_SECONDS)
        return result

    def worker(self, number: int) -> str:
        """Name of a worker process."""
        return f"{self.pool}-1-{number}"

    def pids(self, *words: str) -> list[int]:
        """Processes of this host, namespaces included, with one of these words in their command line."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                argv = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(word in argv for word in words):
                    found.append(int(process.name))
        return sorted(found)

    def keepers(self, name: str) -> list[int]:
        """Processes of this host that keep a unit's processes: parents of the first of them."""
        first = self.runtime.folder.spec(name).process_names[0]
        [pid] = self.pids(first)
        status = Path(f"/proc/{pid}/status").read_text()
        return [int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")]

    def all_logs(self) -> str:
        """What all units have written."""
        names = self.do(self.runtime.observe())
        return "\n".join(f"{name}:\n{self.do(self.runtime.logs(name, 30))}" for name in names)

    def stop_all(self) -> None:
        """End all units."""

        async def stop_all() -> None:
            names = await self.runtime.observe()
            await asyncio.gather(*(self.runtime.stop(name, 1) for name in names))

        self.do(stop_all())


class ProcessBench(Bench):
    """Units are processes of this host."""

    kind = "process"

    def new_runtime(self) -> ProcessRuntime:
        """See :class:`Bench`."""
        return ProcessRuntime(self.folder / "run", hidden_folders=[str(self.hidden)])

    def scheduler_spec(self) -> WorkerSpec:
        """See :class:`Bench`."""
        return WorkerSpec(
            name="scheduler",
            process_names=("scheduler",),
            role="scheduler",
            scheduler_address=None,
            client_port=self.client_port,
            dashboard_port=self.dashboard_port,
            **self._common(),
        )

    def spec(self, name: str, processes: tuple[int, ...] = (0,)) -> WorkerSpec:
        """See :class:`Bench`."""
        address = f"tcp://127.0.0.1:{self.client_port}"
        return WorkerSpec(
            name=name, process_names=tuple(map(self.worker, processes)), scheduler_address=address, **self._common()
        )

    def leftovers(self, name: str) -> list[str]:
        """See :class:`Bench`."""
        return [str(path) for path in (self.folder / "run").glob(f"{name}*")]

    def _common(self) -> dict[str, Any]:
        return {
            "cluster_id": "0123456789abcdef",
            "pool": self.pool,
            "site": 1,
            "threads_per_process": 2,
            "memory_bytes_per_process": 256 << 20,
            "address": None,
            "uid": os.geteuid(),
            "gid": os.getegid(),
            "data_folders": (str(self.data),),
            "deadline_seconds": 120.0,
        }


SERVICE = ("objects.example", PREFIX[0x1_0000_0001])


class DockerBench(Bench):
    """Units are containers of an engine of this bench, joined by a bridge.

    ::

        this host             127.0.0.1:<client port> ── relay ──┐ (enters the scheduler's network)
        engine's namespaces   bridge ── veth ── scheduler P::1 ──┘
                                └────── veth ── unit P::11, P::12 …

    The engine has a process number namespace of its own, too, so that everything ends with it: what the engine calls
    process 5 is found in the engine's own /proc.
    """

    kind = "docker"

    def open(self, stack: contextlib.ExitStack) -> None:
        """See :class:`Bench`."""
        self._addresses = iter(range(0x11, 0xFF))
        self._short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mc-")))  # a socket's path is short
        self.engine = stack.enter_context(_engine(self._short, Path(os.environ["MESHCOMPUTE_WORKER_IMAGE"])))
        self.enter("ip link add cluster type bridge && ip link set cluster up")

    @property
    def base_url(self) -> str:
        """Address of the engine."""
        return f"unix://{self._short}/docker.sock"

    def enter(self, script: str) -> None:
        """Run a script in the engine's namespaces."""
        command = ["nsenter", f"--target={self.engine}", "--mount", "--net", "--pid", "sh", "-ec", script]
        ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, f"{script}: {ran.stderr}"

    def new_runtime(self, timeout_seconds: float = 30.0) -> DockerRuntime:
        """See :class:`Bench`."""
        proc = f"/proc/{self.engine}/root/proc"
        return DockerRuntime(self.folder / "run", base_url=self.base_url, proc=proc, timeout_seconds=timeout_seconds)

    def attach(self, spec: WorkerSpec) -> None:
        """See :class:`Bench`."""
        pid = self.do(self.runtime.observe())[spec.name].pid
        link = f"v{pid}"
        self.enter(
            f"ip link add {link} type veth peer name mesh0 netns {pid}; ip link set {link} master cluster up; "
            f"nsenter --target={pid} --net sh -ec "
            f"'ip address add {spec.address}/64 dev mesh0 nodad; ip link set mesh0 up'"
        )

    def scheduler_spec(self) -> WorkerSpec:
        """See :class:`Bench`."""
        return WorkerSpec(
            name="scheduler",
            process_names=("scheduler",),
            role="scheduler",
            scheduler_address=None,
            address=PREFIX[1],
            client_port=self.client_port,
            dashboard_port=self.dashboard_port,
            **self._common(),
        )

    def spec(self, name: str, processes: tuple[int, ...] = (0,)) -> WorkerSpec:
        """See :class:`Bench`."""
        return WorkerSpec(
            name=name,
            process_names=tuple(map(self.worker, processes)),
            scheduler_address=f"tcp://[{PREFIX[1]}]:8786",
            address=PREFIX[next(self._addresses)],
            hosts=(SERVICE,),
            **self._common(),
        )

    def second_scheduler(self) -> WorkerSpec:
        """Make the spec of another scheduler, at other ports, which is not joined to the network."""
        [port] = _free_ports(1)
        address = PREFIX[next(self._addresses)]
        names = {"name": "second", "process_names": ("scheduler-2",)}
        return replace(self.scheduler, **names, address=address, client_port=port, dashboard_port=None)

    def leftovers(self, name: str) -> list[str]:
        """See :class:`Bench`."""
        with client_of(self.base_url) as engine:
            containers = [container.name for container in engine.containers.list(all=True)]
        files = [str(path) for path in (self.folder / "run").glob(f"{name}*")]
        return [*files, *(container for container in containers if container == name)]

    def _common(self) -> dict[str, Any]:
        return {
            "cluster_id": "0123456789abcdef",
            "pool": self.pool,
            "site": 1,
            "threads_per_process": 1,
            "memory_bytes_per_process": 256 << 20,
            "uid": 12345,
            "gid": 23456,
            "groups": (34567,),
            "data_folders": (str(self.data),),
            "deadline_seconds": 120.0,
        }


@contextlib.contextmanager
def client_of(base_url: str) -> Iterator[DockerClient]:
    """Talk to an engine."""
    client = DockerClient(base_url=base_url, timeout=30, version="1.41")
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def _engine(folder: Path, archive: Path) -> Iterator[int]:
    """Start an engine that has an image, in namespaces of its own; gives the process with which all of it ends."""
    store, lock = open_image_store(archive, say=print, cache=archive.with_suffix(".store"))
    group = f"/meshcompute-bench-{os.getpid()}"
    (folder / "data").mkdir()
    script = "\n".join(
        (
            "mount -t tmpfs tmpfs /run",
            "ip link set lo up",
            f"mount --bind {folder}/data {folder}/data",  # or the engine does it, and loses what is mounted inside
            *render_engine_store(str(store), f"{folder}/data"),
            f"exec dockerd --host unix://{folder}/docker.sock --data-root {folder}/data --exec-root {folder}/exec \\",
            f"    --pidfile {folder}/pid --cgroup-parent={group} --bridge=none --iptables=false --ip6tables=false",
        )
    )
    kinds = ["--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "sh", "-ec", script]
    with (folder / "log").open("ab") as log:
        host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until = time.monotonic() + TIMEOUT_SECONDS
        while not (folder / "docker.sock").exists():
            alive = host.poll() is None and time.monotonic() < until
            assert alive, f"no engine: {(folder / 'log').read_text()[-2000:]}"
            time.sleep(0.05)
        with client_of(f"unix://{folder}/docker.sock") as engine:
            engine.ping()
        yield int(Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()[0])
    finally:
        host.kill()
        host.wait()
        os.close(lock)
        for cgroup in Path("/sys/fs/cgroup").glob(f"*{group}"):
            for inner in (*sorted(cgroup.rglob("*/"), reverse=True), cgroup):
                with contextlib.suppress(OSError):
                    inner.rmdir()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
