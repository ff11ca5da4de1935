"""Units as plain processes of this host: the runtime that needs neither root nor an engine.

Covers starting, adopting and ending them, and which folders they see. Does not cover networks: they listen on
127.0.0.1. Where the host allows namespaces (:mod:`.namespaces`), nothing of a unit survives its keeper; elsewhere a
process that a task has started, and that has left its group, can survive a keeper that was killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from controlplane.command import run
from controlplane.errors import SiteError
from controlplane.workers import entrypoint, nursery
from controlplane.workers.base import ImageError, UnitStartError, WorkerSpec, WorkerState
from controlplane.workers.commands import plan_unit, reason_of
from controlplane.workers.inventory import inventory_command, parse_inventory
from controlplane.workers.namespaces import find_namespace, submounts_of, wrap
from controlplane.workers.ports import listen_locally
from controlplane.workers.processes import (
    ProcessRecord,
    children_of,
    disown,
    is_alive,
    read_record,
    record_of,
    write_record,
)
from controlplane.workers.runfolder import RunFolder, unknown_unit

__all__ = ["ProcessRuntime"]

GRACE_SECONDS = 5.0  # at the end of a lease; stop() says its own
KILL_TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.02
INVENTORY_TIMEOUT_SECONDS = 30.0
# What another user's processes may know of this one's environment.
_SHARED_VARIABLES = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")

logger = logging.getLogger(__name__)


class ProcessRuntime:
    """Start units as processes of this host.

    Parameters
    ----------
    folder
        Where the units have their folders. Whoever can write it can end them.
    python
        The interpreter of Dask's processes.
    views
        Where the data folders really are, by the path at which units see them; others are where they seem to be.
    hidden_folders
        Folders that units see empty, such as those of other sites that are simulated on this host.
    environment
        Further variables of Dask's processes.
    monotonic
        Reads CLOCK_MONOTONIC, in seconds.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        python: str = sys.executable,
        views: Mapping[str, str] | None = None,
        hidden_folders: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = RunFolder(Path(folder).absolute(), monotonic)
        self.python = python
        self.views = dict(views or {})
        self.hidden_folders = tuple(hidden_folders)
        self.environment = dict(environment or {})
        self._monotonic = monotonic
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._namespace: tuple[str, ...] | None = None
        self._has_looked = False
        self._starting: set[str] = set()
        self._packages: dict[str, str] = {}

    @property
    def is_isolated(self) -> bool:
        """Whether each unit sees only its own folders and ends as a whole; known once a unit was started."""
        return self._namespace is not None

    async def observe(self) -> dict[str, WorkerState]:
        """Look at all units; see :meth:`.WorkerRuntime.observe`."""
        return await asyncio.to_thread(lambda: {name: self._state(name) for name in self.folder.names()})

    async def start(self, spec: WorkerSpec) -> WorkerState:
        """Start a unit; see :meth:`.WorkerRuntime.start`."""
        self._starting.add(spec.name)
        try:
            return await asyncio.to_thread(self._start, spec)
        finally:
            self._starting.discard(spec.name)

    async def stop(self, name: str, grace_seconds: float) -> None:
        """End a unit and remove its folder; see :meth:`.WorkerRuntime.stop`."""
        self.folder.end(name, grace_seconds)
        process = read_record(self._record(name))
        family = [] if process is None else [process, *children_of(process.pid)]
        if not await self._wait_until_gone(name, family, grace_seconds + 1):
            logger.info("killing a worker unit that did not end in time name=%s", name)
            for member in family:
                if is_alive(member):
                    os.kill(member.pid, signal.SIGKILL)
            if not await self._wait_until_gone(name, family, KILL_TIMEOUT_SECONDS):
                raise UnitStartError(
                    f"Worker unit {name!r} (process {family[0].pid}) does not end even when killed: the kernel is "
                    f"waiting for something, perhaps a disk. See /proc/{family[0].pid}/stack."
                )
        self._children.pop(name, None)
        await asyncio.to_thread(self.folder.remove, name)

    async def logs(self, name: str, lines: int, process: str | None = None) -> str:
        """Read the end of a unit's log; see :meth:`.WorkerRuntime.logs`."""
        return await asyncio.to_thread(self._logs, name, lines, process)

    async def renew(self, name: str, deadline_seconds: float) -> None:
        """Give a unit a new deadline; see :meth:`.WorkerRuntime.renew`."""
        self.folder.renew(name, deadline_seconds)

    async def check_image(self, image: str | None) -> None:
        """Accept every image: processes have none, they run the Python of this host."""

    async def packages(self, image: str | None) -> dict[str, str]:
        """Ask the interpreter of the workers; see :meth:`.WorkerRuntime.packages`."""
        if not self._packages:
            try:
                output = await run(inventory_command(self.python), timeout_seconds=INVENTORY_TIMEOUT_SECONDS)
                self._packages = parse_inventory(output.stdout)
            except (SiteError, ValueError) as exc:
                raise ImageError(
                    f"{self.python} does not say which packages it has ({exc}): correct process.python in site.toml."
                ) from exc
        return self._packages

    async def close(self) -> None:
        """Let go of the units, which live on; see :meth:`.WorkerRuntime.close`."""
        for child in self._children.values():
            disown(child)
        self._children.clear()

    # How

    def _start(self, spec: WorkerSpec) -> WorkerState:
        if spec.name in self.folder.names() and (state := self._state(spec.name)).state != "exited":
            return state
        user = _other_user(spec)
        if spec.role == "scheduler":
            for listener in listen_locally(spec):
                listener.close()  # Dask opens it again; would it be taken now, Dask would choose another one
        try:
            return self._launch(spec, user)
        except OSError as exc:
            raise UnitStartError(
                f"Worker unit {spec.name!r} cannot be started: {exc}. Mend it, it is tried again."
            ) from exc

    def _launch(self, spec: WorkerSpec, user: tuple[int, int, tuple[int, ...]] | None) -> WorkerState:
        self._look_at_host()
        if self._namespace is None:
            self._link_views(spec)
        scratch = self.folder.folder(spec.name) / "scratch"
        plan = plan_unit(
            spec,
            python=self.python,
            scratch=str(scratch),
            grace_seconds=GRACE_SECONDS,
            nursery=nursery.__file__,
            environment=self.environment,
        )
        self.folder.create(spec, plan)
        scratch.mkdir(mode=0o700)
        if user is not None:
            os.chown(scratch, spec.uid, spec.gid)
        command = wrap(
            [self.python, "-I", entrypoint.__file__, str(self.folder.given(spec.name))],
            namespace=self._namespace,
            views=self._views(spec.data_folders),
            hidden=self.hidden_folders,
            user=user,
        )
        with self._log(spec.name).open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=_environment(user, scratch),
                start_new_session=True,  # the unit outlives this process, which may be restarted
            )
        self._children[spec.name] = child
        write_record(self._record(spec.name), record_of(child.pid))
        logger.info("started a worker unit name=%s pid=%d processes=%d", spec.name, child.pid, len(spec.process_names))
        return self._state(spec.name)

    def _look_at_host(self) -> None:
        if self._has_looked:
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=self.folder.path) as probe:
            self._namespace = find_namespace(Path(probe))
        if self._namespace is None:
            logger.warning("this host allows no namespaces: units see the data folders of all sites")
        self._has_looked = True

    def _state(self, name: str) -> WorkerState:
        spec = self.folder.spec(name)
        process = read_record(self._record(name))
        child = self._children.get(name)
        code = None if child is None else child.poll()
        if process is not None and code is None and is_alive(process):
            return WorkerState(
                cluster_id=spec.cluster_id,
                name=name,
                state="running",
                pid=process.pid,
                netns=f"/proc/{process.pid}/ns/net",
            )
        if process is None and name in self._starting:
            return WorkerState(cluster_id=spec.cluster_id, name=name, state="starting")
        message = "it was started only in part" if process is None else reason_of(code)
        return WorkerState(
            cluster_id=spec.cluster_id,
            name=name,
            state="exited",
            exit_code=code,
            message=message,
            has_run=process is not None,
        )

    def _link_views(self, spec: WorkerSpec) -> None:
        """Let folders lead to where the data really is, where they cannot be mounted."""
        for folder in map(Path, spec.data_folders):
            source = self.views.get(str(folder), str(folder))
            if source != str(folder) and not folder.is_symlink():
                if folder.is_dir():
                    folder.rmdir()  # fails if something is in it: then it is not the empty place that it should be
                folder.symlink_to(source, target_is_directory=True)

    def _views(self, folders: Sequence[str]) -> dict[str, str]:
        sources = {self.views.get(folder, folder): folder for folder in folders}
        return {
            source + mount: target + mount
            for source, target in sources.items()
            for mount in ("", *submounts_of(source))
        }

    def _record(self, name: str) -> Path:
        return self.folder.folder(name) / "process.json"

    async def _wait_until_gone(self, name: str, family: Sequence[ProcessRecord], timeout_seconds: float) -> bool:
        until = self._monotonic() + timeout_seconds
        while True:
            if name in self._children:
                self._children[name].poll()  # takes note of its end, without which it stays as a zombie
            if not any(is_alive(member) for member in family):
                return True
            if self._monotonic() > until:
                return False
            await asyncio.sleep(POLL_SECONDS)

    def _log(self, name: str) -> Path:
        return self.folder.folder(name) / "log"

    def _logs(self, name: str, lines: int, process: str | None) -> str:
        try:
            with self._log(name).open(errors="replace") as log:
                wanted = (line for line in log if process is None or line.startswith(f"{process} | "))
                return "".join(deque(wanted, maxlen=lines))
        except FileNotFoundError:
            raise unknown_unit(name) from None


def _other_user(spec: WorkerSpec) -> tuple[int, int, tuple[int, ...]] | None:
    """Tell as whom to run, if not as this process's own user."""
    if spec.uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise UnitStartError(
            f"Worker unit {spec.name!r} should run as user {spec.uid}, and this daemon runs as user {os.geteuid()}, "
            'not as root: start a daemon as that user, or use runtime = "docker".'
        )
    return spec.uid, spec.gid, spec.groups


def _environment(user: tuple[int, int, tuple[int, ...]] | None, scratch: Path) -> dict[str, str]:
    if user is None:
        environment = dict(os.environ)
        # The source tree of a developer must not leak into an environment that is meant to be another one.
        environment.pop("PYTHONPATH", None)
        return environment
    return {name: os.environ[name] for name in _SHARED_VARIABLES if name in os.environ} | {"HOME": str(scratch)}
