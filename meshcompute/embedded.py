"""The embedded mesh: a scheduler and the workers of several sites as processes of this machine.

Covers starting and ending them, what each site can see, their logs, and that nothing outlives this process. Does not
cover networks: everything listens on the loopback address only, and no root is needed. Nor does it cover daemons and
leases, which :mod:`meshcompute.mesh.localsites` has: this is for tests and for trying pools out, with stock schedulers
and workers of any environment, which may be killed.

::

    this process ── client ──►  scheduler            127.0.0.1, a stock `dask scheduler`
                                  ▲        ▲
                 a-1-0 … a-1-3  ──┘        └──  b-2-0 … b-2-3        stock `dask worker`, one process each
                 sees <root>/data/a             sees <root>/data/b   (elsewhere these folders are empty)

Where the kernel permits, each worker has a mount namespace of its own, in which its site's folder appears at
``<root>/data/<site>`` and the folders of the other sites are hidden. This process and the scheduler see none of it,
as a client on another continent would.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import dask
from distributed import Client

from meshcompute.errors import MeshError
from meshcompute.scratch import ScratchFolder

__all__ = ["EmbeddedMesh", "MeshStartError"]

POOL_PREFIX = "pool-"  # the resource of a worker of pool x is called pool-x (as in meshcompute.pools)
LOG_TAIL_LINES = 15

# Ways to a mount namespace, best first: with the privilege (root), as the user itself, as a mapped root (older tools).
_NAMESPACES: Sequence[Sequence[str]] = (
    ("unshare", "--mount"),
    ("unshare", "--user", "--map-current-user", "--keep-caps", "--mount"),
    ("unshare", "--user", "--map-root-user", "--mount"),
)
# Linux ends these processes when the thread that started them ends, whatever ended it: nothing is left to clean up.
_DIE_WITH_PARENT: Sequence[str] = ("setpriv", "--pdeathsig", "KILL")
# What --keep-caps gave for the mounts is dropped again before the worker starts.
_DROP_CAPABILITIES: Sequence[str] = ("--inh-caps=-all", "--ambient-caps=-all")


class MeshStartError(MeshError, RuntimeError):
    """A process of the embedded mesh ended, or was not ready in time.

    Parameters
    ----------
    process
        Name of the process: ``scheduler`` or the name of a worker.
    reason
        What happened to it.
    log
        The last lines that it wrote.
    """

    def __init__(self, process: str, reason: str, log: str) -> None:
        super().__init__(process, reason, log)
        self.process = process
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return f"The embedded mesh did not start: {self.process} {self.reason}. The end of its log:\n{self.log}"


class EmbeddedMesh:
    """A Dask cluster of several sites on this machine.

    Parameters
    ----------
    sites
        The folder with the data of each site, by the site's name, which is also the name of its pool.
    workers_per_site
        Worker processes at each site, named ``<pool>-<number of the site>-<number of the process>``.
    threads_per_worker
        Threads of each of them.
    memory_limit
        Memory at which a worker pauses, in bytes or as Dask writes it; ``"auto"`` shares the machine's memory.
    resources
        Further resources of every worker, e.g. ``{"GPU": 1}``.
    scheduler_python
        Interpreter of the scheduler. Its environment needs Dask, and need not have meshcompute.
    worker_python
        Interpreter of the workers, likewise.
    environment
        Variables of all processes, besides this process's own; Dask's settings, for example.
    dashboard
        Whether the scheduler serves its dashboard (on 127.0.0.1, at a free port).
    start_timeout_seconds
        How long everything together may take to be ready.
    progress
        Called with one line of text whenever something became true that a waiting person wants to know.

    Notes
    -----
    The constructor stores; :meth:`start` or a ``with`` block acts. Workers have no nanny: one process is one worker,
    so that killing it is losing it.
    """

    def __init__(
        self,
        sites: Mapping[str, str | os.PathLike[str]],
        *,
        workers_per_site: int = 4,
        threads_per_worker: int = 1,
        memory_limit: str | int = "auto",
        resources: Mapping[str, float] | None = None,
        scheduler_python: str = sys.executable,
        worker_python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        dashboard: bool = False,
        start_timeout_seconds: float = 120.0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.sites = {name: Path(folder).absolute() for name, folder in sites.items()}
        self.workers_per_site = workers_per_site
        self.threads_per_worker = threads_per_worker
        self.memory_limit = memory_limit
        self.resources = dict(resources or {})
        self.scheduler_python = scheduler_python
        self.worker_python = worker_python
        self.environment = dict(environment or {})
        self.dashboard = dashboard
        self.start_timeout_seconds = start_timeout_seconds
        self._progress = progress or (lambda _line: None)
        self._scratch: ScratchFolder | None = None
        self._scheduler_address: str | None = None
        self._namespace: Sequence[str] | None = None
        self._dies_with_parent = False
        self._starter: ThreadPoolExecutor | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: list[Client] = []

    # What is true now

    @property
    def root(self) -> Path:
        """Folder of this mesh: ``data`` (what sites see), ``logs``, ``scratch``; it exists while the mesh does."""
        if self._scratch is None:
            raise MeshError("The embedded mesh is not running: use it in a with block, or call start() first.")
        return self._scratch.path

    @property
    def scheduler_address(self) -> str:
        """Address of the scheduler, e.g. ``tcp://127.0.0.1:40123``."""
        if self._scheduler_address is None:
            raise MeshError("The embedded mesh has no scheduler: use it in a with block, or call start() first.")
        return self._scheduler_address

    @property
    def isolated(self) -> bool:
        """Whether each site really sees only its own folder, and this process none of them."""
        return self._namespace is not None

    @property
    def pids(self) -> dict[str, int]:
        """Process id of the scheduler and of every worker, by name."""
        return {name: process.pid for name, process in self._processes.items()}

    def folder(self, site: str) -> Path:
        """Tell at which path the workers of a site see its folder.

        Parameters
        ----------
        site
            Name of the site.

        Returns
        -------
        pathlib.Path
            The same path on every process; empty for all others where :attr:`isolated` is true.
        """
        return self.root / "data" / site

    def log(self, process: str) -> str:
        """Read what a process has written so far.

        Parameters
        ----------
        process
            ``scheduler``, or the name of a worker.

        Returns
        -------
        str
            Its standard output and standard error.
        """
        return (self.root / "logs" / f"{process}.log").read_text(errors="replace")

    # Acting

    def start(self) -> Self:
        """Start all processes and wait until every worker is registered.

        Returns
        -------
        EmbeddedMesh
            This mesh.

        Raises
        ------
        MeshStartError
            A process ended or the time was up. Everything has been ended again.
        FileNotFoundError
            A site's folder does not exist.
        """
        for name, store in self.sites.items():
            if not store.is_dir():
                raise FileNotFoundError(f"The folder of site {name!r} does not exist: {store}")
        deadline = time.monotonic() + self.start_timeout_seconds
        self._scratch = ScratchFolder("meshcompute-mesh-")
        try:
            for folder in ("logs", "scratch", *(f"data/{name}" for name in self.sites)):
                (self.root / folder).mkdir(parents=True)
            self._find_out_what_the_machine_allows()
            self._start_scheduler()
            for name in self.sites:
                for _ in range(self.workers_per_site):
                    self.start_worker(name)
            self._wait_for_scheduler(deadline)
            self._wait_for_workers(deadline)
        except BaseException:
            self.close()
            raise
        return self

    def client(self, *, set_as_default: bool = True) -> Client:
        """Connect a client, which :meth:`close` closes too.

        Parameters
        ----------
        set_as_default
            Whether Dask uses it for everything that names no client.

        Returns
        -------
        distributed.Client
            A new client of this mesh's scheduler.
        """
        client = Client(self.scheduler_address, set_as_default=set_as_default)
        self._clients.append(client)
        return client

    def start_worker(self, site: str) -> str:
        """Start one more worker process at a site, without waiting for it.

        Parameters
        ----------
        site
            Name of the site.

        Returns
        -------
        str
            The worker's name.
        """
        number = list(self.sites).index(site) + 1
        taken = {int(name.rsplit("-", 1)[1]) for name in self._processes if name.startswith(f"{site}-{number}-")}
        name = f"{site}-{number}-{min(set(range(len(taken) + 1)) - taken)}"
        resources = {f"{POOL_PREFIX}{site}": 1.0, **self.resources}
        memory_limit = self.memory_limit
        if memory_limit == "auto":
            # Dask's own "auto" would give each single-process worker the memory of the machine.
            memory_limit = str(1 / (len(self.sites) * self.workers_per_site))
        command = [self.worker_python, "-m", "dask", "worker"]
        command += ["--scheduler-file", str(self.root / "scheduler.json"), "--name", name]
        command += ["--resources", " ".join(f"{key}={value:g}" for key, value in resources.items())]
        command += ["--nthreads", str(self.threads_per_worker), "--memory-limit", str(memory_limit)]
        command += ["--host", "127.0.0.1", "--no-nanny", "--death-timeout", "60"]
        command += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        command += ["--local-directory", str(self.root / "scratch" / name)]
        self._start(name, command, site=site)
        return name

    def kill(self, process: str) -> None:
        """End one process at once, as a crash would.

        Parameters
        ----------
        process
            ``scheduler``, or the name of a worker.
        """
        ended = self._processes.pop(process)
        ended.kill()
        ended.wait()

    def close(self) -> None:
        """End everything that this mesh started, and remove its folder. Calling it again does nothing."""
        for client in self._clients:
            client.close(timeout=2)
        self._clients.clear()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None
        if self._scratch is not None:
            self._scratch.remove()
        self._scratch = self._scheduler_address = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # How

    def _find_out_what_the_machine_allows(self) -> None:
        probe = self.root / "scratch"
        self._dies_with_parent = _succeeds([*_DIE_WITH_PARENT, "true"])
        for namespace in _NAMESPACES:
            mount = shlex.join(["mount", "-t", "tmpfs", "-o", "size=4k", "probe", str(probe)])
            bind = shlex.join(["mount", "--bind", str(probe), str(self.root / "logs")])
            if _succeeds([*namespace, "sh", "-ec", f"{mount}; {bind}"]):
                self._namespace = namespace
                self._progress("each site sees only its own folder (a mount namespace per process)")
                return
        self._namespace = None
        for name, store in self.sites.items():
            view = self.folder(name)
            view.rmdir()
            view.symlink_to(store, target_is_directory=True)
        self._progress("this machine allows no mount namespaces: every site sees the folders of all")

    def _start_scheduler(self) -> None:
        command = [self.scheduler_python, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0"]
        command += ["--scheduler-file", str(self.root / "scheduler.json")]
        # Without a dashboard there still is an HTTP server, and by default it listens to everybody.
        command += ["--dashboard-address", "127.0.0.1:0", "--dashboard" if self.dashboard else "--no-dashboard"]
        self._start("scheduler", command, site=None)

    def _start(self, name: str, command: Sequence[str], *, site: str | None) -> None:
        """Start a process that dies with this one and sees the folder of its site only."""
        if self._dies_with_parent:
            drop = _DROP_CAPABILITIES if self._namespace and "--keep-caps" in self._namespace else ()
            command = [*_DIE_WITH_PARENT, *drop, *command]
        if self._namespace is not None:
            command = [*self._namespace, "sh", "-ec", f'{self._mounts(site)}\nexec "$@"', "sh", *command]
        # As a nanny does: one thread for each task, and memory that is freed goes back to the system at once.
        spawned = dask.config.get("distributed.nanny.pre-spawn-environ")
        environment = {variable: str(value) for variable, value in spawned.items() if value is not None}
        environment |= {**os.environ, "PYTHONUNBUFFERED": "1"}
        # The source tree of a developer must not leak into an environment that is meant to be another one.
        environment.pop("PYTHONPATH", None)
        environment |= self.environment
        if site is not None:
            environment["POOL_NAME"] = site
        with (self.root / "logs" / f"{name}.log").open("ab") as log:
            if self._starter is None:
                # The kernel's "parent" is the thread that forks: it must live as long as the mesh does.
                self._starter = ThreadPoolExecutor(1, thread_name_prefix="meshcompute-starter")
            self._processes[name] = self._starter.submit(
                subprocess.Popen,
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for us; we end them in order
            ).result()

    def _mounts(self, site: str | None) -> str:
        """Render the shell lines that show a site its folder and hide all others; ``None`` sees nothing."""
        own = None if site is None else self.sites[site]
        lines = [] if site is None else [["mount", "--bind", str(own), str(self.folder(site))]]
        lines += [
            ["mount", "-t", "tmpfs", "-o", "ro,size=4k,mode=0555", "hidden", str(store)]
            for store in self.sites.values()
            if store != own
        ]
        return "\n".join(shlex.join(line) for line in lines)

    def _wait_for_scheduler(self, deadline: float) -> None:
        file = self.root / "scheduler.json"
        while self._scheduler_address is None:
            self._check_alive(deadline, "scheduler")
            try:
                self._scheduler_address = str(json.loads(file.read_text())["address"])
            except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or only half
                time.sleep(0.02)
        self._progress(f"scheduler at {self._scheduler_address}")

    def _wait_for_workers(self, deadline: float) -> None:
        expected = {name for name in self._processes if name != "scheduler"}
        seen = 0
        with Client(self.scheduler_address, set_as_default=False) as client:
            while True:
                workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"].values()
                missing = expected - {worker["name"] for worker in workers}
                if len(expected) - len(missing) > seen:
                    seen = len(expected) - len(missing)
                    self._progress(f"{seen} of {len(expected)} workers")
                if not missing:
                    return
                self._check_alive(deadline, min(missing))
                time.sleep(0.05)

    def _check_alive(self, deadline: float, waiting_for: str) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise MeshStartError(name, f"ended with exit code {process.returncode}", self._log_tail(name))
        if time.monotonic() > deadline:
            reason = f"was not ready after {self.start_timeout_seconds:g} s"
            raise MeshStartError(waiting_for, reason, self._log_tail(waiting_for))

    def _log_tail(self, process: str) -> str:
        return "\n".join(self.log(process).splitlines()[-LOG_TAIL_LINES:])


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
