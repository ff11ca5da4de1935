"""Who is at the other end of a unix socket.

Covers the kernel's answer (``SO_PEERCRED``, ``SO_PEERGROUPS``), names of accounts, and what ``site.toml`` lets them
do. Nothing that a client says about itself counts.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from controlplane.config import EVERYBODY, AccessConfig
from controlplane.errors import ConfigError

__all__ = ["Caller", "PeerCredentials", "account_of", "caller_of", "read_credentials"]

SO_PEERGROUPS = 59  # asm-generic/socket.h since Linux 4.13; Python's socket module does not have it
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_GROUPS_MAX_NBYTES = 1024  # what getsockopt of Python reads at most: 256 groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials:
    """What the kernel says of a connected process, at the time when it connected."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An account of this host, and what it may do here."""

    uid: int
    gid: int
    user: str
    groups: tuple[int, ...]
    is_allowed: bool
    is_operator: bool


def read_credentials(peer: socket.socket) -> PeerCredentials:
    """Ask the kernel who connected.

    Parameters
    ----------
    peer
        A connected unix socket.

    Returns
    -------
    PeerCredentials
        Its user and groups.
    """
    _pid, uid, gid = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        packed = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_MAX_NBYTES)
        groups = struct.unpack(f"{len(packed) // 4}I", packed)
    except OSError:  # more groups than fit: then what the accounts' data base says
        groups = tuple(os.getgrouplist(user_name(uid), gid))
    return PeerCredentials(uid=uid, gid=gid, groups=tuple(sorted({gid, *groups})))


def user_name(uid: int) -> str:
    """Name of an account, or ``uid-<number>`` if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"


def group_name(gid: int) -> str:
    """Name of a group, or ``gid-<number>`` if it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid-{gid}"


def caller_of(
    credentials: PeerCredentials,
    access: AccessConfig,
    *,
    own_uid: int,
    user_name: Callable[[int], str] = user_name,
    group_name: Callable[[int], str] = group_name,
) -> Caller:
    """Decide what a connected process may do.

    Parameters
    ----------
    credentials
        What the kernel says of it.
    access
        What the operator says.
    own_uid
        The account that this daemon runs as. It and root can end the daemon anyway, so they are operators.
    user_name
        Looks up an account's name.
    group_name
        Looks up a group's name.

    Returns
    -------
    Caller
        The account with its rights.
    """
    user = user_name(credentials.uid)
    groups = {group_name(gid) for gid in credentials.groups}
    is_operator = credentials.uid in {0, own_uid} or (bool(access.operators_group) and access.operators_group in groups)
    is_allowed = (
        is_operator or EVERYBODY in access.users or user in access.users or not groups.isdisjoint(access.groups)
    )
    return Caller(
        uid=credentials.uid,
        gid=credentials.gid,
        user=user,
        groups=credentials.groups,
        is_allowed=is_allowed,
        is_operator=is_operator,
    )


def account_of(name: str) -> PeerCredentials:
    """Look up the account that ``workers.user`` of ``site.toml`` names.

    Parameters
    ----------
    name
        The account.

    Returns
    -------
    PeerCredentials
        Its user and groups.

    Raises
    ------
    ConfigError
        If there is no such account.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            "site.toml", "workers.user", f"{name!r} is no account of this host; create it, or leave the key away"
        ) from None
    groups = tuple(sorted(set(os.getgrouplist(name, entry.pw_gid))))
    return PeerCredentials(uid=entry.pw_uid, gid=entry.pw_gid, groups=groups)
