"""Temporary folders that do not outlive their owner for long, even one that was killed.

Covers claiming a folder and sweeping those whose owner is gone: a lock on a file in the folder is held as long as the
owner lives, by the kernel's doing. Does not cover what is in the folders.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ScratchFolder"]

_LOCK = ".owner-lives"


class ScratchFolder:
    """A temporary folder of this process; use it as a block, or call :meth:`remove`.

    Parameters
    ----------
    prefix
        Start of its name. Folders of the same start whose owner is gone are removed first.

    Attributes
    ----------
    path : pathlib.Path
        The folder.
    """

    def __init__(self, prefix: str) -> None:
        sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        # Locked before it has its name, so that nobody finds it unlocked in between.
        fresh = self.path / (_LOCK + ".new")
        self._lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the folder. Calling it again does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)  # what a killed process holds on to is nobody's loss
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def sweep(prefix: str) -> list[Path]:
    """Remove the folders whose owner is gone.

    Parameters
    ----------
    prefix
        Start of their names.

    Returns
    -------
    list of pathlib.Path
        What was removed. Folders without our lock, or of other users, are left alone.
    """
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        finally:
            os.close(lock)
    return removed
