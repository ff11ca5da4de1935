"""What a person's clusters are called and where they are, for other processes of the same person.

Covers one small file for each cluster that runs, in a private folder that does not outlive a boot of the machine. It
holds names, addresses and the id of the process that keeps the cluster; no secret. Whoever keeps a cluster writes its
file again with every renewal, so that a file whose keeper was killed is known to be out of date once the leases are
over: whoever looks or starts a cluster next removes it. Does not cover what is true of a cluster: the sites know that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from meshcompute.errors import MeshError

__all__ = ["ClusterRecord", "UnknownClusterError", "find_record", "forget", "record_folder", "records", "remember"]


LEASES_REMEMBERED = 1.5  # one lease, and as long as a renewal may have been on its way
LOG_REMEMBERED_SECONDS = 3600.0  # longer than a boot may take


class UnknownClusterError(MeshError, LookupError):
    """There is no such cluster here, or more than one and none was named.

    Parameters
    ----------
    name
        The name that was given; None if none was.
    known
        Names of the clusters that there are.
    """

    def __init__(self, name: str | None, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        known = ", ".join(self.known)
        if self.name is None and self.known:
            return f"There are several clusters; name one of them: {known}."
        which = "No cluster" if self.name is None else f"No cluster {self.name!r}"
        cure = f"There are: {known}." if known else "Start one with meshcompute up user@site."
        return f"{which} of yours runs on this host. {cure}"


class ClusterRecord(BaseModel):
    """One cluster that runs, and who keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    cluster_id: str
    prefix: str
    scheduler: str  # how the host of the scheduler is reached
    sites: dict[int, str]  # how each site is reached, by its number
    pools: dict[int, str]
    socket: str
    ssh: tuple[str, ...]
    site_command: str
    client_address: str
    dashboard_address: str | None
    lease_seconds: float
    pid: int
    pid_started: str

    def is_kept(self) -> bool:
        """Whether the process that renews the leases still runs."""
        return process_started(self.pid) == self.pid_started


def process_started(pid: int) -> str:
    """Tell when a process began, so that its number is not taken for another's; empty if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def record_folder() -> Path:
    """Find the private folder of the records, and make it if it is not there.

    Returns
    -------
    pathlib.Path
        Below ``XDG_RUNTIME_DIR``, else below the folder for temporary files.
    """
    parent = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(parent) / "meshcompute" if parent else Path(tempfile.gettempdir()) / f"meshcompute-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise MeshError(f"{folder} is not yours alone: remove it, or set XDG_RUNTIME_DIR to a private folder.")
    return folder


def remember(record: ClusterRecord) -> None:
    """Write a record, or write it again to say that the cluster is kept; the old one of the same name is replaced.

    Parameters
    ----------
    record
        The cluster.
    """
    records()  # sweeps what others have left
    path = record_folder() / f"{record.name}.json"
    text = record.model_dump_json()
    with contextlib.suppress(OSError):  # it is not there yet, or not any more
        if path.read_text() == text:
            os.utime(path)
            return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def forget(name: str) -> None:
    """Remove a record, and the folder with the last one.

    Parameters
    ----------
    name
        Name of the cluster.
    """
    folder = record_folder()
    (folder / f"{name}.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are others
        folder.rmdir()


def records() -> list[ClusterRecord]:
    """Read all records of this person, and remove those of clusters whose keeper was killed and whose leases are over.

    Returns
    -------
    list of ClusterRecord
        By name.
    """
    folder = record_folder()
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValidationError):  # it ended just now, or another release wrote it
            record = ClusterRecord.model_validate_json(path.read_text())
            if record.is_kept() or _age_seconds(path) < LEASES_REMEMBERED * record.lease_seconds:
                found.append(record)
            else:
                path.unlink()
    # Logs of clusters in the background, and records that were half written.
    for path in (*folder.glob("*.log"), *folder.glob(".*.json.*")):
        with contextlib.suppress(OSError):
            if not path.with_suffix(".json").exists() and _age_seconds(path) > LOG_REMEMBERED_SECONDS:
                path.unlink()
    if not found:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return found


def _age_seconds(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def find_record(name: str | None) -> ClusterRecord:
    """Find a cluster by its name; without one, the only cluster that there is.

    Parameters
    ----------
    name
        Its name, or None.

    Returns
    -------
    ClusterRecord
        The cluster.

    Raises
    ------
    UnknownClusterError
        There is none of that name, or several and none was named.
    """
    known = records()
    found = [record for record in known if name in (None, record.name)]
    if len(found) != 1:
        raise UnknownClusterError(name, tuple(record.name for record in known))
    return found[0]
