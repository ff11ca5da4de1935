"""The protocol of worker runtimes, the records that go through it, and its errors.

Covers what every runtime promises; ``tests/contract/test_workers.py`` holds all of them to it. Does not cover how a
runtime does it, nor which workers a cluster should have.

A *unit* is what a runtime starts under one name: a container, or a supervisor with its processes. Inside it a keeper
(:mod:`.entrypoint`) starts Dask's processes, replaces those that exit, and ends them all when the deadline has passed.

Errors of runtimes, below those of :mod:`..errors`::

    RuntimeUnknownError               the engine does not answer: nothing is known, so nothing may be concluded
    ApplyError ── UnitStartError      a unit cannot be started as it was asked for
    ConflictError ── PortTakenError   somebody else listens where the scheduler should be reached
    InvalidSpecError ┬─ ImageError    the image is not here
                     └─ FolderError   a data folder is not here
    NotFoundError ── UnitUnknownError there is no unit of that name
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Literal, Protocol

from controlplane.errors import ApplyError, ConflictError, InvalidSpecError, NotFoundError, RuntimeUnknownError

__all__ = [
    "FolderError",
    "ImageError",
    "PortTakenError",
    "RuntimeUnknownError",
    "UnitStartError",
    "UnitUnknownError",
    "WorkerRuntime",
    "WorkerSpec",
    "WorkerState",
]

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,62}")  # what Docker, file systems and Dask all take


class UnitStartError(ApplyError):
    """A unit cannot be started as it was asked for."""


class PortTakenError(ConflictError):
    """Somebody else listens at the port of this host where the scheduler should be reached."""


class ImageError(InvalidSpecError):
    """The image is not here, or cannot be used."""


class FolderError(InvalidSpecError):
    """A data folder is not here, or not mounted."""


class UnitUnknownError(NotFoundError):
    """There is no unit of that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """A unit as it should be.

    Attributes
    ----------
    cluster_id
        The cluster that it belongs to.
    name
        Name of the unit, unique at its runtime over all clusters.
    pool
        The site's pool: workers get the resource ``pool-<pool>`` and ``POOL_NAME`` in their environment.
    site
        Number of the site in its cluster.
    process_names
        Names of Dask's processes in this unit: ``("ecmwf-1-0", "ecmwf-1-1")``; for a scheduler, one name.
    threads_per_process
        Threads of each worker, and processors that each process may use.
    memory_bytes_per_process
        Memory of each process, in bytes.
    scheduler_address
        Where workers find their scheduler: ``tcp://[fda5:c0ff:eeee:0::1]:8786``; unused by a scheduler.
    address
        Address on the data plane, the only one where the unit listens; ``None`` is 127.0.0.1, without waiting for it.
    image
        Image of the container, ``None`` for the runtime's default; a runtime without images ignores it.
    uid, gid, groups
        Whose rights the processes have: numbers of the user, its group and its further groups.
    data_folders
        Folders that the processes can read, at the same paths.
    deadline_seconds
        For how long from now, unless renewed, the unit lives whatever happens to the daemon.
    role
        ``worker`` or ``scheduler``.
    client_port, dashboard_port
        Ports at this host's 127.0.0.1 for clients and browsers; used by a scheduler only. ``None``: no dashboard.
    owner
        Name of the user, for labels only.
    hosts
        Names that the processes can look up, with their addresses; a runtime without networks of its own ignores them.
    """

    cluster_id: str
    name: str
    pool: str
    site: int
    process_names: tuple[str, ...]
    threads_per_process: int
    memory_bytes_per_process: int
    scheduler_address: str | None
    address: IPv6Address | None
    uid: int
    gid: int
    deadline_seconds: float
    groups: tuple[int, ...] = ()
    image: str | None = None
    data_folders: tuple[str, ...] = ()
    role: Literal["worker", "scheduler"] = "worker"
    client_port: int = 8786
    dashboard_port: int | None = 8787
    owner: str = ""
    # Not in the repr, by which units are compared: one that runs goes on when the operator names another service.
    hosts: tuple[tuple[str, IPv6Address], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in (self.name, *self.process_names):
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name for a worker: use letters, digits, '-', '_' and '.', 2 to 63 of them."
                )
        if not self.process_names or len(set(self.process_names)) != len(self.process_names):
            raise ValueError(f"Unit {self.name} needs processes with different names, and got {self.process_names}.")
        if self.role == "worker" and self.scheduler_address is None:
            raise ValueError(f"Unit {self.name} has workers, so its spec must say where their scheduler is.")
        for folder in self.data_folders:
            if not folder.startswith("/"):
                raise ValueError(f"Data folder {folder!r} must be an absolute path.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A unit as it is.

    Attributes
    ----------
    cluster_id, name
        As in its :class:`WorkerSpec`.
    state
        ``starting`` until it has a process, then ``running``, at last ``exited``; it stays so until it is stopped.
    pid
        Process of this host that lives as long as the unit does.
    netns
        Path of the unit's network namespace, to which its link is attached; ``None`` if it is this host's.
    exit_code
        Of a unit that has exited, where it is known.
    message
        Why it is so, for people.
    has_run
        Of a unit that has exited: whether it ever ran, as far as anybody knows.
    """

    cluster_id: str
    name: str
    state: Literal["starting", "running", "exited"]
    pid: int | None = None
    netns: str | None = None
    exit_code: int | None = None
    message: str = ""
    has_run: bool = False


class WorkerRuntime(Protocol):
    """What starts, observes and ends units. All methods may be called again after a crash of the caller.

    Notes
    -----
    A unit has its own deadline: it ends when the deadline has passed, though nobody asked and nobody is left to ask.
    A new runtime object over the same host finds all units that an earlier one has started.
    """

    async def observe(self) -> dict[str, WorkerState]:
        """Look at all units of this runtime.

        Returns
        -------
        dict
            States by name; units of a past life of the daemon and those that have exited are among them.

        Raises
        ------
        RuntimeUnknownError
            The engine does not answer.
        """
        ...

    async def start(self, spec: WorkerSpec) -> WorkerState:
        """Start a unit; one of this name that runs is left as it is, one that has exited is replaced.

        Parameters
        ----------
        spec
            What to start.

        Returns
        -------
        WorkerState
            The unit, which waits for its address before it starts Dask's processes.

        Raises
        ------
        UnitStartError
            It cannot be started as asked.
        PortTakenError
            A scheduler's port on this host is taken.
        ImageError
            There is no such image.
        FolderError
            A data folder is not here.
        RuntimeUnknownError
            The engine does not answer.
        """
        ...

    async def stop(self, name: str, grace_seconds: float) -> None:
        """End a unit and remove all of it; what does not end by itself in time is killed.

        Parameters
        ----------
        name
            Name of the unit; none of this name is fine.
        grace_seconds
            How long its processes may take to end by themselves.

        Raises
        ------
        RuntimeUnknownError
            The engine does not answer; the unit's deadline is withdrawn as far as possible.
        """
        ...

    async def logs(self, name: str, lines: int, process: str | None = None) -> str:
        """Read what a unit's processes have written.

        Parameters
        ----------
        name
            Name of the unit.
        lines
            At most so many, the last ones.
        process
            Only what this one wrote.

        Returns
        -------
        str
            Lines that begin with the name of the process which wrote them.

        Raises
        ------
        UnitUnknownError
            There is no such unit.
        RuntimeUnknownError
            The engine does not answer.
        """
        ...

    async def renew(self, name: str, deadline_seconds: float) -> None:
        """Give a unit a new deadline.

        Parameters
        ----------
        name
            Name of the unit.
        deadline_seconds
            Seconds from now.

        Raises
        ------
        UnitUnknownError
            There is no such unit.
        """
        ...

    async def check_image(self, image: str | None) -> None:
        """Make sure that an image can be used here.

        Parameters
        ----------
        image
            Its name, or ``None`` for the runtime's default.

        Raises
        ------
        ImageError
            It is not here.
        RuntimeUnknownError
            The engine does not answer.
        """
        ...

    async def packages(self, image: str | None) -> dict[str, str]:
        """Ask with which versions of packages workers run.

        Parameters
        ----------
        image
            Their image, or ``None`` for the runtime's default; a runtime without images ignores it.

        Returns
        -------
        dict
            Version by package, ``python`` among them.

        Raises
        ------
        ImageError
            It is not here, or cannot be asked.
        RuntimeUnknownError
            The engine does not answer.
        """
        ...

    async def close(self) -> None:
        """Let go of what this object holds; units stay, and another call opens it again."""
        ...
