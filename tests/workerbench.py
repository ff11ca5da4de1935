"""Benches for the contract of worker runtimes: a runtime, a scheduler in a unit, and eyes on this host's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from distributed import Client

from controlplane.workers.base import WorkerRuntime, WorkerSpec
from controlplane.workers.process import ProcessRuntime

__all__ = ["Bench", "ProcessBench"]

TIMEOUT_SECONDS = 60
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
            stack.callback(self.stop_all)
            self.scheduler = self.scheduler_spec()
            self.do(self.runtime.start(self.scheduler))
            self.attach(self.scheduler)
            self.client = stack.enter_context(Client(f"tcp://127.0.0.1:{self.client_port}", timeout=TIMEOUT_SECONDS))
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

    def wait(self, is_true: Callable[[], object], what: str) -> None:
        """Wait for a state."""
        until = time.monotonic() + TIMEOUT_SECONDS
        while not is_true():
            assert time.monotonic() < until, f"{what}: not seen in {TIMEOUT_SECONDS} s\n{self.all_logs()}"
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


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
