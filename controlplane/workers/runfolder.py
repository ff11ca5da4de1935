"""The folder of a unit: its plan and its lease, which the keeper reads, and what is needed to find it again.

Covers writing, renewing and listing these folders. Does not cover the processes themselves. ::

    <folder of the runtime>/<name of the unit>/
        spec.json       what was asked for
        given/          all that the processes see of it, and cannot write
            plan.json   what the keeper does
            lease       when it ends: a point in time of CLOCK_MONOTONIC, or "stop" and the seconds of grace
        ...             more as the runtime needs

Nothing in it is secret. It may be lost with the machine's boot: CLOCK_MONOTONIC and the processes are, too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from controlplane.workers.base import UnitUnknownError, WorkerSpec

__all__ = ["RunFolder", "unknown_unit"]


class RunFolder:
    """The folders of all units of one runtime.

    Parameters
    ----------
    path
        Where they are.
    monotonic
        Reads CLOCK_MONOTONIC, in seconds.
    """

    def __init__(self, path: Path, monotonic: Callable[[], float]) -> None:
        self.path = path
        self._monotonic = monotonic

    def names(self) -> list[str]:
        """List the units that have a folder."""
        if not self.path.is_dir():
            return []
        return sorted(folder.name for folder in self.path.iterdir() if (folder / "spec.json").is_file())

    def folder(self, name: str) -> Path:
        """Path of a unit's folder; it need not exist."""
        return self.path / name

    def given(self, name: str) -> Path:
        """Path of what the processes of a unit see."""
        return self.path / name / "given"

    def create(self, spec: WorkerSpec, plan: dict[str, Any]) -> None:
        """Make the folder of a unit, with a lease that runs from now. What was there before goes first.

        Parameters
        ----------
        spec
            The unit.
        plan
            What its keeper does.
        """
        self.remove(spec.name)
        given = self.given(spec.name)
        given.mkdir(parents=True)
        for folder in (self.folder(spec.name), given):
            folder.chmod(0o755)  # whatever the umask: the unit's user reads them
        _write(given / "plan.json", json.dumps(plan, indent=1))
        self.renew(spec.name, spec.deadline_seconds, is_new=True)
        _write(self.folder(spec.name) / "spec.json", json.dumps(asdict(spec), default=str, indent=1))

    def renew(self, name: str, deadline_seconds: float, *, is_new: bool = False) -> None:
        """Write a new deadline, unless the unit was told to stop.

        Parameters
        ----------
        name
            Name of the unit.
        deadline_seconds
            Seconds from now.
        is_new
            Whether the folder is being made.

        Raises
        ------
        UnitUnknownError
            It has no folder.
        """
        lease = self.given(name) / "lease"
        if not is_new and not lease.is_file():
            raise unknown_unit(name)
        if is_new or not lease.read_text().startswith("stop"):
            _write(lease, repr(self._monotonic() + deadline_seconds))

    def end(self, name: str, grace_seconds: float) -> None:
        """Tell the keeper of a unit to end; without a folder there is nobody to tell."""
        if self.given(name).is_dir():
            _write(self.given(name) / "lease", f"stop {grace_seconds!r}")

    def spec(self, name: str) -> WorkerSpec:
        """Read back what was asked for.

        Parameters
        ----------
        name
            Name of the unit.

        Returns
        -------
        WorkerSpec
            As given to :meth:`create`.

        Raises
        ------
        UnitUnknownError
            It has no folder.
        """
        try:
            fields = json.loads((self.folder(name) / "spec.json").read_text())
        except FileNotFoundError:
            raise unknown_unit(name) from None
        for key in ("process_names", "groups", "data_folders"):
            fields[key] = tuple(fields[key])
        if fields["address"] is not None:
            fields["address"] = IPv6Address(fields["address"])
        fields["hosts"] = tuple((host, IPv6Address(address)) for host, address in fields.get("hosts", ()))
        return WorkerSpec(**fields)

    def remove(self, name: str) -> None:
        """Remove the folder of a unit; none is fine."""
        # The spec goes first and alone: half a folder is no unit.
        (self.folder(name) / "spec.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder(name), ignore_errors=True)


def unknown_unit(name: str) -> UnitUnknownError:
    """Make the error for a name that no unit has."""
    return UnitUnknownError(f"There is no worker unit {name!r} here: it was never started, or has been removed.")


def _write(path: Path, text: str) -> None:
    """Replace a file at once: who reads it sees the old or the new text."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(0o644)
    os.replace(new, path)  # noqa: PTH105 - the name of the system call says that it is atomic
