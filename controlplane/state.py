"""What a site was asked for, in memory and on disk, so that a restart of the daemon changes nothing.

Covers records of clusters and tombstones, one JSON file each, written so that a crash leaves the old or the new one.
Does not cover what runs: that is asked of the machine itself, every time. No secret is in any record: private keys
never leave the interfaces that use them.

::

    <state folder>/clusters/<id>.json       a cluster that should be here, or is being removed
    <state folder>/tombstones/<id>.json     epochs of clusters that ended, against late requests
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from controlplane.errors import StoreError
from controlplane.leases import Lease, Tombstone
from meshcompute.protocol import ClusterSpec

__all__ = ["ClusterRecord", "Owner", "Store"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """An account: the one that a cluster belongs to, or the one that its workers run as."""

    uid: int
    gid: int
    user: str
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """A cluster as it was asked for.

    ``fingerprint_by_unit`` says from which wish each unit was started. It is written before the start, so it is right
    or the unit does not run.
    """

    cluster_id: str
    owner: Owner
    run_as: Owner
    spec: ClusterSpec
    lease: Lease
    boot_id: str
    listen_port: int | None
    is_ended: bool = False
    end_reason: str = ""
    fingerprint_by_unit: Mapping[str, str] = field(default_factory=dict)


_RECORD = TypeAdapter(ClusterRecord)
_TOMBSTONE = TypeAdapter(Tombstone)


class Store:
    """The state folder.

    Parameters
    ----------
    folder
        Where to keep the files; only this account can read it.

    Notes
    -----
    A file that cannot be read is renamed to ``<name>.broken`` and reported: one bad file must not keep a site down,
    and must not vanish either.
    """

    def __init__(self, folder: Path) -> None:
        self._clusters = folder / "clusters"
        self._tombstones = folder / "tombstones"
        self._folder = folder
        self.problems: tuple[str, ...] = ()

    def open(self) -> None:
        """Make the folders.

        Raises
        ------
        StoreError
            If that is not possible.
        """
        try:
            self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)  # workers of others pass through it
            for folder in (self._clusters, self._tombstones):
                folder.mkdir(mode=0o700, exist_ok=True)
            for leftover in (*self._clusters.glob(".*.new"), *self._tombstones.glob(".*.new")):
                leftover.unlink()
        except OSError as exc:
            raise _store_error("make", self._folder, exc) from exc

    def load(self) -> tuple[dict[str, ClusterRecord], dict[str, Tombstone]]:
        """Read all that is there.

        Returns
        -------
        tuple
            Records and tombstones by cluster; the oldest tombstones come first.

        Raises
        ------
        StoreError
            If the folder cannot be read at all.
        """
        problems: list[str] = []
        records = {record.cluster_id: record for record in _read_all(self._clusters, _RECORD, problems)}
        stones = sorted(_read_all(self._tombstones, _TOMBSTONE, problems), key=lambda stone: stone.buried_at)
        self.problems = tuple(problems)
        return records, {stone.cluster_id: stone for stone in stones}

    def save(self, record: ClusterRecord) -> None:
        """Write a cluster's record; it is on disk when this returns."""
        _write(self._clusters / f"{record.cluster_id}.json", _RECORD.dump_json(record))

    def forget(self, cluster_id: str) -> None:
        """Remove a cluster's record."""
        _unlink(self._clusters / f"{cluster_id}.json")

    def bury(self, tombstone: Tombstone) -> None:
        """Remember the epoch at which a cluster ended."""
        _write(self._tombstones / f"{tombstone.cluster_id}.json", _TOMBSTONE.dump_json(tombstone))

    def unearth(self, cluster_id: str) -> None:
        """Remove a tombstone."""
        _unlink(self._tombstones / f"{cluster_id}.json")


def _read_all(folder: Path, adapter: TypeAdapter[Any], problems: list[str]) -> Iterable[Any]:
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as exc:
        raise _store_error("read", folder, exc) from exc
    for path in paths:
        try:
            found = adapter.validate_json(path.read_bytes())
            if found.cluster_id != path.stem:
                raise ValueError(f"it is about cluster {found.cluster_id}")
            yield found
        except (OSError, ValueError) as exc:
            reason = f"{exc.error_count()} errors" if isinstance(exc, ValidationError) else exc
            aside = path.with_suffix(".broken")
            with contextlib.suppress(OSError):
                path.rename(aside)
            problems.append(f"{path.name} cannot be used ({reason}) and was set aside as {aside}")
            logger.error("state file cannot be used path=%s reason=%s", path, reason)  # noqa: TRY400 - no traceback


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        new.rename(path)
    except OSError as exc:
        raise _store_error("write", path, exc) from exc


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise _store_error("remove", path, exc) from exc


def _store_error(verb: str, path: Path, exc: OSError) -> StoreError:
    return StoreError(
        f"Cannot {verb} {path}: {exc.strerror}. The daemon keeps its state there: mend the disk or the permissions, "
        "or name another state_folder in site.toml."
    )
