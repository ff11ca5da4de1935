"""Sites on this machine, each with a control daemon of its own: what a mesh is made of, without root and network.

Covers starting and ending the daemons, as the same person, in a private folder. They are the programs that an operator
of a real site runs, with plain processes as workers and the loopback address as data plane; a
:class:`~meshcompute.mesh.cluster.MeshCluster` drives them as it does any others. Does not cover the cluster itself, nor
what its workers see: each daemon shows its own workers its own folder, and hides those of the others, where the kernel
permits that.

::

    this process ── MeshCluster ──► <root>/client.sock    daemon, role scheduler ──► dask scheduler
                          ├───────► <root>/a.sock         daemon of site a       ──► workers a-1-0 …: <root>/data/a
                          └───────► <root>/b.sock         daemon of site b       ──► workers b-2-0 …: <root>/data/b

Notes
-----
Nothing outlives this process for long. A daemon gets a signal when the thread that started it ends, whatever ended it,
and ends its clusters; should it be killed, too, workers end with their lease. The folder goes with whoever makes the
next one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from distributed.system import MEMORY_LIMIT

from meshcompute.embedded import MeshStartError
from meshcompute.errors import MeshError
from meshcompute.scratch import ScratchFolder

__all__ = ["CLIENT", "LocalSites"]

CLIENT = "client"  # the daemon of the scheduler; no site has this name
START_TIMEOUT_SECONDS = 60.0
END_TIMEOUT_SECONDS = 20.0
LOOK_SECONDS = 0.02
LOG_TAIL_LINES = 15
MEMORY_NBYTES_MIN = 64 << 20
# Linux sends the signal when the thread that started the daemon ends, whatever ended it.
_ENDS_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")


class LocalSites:
    """Control daemons of several sites, and of the client's host, on this machine.

    Parameters
    ----------
    sites
        The folder with the data of each site, by the site's name, which is also the name of its pool.
    workers_per_site
        Worker processes at each site, of one thread each.
    start_timeout_seconds
        How long the daemons may take until they answer.

    Notes
    -----
    The constructor stores; :meth:`start` or a ``with`` block acts::

        with LocalSites({"a": folder_a, "b": folder_b}) as local:
            with MeshCluster(local.addresses, scheduler=local.scheduler) as cluster, Client(cluster):
                ...
    """

    def __init__(
        self,
        sites: Mapping[str, str | os.PathLike[str]],
        *,
        workers_per_site: int = 4,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
    ) -> None:
        if CLIENT in sites:
            raise ValueError(f"{CLIENT!r} is the client's host and cannot be a site: choose another name.")
        self.sites = {name: Path(folder).absolute() for name, folder in sites.items()}
        self.workers_per_site = workers_per_site
        self.start_timeout_seconds = start_timeout_seconds
        self._scratch: ScratchFolder | None = None
        self._starter: ThreadPoolExecutor | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def root(self) -> Path:
        """Folder of the daemons: sockets, logs, and ``data`` (what sites see); it exists while they run."""
        if self._scratch is None:
            raise MeshError("The local sites do not run: use them in a with block, or call start() first.")
        return self._scratch.path

    @property
    def addresses(self) -> list[str]:
        """The sites, as a :class:`~meshcompute.mesh.cluster.MeshCluster` takes them."""
        return [self._address(name) for name in self.sites]

    @property
    def scheduler(self) -> str:
        """The client's host, likewise."""
        return self._address(CLIENT)

    @property
    def pids(self) -> dict[str, int]:
        """Process id of every daemon, by the site's name; the client's host's is called ``client``."""
        return {name: daemon.pid for name, daemon in self._daemons.items()}

    def folder(self, site: str) -> Path:
        """Tell at which path the workers of a site see its folder, and cannot write it.

        Parameters
        ----------
        site
            Name of the site.

        Returns
        -------
        pathlib.Path
            The same path everywhere; for all others an empty folder, where the kernel permits mount namespaces.
        """
        return self.root / "data" / site

    def log(self, site: str) -> str:
        """Read what a daemon has written so far.

        Parameters
        ----------
        site
            Name of the site, or ``client``.

        Returns
        -------
        str
            Its log.
        """
        return (self.root / f"{site}.log").read_text(errors="replace")

    def start(self) -> Self:
        """Start the daemons, and wait until all of them answer.

        Returns
        -------
        LocalSites
            These sites.

        Raises
        ------
        MeshStartError
            A daemon ended or the time was up. Everything has been ended again.
        FileNotFoundError
            A site's folder does not exist.
        """
        for name, store in self.sites.items():
            if not store.is_dir():
                raise FileNotFoundError(f"The folder of site {name!r} does not exist: {store}")
        deadline = time.monotonic() + self.start_timeout_seconds
        self._scratch = ScratchFolder("meshcompute-sites-")
        # The kernel's "parent" is the thread that forks: it must live as long as the daemons do.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="meshcompute-starter")
        try:
            for name in (CLIENT, *self.sites):
                self._start_daemon(name)
            for name in self._daemons:
                self._wait_until_it_answers(name, deadline)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the daemons with all that they started, and remove the folder. Calling it again does nothing."""
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(END_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:  # what it has not ended, ends with its lease
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # How

    def _address(self, name: str) -> str:
        return f"local:{self._socket(name)}"

    def _socket(self, name: str) -> Path:
        return self.root / f"{name}.sock"

    def _start_daemon(self, name: str) -> None:
        assert self._starter is not None
        if name in self.sites:
            self.folder(name).mkdir(parents=True)
        config = self.root / f"{name}.toml"
        config.write_text(self._site_toml(name))
        # meshcompute does not import the daemon: a site runs it as a program, and so do we.
        command = [sys.executable, "-m", "controlplane", "serve", "--stop-clusters", "--config", str(config)]
        with (self.root / f"{name}.log").open("ab") as log:
            self._daemons[name] = self._starter.submit(
                subprocess.Popen,
                [*_ENDS_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                start_new_session=True,  # a Ctrl-C in the terminal is for us; we end them in order
            ).result()

    def _site_toml(self, name: str) -> str:
        """Render what an operator would write; in quotes, JSON and TOML are the same."""
        others = [str(store) for store in self.sites.values()]
        memory_nbytes = max(MEMORY_NBYTES_MIN, MEMORY_LIMIT // (len(self.sites) * self.workers_per_site))
        lines = [
            f"pool = {json.dumps(name)}",
            f'role = "{"site" if name in self.sites else "scheduler"}"',
            'runtime = "process"',
            'network = "loopback"',
            f"socket = {json.dumps(str(self._socket(name)))}",
            f"state_folder = {json.dumps(str(self.root / 'state' / name))}",
            "[limits]",
            f"workers = {max(16, self.workers_per_site)}",
            f"memory_per_worker = {memory_nbytes}",
            "[workers]",
            f"processes_per_container = {self.workers_per_site}",
            f"memory_per_process = {memory_nbytes}",
            f"data_folders = {json.dumps([str(self.folder(name))] if name in self.sites else [])}",
            "[process]",
            f"hidden_folders = {json.dumps(others)}",
        ]
        if name in self.sites:
            lines.append(f"views = {{ {json.dumps(str(self.folder(name)))} = {json.dumps(str(self.sites[name]))} }}")
        return "\n".join(lines) + "\n"

    def _wait_until_it_answers(self, name: str, deadline: float) -> None:
        daemon = self._daemons[name]
        while not _accepts(self._socket(name)):
            if daemon.poll() is not None:
                reason = f"ended with exit code {daemon.returncode}"
            elif time.monotonic() > deadline:
                reason = f"did not answer within {self.start_timeout_seconds:g} s"
            else:
                time.sleep(LOOK_SECONDS)
                continue
            raise MeshStartError(f"the daemon of {name}", reason, self._log_tail(name))

    def _log_tail(self, name: str) -> str:
        return "\n".join(self.log(name).splitlines()[-LOG_TAIL_LINES:])


def _accepts(path: Path) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
