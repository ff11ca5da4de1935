"""Processes of this host that outlive the daemon: how to know them again.

Covers records of processes that cannot be mistaken for later ones with the same number. Does not cover starting them.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ProcessRecord", "children_of", "disown", "is_alive", "read_record", "record_of", "write_record"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    start_ticks: int  # since the boot, in units of the kernel's clock
    boot_id: str


def record_of(pid: int) -> ProcessRecord:
    """Record a process; one that has ended already gets a record that nobody alive has.

    Parameters
    ----------
    pid
        Its number.

    Returns
    -------
    ProcessRecord
        The record.
    """
    fields = _stat(pid)
    return ProcessRecord(pid=pid, start_ticks=int(fields[19]) if fields else -1, boot_id=_boot_id())


def is_alive(record: ProcessRecord) -> bool:
    """Tell whether the recorded process, and not another one, still runs; a zombie does not.

    Parameters
    ----------
    record
        The record.

    Returns
    -------
    bool
        Whether it runs.
    """
    fields = _stat(record.pid)
    is_same = bool(fields) and int(fields[19]) == record.start_ticks and record.boot_id == _boot_id()
    return is_same and fields[0] not in "ZX"


def children_of(pid: int) -> list[ProcessRecord]:
    """Record the children of a process's first thread.

    Parameters
    ----------
    pid
        Its number.

    Returns
    -------
    list of ProcessRecord
        Empty if it has ended.
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [record_of(int(child)) for child in children]


def disown(child: subprocess.Popen[bytes]) -> None:
    """Say that a child is meant to outlive this process; Python would warn of it as of one that was forgotten.

    Parameters
    ----------
    child
        The child.
    """
    if child.poll() is None:
        child.returncode = 0


def write_record(path: Path, record: ProcessRecord) -> None:
    """Write a record to a file.

    Parameters
    ----------
    path
        The file.
    record
        What goes into it.
    """
    path.write_text(json.dumps(asdict(record)))


def read_record(path: Path) -> ProcessRecord | None:
    """Read a record back.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    ProcessRecord or None
        None if it was not written, or only in part.
    """
    try:
        return ProcessRecord(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _stat(pid: int) -> list[str]:
    """Read the fields of /proc/PID/stat that follow the command's name: the state is 0, the start (field 22) is 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
