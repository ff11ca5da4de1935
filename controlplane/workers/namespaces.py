"""Namespaces for units that are plain processes: what can be had here, and the command that makes them.

Covers mount namespaces (which folders a unit sees) and pid namespaces (that nothing of it survives its keeper), with
or without root. Does not cover networks: plain processes share this host's. ::

    this host             unshare ──► keeper (process 1 of the namespace) ──► dask worker, dask worker …
    kill -9 of unshare      ends the keeper (--kill-child), and the end of a process 1 ends all of its namespace
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["find_namespace", "submounts_of", "wrap"]

# The best first: with the privilege (root), as the user itself, as a mapped root (older tools).
_NAMESPACES: Sequence[Sequence[str]] = (
    ("unshare",),
    ("unshare", "--user", "--map-current-user", "--keep-caps"),
    ("unshare", "--user", "--map-root-user"),
)
_KINDS = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
PROBE_TIMEOUT_SECONDS = 10


def find_namespace(folder: Path) -> tuple[str, ...] | None:
    """Try which namespaces this host allows.

    Parameters
    ----------
    folder
        An existing folder to try a mount in; nobody else sees it.

    Returns
    -------
    tuple of str or None
        The beginning of a command, or None where there are none to be had.
    """
    mounts = shlex.join(["mount", "-t", "tmpfs", "-o", "size=4k", "probe", str(folder)])
    bind = f"{shlex.join(['mount', '--bind', '/etc', str(folder)])}; {_read_only(str(folder))}"
    for namespace in _NAMESPACES:
        if _succeeds([*namespace, *_KINDS, "sh", "-ec", f"{mounts}; {bind}"]):
            return (*namespace, *_KINDS)
    return None


def wrap(
    command: Sequence[str],
    *,
    namespace: Sequence[str] | None,
    views: Mapping[str, str],
    hidden: Sequence[str],
    user: tuple[int, int, tuple[int, ...]] | None,
) -> list[str]:
    """Wrap a command so that it runs in its own namespaces and as a certain user.

    Parameters
    ----------
    command
        What is to run.
    namespace
        What :func:`find_namespace` has found.
    views
        The folders that it sees read-only: path there, by path of this host.
    hidden
        Folders that are empty for it.
    user
        Its uid, gid and groups, if not those of this process.

    Returns
    -------
    list of str
        The command to start.
    """
    drop = (
        []
        if namespace is None or "--user" not in namespace
        else ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    )
    if user is not None:
        uid, gid, groups = user
        further = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        drop += ["--reuid", str(uid), "--regid", str(gid), *further, "--inh-caps=-all"]
    if namespace is None:
        return ["setpriv", "--no-new-privs", *drop, *command]
    # A change of the user would clear the signal that unshare's end sends.
    wrapped = ["setpriv", "--no-new-privs", *drop, "--pdeathsig", "keep", *command]
    lines = [
        f"{shlex.join(['mount', '--bind', source, target])}; {_read_only(target)}" for source, target in views.items()
    ]
    hide = ["mount", "-t", "tmpfs", "-o", "ro,size=4k,mode=0555", "hidden"]
    lines += [shlex.join([*hide, folder]) for folder in hidden if folder not in views.values()]
    return [*namespace, "sh", "-ec", "\n".join([*lines, 'exec "$@"']), "sh", *wrapped]


def submounts_of(folder: str) -> tuple[str, ...]:
    """List what is mounted below a folder: a mount of the folder itself shows it only if it is mounted, too.

    Parameters
    ----------
    folder
        Its path.

    Returns
    -------
    tuple of str
        Paths below it, with the slash that begins them, outer before inner.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = {line.split()[4].encode().decode("unicode_escape") for line in lines}  # blanks are written as \\040
    inside = folder.rstrip("/") + "/"
    return tuple(sorted(mount.removeprefix(inside[:-1]) for mount in mounts if mount.startswith(inside)))


def _read_only(folder: str) -> str:
    # Without root, flags that the mount had before must be named again, or the kernel refuses.
    plain = shlex.join(["mount", "-o", "remount,bind,ro", folder])
    careful = shlex.join(["mount", "-o", "remount,bind,ro,nosuid,nodev", folder])
    return f"{plain} 2>&- || {careful}"


def _succeeds(command: Sequence[str]) -> bool:
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=PROBE_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0
